"""Every kernel of ``lowprec_kernels`` against its reference, as the ops and the optimizer call it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from lowprec_kernels.quantize_rows import reference as casts
from lowprec_kernels.quantize_rows.reference import FP8
from torch import Tensor, nn

from lowprec.doctor.check import Check, attempt
from lowprec.doctor.numerics import SIZE, judged, random_pair
from lowprec.ops.backends import Backend
from lowprec.ops.scaled_grouped_matmul import no_grouped_product
from lowprec.ops.scaled_matmul import fuses

GROUP = "lowprec's kernels"
LEAST_DB = 25.0
"""Between a kernel and its reference lie roundings of bf16 (45 dB) and fp8 codes that are off by one (25 to 30)."""


class Trial(NamedTuple):
    """One way to call an op."""

    name: str
    backends: Sequence[Backend]
    """Its kernels, then the reference."""
    arguments: Callable[[], tuple]
    """Fresh ones for each call: some ops write into them."""
    without: tuple[str, ...] = ()
    """Backends that are not made for these arguments."""


def check_kernels() -> Iterator[Check]:
    """On the first GPU. Where there is none, one 'no' speaks for all, and what runs on a processor is tried."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        reason, remedy = "they run on GPUs, and there is none", "The same operations run as plain PyTorch meanwhile."
        yield Check(group=GROUP, name="Triton kernels", ok=False, reason=reason, remedy=remedy)
    for trial in trials(device):
        for backend in trial.backends[:-1]:
            is_triton = backend.name.startswith("triton")
            if (is_triton and device.type == "cpu") or backend.name in trial.without:
                continue
            name = trial.name if backend.name == "triton" else f"{trial.name}, {backend.name.removeprefix('triton, ')}"
            remedy = "Nothing is lost but speed: the next of its backends runs instead."
            yield attempt(GROUP, name, partial(_against_reference, trial, backend), remedy=remedy)
    if device.type == "cuda":
        for states in ("fp32", "int8"):
            remedy = "Set state_store=cpu, or model.dtype=fp32 with optimizer.state_dtype=fp32: both need no kernel."
            yield attempt(GROUP, f"AdamW, {states} states", partial(_adamw, device, states), remedy=remedy)
        remedy = "Set train.max_grad_norm=1.0: then nothing is updated in backward, which alone needs this kernel."
        yield attempt(GROUP, "gradient norm", partial(_gradient_norm, device), remedy=remedy)


def trials(device: torch.device) -> Iterator[Trial]:
    """Every op with a kernel, in each of its formats."""
    x, y = (t.bfloat16() for t in random_pair(device))
    yield Trial("rotation", _backends("rotate"), lambda: (x, 64, -1))
    for dtype, kind in ((FP8, "fp8"), (torch.int8, "int8")):
        (a, scale_a), (b, scale_b) = (casts.quantize_rows(t, 1, dtype) for t in (x, y))
        scale = casts.quantize_columns(x, 64, dtype)[1]
        known = (a, scale_a, 1, 64, scale)
        yield Trial(f"{kind} cast by rows", _backends("quantize_rows"), partial(tuple, (x, 64, dtype, False, None)))
        yield Trial(f"{kind} cast by columns", _backends("quantize_columns"), partial(tuple, (x, 64, dtype)))
        again = _backends("quantize_columns", "REQUANTIZE_BACKENDS")
        yield Trial(f"{kind} cast by columns, again", again, partial(tuple, known))
        yield Trial(f"{kind} transposition", _backends("transpose_codes"), partial(tuple, (a, None)))
        if kind == "fp8":
            yield Trial(f"{kind} scales along a sum", _backends("fold_scales"), partial(tuple, (scale_a, scale_b, 3)))
        product = (a, scale_a, b, scale_b, None, torch.bfloat16, True)
        without = ("torch._scaled_mm",) if kind == "int8" or device.type == "cpu" else ()
        yield Trial(f"{kind} product", _backends("scaled_matmul"), partial(tuple, product), without)
        low, up = x[:, :16].contiguous(), y[:, :16].float()  # as many rows as the operands
        adapted = (*product, low, up)
        if fuses(16, low.dtype, device):
            yield Trial(f"{kind} product with an adapter", _backends("scaled_matmul"), partial(tuple, adapted), without)
        if kind == "fp8":
            without = ("torch._scaled_grouped_mm",) if no_grouped_product(device) else ()
            ends = torch.tensor([SIZE // 4, SIZE // 4, SIZE], dtype=torch.int32, device=device)
            experts = (a, scale_a, b.expand(3, -1, -1).contiguous(), scale_b.repeat(3, 1), ends, torch.bfloat16, True)
            yield Trial("fp8 grouped product", _backends("scaled_grouped_matmul"), partial(tuple, experts), without)
    for kind in ("SwiGLU", "GeGLU"):
        gated = (x, y, kind)
        yield Trial(f"{kind}, cast to fp8", _backends("quantize_gated"), partial(tuple, gated))
        gradients, errors = _backends("quantize_gated", "GRADIENT_BACKENDS"), (y, *gated, None)
        yield Trial(f"{kind} gradients, cast to fp8", gradients, partial(tuple, errors))
    norm = (y, x, x[0].contiguous(), torch.rand(SIZE, device=device) + 0.5, 1.0, True)
    yield Trial("RMSNorm's gradients", _backends("rms_norm"), partial(tuple, norm))
    packed = _packed(x)
    yield Trial("NF4 decoding", _backends("decode_nf4"), lambda: (packed, SIZE, torch.empty_like(x), None, 1, 1, False))
    targets = torch.arange(SIZE, device=device)
    table = y.cpu().pin_memory() if device.type == "cuda" else y
    yield Trial("rows of a table on the host", _backends("gather_host_rows"), lambda: (targets.flip(0), table))
    losses = _backends("cross_entropy")
    yield Trial("cross-entropy", losses, lambda: (x.clone(), targets, 1.0, 0.0, True))


def _backends(op: str, name: str = "BACKENDS") -> Sequence[Backend]:
    return getattr(import_module(f"lowprec.ops.{op}"), name)


def _packed(weight: Tensor) -> Any:
    from bitsandbytes import functional
    from lowprec_kernels.nf4.reference import Packed

    data, state = functional.quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=False)
    return Packed(data.reshape(-1), state.code, state.absmax, state.blocksize)


def _against_reference(trial: Trial, backend: Backend) -> str:
    arguments, expected = trial.arguments(), trial.arguments()
    reason = backend.why_not(*arguments)
    if reason is not None:
        raise RuntimeError(reason)
    found = _tensors((backend.run(*arguments), arguments))
    wanted = _tensors((trial.backends[-1].run(*expected), expected))
    levels = [judged(b.float(), a.float(), LEAST_DB) for a, b in zip(found, wanted, strict=True)]
    return "the same bits" if set(levels) == {"inf dB"} else min(levels, key=lambda text: float(text.split()[0]))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples: what an op returned, and what it may have written into."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, tuple) else []


def _adamw(device: torch.device, states: str) -> str:
    """Three steps of bf16 weights on the GPU and on the processor, from the same start."""
    from lowprec.optim import AdamW

    start, gradient = (t.bfloat16().cpu() for t in random_pair(device))
    moved = []
    for place in (torch.device("cpu"), device):
        weight = nn.Parameter(start.clone().to(place))
        optimizer = AdamW([("weight", weight)], lr=1e-2, state_dtype=states)
        for _ in range(3):
            weight.grad = gradient.clone().to(place)
            optimizer.step()
        optimizer.close()
        moved.append(weight.detach().cpu().float() - start.float())
    return f"{judged(moved[0], moved[1], LEAST_DB)} from the reference"


def _gradient_norm(device: torch.device) -> str:
    """Of finite numbers, and the flag of an infinite one."""
    from lowprec_kernels.gradient_norm import reference, triton_kernel

    x = random_pair(device)[0].bfloat16()
    scratch = triton_kernel.make_scratch(device)
    found, expected = torch.zeros(2, device=device), torch.zeros(2, device=device)
    triton_kernel.norm_(x, found[0], found[1], scratch)
    reference.norm_(x, expected[0], expected[1])
    level = judged(expected, found, LEAST_DB)
    x[0, 0] = float("inf")
    triton_kernel.norm_(x, found[0], found[1], scratch)
    if not found[1]:
        raise RuntimeError("an infinite gradient raised no flag")
    return f"{level} from the reference"
