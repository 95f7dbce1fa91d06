"""Chunks cover every element of every parameter exactly once, and their bytes come back as they went in."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowprec_kernels.adamw.reference import BLOCK

from lowprec.optim.format import StateFormat
from lowprec.optim.layout import gather, make_layout, scatter

FORMATS = [
    StateFormat(torch.float32, "fp32", "none", False),
    StateFormat(torch.bfloat16, "fp32", "split", False),
    StateFormat(torch.bfloat16, "int8", "split", True),
    StateFormat(torch.bfloat16, "bf16", "fp32", False),
]
sizes = st.lists(st.tuples(st.integers(1, 3000), st.sampled_from(FORMATS)), min_size=1, max_size=8)


@settings(max_examples=60)
@given(sizes, st.one_of(st.none(), st.integers(BLOCK * 16, 40_000)))
def test_chunks_cover_every_element_once_and_keep_it(parameters, chunk_bytes):
    numels = {
        i * 2 + 1: numel for i, (numel, _) in enumerate(parameters)
    }  # numbers with gaps, as with frozen parameters
    formats = {i * 2 + 1: format for i, (_, format) in enumerate(parameters)}
    chunks = make_layout(numels, formats, chunk_bytes)
    covered = {i: torch.zeros(numel, dtype=torch.int32) for i, numel in numels.items()}
    for index, chunk in enumerate(chunks):
        assert chunk.index == index
        assert chunk_bytes is None or chunk.nbytes <= chunk_bytes
        assert len({formats[piece.parameter] for piece in chunk.pieces}) == 1
        for piece in chunk.pieces:
            assert piece.start % BLOCK == piece.position % BLOCK == 0
            covered[piece.parameter][piece.start : piece.stop] += 1
    assert all((count == 1).all() for count in covered.values())

    values = {
        i: {
            field.name: torch.randint(0, 100, (field.nbytes(numel) // field.dtype.itemsize,)).to(field.dtype)
            for field in formats[i].fields
        }
        for i, numel in numels.items()
    }
    buffers = [torch.full((chunk.nbytes,), 255, dtype=torch.uint8) for chunk in chunks]
    for chunk, buffer in zip(chunks, buffers, strict=True):
        scatter(chunk, buffer, lambda i: values[i])
    for i, fields in values.items():
        mine = [chunk for chunk in chunks if any(piece.parameter == i for piece in chunk.pieces)]
        found = gather(mine, lambda chunk: buffers[chunk.index], i, may_alias=True)
        assert found.keys() == fields.keys()
        assert all(torch.equal(found[name], fields[name]) for name in fields)


def test_bytes_per_parameter_are_those_of_the_docs():
    table = {format: format.bytes_per_parameter for format in FORMATS}
    assert table[FORMATS[0]] == 8 and table[FORMATS[1]] == 10 and table[FORMATS[3]] == 8
    assert StateFormat(torch.bfloat16, "int8", "split", False).bytes_per_parameter == 4.03125
    assert all(StateFormat.from_json(format.as_json()) == format for format in FORMATS)
