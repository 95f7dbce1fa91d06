"""What keeps ``lowprec plan`` short: steps that are traced once."""

import pytest
from transformers import LlamaConfig

import lowprec
from lowprec.plan import predict
from lowprec.plan.step import TracedRecipe


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Recipe and keys of a plan for a folder that holds nothing but the config.json of an 8B model."""
    path = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, **heads).save_pretrained(path)
    return "lora", [f"model.model_name_or_path={path}"]


def test_a_plan_that_does_not_fit_traces_every_size_once(asked, monkeypatch):
    built, traced = [], []

    class Counted(TracedRecipe):
        def __init__(self, recipe, config, machine):
            built.append((recipe.choice("weights"), recipe.choice("adapter"), recipe.train.gradient_checkpointing))
            super().__init__(recipe, config, machine)

        def _trace(self, rows, length):
            traced.append((rows, length))
            return super()._trace(rows, length)

    monkeypatch.setattr(predict, "TracedRecipe", Counted)
    name, keys = asked
    answer = lowprec.plan(name, keys, gpu="RTX 4060", vram=16)
    assert answer.fits is False and answer.largest is None and len(answer.advice) == 6
    others = [
        ("bf16", "lora", "full"),
        ("nf4", "lora", "full"),
        ("int8_hadamard", "lora", "full"),
        ("bf16", "none", "full"),
    ]
    assert built == [("bf16", "lora", "full"), ("bf16", "lora", "offload"), *others]
    # The recipe, what is there before its first token, one row, one short row; offload, half the length (half the
    # batch is known), embeddings on the host, nf4, int8; and two shipped recipes at rest.
    sizes = [(2, 2048), (0, 0), (1, 2048), (1, 64), (2, 2048), (2, 1024), *[(2, 2048)] * 3, (0, 0), (0, 0)]
    assert traced == sizes
