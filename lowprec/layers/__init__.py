"""Weight schemes, one a file. Importing this package registers them all as choices of the recipe group ``weights``."""

from lowprec.layers import auto, bf16, eight_bit_schemes, nf4  # noqa: F401  # each import registers options
