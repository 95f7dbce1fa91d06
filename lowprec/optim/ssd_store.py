"""States on one or several disks: read ahead, updated, written behind, through a bounded number of host buffers."""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.disk import GIB, Disk, HostMemory, aligned, bytes_of, direct_refusal
from lowprec.optim.layout import Chunk, initialise
from lowprec.optim.path_lock import PathLock, leftovers
from lowprec.optim.saved_chunks import SavedChunks, places
from lowprec.optim.ssd_files import Record, Version, checksum, keep, make_slots
from lowprec.optim.traffic import Traffic

MIN_BUFFERS = 4


class SsdStore:
    """Chunks in slots of the live version's files (ssd_files.py). See ``StateStore`` for the protocol.

    A buffer belongs to one chunk from the start of its read to the end of its write, and to nobody else.
    """

    resident = False

    def __init__(
        self,
        chunks: list[Chunk],
        names: Sequence[str],
        params: Sequence[Tensor],
        paths: Sequence[Path],
        *,
        chunk_bytes: int,
        pinned_gib: float,
        reserve_checkpoints: int,
        threads: int,
        pin: bool,
        disk: Disk | None = None,
    ):
        self.chunks = chunks
        self.traffic = Traffic()
        self.notes: list[str] = []
        self._names, self._params, self._paths = names, params, list(paths)
        self._disk = disk or Disk()
        self._pin = pin
        self._chunk_bytes = chunk_bytes
        self._reserve = reserve_checkpoints
        self._slots, self._stripe_bytes = make_slots(chunks, len(self._paths))
        self._records: dict[int, Record] = {}
        self._locks: list[PathLock] = []
        try:
            self._open(threads, pinned_gib)
        except BaseException:
            for lock in self._locks:
                lock.release()
            raise

    def _open(self, threads: int, pinned_gib: float) -> None:
        for path in self._paths:
            self._locks.append(PathLock(path))
            for file in leftovers(path):
                file.unlink()
        refusals = [direct_refusal(self._disk, path) for path in self._paths]
        self._direct = [refusal is None for refusal in refusals]
        for path, refusal in zip(self._paths, refusals, strict=True):
            if refusal is not None:
                self.notes.append(
                    f"state_store.path={path}: the page cache takes part in every transfer, because {refusal}."
                )
        largest = max((slot.length for slot in self._slots), default=0)
        useful = len(self.chunks) + MIN_BUFFERS
        count = min(int(pinned_gib * GIB) // max(largest, 1), useful)
        if count < MIN_BUFFERS:
            raise UserError(
                f"state_store.pinned_gib={pinned_gib} holds {count} buffers of {largest / 2**20:.1f} MiB, and the "
                f"store needs {MIN_BUFFERS}: set it to {MIN_BUFFERS * largest / GIB:.2f} at least."
            )
        busy = min(2 * threads, useful)  # one for each transfer that there may be at a time
        if count < busy:
            enough = math.ceil(busy * largest / GIB * 1000) / 1000
            self.notes.append(
                f"state_store.pinned_gib={pinned_gib} holds {count} buffers of {largest / 2**20:.1f} MiB, and there "
                f"may be {threads} reads and {threads} writes at a time, so the disk will idle: set it to {enough}."
            )
        self._next_number = 0
        self._spares: list[Version] = []
        # Before the files: where memory is refused, none is left behind.
        self._memory = HostMemory((count + 1) * aligned(largest), self._pin, "lower state_store.pinned_gib")
        self._live: Version | None = self._new_version()
        self._num_buffers = count
        self._free = deque(self._memory.take(aligned(largest)) for _ in range(count))
        self._peeked = self._memory.take(aligned(largest))
        self._plan: deque[Chunk] = deque()
        self._reading: dict[int, Future[Tensor]] = {}
        self._writing: dict[int, Future[None]] = {}
        self._held: dict[int, Tensor] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        # A checksum is made by other threads than the transfers, so that the disk never has less to do meanwhile.
        self._readers, self._checkers, self._summers, self._writers = self._pools = tuple(
            ThreadPoolExecutor(threads, f"lowprec-{work}") for work in ("read", "check", "sum", "write")
        )
        self._closed = False

    def _new_version(self) -> Version:
        if self._spares:
            return self._spares.pop()
        self._next_number += 1
        return Version.create(self._disk, self._next_number, self._paths, self._stripe_bytes, self._direct)

    def describe(self, chunk: Chunk) -> str:
        """Which chunk this is, for messages: its number and the parameters in it."""
        first, last = (self._names[chunk.pieces[i].parameter] for i in (0, -1))
        return f"chunk {chunk.index}, states of {first}" + (f" to {last}" if last != first else "")

    # Reading ahead ----------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Nothing to do: buffers and files are there."""

    def prefetch(self, order: Sequence[Chunk]) -> None:
        with self._changed:
            soon = {chunk.index for chunk in order[: self._num_buffers]}
            for index in self._finished_reads():
                if index not in soon:  # read ahead and not asked for: a step may leave parameters out
                    self._give_up_read(index)
            stored = self._records.keys() | self._writing.keys()
            self._plan = deque(chunk for chunk in order if chunk.index in stored and chunk.index not in self._reading)
            self._read_ahead()

    def _read_ahead(self) -> None:
        """Begin planned reads while there are free buffers. Call with ``_changed`` held."""
        while self._plan and self._free and self._error is None and not self._closed:
            self._start_read(self._plan.popleft())

    def _start_read(self, chunk: Chunk) -> None:
        if chunk.index in self._reading or chunk.index in self._held:
            return
        buffer = self._free.popleft()
        loaded = self._readers.submit(self._load, chunk, buffer, self._writing.get(chunk.index))
        future = self._checkers.submit(self._check, chunk, buffer, loaded)
        self._reading[chunk.index] = future
        future.add_done_callback(self._read_ended)

    def _load(self, chunk: Chunk, buffer: Tensor, pending_write: "Future[None] | None") -> Record:
        if pending_write is not None:
            pending_write.result()
        begin = time.perf_counter()
        record = self._records[chunk.index]
        record.read(bytes_of(buffer))
        with self._changed:
            self.traffic.bytes_read += record.slot.length
            self.traffic.read_s += time.perf_counter() - begin
        return record

    def _check(self, chunk: Chunk, buffer: Tensor, loaded: "Future[Record]") -> Tensor:
        loaded.result().check(bytes_of(buffer), self.describe(chunk))
        return buffer

    def read(self, chunk: Chunk) -> Tensor:
        assert chunk.index not in self._held, f"chunk {chunk.index} is being updated already"
        begin = time.perf_counter()
        with self._changed:
            self._raise_error()
            fresh = chunk.index not in self._records and chunk.index not in self._writing
            if chunk.index not in self._reading:
                if chunk in self._plan:
                    self._plan.remove(chunk)  # or it would be read once more after its update, and keep a buffer
                while not self._free:
                    self._raise_error()
                    finished = self._finished_reads()
                    if finished and not self._writing:  # writes under way will free buffers
                        self._give_up_read(finished[-1])
                        self._plan.append(self.chunks[finished[-1]])
                    else:
                        self._changed.wait()
                if fresh:
                    buffer = self._free.popleft()
                else:
                    self._start_read(chunk)
        if fresh:
            initialise(chunk, buffer, self._params)
        else:
            buffer = self._result(self._reading[chunk.index])
        with self._changed:
            self._reading.pop(chunk.index, None)
            self._held[chunk.index] = buffer
            self.traffic.unhidden_s += time.perf_counter() - begin
        return buffer

    def _finished_reads(self) -> list[int]:
        """The chunks that wait to be asked for, in the order of their reads. Call with ``_changed`` held."""
        return [i for i, future in self._reading.items() if future.done() and future.exception() is None]

    def _give_up_read(self, index: int) -> None:
        """Take the buffer of a finished read back. Call with ``_changed`` held.

        Where chunks are asked for in another order than announced, all buffers may be full of others.
        """
        self._free.append(self._reading.pop(index).result())

    def _read_ended(self, future: "Future[Tensor]") -> None:
        with self._changed:
            # Nobody may ask for this chunk, and a step that waits for its buffer would wait for ever.
            self._error = self._error or future.exception()
            self._changed.notify_all()

    def _result(self, future: "Future[Any]") -> Any:
        try:
            return future.result()
        except BaseException as error:
            self._error = self._error or error  # a step is torn from here on: nothing may be saved of it
            raise self._failure(error) from error

    # Writing behind ---------------------------------------------------------------------------------------------------

    def write(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None" = None) -> None:
        with self._changed:
            self._raise_error()
            assert self._held.pop(chunk.index) is buffer, "a chunk is updated in the buffer that read gave"
            try:
                self._make_room()
            except BaseException as error:
                self._error = error  # the step is torn
                raise
            assert self._live is not None
            summed = self._summers.submit(self._sum, chunk, buffer, after)
            self._writing[chunk.index] = self._writers.submit(self._store, chunk, buffer, summed, self._live)

    def _make_room(self) -> None:
        """The version to write to; in the first write of a run that resumes no checkpoint, the reserved ones too."""
        if self._live is None:
            self._live = self._new_version()
        reserve, self._reserve = self._reserve, 0
        self._spares += [self._new_version() for _ in range(reserve)]

    def _sum(self, chunk: Chunk, buffer: Tensor, after: "torch.cuda.Event | None") -> int:
        if after is not None:
            after.synchronize()
        return checksum(bytes_of(buffer)[: self._slots[chunk.index].length])

    def _store(self, chunk: Chunk, buffer: Tensor, summed: "Future[int]", version: Version) -> None:
        try:
            slot = self._slots[chunk.index]
            record = Record(version, slot, summed.result())
            begin = time.perf_counter()
            version.files[slot.stripe].write(bytes_of(buffer)[: slot.length], slot.offset)
            with self._changed:
                self._replace(chunk, record)
                self.traffic.bytes_written += slot.length
                self.traffic.write_s += time.perf_counter() - begin
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
            raise
        finally:
            with self._changed:
                self._writing.pop(chunk.index)
                self._free.append(buffer)
                self._read_ahead()
                self._changed.notify_all()

    def _replace(self, chunk: Chunk, record: Record) -> None:
        """The chunk's newest states are in ``record`` now; a version that holds no newest states is given up."""
        old = self._records.get(chunk.index)
        self._records[chunk.index] = record
        record.version.chunks += 1
        if old is not None:
            old.version.chunks -= 1
            if old.version.chunks == 0 and old.version is not self._live:
                old.version.drop()

    def _failure(self, error: BaseException) -> BaseException:
        if not isinstance(error, OSError):
            return error
        return UserError(
            f"state_store.path={', '.join(map(str, self._paths))}: the disk failed ({error}). The run stops here; "
            "its last checkpoint is intact: mend the disk or choose another state_store.path, and resume from it."
        )

    def _raise_error(self) -> None:
        assert not self._closed, "the store is closed"
        if self._error is not None:
            raise self._failure(self._error) from self._error

    # Looking, waiting, ending -----------------------------------------------------------------------------------------

    def peek(self, chunk: Chunk) -> Tensor:
        with self._changed:
            writing, reading = self._writing.get(chunk.index), self._reading.get(chunk.index)
        if writing is not None:
            self._result(writing)
        if reading is not None:
            return self._result(reading)
        if chunk.index in self._records:
            record = self._records[chunk.index]
            record.read(bytes_of(self._peeked))
            record.check(bytes_of(self._peeked), self.describe(chunk))
        else:
            initialise(chunk, self._peeked, self._params)
        return self._peeked

    def flush(self) -> None:
        begin = time.perf_counter()
        with self._changed:
            while self._writing:
                self._changed.wait()
            self._raise_error()
        try:
            for version in {id(r.version): r.version for r in self._records.values() if r.version.owned}.values():
                version.sync()
        except OSError as error:
            self._error = error
            raise self._failure(error) from error
        self.traffic.unhidden_s += time.perf_counter() - begin

    def close(self) -> None:
        if self._closed:
            return
        with self._changed:
            self._plan.clear()
            self._closed = True
        for pool in self._pools:
            pool.shutdown()
        versions = {id(version): version for version in [*self._spares, *([self._live] if self._live else [])]}
        versions |= {id(record.version): record.version for record in self._records.values()}
        for version in versions.values():
            version.drop()
        self._records.clear()
        self._free.clear()
        self._memory.close()
        for lock in self._locks:
            lock.release()

    def snapshot(self, folder: Path) -> dict[str, Any]:
        for chunk in self.chunks:
            if chunk.index not in self._records and chunk.format.master == "fp32":
                self.write(chunk, self.read(chunk))  # a master that no step has touched, and which is not zeros
        self.flush()
        manifest, linked = keep(self._disk, [self._records.get(chunk.index) for chunk in self.chunks], folder)
        if linked:
            self._live = None  # the checkpoint owns these blocks now: the next write begins a new version
        return manifest | {"chunk_bytes": self._chunk_bytes}

    def restore(self, saved: SavedChunks) -> bool:
        if saved.places() != places(self.chunks, self._names):
            return False
        assert not self._records, "states are restored into a fresh store"
        for chunk, record in zip(self.chunks, saved.records, strict=True):
            if record is not None:
                self._replace(chunk, record)
        self._reserve = 0  # the checkpoint takes the reserved place already
        return True
