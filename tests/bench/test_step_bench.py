"""The benchmark of a step's pieces: what is chosen, what is called, and its rows."""

import json
import warnings

import pytest
import torch

from lowprec.bench.step import adamw, attention, gradient_norm, low_rank_product
from lowprec.bench.step.call import Call, figures, kernel_of
from lowprec.bench.step.run import PIECES, bench_step, select, table
from lowprec.cli import main
from lowprec.errors import UserError
from lowprec.ops.scaled_matmul import BACKENDS
from lowprec.testing import sqnr_db

CPU = torch.device("cpu")
TINY_SHAPE = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "head": ((256, 64, 1024, True),),
    "rmsnorm": ((256, 512),),
    "swiglu": ((256, 1024),),
    "gated_casts": ((256, 1024, "SwiGLU"), (256, 1024, "GeGLU")),
    "rope": ((256, 8, 2, 64),),
    "adamw": ((2048,),),
    "adamw_step": ((TINY_SHAPE,),),
    "gradient_norm": ((5000,),),
    "low_rank_product": ((64, 128, 64, "e4m3"), (64, 128, 64, "int8")),
    "attention": ((2, 4, 2, 64, 64),),
    "packed_attention": ((2, 4, 2, 64, 64, 16),),
}
ANYWHERE = ("adamw", "adamw_step", "gradient_norm", "low_rank_product", "attention", "packed_attention")
"""Without a GPU, where Liger's kernels do not run and the others are interpreted."""


def tiny(names):
    return {name: (PIECES[name][0], TINY[name]) for name in names}


def calls_of(items):
    return [item for item in items if isinstance(item, Call)]


def test_names_are_chosen_by_their_parts():
    assert list(select([])) == list(PIECES) == list(TINY)
    assert list(select(["attention", "adamw"])) == ["adamw", "adamw_step", "attention", "packed_attention"]
    assert list(select(["norm"])) == ["rmsnorm", "gradient_norm"]


def test_unknown_names_are_one_error(capsys):
    assert main(["bench", "step", "--works", "adamw,nothing,none"]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "--works nothing,none: no piece has that in its name. Choose from: head, rmsnorm," in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so only without a GPU")
def test_needs_a_gpu():
    with pytest.raises(UserError, match="lowprec bench step.*no CUDA device"):
        bench_step(["adamw"])


def test_the_table_without_a_gpu():
    result = table(tiny(ANYWHERE), CPU)
    by_piece = {name: [row for row in result.rows if row["piece"] == name] for name in ANYWHERE}
    assert all(row["ms"] > 0 and row["shape"] for row in result.rows)
    for name in ("adamw", "adamw_step", "gradient_norm"):
        assert all(row["TB/s"] > 0 and row["copy, TB/s"] > 0 for row in by_piece[name])
    for name in ("low_rank_product", "attention", "packed_attention"):
        assert all(row["TFLOP/s"] > 0 and "TB/s" not in row for row in by_piece[name])
    assert [row["way"].split(":")[0] for row in by_piece["attention"]] == ["lowprec", "SDPA, FLASH_ATTENTION"]
    assert all("flash_attention" in row["way"] for row in by_piece["attention"])  # the operator that ran
    assert sum("heads of 64: no " in note for note in result.notes) == 2  # what a processor refuses
    assert sum(note == attention.NOTE for note in result.notes) == 1
    json.dumps(result.to_dict())


def test_whole_steps_move_all_parameters():
    found = calls_of(adamw.step_calls(TINY_SHAPE, CPU))
    assert {call.shape for call in found} == {"0.0 M elements in 20 parameters"}
    numel = 64 * 16 + 16 + 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 32 + 2 * 16)
    assert found[0].nbytes == 26 * numel and found[-1].nbytes == 28 * numel
    assert not any(call.replayed for call in found)


def test_every_format_of_the_update_is_called_with_its_bytes():
    found = {call.way: call for call in calls_of(adamw.calls(2048, CPU))}
    scales = 2 * 2 * 4 / 256  # two, read and written
    assert {way: call.nbytes / 2048 for way, call in found.items()} == {
        "fp32 states, master split": 26,
        "int8 states, master split": 14 + scales,
        "int8 states, master none": 10 + scales,
        "PyTorch, fp32 weights and states": 28,
    }
    for call in found.values():
        param = call.run.args[0][0] if call.way.startswith("PyTorch") else call.run.args[0]
        before = param.clone()
        call.run()
        assert param.isfinite().all() and not torch.equal(param, before)


def test_both_ways_give_the_norm():
    norms = []
    for call in calls_of(gradient_norm.calls(5000, CPU)):
        call.run()
        grad, norm, flag = call.run.args[-3:]
        norms.append((norm / grad.double().norm()).item())
        assert call.nbytes == 10_000 and flag == 0
    assert norms == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("kind", ["e4m3", "int8"])
def test_the_low_rank_term_is_the_same_after_the_product_and_in_it(kind):
    found = {call.way: call.run() for call in calls_of(low_rank_product.calls(64, 128, 64, kind, CPU))}
    alone = found.pop(f"alone ({BACKENDS[-1].name})")
    for rank in low_rank_product.RANKS:
        after, inside = (found.pop(f"rank {rank} {how}") for how in ("by addmm_ after it", "in its kernel"))
        assert sqnr_db(after, inside) > 40 > 20 > sqnr_db(after, alone)
    assert not found


def test_attention_and_its_gradients_are_the_same_by_every_way():
    for items in (attention.calls(2, 4, 2, 64, 64, CPU), attention.packed_calls(2, 4, 2, 64, 64, 16, CPU)):
        found = calls_of(items)
        (q, k, v, error), (way, other) = found[0].run.args[1:], (call.run.args[0] for call in found)
        assert way(q, k, v).shape == error.shape == (2, 64, 4, 64)
        assert sqnr_db(way(q, k, v).detach(), other(q, k, v).detach()) > 40
        for mine, theirs in zip(*(call.run() for call in found), strict=True):
            assert sqnr_db(mine, theirs) > 40


def test_a_refusal_is_told_in_the_words_of_the_warnings():
    def run():
        warnings.warn("Memory efficient kernel not used because: (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("Heads differ [q, k] (Triggered internally at a.cpp:2.)", stacklevel=1)
        warnings.warn("cuDNN attention has been runtime disabled. (Triggered internally at a.cpp:3.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.\nException raised from")

    assert attention.refusal(run) == "Heads differ [q, k]"
    assert attention.refusal(lambda: torch.zeros(2) @ torch.zeros(3)).startswith("inconsistent tensor size")
    assert attention.refusal(lambda: None) is None


def test_a_call_is_named_by_what_takes_longest():
    x = torch.randn(256, 256)
    row = figures(Call("s", "way", lambda: (x @ x).relu(), flops=2 * 256**3, names_kernel=True), CPU)
    assert row["way"] == "way: mm" and kernel_of(lambda: None, CPU) == "no kernel seen"
    assert row["TFLOP/s"] == pytest.approx(2 * 256**3 / row["ms"] / 1e9)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PIECES)
def test_every_way_is_measured(name):
    result = table(tiny([name]), torch.device("cuda"))
    assert result.rows and all(row["ms"] > 0 and ("GiB" in row) != ("TB/s" in row) for row in result.rows)
    ways = {row["way"].split(" of ")[0].split(":")[0] for row in result.rows}
    expected = {
        "head": {"Liger", "chunks", "all logits"},
        "gated_casts": {"lowprec", "Liger, then the cast", "Liger, then the casts"},
        "low_rank_product": {"rank 16 by addmm_ after it", "rank 64 by addmm_ after it"},
        "attention": {"lowprec", "SDPA, FLASH_ATTENTION"},
        "packed_attention": {"lowprec", "SDPA, sample by sample"},
        "adamw": {"int8 states, master none", "PyTorch, fp32 weights and states"},
        "adamw_step": {"step, int8 states, master split", "step, PyTorch fused, bfloat16 weights and states"},
        "gradient_norm": {"norm and flag in one launch", "vector_norm, then the flag"},
    }
    assert expected.get(name, {"PyTorch", "Liger"}) <= ways
