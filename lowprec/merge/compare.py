"""How far the merged model's answers are from those of base and adapter: logits on real tokens."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowprec.data.python_docs import python_docs

MAX_TOKENS = 128


@dataclass(frozen=True)
class LogitDifference:
    """Between two models on the same tokens."""

    against: str
    """What the merged model is compared with."""
    largest: float
    """Largest absolute difference of a logit."""
    root_mean_square: float
    largest_logit: float
    """Largest absolute logit of the reference: what ``largest`` is to be seen against."""
    same_top_token: float
    """Share of positions where both models find the same token likeliest."""
    num_tokens: int


def sample_tokens(tokenizer: PreTrainedTokenizerBase, text: str | None) -> torch.Tensor:
    """``[1, tokens]`` ids of ``text``, or of the built-in documentation of Python's standard library."""
    if text is None:
        texts, length = [], 0
        for record in python_docs():
            assert record.fields is not None
            texts.append("\n".join(str(value) for value in record.fields.values()))
            length += len(texts[-1])
            if length > 8 * MAX_TOKENS:
                break
        text = "\n".join(texts)
    return tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)["input_ids"]


@torch.inference_mode()
def logits_of(model: PreTrainedModel | PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits ``[tokens, vocabulary]`` on the CPU."""
    return model.eval()(input_ids=ids.to(model.device)).logits[0].float().cpu()


def difference(against: str, reference: torch.Tensor, merged: torch.Tensor) -> LogitDifference:
    """Compare two results of ``logits_of``."""
    gap = (reference - merged).abs()
    return LogitDifference(
        against=against,
        largest=gap.max().item(),
        root_mean_square=gap.square().mean().sqrt().item(),
        largest_logit=reference.abs().max().item(),
        same_top_token=(reference.argmax(-1) == merged.argmax(-1)).float().mean().item(),
        num_tokens=reference.shape[0],
    )
