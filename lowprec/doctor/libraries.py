"""Libraries that have kernels of their own, each tried against plain PyTorch."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lowprec.doctor.check import Check, attempt
from lowprec.doctor.numerics import judged, random_pair

GROUP = "libraries"
COMPILE_LIMIT_S = 180
_COMPILE = """
import sys, torch
device = sys.argv[1]
def f(x, w):
    return torch.nn.functional.silu(x @ w).sum(-1)
x, w = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0)).to(device).unbind()
torch.testing.assert_close(torch.compile(f)(x, w), f(x, w), rtol=1e-3, atol=1e-3)
"""


def check_libraries(quick: bool) -> Iterator[Check]:
    """bitsandbytes, Liger, flash-attn, torch.compile; on the first GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bnb = "pip install --force-reinstall bitsandbytes, and look at python -m bitsandbytes."
    yield attempt(GROUP, "bitsandbytes, 4 bits", partial(_four_bits, device), remedy=bnb, required=True)
    other = "optimizer=adamw with optimizer.state_dtype=int8 keeps 8-bit states without it."
    yield attempt(GROUP, "bitsandbytes, 8-bit AdamW", partial(_adamw_8bit, device), remedy=other)
    yield attempt(GROUP, "Liger kernels", partial(_liger, device), remedy="pip install 'lowprec[cuda]', on a GPU.")
    own = "PyTorch's own attention serves instead; nothing is lost but, in some shapes, speed."
    yield attempt(GROUP, "flash-attn", partial(_flash, device), remedy=own)
    if not quick:
        remedy = "It needs a C compiler (gcc, g++) and Python's headers. lowprec trains without it."
        yield attempt(GROUP, "torch.compile", partial(_compile, device), remedy=remedy)


def _four_bits(device: torch.device) -> str:
    from bitsandbytes import functional

    x, _ = random_pair(device)
    codes, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    if codes.numel() * 2 != x.numel():
        raise RuntimeError(f"{x.numel()} numbers became {codes.numel()} bytes")
    return f"there and back: {judged(x, functional.dequantize_4bit(codes, state))}"


def _adamw_8bit(device: torch.device) -> str:
    """Three steps of it beside PyTorch's, on the same gradients; its states have to be 8-bit ones."""
    import bitsandbytes

    start, gradient = random_pair(device)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [
        torch.optim.AdamW(weights[:1], lr=1e-2),
        bitsandbytes.optim.AdamW8bit(weights[1:], lr=1e-2, weight_decay=1e-2),
    ]
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for _ in range(3):
            weight.grad = gradient.clone()
            optimizer.step()
    state = optimizers[1].state[weights[1]]
    if not any(isinstance(value, Tensor) and value.dtype == torch.uint8 for value in state.values()):
        raise RuntimeError("it runs, and its states are not 8-bit")
    return f"three steps: {judged(weights[0].detach() - start, weights[1].detach() - start)} from PyTorch's"


def _liger(device: torch.device) -> str:
    if device.type != "cuda":
        raise RuntimeError("they are Triton kernels, and there is no GPU")
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    x, w = random_pair(device)
    return judged(nn.functional.silu(x.double()) * w.double(), LigerSiLUMulFunction.apply(x, w))


def _flash(device: torch.device) -> str:
    from flash_attn import flash_attn_func

    q, k, v = torch.randn(3, 1, 64, 4, 64, device=device, dtype=torch.bfloat16).unbind()
    wide_q, wide_k, wide_v = (x.transpose(1, 2).double() for x in (q, k, v))
    reference = nn.functional.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=True)
    return judged(reference.transpose(1, 2), flash_attn_func(q, k, v, causal=True))


def _compile(device: torch.device) -> str:
    """In a process of its own, with a limit: a compiler can hang."""
    command = [sys.executable, "-c", _COMPILE, device.type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"a small function was not compiled in {COMPILE_LIMIT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(next((line for line in reversed(lines) if "Error" in line), "it ended without a word"))
    return "a small function compiles and is right"
