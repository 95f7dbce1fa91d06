"""Peaks measured on an H100 (torch.cuda.max_memory_allocated), against the trace of the same loop."""

import pytest
import torch
from transformers import LlamaConfig

from lowprec.attention import attend_without_masks
from lowprec.plan.ledger import peak_of
from lowprec.plan.model import with_layers
from lowprec.plan.tape import TEMPLATE_LAYERS
from tests.plan.loops import traced, with_checkpointing, with_lora

HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "1.04b": LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         tie_word_embeddings=True, **HEADS),
    "1.24b": LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         tie_word_embeddings=True, **HEADS),
    "8b": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      **HEADS),
}  # fmt: skip

# docs/benchmarks/ssd_h100_202611.md (lowprec.bench.ssd_training), and plain transformers and PEFT loops measured on
# such a machine: bf16 weights, GB of 1e9 bytes. The fourth number is the bytes of states for each trained parameter.
CELLS = {
    "1.04b, gradients freed at once": ("1.04b", 4, 2048, 0, 19.64),
    "1.04b, fp32 states and split masters": ("1.04b", 4, 2048, 10, 30.06),
    "8b, checkpointed, gradients freed at once": ("8b", 1, 2048, 0, 19.85),
    "1.24b, plain loop, bf16 states": ("1.24b", 4, 2048, 4, 34.5),
    "8b, PEFT's LoRA, checkpointed": ("8b", 2, 2048, 8, 24.1),
}


@pytest.mark.parametrize("cell", CELLS)
def test_peaks_are_predicted_within_half_a_percent(cell):
    shape, rows, length, state_bytes, measured_gb = CELLS[cell]

    def prepare(model):
        attend_without_masks(model)
        if "LoRA" in cell:
            return with_lora(model)
        return with_checkpointing(model) if "checkpointed" in cell else model

    config = SHAPES[shape]
    tape = traced(
        with_layers(config, TEMPLATE_LAYERS),
        rows,
        length,
        dtype=torch.bfloat16,
        prepare=prepare,
        state_bytes=lambda parameter: [parameter.numel() * state_bytes],
        frees_gradients="freed" in cell or "split" in cell,
        like_cuda=True,
    )
    predicted_gb = peak_of(tape.stretched(config.num_hidden_layers).events()).allocated / 1e9
    assert predicted_gb == pytest.approx(measured_gb, rel=0.005)
