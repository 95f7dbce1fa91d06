"""The products: each number format, and each weight scheme as training would use it, against fp32."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lowprec.doctor.check import Check, attempt
from lowprec.layers.base import WeightScheme
from lowprec.model import has_bf16
from lowprec.option import option_names
from lowprec.prepare import as_scheme
from lowprec.testing import sqnr_db

SIZE = 256
FP8_MAX = 448.0
MIN_SQNR_DB = 15
"""The coarsest format here, NF4, gives about 19 dB on normal values; a wrong kernel gives about 0."""


def check_numerics() -> Iterator[Check]:
    """On the first GPU where there is one, else on the processor."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    group = f"products on {'the GPU' if device.type == 'cuda' else 'the processor'}"
    newer = "It needs a newer GPU; the other formats serve meanwhile."
    remedy = "Set model.dtype=fp16 (GPU) or fp32 (processor)."
    on_gpu = device.type == "cuda"  # where the shipped recipes compute in bf16; on a processor they may choose
    yield attempt(group, "bf16", partial(_bf16, device), remedy=remedy, required=on_gpu)
    for name, product in (("fp8, a scale a tensor", _fp8_tensor), ("fp8, a scale a row", _fp8_row)):
        yield attempt(group, name, partial(_against_fp32, device, product), remedy=newer)
    yield attempt(group, "int8", partial(_int8, device), remedy=newer)
    yield attempt(group, "Triton", partial(_triton, device), remedy="On a GPU it needs a C compiler (gcc).")
    for name in option_names("weights"):
        if name != "auto":  # it chooses among the others
            yield _scheme(group, name, device)


def _bf16(device: torch.device) -> str:
    found = _against_fp32(device, lambda x, w: x.bfloat16() @ w.bfloat16().T)
    if not has_bf16(device):
        raise RuntimeError(f"it is emulated here, correctly ({found}) and slowly")
    return found


def _against_fp32(device: torch.device, product: Callable[[Tensor, Tensor], Tensor]) -> str:
    x, w = random_pair(device)
    return judged(x.double() @ w.double().T, product(x, w))


def random_pair(device: torch.device) -> tuple[Tensor, Tensor]:
    """Two fp32 matrices ``[SIZE, SIZE]`` of normal numbers, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, SIZE, SIZE, generator=generator).to(device).unbind())  # type: ignore[return-value]


def judged(reference: Tensor, value: Tensor, least_db: float = MIN_SQNR_DB) -> str:
    """The signal to noise of ``value`` as text. Raises RuntimeError where it is below ``least_db``."""
    noise = sqnr_db(reference, value)
    if noise < least_db:
        raise RuntimeError(f"it runs and is wrong: {noise:.1f} dB from the reference")
    return f"{noise:.0f} dB"


def _fp8_tensor(x: Tensor, w: Tensor) -> Tensor:
    return _fp8(x, w, x.abs().amax() / FP8_MAX, w.abs().amax() / FP8_MAX)


def _fp8_row(x: Tensor, w: Tensor) -> Tensor:
    return _fp8(x, w, x.abs().amax(1, keepdim=True) / FP8_MAX, w.abs().amax(1, keepdim=True) / FP8_MAX)


def _fp8(x: Tensor, w: Tensor, scale_x: Tensor, scale_w: Tensor) -> Tensor:
    x8, w8 = (x / scale_x).to(torch.float8_e4m3fn), (w / scale_w).to(torch.float8_e4m3fn)
    scale_w = scale_w.T.contiguous() if scale_w.dim() else scale_w
    return torch._scaled_mm(x8, w8.T, scale_a=scale_x, scale_b=scale_w, out_dtype=torch.bfloat16)


def _int8(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-127, 128, (SIZE, SIZE), generator=generator, dtype=torch.int8) for _ in range(2))
    result = torch._int_mm(x.to(device), w.to(device).T).cpu()
    if not torch.equal(result, x.int() @ w.int().T):
        raise RuntimeError("it runs and is wrong: the int32 sums differ")
    return "exact"


def _triton(device: torch.device) -> str:
    if device.type != "cuda":
        raise RuntimeError("Triton compiles for GPUs; on the processor the same operations run as plain PyTorch")
    from lowprec.doctor.triton_probe import add_one

    began = time.perf_counter()
    if not torch.equal(add_one(torch.arange(100, device=device)), torch.arange(1, 101, device=device)):
        raise RuntimeError("a compiled kernel gives wrong values")
    return f"a kernel compiled and ran in {time.perf_counter() - began:.1f} s"


def _scheme(group: str, name: str, device: torch.device) -> Check:
    """Convert a frozen layer as training would, multiply forward and backward, and compare."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=torch.bfloat16)
    linear.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=generator).to(linear.weight), requires_grad=False)
    scheme, title = as_scheme(name), f"weights={name}"
    required = name in ("bf16", "nf4")
    reason = scheme.why_not(linear, True)
    if reason is not None:
        remedy = "Choose another of the group weights."
        return Check(group=group, name=title, ok=False, reason=reason, remedy=remedy, required=required)
    remedy = "Look at the versions above, and run it again with --debug."
    return attempt(group, title, partial(_product_of, scheme, linear), remedy=remedy, required=required)


def _product_of(scheme: WeightScheme, linear: nn.Linear) -> str:
    weight = linear.weight.detach().double()
    layer = scheme.convert(linear, True)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SIZE, SIZE, generator=generator).to(weight.device, torch.bfloat16).requires_grad_()
    y = layer(x)
    y.backward(x.detach())
    forward = judged(x.detach().double() @ weight.T, y)
    assert x.grad is not None
    backward = judged(x.detach().double() @ weight, x.grad)
    return f"{scheme.kernel(layer)}; forward {forward}, input gradient {backward}"
