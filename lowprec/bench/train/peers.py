"""A work by other libraries, driven as their own documentation says, on the same random weights' shape."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.bench.train.clock import cap_memory, time_steps
from lowprec.bench.train.ours import random_model, recipe_of
from lowprec.bench.train.works import Work

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEEDS = {"transformers": (), "transformers+liger": ("liger_kernel",), "unsloth": ("unsloth",), "torchao": ("torchao",)}
"""Peer -> the packages beyond transformers, PEFT and bitsandbytes."""


def why_not(peer: str, path: list[str] | None = None) -> str | None:
    """Why a peer cannot be measured here."""
    missing = [name for name in NEEDS[peer] if find_spec(name) is None]
    missing = [name for name in missing if not any((Path(folder) / name).is_dir() for folder in path or [])]
    return f"{', '.join(missing)} is not installed" if missing else None


def run(peer: str, work: Work, folder: Path, device: torch.device) -> dict:
    """Figures of one work by one peer."""
    model = _unsloth(work, folder) if peer == "unsloth" else _transformers(peer, work, device)
    optimizer = _optimizer(work, model, recipe_of(work, folder, device).optimizer.learning_rate)
    ids = torch.randint(0, work.shape["vocab_size"], (work.batch, work.length), device=device)
    mask = torch.ones_like(ids)
    cap_memory(work.cap_gib, device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return time_steps(step, work.tokens, work.warmup, work.timed, device).to_dict()


def _transformers(peer: str, work: Work, device: torch.device) -> Any:
    """transformers + PEFT + bitsandbytes, and with ``+liger`` Liger's kernels on this instance; torchao's float8
    tensorwise training, compiled."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(work.shape, dtype, device)
    if work.method == "nf4":
        to_bitsandbytes(model, dtype, device)
    model.to(device)
    if peer == "transformers+liger":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if work.method == "full":
        if peer == "torchao":
            from torchao.float8 import convert_to_float8_training

            convert_to_float8_training(model, module_filter_fn=lambda module, name: "lm_head" not in name)
            model = torch.compile(model)
        return model.train()
    from peft import LoraConfig, get_peft_model

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=LINEARS)
    return get_peft_model(model, config).train()


def to_bitsandbytes(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Every linear layer but the head as ``BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True)`` would load it."""
    import bitsandbytes as bnb

    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]:
        with torch.device("meta"):
            layer = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, dtype, True, "nf4"
            )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        if linear.bias is not None:
            layer.bias = linear.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to(device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def _unsloth(work: Work, folder: Path) -> Any:
    """FastLanguageModel from a folder of random weights, with its own offloaded checkpointing."""
    import unsloth  # noqa: F401, I001  must come before transformers' other users
    from unsloth import FastLanguageModel

    source = _saved_model(work, folder)
    model, _ = FastLanguageModel.from_pretrained(
        str(source), max_seq_length=work.length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", target_modules=LINEARS,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    return model.train()


def _saved_model(work: Work, folder: Path) -> Path:
    """A Hugging Face folder of random weights, kept for the next call."""
    from lowprec.testing import tiny_tokenizer

    target = folder / f"{work.shape['model_type']}-{work.shape['hidden_size']}x{work.shape['num_hidden_layers']}"
    if not target.is_dir():
        model = random_model(work.shape, torch.bfloat16, torch.device("cuda"))
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.cpu().save_pretrained(partial, max_shard_size="4GB")
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = None  # there is nothing to chat about, and unsloth would rewrite it
        tokenizer.save_pretrained(partial)
        partial.rename(target)
        del model
        torch.cuda.empty_cache()
    return target


def _optimizer(work: Work, model: nn.Module, learning_rate: float) -> Any:
    """PyTorch's fused AdamW; for LoRA bitsandbytes' 8-bit one, as unsloth's and PEFT's examples have it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if work.method == "full" or not torch.cuda.is_available():
        return torch.optim.AdamW(trained, lr=learning_rate, fused=True)
    import bitsandbytes as bnb

    build: Callable = bnb.optim.AdamW8bit
    return build(trained, lr=learning_rate)
