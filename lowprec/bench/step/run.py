"""The pieces by name, and their table.

Times are medians of replays of a CUDA graph (``lowprec.machine.timing.graph_milliseconds``), since the host may take
longer to launch a piece than the device to run it. Called as they are (``milliseconds``) are the head, since Liger's
function waits for numbers from the device, which no graph can do, and its kernels take longer than their launches; and
an optimizer's step, whose launches are what is measured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lowprec.bench.measure import BenchResult, need_gpu
from lowprec.bench.step import adamw, attention, elementwise, gated_casts, gradient_norm, head, low_rank_product
from lowprec.bench.step.call import Call, figures
from lowprec.errors import UserError

Calls = Callable[..., Iterator[Call | str]]
"""From the numbers of a case and a device to its calls and notes."""

PIECES: dict[str, tuple[Calls, tuple[tuple, ...]]] = {
    "head": (head.calls, head.CASES),
    "rmsnorm": (elementwise.rmsnorm, elementwise.ROWS),
    "swiglu": (elementwise.swiglu, elementwise.INNER_ROWS),
    "gated_casts": (gated_casts.calls, gated_casts.CASES),
    "rope": (elementwise.rope, elementwise.HEADS),
    "adamw": (adamw.calls, adamw.CASES),
    "adamw_step": (adamw.step_calls, adamw.STEP_CASES),
    "gradient_norm": (gradient_norm.calls, gradient_norm.CASES),
    "low_rank_product": (low_rank_product.calls, low_rank_product.CASES),
    "attention": (attention.calls, attention.CASES),
    "packed_attention": (attention.packed_calls, attention.PACKED_CASES),
}
"""Name -> what yields its calls, and the cases that it is given."""

NOTES = {
    "ms": "ms: replayed as a CUDA graph; the head and an optimizer's step called as they are, with what the host takes",
    "GiB": "GiB: peak beyond what stands before",
    "TB/s": "TB/s: the bytes that have to move, over the time; copy: one that moves as many, read and written",
}


def bench_step(works: Sequence[str] = ()) -> BenchResult:
    """Measure the pieces with one of ``works`` in their names; all where it is empty.

    Raises:
        UserError: there is no such piece, no GPU, or no Liger for a piece that is compared with it.
    """
    chosen = select(works)
    need_gpu("step")
    return table(chosen, torch.device("cuda"))


def select(works: Sequence[str]) -> dict[str, tuple[Calls, tuple[tuple, ...]]]:
    """The pieces that have one of these parts in their names, in the order of the table."""
    unknown = [part for part in works if not any(part in name for name in PIECES)]
    if unknown:
        raise UserError(
            f"--works {','.join(unknown)}: no piece has that in its name. Choose from: {', '.join(PIECES)}."
        )
    return {name: piece for name, piece in PIECES.items() if not works or any(part in name for part in works)}


def table(pieces: Mapping[str, tuple[Calls, tuple[tuple, ...]]], device: torch.device) -> BenchResult:
    """A row a call: the piece's name and the call's figures."""
    rows, notes = [], []
    for name, (calls, cases) in pieces.items():
        for case in cases:
            for call in calls(*case, device):
                if isinstance(call, str):
                    notes.append(call)
                else:
                    rows.append({"piece": name} | figures(call, device))
    columns = {column for row in rows for column in row}
    told = [note for column, note in NOTES.items() if column in columns]
    return BenchResult("Pieces of a step", rows, [*told, *dict.fromkeys(notes)])
