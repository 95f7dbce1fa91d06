"""``lowprec bench linear``: one layer, forward and gradients, in every scheme, beside bf16 and (``--peers``) torchao.

``eager`` is the time of a call as a training loop makes it, the host's part included; ``graph`` that of the kernels
alone, replayed as a CUDA graph. bf16 and torchao are compiled. ``products`` is the time of the layer's products alone,
replayed in the same run on operands that are ready. ``bound`` is the share of the physical bound: the products at the
8-bit datasheet rate of the card.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from lowprec_kernels.scaled_matmul.cases import LAYERS, products
from torch import nn

from lowprec import ops
from lowprec.bench.measure import BenchResult, need_gpu, peak_tflops
from lowprec.layers.eight_bit import TrainedOperands, transposed_weight, weight_codes
from lowprec.layers.eight_bit_functions import trained_product
from lowprec.layers.eight_bit_linear import TrainedEightBitLinear
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.nf4 import NF4, PRODUCTS
from lowprec.machine.timing import graph_milliseconds, milliseconds
from lowprec.prepare import as_scheme

PEERS = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
SIXTEEN_BITS = ("bf16", "nf4, bf16", "nf4, bitsandbytes")
EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
SMALL_LAYERS = ((2048, 2048), (8192, 2048), (2048, 8192))
"""(out, in) of Llama-3.2-1B's larger linear layers."""


def run(tokens: int = 8192, peers: bool = False, layers: tuple[tuple[int, int], ...] = LAYERS) -> BenchResult:
    """Forward and both gradients of trained layers, forward and input gradient of frozen ones."""
    need_gpu("linear")
    rows = []
    for out_features, in_features in layers:
        for frozen in (False, True):
            rows += _layer(out_features, in_features, tokens, frozen, peers and not frozen)
    notes = [
        "x bf16: speed against the bf16 layer of the same row group, by the graph times, and by the eager ones",
        *(["x torchao: against its fastest recipe of the same row group, by the graph times"] if peers else []),
    ]
    return BenchResult(f"One linear layer at {tokens} tokens, ms", rows, notes)


def break_even(
    token_counts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192),
    layers: tuple[tuple[int, int], ...] = (*SMALL_LAYERS, *LAYERS),
) -> BenchResult:
    """From how many tokens on each shape pays: bf16's time over that of the scheme, by graph times."""
    need_gpu("linear")
    rows = []
    for out_features, in_features in layers:
        for frozen in (False, True):
            speeds: dict[str, dict[int, float]] = {"fp8": {}, "int8_hadamard": {}}
            for tokens in token_counts:
                plain, x, error = _operands(out_features, in_features, tokens, frozen)
                ms = graph_milliseconds(_step(plain, x, error, frozen), 12)
                for scheme, found in speeds.items():
                    converted = as_scheme(scheme).convert(copy.deepcopy(plain), frozen)
                    found[tokens] = ms / graph_milliseconds(_step(converted, x, error, frozen), 12)
            label = {"layer": f"{out_features} x {in_features}", "weight": "frozen" if frozen else "trained"}
            for scheme, found in speeds.items():
                row = label | {"scheme": scheme, "pays from": _pays_from(found)}
                rows.append(row | {str(tokens): speed for tokens, speed in found.items()})
    return BenchResult(
        "Speed of a layer against bf16 by tokens", rows, ["by the graph times; casts of weights included"]
    )


def _pays_from(speeds: dict[int, float]) -> int | str:
    """The least number of tokens from which on every measured one is faster than bf16."""
    slower = [tokens for tokens, speed in speeds.items() if speed <= 1]
    faster = [tokens for tokens in speeds if not slower or tokens > max(slower)]
    return min(faster, default="nowhere")


def _layer(out_features: int, in_features: int, tokens: int, frozen: bool, peers: bool) -> list[dict]:
    torch.compiler.reset()  # or the ninth layer that is compiled runs uncompiled (Dynamo's recompile_limit)
    plain, x, error = _operands(out_features, in_features, tokens, frozen)
    steps: dict[str, Callable[[], object]] = {}
    for name, layer in _candidates(plain, frozen, peers).items():
        steps[name] = _step(layer, x, error, frozen)
        if isinstance(layer, TrainedEightBitLinear):
            steps[f"{name}, weight cast before"] = _step_on_codes(layer, x, error)
    alone = {kind: _products_ms(tokens, out_features, in_features, frozen, kind) for kind in ("bf16", *EIGHT_BITS)}
    flops = 2 * tokens * out_features * in_features * (2 if frozen else 3)
    rows: list[dict] = []
    for name, step in steps.items():
        kind = next((kind for kind in alone if name.startswith(kind)), None)
        row: dict = {
            "layer": f"{out_features} x {in_features}",
            "weight": "frozen" if frozen else "trained",
            "scheme": name,
            "eager": milliseconds(step),
            "graph": graph_milliseconds(step),
            "products": alone[kind] if kind else None,
        }
        first = rows[0] if rows else row
        row["x bf16, graph"] = first["graph"] / row["graph"]
        row["x bf16, eager"] = first["eager"] / row["eager"]
        row["bound"] = flops / peak_tflops(name not in SIXTEEN_BITS) / 1e9 / row["graph"]
        rows.append(row)
    fastest = min((row["graph"] for row in rows if row["scheme"].startswith("torchao")), default=None)
    for row in rows if fastest is not None else ():
        row["x torchao"] = fastest / row["graph"]
    return rows


def _candidates(plain: nn.Linear, frozen: bool, peers: bool) -> dict[str, Any]:
    """Name -> a layer in place of ``plain``, bf16 first."""
    found: dict[str, Any] = {"bf16": torch.compile(copy.deepcopy(plain))}
    for name, scheme in _schemes(frozen).items():
        found[name] = scheme.convert(copy.deepcopy(plain), frozen)
    if frozen:
        for product in PRODUCTS:
            found[f"nf4, {product}"] = NF4(product=product).convert(copy.deepcopy(plain), True)
        found["nf4, bitsandbytes"] = _bitsandbytes(plain)
    if peers:
        found |= {f"torchao {recipe}": _torchao(copy.deepcopy(plain), recipe) for recipe in PEERS}
    return found


def _products_ms(tokens: int, out_features: int, in_features: int, frozen: bool, kind: str) -> float:
    """ms of the two or three products of a layer one after the other, by the kernels that the layers use."""
    cases = list(products(tokens, out_features, in_features).values())[: 2 if frozen else 3]
    calls: list[Callable[[], object]] = []
    for case in cases:
        a, b = (torch.randn(rows, case.k, device="cuda", dtype=torch.bfloat16) for rows in (case.m, case.n))
        if kind == "bf16":
            calls.append(partial(torch.mm, a, b.t()))
            continue
        operands = (*ops.quantize_rows(a, 1, EIGHT_BITS[kind]), *ops.quantize_rows(b, 1, EIGHT_BITS[kind]))
        calls.append(partial(ops.scaled_matmul, *operands, None, torch.bfloat16, case is cases[0]))
    return graph_milliseconds(lambda: [call() for call in calls])


def _schemes(frozen: bool) -> dict[str, EightBit]:
    if frozen:
        both = {
            f"{scheme.option_name}, {layout}": scheme(layout=layout)
            for scheme in (Fp8, Int8Hadamard)
            for layout in ("one", "both")
        }
        return both | {"fp8_hadamard, one": Fp8Hadamard()}
    return {scheme.option_name: scheme() for scheme in (Fp8, Fp8Hadamard, Int8Hadamard)}


def _operands(out_features: int, in_features: int, tokens: int, frozen: bool):
    with torch.device("cuda"):
        plain = nn.Linear(in_features, out_features, bias=False).bfloat16().requires_grad_(not frozen)
        x, error = torch.randn(tokens, in_features).bfloat16(), torch.randn(tokens, out_features).bfloat16()
    return plain, x.requires_grad_(), error


def _step(layer: nn.Module, x: torch.Tensor, error: torch.Tensor, frozen: bool) -> Callable[[], object]:
    wanted = [x, *([] if frozen else [p for p in layer.parameters() if p.requires_grad])]
    return lambda: torch.autograd.grad(layer(x), wanted, error)


def _step_on_codes(layer: TrainedEightBitLinear, x: torch.Tensor, error: torch.Tensor) -> Callable[[], object]:
    """The step of a trained layer whose weight was quantised before, in both layouts."""
    weight = layer.weight.detach()
    forward = weight_codes(weight, layer.plan)
    operands = TrainedOperands(forward, transposed_weight(weight, forward, layer.plan))

    def step() -> object:
        y = trained_product(x, layer.weight, layer.bias, operands, layer.plan)
        return torch.autograd.grad(y, [x, layer.weight], error)

    return step


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
