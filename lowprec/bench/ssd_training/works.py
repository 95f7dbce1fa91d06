"""What is trained over which store, and the peer that is measured beside it."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lowprec.bench.train.works import LLAMA_1B, LLAMA_8B, TINY

LLAMA_32K = LLAMA_1B | {"vocab_size": 32000}
"""1.04 B parameters, as DeepSpeed was measured with."""
LLAMA_LONG = LLAMA_1B | {"num_hidden_layers": 8, "vocab_size": 4096}
"""A small vocabulary leaves room for the tokens that make a step's compute longer than its transfers."""


@dataclass(frozen=True)
class Work:
    """One row: a Llama of random weights, its batch, and where its states are. Steps include the first, untimed one."""

    name: str
    target: str
    """What is to be reached, in words."""
    shape: dict[str, Any] = field(default_factory=lambda: LLAMA_32K)
    batch: int = 4
    length: int = 2048
    steps: int = 5
    store: str = "ssd"
    state_dtype: str = "fp32"
    max_grad_norm: float | None = None
    """Exact clipping, which begins the update after backward; None: in backward."""
    checkpointing: bool = False
    cap_gib: float | None = None
    """Cap on the process's GPU memory."""
    pinned_gib: float = 2.0
    peer: str | None = None
    """The device of DeepSpeed's optimizer that is measured with the same shape and batch."""

    def same_peer(self, other: "Work") -> bool:
        """Whether one run of DeepSpeed is the peer of both: the formats of our states are nothing to it."""
        mine, theirs = ((work.peer, work.shape, work.batch, work.length, work.max_grad_norm) for work in (self, other))
        return self.peer is not None and mine == theirs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


WORKS = {
    work.name: work
    for work in (
        Work("fp32", "at least 90 % of the raw mixed rate (mean); at most 70 % of DeepSpeed's step", peer="nvme"),
        Work("int8", "at least 90 % of the raw mixed rate (mean); at most 30 % of DeepSpeed's step", state_dtype="int8",
             steps=6, peer="nvme"),
        Work("fp32_cpu", "at most DeepSpeed's step", store="cpu", steps=6, peer="cpu"),
        Work("fp32_clip", "as fp32, with one bf16 copy of the gradients more", max_grad_norm=1.0, steps=4),
        Work("int8_clip", "as int8, with one bf16 copy of the gradients more", max_grad_norm=1.0, state_dtype="int8",
             steps=5),
        Work("int8_long", "at most 1.10 x the larger of compute and disk time", LLAMA_LONG, batch=96,
             checkpointing=True, state_dtype="int8"),
        Work("8b_24gib", "runs under the cap", LLAMA_8B, batch=1, checkpointing=True, cap_gib=24.0,
             state_dtype="int8", steps=3),
        Work("fp32_gpu", "for comparison: no transfers", store="gpu", steps=6),
    )
}  # fmt: skip
TINY_WORK = Work(
    "tiny", "tries the benchmark out on any machine", TINY, batch=2, length=64, steps=3, pinned_gib=0.05, peer="nvme"
)
KNOWN = WORKS | {TINY_WORK.name: TINY_WORK}
