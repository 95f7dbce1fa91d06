"""Where the states of every parameter lie: chunks of bytes, cut independently of the parameters' sizes.

The parameters of one format lie one after another on a line of elements, each beginning at a multiple of BLOCK, and the
line is cut into chunks of a fixed number of elements. A chunk keeps its fields one after another, so that one
read brings everything an update needs. A parameter may cover many chunks, and a chunk hold pieces of many parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from lowprec_kernels.adamw.reference import BLOCK
from torch import Tensor

from lowprec.optim.format import StateFormat


@dataclass(frozen=True)
class Piece:
    """Elements ``start .. stop`` of the parameter number ``parameter``, from element ``position`` of the chunk on."""

    parameter: int
    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class Chunk:
    """``numel`` elements of one format and their ``nbytes`` bytes."""

    index: int
    format: StateFormat
    numel: int
    nbytes: int
    pieces: tuple[Piece, ...]

    @cached_property
    def parameters(self) -> tuple[int, ...]:
        """The numbers of the parameters that have a piece here, each once."""
        return tuple(dict.fromkeys(piece.parameter for piece in self.pieces))

    def views(self, buffer: Tensor) -> list[dict[str, Tensor]]:
        """The fields of every piece, as flat views of ``buffer`` (uint8, at least ``nbytes``, on any device)."""
        arrays, offset = {}, 0
        for field in self.format.fields:
            length = field.nbytes(self.numel)
            arrays[field.name] = buffer[offset : offset + length].view(field.dtype), field.block
            offset += length
        return [
            {
                name: array[piece.position // block : -(-(piece.position + piece.stop - piece.start) // block)]
                for name, (array, block) in arrays.items()
            }
            for piece in self.pieces
        ]


def make_layout(numels: dict[int, int], formats: dict[int, StateFormat], chunk_bytes: int | None) -> list[Chunk]:
    """Cut parameters (number -> elements, number -> format) into chunks of at most ``chunk_bytes``.

    The last parameter comes first, because backward finishes its gradient first. ``None``: a chunk for each parameter.
    """
    chunks: list[Chunk] = []
    for format in dict.fromkeys(formats.values()):
        pieces: list[Piece] = []
        used = 0
        limit = None if chunk_bytes is None else chunk_bytes // format.nbytes(BLOCK) * BLOCK
        assert limit != 0, f"chunks of {chunk_bytes} bytes cannot hold one block of {format}"

        def close(format: StateFormat = format) -> None:
            nonlocal pieces, used
            if pieces:
                chunks.append(Chunk(len(chunks), format, used, format.nbytes(used), tuple(pieces)))
            pieces, used = [], 0

        for parameter in reversed([i for i, f in formats.items() if f == format]):
            start = 0
            while start < numels[parameter]:
                stop = numels[parameter] if limit is None else min(numels[parameter], start + limit - used)
                pieces.append(Piece(parameter, start, stop, used))
                used += -(-(stop - start) // BLOCK) * BLOCK
                start = stop
                if limit is None or used == limit:
                    close()
        close()
    return chunks


def initialise(chunk: Chunk, buffer: Tensor, params: Sequence[Tensor]) -> None:
    """The states before the first step: zeros, and the weights themselves where a whole master is kept."""
    buffer[: chunk.nbytes].zero_()
    if chunk.format.master == "fp32":
        for piece, fields in zip(chunk.pieces, chunk.views(buffer), strict=True):
            fields["master"].copy_(params[piece.parameter].detach().view(-1)[piece.start : piece.stop])


def gather(
    chunks: Sequence[Chunk], peek: Callable[[Chunk], Tensor], parameter: int, *, may_alias: bool
) -> dict[str, Tensor]:
    """The fields of one parameter, flat: copies, or where ``may_alias`` a view if one chunk holds all of it."""
    parts: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        buffer = peek(chunk)
        for piece, fields in zip(chunk.pieces, chunk.views(buffer), strict=True):
            if piece.parameter == parameter:
                for name, array in fields.items():
                    parts.setdefault(name, []).append(array if may_alias and len(chunks) == 1 else array.clone())
    return {name: arrays[0] if len(arrays) == 1 else torch.cat(arrays) for name, arrays in parts.items()}


def scatter(chunk: Chunk, buffer: Tensor, values: Callable[[int], dict[str, Tensor]]) -> None:
    """Fill a chunk's buffer with the flat fields of its parameters, ``values(parameter)``."""
    for piece, fields in zip(chunk.pieces, chunk.views(buffer), strict=True):
        given = values(piece.parameter)
        for field in chunk.format.fields:
            target, start = fields[field.name], piece.start // field.block
            target.copy_(given[field.name].reshape(-1)[start : start + target.numel()])
