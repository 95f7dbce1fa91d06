"""Noise of every scheme on every linear layer of a model, against fp32: ``python -m lowprec.bench.accuracy MODEL``.

One forward and backward pass in fp32 records each layer's inputs X and errors E on real text; then each scheme computes
the layer's output, input gradient and weight gradient from them (rounded to bf16, as the layers get them). The noise of
the output is taken per token, that of the gradients pooled over tokens, all in dB of signal over noise.
"""

import argparse
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowprec.bench.measure import BenchResult
from lowprec.layers.eight_bit_schemes import EightBit, Fp8, Fp8Hadamard, Int8Hadamard
from lowprec.layers.products import Product, WeightGradient

SCHEMES: dict[str, EightBit] = {
    "fp8": Fp8(),
    "fp8_hadamard": Fp8Hadamard(),
    "int8_hadamard": Int8Hadamard(),
    "int8, no rotation": Int8Hadamard(forward=Product(), input_gradient=Product(), weight_gradient=WeightGradient()),
}


def record(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, tuple[nn.Linear, torch.Tensor, torch.Tensor]]:
    """Layer name -> the layer, X ``[tokens, in]`` and E ``[tokens, out]``, for all linears but the output head."""
    seen: dict[str, list] = {}
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():

            def watch(module: nn.Module, args: tuple, output: torch.Tensor, name: str = name) -> None:
                seen[name] = [module, args[0].detach().flatten(0, -2)]
                output.register_hook(lambda error: seen[name].append(error.detach().flatten(0, -2)))

            hooks.append(layer.register_forward_hook(watch))
    model(input_ids=ids, labels=ids).loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: tuple(found) for name, found in seen.items()}


def noise(layer: nn.Linear, x: torch.Tensor, error: torch.Tensor) -> dict[str, dict[str, float]]:
    """Scheme -> median and 1st percentile over tokens of the output's SQNR, pooled SQNR of both gradients, in dB."""
    weight = layer.weight.detach().bfloat16()
    x, error = x.bfloat16(), error.bfloat16()
    wide_w, wide_x, wide_e = weight.float(), x.float(), error.float()
    exact = (wide_x @ wide_w.t(), wide_e @ wide_w, wide_e.t() @ wide_x)
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = nn.Parameter(weight)
    x.requires_grad_()
    found = {}
    for name, scheme in SCHEMES.items():
        y = scheme.convert(plain, False)(x)
        grad_x, grad_weight = torch.autograd.grad(y, [x, plain.weight], error)
        tokens = _db(exact[0], y.detach().float(), -1)
        tokens = tokens[tokens.isfinite()]
        found[name] = {
            "output median": tokens.median().item(),
            "output 1st percentile": tokens.quantile(0.01).item(),
            "input gradient": _db(exact[1], grad_x.float()).item(),
            "weight gradient": _db(exact[2], grad_weight.float()).item(),
        }
    return found


def run(model_path: Path, text: str, tokens: int = 1024) -> tuple[BenchResult, dict]:
    """The summary by scheme and kind of layer, and every single figure: scheme -> layer -> measure -> dB."""
    gguf = {"gguf_file": model_path.name} if model_path.suffix == ".gguf" else {}
    folder = model_path.parent if gguf else model_path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    ids = AutoTokenizer.from_pretrained(folder, **gguf)(text, return_tensors="pt").input_ids[:, :tokens]
    assert ids.shape[1] == tokens, f"the text has only {ids.shape[1]} tokens"
    layers = record(model, ids)
    by_layer = {layer: noise(*found) for layer, found in layers.items()}
    figures = {name: {layer: found[name] for layer, found in by_layer.items()} for name in SCHEMES}
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    rows = [_summary(scheme, kind, figures[scheme]) for scheme in figures for kind in (*kinds, "all")]
    note = f"{len(layers)} linear layers, {tokens} tokens; medians are over layers"
    return BenchResult("Signal to noise of 8-bit products, dB", rows, [note]), figures


def plot(figures: dict, path: Path) -> None:
    """One panel a measure: every layer in the order of the model, one line a scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measures = list(next(iter(next(iter(figures.values())).values())))
    canvas, axes = pyplot.subplots(len(measures), 1, figsize=(11, 12), sharex=True)
    for axis, measure in zip(axes, measures, strict=True):
        for scheme, layers in figures.items():
            axis.plot([found[measure] for found in layers.values()], label=scheme, linewidth=1)
        axis.set_ylabel("dB")
        axis.set_title(measure, fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8, ncol=4)
    axes[-1].set_xlabel("linear layers in the order of the model (7 a block)")
    canvas.tight_layout()
    canvas.savefig(path, dpi=110)


def _summary(scheme: str, kind: str, layers: dict[str, dict[str, float]]) -> dict:
    mine = [found for name, found in layers.items() if kind in ("all", name.rsplit(".", 1)[-1])]

    def over(measure: str) -> tuple[float, float]:
        values = torch.tensor([found[measure] for found in mine])
        return round(values.min().item(), 1), round(values.median().item(), 1)

    (worst_median, median), (worst_percentile, _) = over("output median"), over("output 1st percentile")
    (worst_x, median_x), (worst_w, median_w) = over("input gradient"), over("weight gradient")
    return {
        "scheme": scheme,
        "layers": kind,
        "output: median": median,
        "worst layer's median": worst_median,
        "worst 1st percentile": worst_percentile,
        "input gradient: worst": worst_x,
        "input gradient: median": median_x,
        "weight gradient: worst": worst_w,
        "weight gradient: median": median_w,
    }


def _db(exact: torch.Tensor, found: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    return 10 * torch.log10(exact.square().sum(dim) / (exact - found).square().sum(dim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--text", type=Path, help="a text file; the standard library's docstrings otherwise")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for accuracy.json and accuracy.png")
    arguments = parser.parse_args()
    if arguments.text is None:
        from lowprec.data.python_docs import python_docs

        pairs = islice(python_docs(), 400)
        text = "\n\n".join("\n".join(map(str, (pair.fields or {}).values())) for pair in pairs)
    else:
        text = arguments.text.read_text(encoding="utf-8")
    result, figures = run(arguments.model, text, arguments.tokens)
    Console().print(result)
    result.write_json(arguments.out / "accuracy.json")
    plot(figures, arguments.out / "accuracy.png")


if __name__ == "__main__":
    main()
