"""Plain training loops over a model, traced without data or followed as they really run."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowprec.plan.cuda_like import LikeCuda
from lowprec.plan.follow import Followed
from lowprec.plan.tape import Tape
from lowprec.plan.tracker import BACKWARD, FORWARD, UPDATE
from lowprec.plan.without_data import no_data


def traced(
    config: Any,
    rows: int,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[Any], Any] = lambda model: model,
    state_bytes: Callable[[nn.Parameter], list[int]] = lambda parameter: [],
    frees_gradients: bool = False,
    real: bool = False,
    like_cuda: bool = False,
) -> Tape:
    """One step of ``model(input_ids, labels).loss.backward()``: without data, or with ``real`` as it runs."""
    with ExitStack() as stack:
        if not real:
            stack.enter_context(no_data())
        if like_cuda:
            stack.enter_context(LikeCuda((9, 0)))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        model = prepare(AutoModelForCausalLM.from_config(config, dtype=dtype)).train()
        model.config.use_cache = False
        states = [(name, n) for name, p in model.named_parameters() if p.requires_grad for n in state_bytes(p)]
        followed = Followed(model, config.num_hidden_layers, config.vocab_size, (9, 0), cublas_handles=2)
        if frees_gradients:
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(_free)
        tape = followed.follow(lambda: _step(followed, rows, length))
        return tape.with_states([(followed.layer_of(name), nbytes) for name, nbytes in states])


def _step(followed: Followed, rows: int, length: int) -> None:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    followed.begin(FORWARD)
    loss = followed.model(input_ids=ids, labels=ids).loss
    followed.begin(BACKWARD)
    loss.backward()
    followed.begin(UPDATE)
    for parameter in followed.model.parameters():
        parameter.grad = None


def _free(parameter: torch.Tensor) -> None:
    parameter.grad = None


def with_lora(model: Any) -> Any:
    """PEFT's own LoRA of rank 16 on all linear layers, in the model's dtype, with full checkpointing."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    return with_checkpointing(model)


def with_8_bit_mlps(model: Any) -> Any:
    """Trained ``fp8`` layers, and Liger's stand-ins between those that are not computed together."""
    from lowprec.plan.liger_like import put_liger_like
    from lowprec.prepare import wrap

    wrap(model, "fp8", frozen=False, use_liger_kernel=False)
    put_liger_like(model, sm_count=1)
    return model


def with_checkpointing(model: Any) -> Any:
    from lowprec.activations import keep_activations

    keep_activations(model, "full")
    return model
