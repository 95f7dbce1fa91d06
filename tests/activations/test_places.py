"""What is copied to and from fixed places, and memory that is read where it lies."""

from types import SimpleNamespace

import pytest
import torch

from lowprec.activations.places import SIDE_BY_SIDE, copies, tensors_of, unowned, with_tensors
from lowprec.data.documents import Documents
from lowprec.optim.backward import SMALL


def test_copies_are_contiguous_and_apart():
    odd = torch.arange(6.0).view(2, 3)
    found = [odd.t(), None, torch.ones(70, dtype=torch.float64), odd[:, 1], torch.tensor(3.0)]
    made = copies(found)
    assert made[1] is None
    for one, other in zip(found, made, strict=True):
        if one is not None:
            assert torch.equal(one, other) and other.is_contiguous() and one.data_ptr() != other.data_ptr()
    assert made[0].untyped_storage().data_ptr() == made[3].untyped_storage().data_ptr()
    assert made[3].data_ptr() % 64 == made[0].data_ptr() % 64
    assert copies([None]) == [None] and copies([]) == []
    assert SIDE_BY_SIDE <= SMALL, "what waits for an update in backward keeps no larger ones"
    large = torch.zeros(SIDE_BY_SIDE + 1)
    apart = copies([odd, large, odd, torch.zeros(0)])
    storages = [copy.untyped_storage() for copy in apart]
    assert storages[0].data_ptr() == storages[2].data_ptr() != storages[1].data_ptr()
    assert storages[1].nbytes() == large.nbytes and apart[3].numel() == 0


@pytest.mark.gpu
def test_memory_of_others_is_read_where_it_lies():
    owner = SimpleNamespace()
    for dtype in (torch.bfloat16, torch.float32, torch.int8):
        whole = torch.arange(60, device="cuda").to(dtype).view(6, 10)
        for part in (whole, whole.t(), whole[1:4, 2:5], whole[:, 3], whole[2, 2], whole[:0]):
            read = unowned(part, owner)
            assert torch.equal(read, part) and read.stride() == part.stride() and read.dtype == dtype
        read = unowned(whole, owner)
        whole.add_(1)
        assert torch.equal(read, whole)


def test_arguments_of_packed_rows_have_places():
    documents, mask = Documents.of([5, 7, 12]), torch.ones(2)
    arguments = (), {"documents": documents, "mask": mask, "plain": 3}
    signature, tensors = tensors_of(arguments)
    assert [tensor.tolist() for tensor in tensors] == [documents.rounded().borders.tolist(), [1, 1]]
    alike = Documents.of([9, 15])
    assert signature == tensors_of(((), {"documents": alike, "mask": mask, "plain": 3}))[0]
    other = Documents.of([1] * 9)
    assert signature != tensors_of(((), {"documents": other, "mask": mask, "plain": 3}))[0], "another power of two"
    _, keywords = with_tensors(arguments, (torch.zeros(9, dtype=torch.int32), mask + 1))
    assert keywords["documents"].borders.sum() == 0 and keywords["documents"].longest == 16
    assert keywords["mask"].tolist() == [2, 2] and keywords["plain"] == 3
