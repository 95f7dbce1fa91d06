"""``fuse(model)``: put the kernels on the modules of one instance that they compute the same results for."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lowprec.fused import mlp, norm, rope
from lowprec.fused.liger import liger_version, why_no_liger
from lowprec.fused.loss_head import put_loss
from lowprec.fused.report import FusedRow
from lowprec.fused.stand_in import is_replaced

OWN = "the model's own code"


def fuse(model: nn.Module, device: torch.device, use_liger_kernel: bool = True) -> list[FusedRow]:
    """Give the norms, MLPs, attentions and the loss of this one model fused kernels. Classes stay untouched.

    Call it before adapters are put on the model, or after: the linear layers are not touched.

    Args:
        device: where the model will run.
        use_liger_kernel: False leaves norms, MLPs and rotary embeddings as they are. The chunked loss needs no Liger.

    Returns:
        A row for each kind of part and class, also for what was left alone, with the reason.
    """
    refusal = "train.use_liger_kernel=false" if not use_liger_kernel else why_no_liger(device)
    rows = []
    for part, candidates in _candidates(model).items():
        for kind, modules in _by_class(candidates).items():
            rows += _put(part, kind, modules, refusal)
    if isinstance(model, PreTrainedModel):
        reason = put_loss(model)
        kernel = "chunks of tokens, never the whole logits" if reason is None else OWN
        rows.append(FusedRow(part="loss", module=type(model).__name__, modules=1, kernel=kernel, reason=reason or ""))
    return rows


def _candidates(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules whose names say that they might be one of these parts."""
    found: dict[str, list[nn.Module]] = {"norm": [], "mlp": [], "rope": []}
    for module in model.modules():
        names = set(module._modules)
        if type(module).__name__.endswith("RMSNorm"):
            found["norm"].append(module)
        elif {"gate_proj", "up_proj", "down_proj"} <= names or {"gate_up_proj", "down_proj"} <= names:
            found["mlp"].append(module)
        elif rope.calls_rope(type(module)):
            found["rope"].append(module)
    return found


def _by_class(modules: list[nn.Module]) -> dict[type[nn.Module], list[nn.Module]]:
    classes: dict[type[nn.Module], list[nn.Module]] = {}
    for module in modules:
        classes.setdefault(type(module), []).append(module)
    return classes


def _put(part: str, kind: type[nn.Module], modules: list[nn.Module], refusal: str | None) -> list[FusedRow]:
    recognise: Any = {"norm": norm.recognise, "mlp": mlp.recognise, "rope": rope.recognise}[part]
    reason, variants = refusal, []
    if not reason and any(is_replaced(module) for module in modules):
        reason = "it has a forward of its own already"
    if not reason:
        variants = [recognise(module) for module in modules]
        if not all(variants):
            reason = "it does not compute what the kernel computes, as a trial on small numbers shows"
    if reason:
        return [FusedRow(part=part, module=kind.__name__, modules=len(modules), kernel=OWN, reason=reason)]
    put: Any = {"norm": norm.put_kernel, "mlp": mlp.put_kernel, "rope": rope.put_kernel}[part]
    kernels: Counter[tuple[str, str]] = Counter()
    for module, variant in zip(modules, variants, strict=True):
        put(module, variant)
        kernels[_kernel_of(part, module, variant)] += 1
    return [
        FusedRow(part=part, module=kind.__name__, modules=count, kernel=kernel, note=note)
        for (kernel, note), count in kernels.items()
    ]


def _kernel_of(part: str, module: nn.Module, variant: Any) -> tuple[str, str]:
    """The kernel that was put on the module, and what else to say of it."""
    if part != "mlp":
        return f"Liger {liger_version()} {'RMSNorm' if part == 'norm' else 'RoPE'}", ""
    apart = mlp.why_casts_apart(module, variant)
    if apart is None:
        return f"lowprec {variant.product} with its layers' casts to e4m3", ""
    return f"Liger {liger_version()} {variant.product}", f"casts to 8 bits apart: {apart}" if apart else ""
