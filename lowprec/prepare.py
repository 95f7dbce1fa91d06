"""The only model surgery: choose a scheme for each linear layer, put the converted layer in its place, report it."""

import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from torch import nn
from transformers.pytorch_utils import Conv1D

import lowprec.layers  # noqa: F401  # registers the schemes
from lowprec.errors import UserError
from lowprec.fused.surgery import fuse
from lowprec.layers import fused_experts
from lowprec.layers.base import WeightScheme
from lowprec.layers.eight_bit_linear import FrozenEightBitLinear
from lowprec.layers.report import BF16, LinearRow, WrapReport
from lowprec.option import option_names

LEFT_ALONE = {
    "lm_head": "output head",
    "score": "classification head",
    "classifier": "classification head",
    "qa_outputs": "classification head",
    "gate": "router",
    "router": "router",
    "shared_expert_gate": "router",
}
"""Last part of a module's name -> what it is. These stay 16-bit unless a rule names them: they are small or read the
loss directly, and their noise is not averaged away."""


NO_ADAPTER = (
    "Fused experts in 8 bits take no adapter of their own: PEFT's all-linear then adapts the other layers alone, also "
    "routers. A rule such as *.experts:bf16 leaves experts as they are."
)


@dataclass(kw_only=True, slots=True)
class Wrap:
    """The recipe's group ``wrap``: what ``wrap`` is told beside ``weights``."""

    rules: list[str] = field(default_factory=list)
    """``pattern:scheme``, such as ``*.o_proj:bf16``; the first whose pattern matches the whole module path decides."""
    calibration_samples: int = 0
    """Samples of the data on which schemes that choose by measurement (``auto``) judge their noise, in one pass of the
    16-bit model on the device, which has to hold it. 0 takes normal numbers, which flatter every scheme."""

    def __post_init__(self) -> None:
        for rule in self.rules:
            if ":" not in rule:
                raise UserError(f"wrap.rules: '{rule}' names no scheme; write pattern:scheme, such as *.o_proj:bf16.")
            as_scheme(rule.rpartition(":")[2])
        if self.calibration_samples < 0:
            raise UserError(f"wrap.calibration_samples={self.calibration_samples} must be 0 or more.")

    def schemes(self, weights: "WeightScheme") -> "dict[str, WeightScheme]":
        """The rules for ``wrap``; one that names the recipe's own scheme means it with the recipe's fields."""
        found: dict[str, WeightScheme] = {}
        for rule in self.rules:
            pattern, _, name = rule.rpartition(":")
            found.setdefault(pattern, weights if name == weights.option_name else as_scheme(name))
        return found


def wrap(
    model: nn.Module,
    weights: "str | WeightScheme" = "auto",
    *,
    frozen: bool | None = None,
    rules: Mapping[str, "str | WeightScheme"] | None = None,
    calibration: Mapping[str, torch.Tensor] | None = None,
    device: torch.device | str | None = None,
    use_liger_kernel: bool = True,
    in_graphs: bool = False,
    choices: "Mapping[str, WeightScheme | None] | None" = None,
) -> WrapReport:
    """Convert the linear layers of ``model`` in place, put fused kernels on its other parts, and say what was done.

    Every ``nn.Linear`` and transformers ``Conv1D`` is considered. Output heads, classification heads and routers stay
    16-bit; embeddings and norms are never touched. Fused experts (3-D parameters) are converted where their product
    is grouped: frozen ones by ``fp8``.

    Args:
        model: a Hugging Face model, or any module.
        weights: a scheme's name (``fp8``, ``fp8_hadamard``, ``int8_hadamard``, ``nf4``, ``bf16``, ``auto``) or a
            scheme object.
        frozen: whether the converted weights will never be trained, so that they may be stored in low precision alone.
            None follows each weight's ``requires_grad``. Pass True before ``get_peft_model``.
        rules: name pattern (``*`` and ``?``, matched against the whole module path, of fused experts that of the module
            which holds them) -> scheme; the first match decides, also for layers that are left alone otherwise.
            ``{"*.o_proj": "bf16"}`` keeps one kind as it is.
        calibration: keyword arguments of one forward pass (``input_ids``, ...), which ``auto`` judges the noise on.
        device: where each layer is moved just before it is converted, so that a device which only holds the converted
            model never holds the 16-bit one. None converts every layer where it is.
        use_liger_kernel: put Liger's kernels on the norms, gated MLPs and rotary embeddings of this one model, where
            ``device`` can run them.
        in_graphs: the layers will be replayed as CUDA graphs, so schemes that choose by measurement compare the
            device's time alone, without the host's.
        choices: an earlier report's ``choices``. Where it names all layers of a scheme that chooses, nothing is
            measured and they are taken again, so that a resumed run has the layers that it began with.

    Returns:
        A report with one row for each linear layer and each weight of fused experts, and what became of the other
        parts. ``print`` shows it as a table.

    Raises:
        UserError: an unknown scheme, a rule that matches nothing, or no layer that could be converted.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"wrap takes a loaded model, not {model!r}: load it first (AutoModelForCausalLM).")
    default = as_scheme(weights)
    chosen = {pattern: as_scheme(scheme) for pattern, scheme in (rules or {}).items()}
    linears = dict(find_linears(model))
    parameters = sum(p.numel() for p in model.parameters())
    _check_rules(chosen, [*linears, *(name for name, _ in fused_experts.find_experts(model))])

    def rule_of(name: str) -> WeightScheme | None:
        return next((scheme for pattern, scheme in chosen.items() if fnmatchcase(name, pattern)), None)

    reasons: dict[str, str] = {}
    schemes: dict[str, WeightScheme] = {}
    for name, linear in linears.items():
        rule = rule_of(name)
        part = "lm_head" if linear is _output_head(model) else name.rsplit(".", 1)[-1]
        if rule is None and part in LEFT_ALONE:
            reasons[name] = f"{LEFT_ALONE[part]} (a rule can name it)"
        elif rule is None and _is_tied(model, linear):
            reasons[name] = "its weight is tied to another module"
        else:
            schemes[name] = rule or default

    def is_frozen(name: str) -> bool:
        return (not linears[name].weight.requires_grad) if frozen is None else frozen

    chosen_now = _let_auto_choose(
        model, linears, schemes, reasons, is_frozen, calibration, device, in_graphs, choices or {}
    )
    rows = []
    for name in list(linears):
        row, layer_is_frozen = _row(name, linears[name]), is_frozen(name)
        linear = linears.pop(name)  # the last reference but the model's: the 16-bit weight goes when it is converted
        if name in schemes:
            _convert(model, row, linear.to(device), schemes[name], layer_is_frozen)
        del linear
        row.reason = row.reason or reasons.get(name, "")
        rows.append(row)
    rows += _convert_experts(model, parameters, lambda name: rule_of(name) or default, frozen, device)
    notes = [NO_ADAPTER] if any(row.converted and len(row.shape) == 3 for row in rows) else []
    fused = fuse(model, _device_of(model, device), use_liger_kernel)
    report = WrapReport(rows, parameters, notes, fused, chosen_now)
    _check_result(report, default, chosen)
    return report


def _device_of(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def as_scheme(weights: "str | WeightScheme") -> WeightScheme:
    """The scheme object of a name (with its default fields); an object is returned as it is."""
    if not isinstance(weights, str):
        return weights
    names = option_names("weights")
    if weights not in names:
        near = difflib.get_close_matches(weights, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"weights={weights!r} is no scheme; choose one of {', '.join(names)}.{hint}")
    return OmegaConf.to_object(ConfigStore.instance().load(f"weights/{weights}.yaml").node)  # type: ignore[return-value]


def find_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Every linear layer once, with its path. Adapters' own layers (PEFT's ``lora_A``, ``lora_B``) are left out."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(part.startswith("lora_") for part in name.split(".")):
            yield name, module


def _convert(model: nn.Module, row: LinearRow, linear: nn.Module, scheme: WeightScheme, frozen: bool) -> None:
    """Put the converted layer in the model and complete the row, or note why not."""
    plain = _as_linear(linear)
    row.reason = scheme.why_not(plain, frozen) or ""
    if row.reason:
        return
    training = linear.training
    converted = scheme.convert(plain, frozen)
    if isinstance(linear, Conv1D):
        _keep_transposed_state(converted)
    converted.train(training)
    if isinstance(converted, FrozenEightBitLinear):
        converted.origin = _name_of(model)
    parent, _, child = row.name.rpartition(".")
    setattr(model.get_submodule(parent), child, converted)
    row.scheme = scheme.option_name
    row.kernel = scheme.kernel(converted)
    row.rotation_block = getattr(converted, "rotation_block", None)


def _let_auto_choose(
    model, linears, schemes, reasons, is_frozen, calibration, device, in_graphs, choices
) -> dict[str, WeightScheme | None]:
    """Replace the schemes that choose by themselves (``chooses``) by what they choose for each layer, or chose
    before; returns their choices."""
    made: dict[str, WeightScheme | None] = {}
    choosers = {id(scheme): scheme for scheme in schemes.values() if getattr(scheme, "chooses", False)}
    for chooser in choosers.values():
        mine = {name: (_as_linear(linears[name]), is_frozen(name)) for name, s in schemes.items() if s is chooser}
        if mine.keys() <= choices.keys():
            verdicts = {name: (choices[name], "as it was chosen before") for name in mine}
        else:
            verdicts = _of_main_process(chooser.choose(model, mine, calibration, device, in_graphs))
        made |= {name: scheme for name, (scheme, _) in verdicts.items()}
        for name, (scheme, reason) in verdicts.items():
            reasons[name] = reason
            if scheme is None:
                del schemes[name]
            else:
                schemes[name] = scheme
    return made


def _of_main_process(verdicts: dict) -> dict:
    """What the first process chose: times differ from one to the next, and the layers must not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return verdicts
    box = [verdicts]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _as_linear(module: nn.Module) -> nn.Linear:
    """The layer itself, or for a ``Conv1D`` (weight ``[in, out]``) a linear layer with its weight transposed."""
    if isinstance(module, nn.Linear):
        return module
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter, module.bias)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear


def _keep_transposed_state(layer: nn.Linear) -> None:
    """Save and load the weight as ``[in, out]``, as the model's own checkpoints have it."""

    def save(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        if state[prefix + "weight"].shape == (layer.out_features, layer.in_features):
            state[prefix + "weight"] = state[prefix + "weight"].t().contiguous()

    def load(module: nn.Module, state: dict, prefix: str, *rest: object) -> None:
        weight = state.get(prefix + "weight")
        if weight is not None and weight.shape == (layer.in_features, layer.out_features):
            state[prefix + "weight"] = weight.t().contiguous()

    layer.register_state_dict_post_hook(save)
    layer.register_load_state_dict_pre_hook(load)


def _row(name: str, linear: nn.Linear | Conv1D) -> LinearRow:
    out, into = (linear.out_features, linear.in_features) if isinstance(linear, nn.Linear) else (linear.nf, linear.nx)
    kernel = f"PyTorch, {linear.weight.dtype}".replace("torch.", "")
    return LinearRow(
        name=name,
        shape=[out, into],
        scheme=BF16,
        kernel=kernel,
        parameters=out * into,
        flops_per_token=2.0 * out * into,
    )


def _convert_experts(
    model: nn.Module,
    parameters: int,
    scheme_of: Callable[[str], WeightScheme],
    frozen: bool | None,
    device: torch.device | str | None,
) -> list[LinearRow]:
    """Convert the fused experts that can be, and a row for each of their weights. ``parameters``: of the model."""
    config = getattr(model, "config", None)
    visited = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_topk", None)
    rows = []
    for path, experts in list(fused_experts.find_experts(model)):
        scheme = scheme_of(path)
        weights = {name: experts.get_parameter(name) for name in fused_experts.weight_names(experts)}
        mine = [
            LinearRow(
                name=f"{path}.{name}",
                shape=list(weight.shape),
                scheme=BF16,
                kernel="the model's own",
                parameters=weight.numel(),
                flops_per_token=2.0 * weight.numel() * (visited or weight.shape[0]) / weight.shape[0],
            )
            for name, weight in weights.items()
        ]
        never_trained = not any(weight.requires_grad for weight in weights.values()) if frozen is None else frozen
        del weights  # the last references but the model's
        reason = fused_experts.why_not(experts, scheme, never_trained, device)
        if reason is None:
            fused_experts.convert(experts, scheme, device, _name_of(model))
        for row in mine:
            if reason is None:
                row.scheme, row.kernel = scheme.option_name, fused_experts.kernel(experts)
            else:
                share = row.parameters / parameters
                row.reason = f"fused experts, {share:.1%} of the model's parameters: {reason}"
        rows += mine
    return rows


def _name_of(model: nn.Module) -> str:
    """Where the model was loaded from, empty where it does not say."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def _output_head(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return get() if get is not None else None


def _is_tied(model: nn.Module, linear: nn.Module) -> bool:
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is linear.weight]
    return len(names) > 1


def _check_rules(rules: Mapping[str, object], names: list[str]) -> None:
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.3)
            hint = f" The nearest is {near[0]!r}." if near else ""
            raise UserError(
                f"the rule {pattern!r} matches no linear layer. Patterns are matched against the whole module path, "
                f"so begin with '*' to match an ending.{hint}"
            )


def _check_result(report: WrapReport, default: WeightScheme, rules: Mapping[str, WeightScheme]) -> None:
    schemes = [default, *rules.values()]
    if all(scheme.option_name == BF16 for scheme in schemes):
        return
    if not report.converted:
        reasons = sorted({f"{row.reason} ({row.name})" for row in report.rows}) or ["the model has no linear layer"]
        if any(scheme.option_name == "auto" for scheme in schemes):  # 16 bits everywhere is a verdict, not a mistake
            report.notes.append("16 bits everywhere: no layer gains from 8 bits here.")
            return
        raise UserError(
            f"weights={default.option_name} converted no layer: {'; '.join(reasons[:4])}. Change the scheme or the "
            "rules, or set weights=bf16."
        )
    if report.flop_share < 0.5:
        note = f"Only {report.flop_share:.0%} of the FLOPs of products with weights run in low precision."
        report.notes.append(note)
        warnings.warn(f"{note} The report's rows give the reasons.", stacklevel=3)
