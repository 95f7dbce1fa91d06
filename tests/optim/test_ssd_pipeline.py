"""The ssd store's pipeline: what is read ahead, which buffers are held, and that the disk need not wait."""

import threading
import time
import zlib
from functools import partial

import pytest
import torch

from lowprec.optim import AdamW
from lowprec.optim.disk import Disk
from tests.optim.training import ssd, start


def test_chunks_may_be_asked_for_in_any_order(tmp_path):
    """All buffers full of prefetched chunks, and another one is needed first."""
    _, optimizer = start(tmp_path)
    store = optimizer._store
    optimizer.flush()
    store.prefetch(store.chunks)
    time.sleep(0.05)
    assert len(store.chunks) > len(store._reading) >= 3
    for chunk in reversed(store.chunks):
        store.write(chunk, store.read(chunk))
    optimizer.flush()
    optimizer.close()


@pytest.mark.parametrize("method", ["read", "write"])
def test_the_disk_need_not_wait_for_checksums(tmp_path, monkeypatch, method):
    """One transfer at a time. A chunk is checked while the next is read, and written while the next is summed."""
    disk = Disk()
    _, optimizer = start(tmp_path, disk=disk, threads=1, pinned_gib=0.01)
    store, begun, ended = optimizer._store, threading.Semaphore(0), []
    for chunk in store.chunks:
        store.write(chunk, store.read(chunk))
    optimizer.flush()  # all buffers are free, and nothing is being read

    def first(call, *args):
        begun.release()
        return call(*args)

    def second(call, *args):
        number = len(ended)
        ended.append(number)
        if number < len(store.chunks) - 1:
            for _ in range(2 if number == 0 else 1):
                assert begun.acquire(timeout=30), f"{number} could not end before the next began"
        return call(*args)

    transfer, summed = (first, second) if method == "read" else (second, first)
    module = "ssd_files" if method == "read" else "ssd_store"
    monkeypatch.setattr(disk, method, partial(transfer, getattr(disk, method)))
    monkeypatch.setattr(f"lowprec.optim.{module}.checksum", partial(summed, zlib.crc32))
    store.prefetch(store.chunks)
    for chunk in store.chunks:
        store.write(chunk, store.read(chunk))
    optimizer.flush()
    assert len(ended) == len(store.chunks) > 3
    optimizer.close()


class CountingDisk(Disk):
    reads = 0

    def read(self, *args):
        self.reads += 1
        return super().read(*args)


def test_every_chunk_is_read_once_a_step_in_whatever_order(tmp_path):
    """Announced twice, and asked for from the end: a chunk that a step has updated keeps no buffer for the next one."""
    disk = CountingDisk()
    _, optimizer = start(tmp_path, disk=disk)
    store = optimizer._store
    for order in (store.chunks, store.chunks[::-1]):
        store.prefetch(store.chunks)
        store.prefetch(store.chunks)
        for chunk in order:
            store.write(chunk, store.read(chunk))
        assert not store._plan and not store._reading
    optimizer.close()


def test_parameters_that_steps_leave_out_keep_no_buffers(tmp_path):
    disk = CountingDisk()
    weights = [(f"w{i}", torch.nn.Parameter(torch.zeros(2000))) for i in range(40)]
    optimizer = AdamW(weights, **ssd(tmp_path, disk=disk))
    store = optimizer._store

    def reads_of_step(used):
        before = disk.reads
        for number, (_, weight) in enumerate(weights):
            weight.grad = torch.ones_like(weight) if number in used else None
        optimizer.step()
        optimizer.flush()
        while not all(future.done() for future in store._reading.values()):
            time.sleep(0.01)
        return disk.reads - before

    first_half = [chunk.index for chunk in store.chunks if chunk.pieces[-1].parameter < 20]
    reads_of_step(range(40))
    for _ in range(2):
        reads_of_step(range(20))  # finds chunks of the others read ahead, or still being read
    # On a busy processor a chunk that was read ahead may have to make room, and be read again.
    reads = [reads_of_step(range(20)) for _ in range(4)]
    assert len(first_half) <= min(reads) <= max(reads) < len(store.chunks)
    assert store._reading.keys() <= set(first_half)
    reads_of_step(range(40))  # they come back
    assert all(torch.equal(weight, weight[0].expand_as(weight)) for _, weight in weights)
    optimizer.close()
