"""Held-out loss, and the model's own words."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowprec.data import PreparedData, eval_batches
from lowprec.train.options import Train
from lowprec.train.step import loss_sum


@torch.no_grad()
def evaluate(
    model: nn.Module, data: PreparedData, options: Train, pad_token_id: int, accelerator: Accelerator
) -> float:
    """Mean cross-entropy over the trained tokens of the held-out samples, nats a token, over all processes."""
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    batches = eval_batches(
        data.evaluation,
        batch_size=options.per_device_eval_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        pad_token_id=pad_token_id,
        max_samples=options.eval_max_samples,
        pin_memory=accelerator.device.type == "cuda",
    )
    for batch in batches:
        inputs = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.inputs.items()}
        totals[0] += loss_sum(model, inputs).double()
        totals[1] += batch.num_trained_tokens
    totals = accelerator.reduce(totals, reduction="sum")
    model.train(was_training)
    return float(totals[0] / totals[1])


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt_ids: list[int], max_new_tokens: int, accelerator: Accelerator) -> str:
    """The most likely continuation of a prompt (greedy), without special tokens.

    Args:
        model: the bare model, without Accelerate's wrapper.
        prompt_ids: token ids, as the chat template renders a question.
    """
    was_training = model.training
    model.eval()
    inputs = torch.tensor([prompt_ids], device=accelerator.device)
    with accelerator.autocast():
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True).strip()
