"""``lowprec::transpose_codes``: 8-bit codes in the other orientation, the rows' factors folded in (e4m3 only)."""

from lowprec_kernels.quantize_rows import reference

from lowprec.ops.backends import Backend, choose, define, lazily, no_triton

BACKENDS = (
    Backend(
        "triton",
        lazily("quantize_rows.triton_kernel", "transpose_codes"),
        lambda codes, factor: no_triton(codes.device, codes.dtype),
    ),
    Backend("reference", reference.transpose_codes),
)


def _run(codes, factor=None):
    return choose(BACKENDS, codes, factor).run(codes, factor)


def _fake(codes, factor=None):
    rows, dim = codes.shape
    return codes.new_empty(dim, (rows + 15) // 16 * 16)


transpose_codes = define("transpose_codes(Tensor codes, Tensor? factor=None) -> Tensor", _run, _fake)
"""``transpose_codes(codes, factor=None)``: ``codes [rows, dim]`` times ``factor [rows]`` as ``[dim, rows']``; rows'
is a multiple of 16, filled with zeros."""
