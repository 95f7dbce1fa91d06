"""Peaks measured on an H100 (torch.cuda.max_memory_allocated), against the trace of the same loop."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from lowprec.attention import attend_without_masks
from lowprec.bench.train.ours import recipe_of
from lowprec.bench.train.works import all_works
from lowprec.machine import named_card
from lowprec.plan import Planner
from lowprec.plan.ledger import peak_of
from lowprec.plan.model import of_template
from lowprec.plan.tape import Template
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
    template = Template(config.num_hidden_layers)
    tape = traced(
        of_template(config, template),
        rows,
        length,
        dtype=torch.bfloat16,
        prepare=prepare,
        state_bytes=lambda parameter: [parameter.numel() * state_bytes],
        frees_gradients="freed" in cell or "split" in cell,
        like_cuda=True,
    )
    predicted_gb = peak_of(tape.stretched(template).events()).allocated / 1e9
    assert predicted_gb == pytest.approx(measured_gb, rel=0.005)


# docs/benchmarks/train_h100_202611.md: GB allocated and reserved.
IN_GRAPHS = {"qlora_8b": (7.285, 7.596), "lora_8bit_8b": (11.529, 11.872), "full_1b": (16.433, 17.274)}


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_memory_of_layers_as_graphs(name):
    """Allocated within 1 %, reserved within 3 %."""
    work = all_works()[name]
    recipe = recipe_of(work, Path(), torch.device("cuda"))
    train = replace(recipe.train, gradient_accumulation_steps=1)
    found = Planner(AutoConfig.for_model(**work.shape), named_card("H100")).predict(
        replace(recipe, train=train), work.batch, work.length
    )
    allocated, reserved = IN_GRAPHS[name]
    assert found.peak.allocated / 1e9 == pytest.approx(allocated, rel=0.01)
    assert found.reserved / 1e9 == pytest.approx(reserved, rel=0.03)
    assert sum(found.peak.parts.values()) == found.peak.allocated
    assert train.cuda_graphs and found.time.host_ms < found.time.products_ms
