"""The products that ``doctor --measure`` times: layers of real models, their three roles, token counts, odd sizes.

A product is ``[m, k] @ [k, n]``. Each layer ``out x in`` gives forward products (m tokens, n out, k in), input
gradients (m tokens, n in, k out) and weight gradients (m out, n in, k tokens). Layer sizes are multiples of 16, which
8-bit products need.
"""

import random
from dataclasses import dataclass

LAYERS = (
    (576, 576), (192, 576), (1536, 576), (49152, 576),  # SmolLM2-135M
    (1536, 1536), (256, 1536), (8960, 1536),  # Qwen2.5-1.5B
    (2048, 2048), (512, 2048), (8192, 2048), (128256, 2048),  # Llama-3.2-1B
    (3072, 3072), (9728, 2560),
    (4096, 4096), (1024, 4096), (14336, 4096), (6144, 4096),  # Llama-3-8B; its q, k and v at once
    (16, 4096), (64, 2048), (32, 576), (400, 1008), (2736, 1040),  # LoRA, and sizes that fit no tile
)  # fmt: skip
TOKENS = (1, 16, 64, 100, 256, 500, 512, 1000, 1024, 2048, 3000, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class Shape:
    m: int
    n: int
    k: int
    group: str
    """The layer: products of one layer are held out together when the predictor is validated."""

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def designed_shapes(max_flops: float, max_elements: float, multiple: int = 4) -> list[Shape]:
    """Every layer, role and token count within the limits, in a fixed order that is diverse from its beginning.

    Args:
        max_elements: of each of the three matrices.
        multiple: what k is a multiple of: 16 for 8-bit products.
    """
    shapes = [
        Shape(*dimensions, group=f"{out}x{inner}")
        for out, inner in LAYERS
        for tokens in TOKENS
        for dimensions in ((tokens, out, inner), (tokens, inner, out), (out, inner, tokens))
        if dimensions[2] >= 16 and dimensions[2] % multiple == 0
    ]
    shapes = [s for s in shapes if s.flops <= max_flops and max(s.m * s.n, s.m * s.k, s.n * s.k) <= max_elements]
    unique = list({(s.m, s.n, s.k): s for s in shapes}.values())
    random.Random(0).shuffle(unique)
    return unique
