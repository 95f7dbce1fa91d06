"""The cells of the study: the paper's three runs, the full factorial around them, and this toolkit's own schemes.

The paper (arXiv:2509.12229, September 2025) trains Qwen2.5-1.5B-Instruct on an RTX 4060 of 8 GB. Its three runs change
batch, length, optimizer and dtype at once, so none of its claims about one factor follows from them; and our notes of
it do not have which of them were quantised, the rank, or whether activations were kept. Here cells differ in one factor
alone, and everything else is the same for all: LoRA of rank 16 on all linear layers, gradient checkpointing, random
weights of the model's shape.
"""

from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

PLAIN, OWN = "transformers + PEFT + bitsandbytes", "lowprec"

PAPER = (
    {"run": 1, "optimizer": "adamw", "dtype": "fp16", "batch": 1, "length": 512, "tokens_per_second": 500.3,
     "peak_mb": 6234},
    {"run": 2, "optimizer": "paged_adamw_8bit", "dtype": "fp16", "batch": 2, "length": 2048,
     "tokens_per_second": 628.1, "peak_mb": 8062},
    {"run": 3, "optimizer": "paged_adamw_8bit", "dtype": "bf16", "batch": 2, "length": 1024,
     "tokens_per_second": 360.2, "peak_mb": 7949},
)  # fmt: skip
"""The rows of the paper's table, on its RTX 4060."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A model, the levels of the factors that suit it, and the card whose memory is imitated."""

    config: dict[str, Any]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    limit_gib: float
    own_weights: tuple[str, ...]

    def limit_on(self, on_gpu: bool) -> float | None:
        """GiB; None on a GPU where the limit would be less than what CUDA takes for itself."""
        return None if on_gpu and self.limit_gib < 1 else self.limit_gib


SHAPES = {
    "qwen2.5-1.5b": Shape(
        config={
            "model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
            "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6, "max_position_embeddings": 32768,
        },
        batches=(1, 2, 4), lengths=(512, 1024, 2048), dtypes=("fp16", "bf16"), limit_gib=8.0,
        own_weights=("bf16", "nf4", "fp8", "int8_hadamard"),
    ),
    "tiny": Shape(
        config={
            "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272, "tie_word_embeddings": True,
        },
        batches=(1, 2, 4), lengths=(16, 32, 64), dtypes=("fp32", "bf16"), limit_gib=0.0012,
        own_weights=("bf16", "int8_hadamard"),
    ),
}  # fmt: skip
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")
METHODS = ("lora", "qlora")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One combination of levels."""

    stack: str
    """PLAIN: the libraries that the paper used, with lowprec's loop around them; OWN: this toolkit's defaults."""
    weights: str
    """Of the frozen base: ``lora`` (16 bits) or ``qlora`` (NF4) in PLAIN; a scheme of lowprec in OWN."""
    optimizer: str
    dtype: str
    batch: int
    length: int

    @property
    def key(self) -> str:
        """Tells the cell in files."""
        stack = "plain" if self.stack == PLAIN else "lowprec"
        return f"{stack} {self.weights} {self.optimizer} {self.dtype} {self.batch}x{self.length}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


FACTORS = ("weights", "optimizer", "dtype", "batch", "length")
"""Fields of a cell that are varied."""


def paper_cells(shape: Shape) -> list[Cell]:
    """The paper's runs, as LoRA and as QLoRA, since it does not say which they were. Of another shape: none."""
    if shape is not SHAPES["qwen2.5-1.5b"]:
        return []
    names = ("optimizer", "dtype", "batch", "length")
    return [
        Cell(stack=PLAIN, weights=method, **{name: row[name] for name in names})  # type: ignore[arg-type]
        for row in PAPER
        for method in METHODS
    ]


def factorial(shape: Shape, *, reduced: bool) -> list[Cell]:
    """Every combination; reduced, the outer levels of batch, length and optimizer alone."""
    batches = shape.batches[:2] if reduced else shape.batches
    lengths = (shape.lengths[0], shape.lengths[-1]) if reduced else shape.lengths
    optimizers = (OPTIMIZERS[0], OPTIMIZERS[-1]) if reduced else OPTIMIZERS
    return [
        Cell(stack=PLAIN, weights=method, optimizer=optimizer, dtype=dtype, batch=batch, length=length)
        for dtype, method, optimizer, length, batch in product(shape.dtypes, METHODS, optimizers, lengths, batches)
    ]


def own_cells(shape: Shape, *, reduced: bool) -> list[Cell]:
    """The schemes of lowprec, with what a recipe gives by default."""
    batches = shape.batches[1:2] if reduced else shape.batches
    lengths = shape.lengths[-1:] if reduced else shape.lengths
    return [
        Cell(stack=OWN, weights=weights, optimizer="adamw", dtype=shape.dtypes[-1], batch=batch, length=length)
        for weights, length, batch in product(shape.own_weights, lengths, batches)
    ]


def all_cells(shape: Shape, *, reduced: bool) -> list[Cell]:
    """Without repetitions, the paper's first."""
    cells = paper_cells(shape) + own_cells(shape, reduced=reduced) + factorial(shape, reduced=reduced)
    return list(dict.fromkeys(cells))
