"""A checkpoint of the ssd store, read chunk by chunk: to continue from, to load into another store, to export."""

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.optim.disk import Disk, bytes_of
from lowprec.optim.layout import Chunk, gather, initialise, make_layout
from lowprec.optim.ssd_files import Record, open_kept
from lowprec.optim.states_io import Header


def places(chunks: Sequence[Chunk], names: Sequence[str]) -> list[Any]:
    """How chunks are cut, by parameter name: equal for two stores whose chunks hold the same."""
    return [
        (chunk.format, chunk.nbytes, [(names[p.parameter], p.start, p.stop, p.position) for p in chunk.pieces])
        for chunk in chunks
    ]


class SavedChunks:
    """The chunks of a checkpoint. ``header.store`` is the manifest that the store's ``snapshot`` returned."""

    def __init__(self, folder: Path, header: Header, disk: Disk | None = None):
        manifest = header.store
        assert manifest is not None, f"{folder} holds states by name, not chunks"
        self.names = list(header.parameters)
        self.numels = [header.numel_of(name) for name in self.names]
        formats = {i: header.format_of(name) for i, name in enumerate(self.names)}
        self.chunks = make_layout(dict(enumerate(self.numels)), formats, manifest["chunk_bytes"])
        self.records: list[Record | None] = open_kept(disk or Disk(), folder, manifest)
        assert len(self.records) == len(self.chunks), f"{folder}: the manifest does not fit its own layout"
        self._index = {name: i for i, name in enumerate(self.names)}
        self._chunks_of: dict[int, list[Chunk]] = {}
        for chunk in self.chunks:
            for parameter in dict.fromkeys(piece.parameter for piece in chunk.pieces):
                self._chunks_of.setdefault(parameter, []).append(chunk)
        longest = max((r.slot.length for r in self.records if r is not None), default=0)
        longest = max([longest, *(chunk.nbytes for chunk in self.chunks)])
        self._buffer = torch.frombuffer(mmap.mmap(-1, longest), dtype=torch.uint8)

    def places(self) -> list[Any]:
        return places(self.chunks, self.names)

    def fields_of(self, name: str) -> dict[str, Tensor]:
        """The fields of one parameter, flat, in memory of their own; zeros where it was never updated."""
        parameter = self._index[name]
        fields = gather(self._chunks_of[parameter], self._peek, parameter, may_alias=False)
        return {key: array.clone() for key, array in fields.items()}

    def _peek(self, chunk: Chunk) -> Tensor:
        record = self.records[chunk.index]
        if record is None:
            assert chunk.format.master != "fp32", "masters are written with the first checkpoint"
            initialise(chunk, self._buffer, ())
        else:
            record.read(bytes_of(self._buffer))
            record.check(bytes_of(self._buffer), f"chunk {chunk.index} of a checkpoint")
        return self._buffer

    def close(self) -> None:
        for version in {id(r.version): r.version for r in self.records if r is not None}.values():
            version.drop()
