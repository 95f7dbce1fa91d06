"""``lowprec bench linear``: one layer, forward and gradients, in every scheme, beside bf16 and (``--peers``) torchao.

``eager`` is the time of a call as a training loop makes it, the host's part included; ``graph`` that of the kernels
alone, replayed as a CUDA graph. bf16 and torchao are compiled. ``bound`` is the share of the physical bound: the
products at the 8-bit datasheet rate of the card.
"""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from lowprec_kernels.scaled_matmul.cases import LAYERS
from torch import nn

from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.nf4 import NF4, PRODUCTS
from lowprec.machine.timing import graph_milliseconds, milliseconds
from lowprec.prepare import as_scheme

PEERS = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
SIXTEEN_BITS = ("bf16", "nf4, bf16", "nf4, bitsandbytes")
PEAK_TFLOPS = {"H100": (989, 1979), "H200": (989, 1979), "4090": (165, 330), "A100": (312, 624)}
"""Dense 16-bit and 8-bit rates of datasheets."""


def run(tokens: int = 8192, peers: bool = False, layers: tuple[tuple[int, int], ...] = LAYERS) -> BenchResult:
    """Forward and both gradients of trained layers, forward and input gradient of frozen ones."""
    need_gpu("linear")
    rows = []
    for out_features, in_features in layers:
        for frozen in (False, True):
            rows += _layer(out_features, in_features, tokens, frozen, peers and not frozen)
    return BenchResult(
        f"One linear layer at {tokens} tokens, ms",
        rows,
        ["x bf16: speed against the bf16 layer of the same row group, by the graph times, and by the eager ones"],
    )


def break_even(token_counts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)) -> BenchResult:
    """From how many tokens on each shape pays: bf16's time over that of the scheme, trained, by graph times."""
    need_gpu("linear")
    rows = []
    for out_features, in_features in ((2048, 2048), (8192, 2048), (2048, 8192), *LAYERS):
        for scheme in ("fp8", "int8_hadamard"):
            row: dict = {"layer": f"{out_features} x {in_features}", "scheme": scheme}
            for tokens in token_counts:
                plain, x, error = _operands(out_features, in_features, tokens, False)
                converted = as_scheme(scheme).convert(copy.deepcopy(plain), False)
                times = [graph_milliseconds(_step(layer, x, error, False), 12) for layer in (plain, converted)]
                row[str(tokens)] = times[0] / times[1]
            rows.append(row)
    return BenchResult("Trained layer, speed against bf16 by tokens", rows)


def _layer(out_features: int, in_features: int, tokens: int, frozen: bool, peers: bool) -> list[dict]:
    plain, x, error = _operands(out_features, in_features, tokens, frozen)
    candidates: dict[str, Any] = {"bf16": torch.compile(copy.deepcopy(plain))}
    for name, scheme in _schemes(frozen).items():
        candidates[name] = scheme.convert(copy.deepcopy(plain), frozen)
    if frozen:
        for product in PRODUCTS:
            candidates[f"nf4, {product}"] = NF4(product=product).convert(copy.deepcopy(plain), True)
        candidates["nf4, bitsandbytes"] = _bitsandbytes(plain)
    if peers:
        candidates |= {f"torchao {recipe}": _torchao(copy.deepcopy(plain), recipe) for recipe in PEERS}
    flops = 2 * tokens * out_features * in_features * (2 if frozen else 3)
    rows: list[dict] = []
    for name, layer in candidates.items():
        step = _step(layer, x, error, frozen)
        row: dict = {
            "layer": f"{out_features} x {in_features}",
            "weight": "frozen" if frozen else "trained",
            "scheme": name,
            "eager": milliseconds(step),
            "graph": graph_milliseconds(step),
        }
        first = rows[0] if rows else row
        row["x bf16, graph"] = first["graph"] / row["graph"]
        row["x bf16, eager"] = first["eager"] / row["eager"]
        row["bound"] = flops / _peak(name not in SIXTEEN_BITS) / 1e9 / row["graph"]
        rows.append(row)
    return rows


def _schemes(frozen: bool) -> dict[str, EightBit]:
    if frozen:
        both = {
            f"{scheme.option_name}, {layout}": scheme(layout=layout)
            for scheme in (Fp8, Int8Hadamard)
            for layout in ("one", "both")
        }
        return both | {"fp8_hadamard, one": Fp8Hadamard()}
    schemes: dict[str, EightBit] = {s.option_name: s() for s in (Fp8, Fp8Hadamard, Int8Hadamard)}
    return schemes | {f"{s.option_name}, weight cached": s(cache="both") for s in (Fp8, Int8Hadamard)}


def _operands(out_features: int, in_features: int, tokens: int, frozen: bool):
    with torch.device("cuda"):
        plain = nn.Linear(in_features, out_features, bias=False).bfloat16().requires_grad_(not frozen)
        x, error = torch.randn(tokens, in_features).bfloat16(), torch.randn(tokens, out_features).bfloat16()
    return plain, x.requires_grad_(), error


def _step(layer: nn.Module, x: torch.Tensor, error: torch.Tensor, frozen: bool):
    wanted = [x, *([] if frozen else [p for p in layer.parameters() if p.requires_grad])]
    return lambda: torch.autograd.grad(layer(x), wanted, error)


def _bitsandbytes(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, False, torch.bfloat16, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.cuda()


def _torchao(linear: nn.Linear, recipe: str) -> Any:
    from lowprec.errors import UserError

    if find_spec("torchao") is None:
        raise UserError("--peers needs torchao: pip install torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    return torch.compile(convert_to_float8_training(nn.Sequential(linear), config=config))


def _peak(eight_bit: bool) -> float:
    name = torch.cuda.get_device_name()
    return next((rates[eight_bit] for card, rates in PEAK_TFLOPS.items() if card in name), float("nan"))
