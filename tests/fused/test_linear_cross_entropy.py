"""The chunked head: gradients in fp64, equality with the plain path, and never more than a chunk of logits alive."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lowprec.fused.linear_cross_entropy import head_cross_entropy, linear_cross_entropy, rows_of_chunk
from lowprec.testing import sqnr_db

ROWS, WIDTH, CLASSES = 37, 12, 53


def problem(dtype=torch.float64, rows=ROWS, classes=CLASSES):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(classes, WIDTH, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(classes, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (rows,), generator=generator)
    targets[3] = -100
    return hidden, weight, bias, targets


def plain(hidden, weight, targets, bias=None, scale=1.0, softcap=0.0):
    z = F.linear(hidden, weight, bias) * scale
    z = softcap * torch.tanh(z / softcap) if softcap else z
    return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), targets, reduction="sum")


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_same_loss_and_gradients_as_the_plain_path(with_bias, softcap):
    hidden, weight, bias, targets = problem()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    arguments = {"bias": bias if with_bias else None, "scale": 0.5, "softcap": softcap}
    expected = plain(hidden, weight, targets, **arguments)
    wanted = torch.autograd.grad(expected * 0.01, leaves)
    loss = linear_cross_entropy(hidden, weight, targets, **arguments, chunk_rows=8)
    found = torch.autograd.grad(loss * 0.01, leaves)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        evaluated = linear_cross_entropy(hidden, weight, targets, **arguments, chunk_rows=5)
    torch.testing.assert_close(evaluated, expected, rtol=1e-12, atol=0)


def test_gradcheck():
    hidden, weight, bias, targets = problem(rows=7, classes=9)
    frozen = weight.detach()
    assert torch.autograd.gradcheck(
        lambda h, b: linear_cross_entropy(h, frozen, targets % 9, b, chunk_rows=3, softcap=4.0), (hidden, bias)
    )


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused():
    hidden, weight, _, targets = problem()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, chunk_rows=8).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=8)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_embeddings_get_both_gradients():
    _, weight, _, targets = problem()
    ids = torch.arange(ROWS) % CLASSES
    grads = []
    for loss in (plain, lambda h, w, t: linear_cross_entropy(h, w, t, chunk_rows=8)):
        weight.grad = None
        loss(F.embedding(ids, weight) * 0.3, weight, targets).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-13)


def test_no_trained_token_gives_zero_and_keeps_the_graph():
    hidden, weight, _, targets = problem()
    nothing = torch.zeros(0, dtype=torch.int64)
    loss = linear_cross_entropy(hidden.index_select(0, nothing), weight, targets[nothing])
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()
    head = LoraHead(weight)
    loss = head_cross_entropy(head, hidden.index_select(0, nothing), targets[nothing])
    loss.backward()
    assert loss == 0 and all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_as_near_to_fp64_as_the_plain_path(autocast):
    """Within 1 dB: the chunks of a bf16 weight gradient are summed in bf16."""
    hidden, weight, _, targets = problem(rows=512)
    exact = torch.autograd.grad(plain(hidden, weight, targets), (hidden, weight))
    noises = []
    for function in (plain, lambda h, w, t: linear_cross_entropy(h, w, t, chunk_rows=128)):
        dtype = torch.float32 if autocast else torch.bfloat16
        leaves = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = function(*leaves, targets)
        assert loss.dtype == torch.float32
        grads = torch.autograd.grad(loss, leaves)
        assert all(g.dtype == dtype for g in grads)
        noises.append([sqnr_db(e, g.double()) for e, g in zip(exact, grads, strict=True)])
    (plain_h, plain_w), (mine_h, mine_w) = noises
    assert mine_h > plain_h - 1 and mine_w > plain_w - 3


def test_the_loss_scale_of_fp16_goes_through_backward():
    hidden, weight, _, targets = problem(torch.float32)
    once = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden)[0]
    scaled = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets) * 1024, hidden)[0]
    assert torch.equal(scaled, once * 1024)


class LoraHead(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.a = nn.Parameter(torch.ones(2, WIDTH, dtype=weight.dtype))
        self.b = nn.Parameter(torch.full((CLASSES, 2), 0.01, dtype=weight.dtype))

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)


def test_heads_of_more_than_one_product():
    hidden, weight, _, targets = problem()
    head = LoraHead(weight)
    leaves = (hidden, *head.parameters())
    expected = F.cross_entropy(0.5 * head(hidden), targets, reduction="sum")
    wanted = torch.autograd.grad(expected, leaves)
    loss = head_cross_entropy(head, hidden, targets, scale=0.5, chunk_rows=8)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("path", ["linear", "head", "evaluation"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(path):
    hidden, weight, _, targets = problem(torch.float32, rows=600)
    with Largest() as largest:
        if path == "head":
            head_cross_entropy(LoraHead(weight), hidden, targets, chunk_rows=128).backward()
        else:
            with torch.set_grad_enabled(path == "linear"):
                loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=128)
            if path == "linear":
                loss.backward()
    assert largest.numel == max(128 * CLASSES, 0 if path == "evaluation" else 600 * WIDTH)
    with Largest() as largest:
        plain(hidden, weight, targets).backward()
    assert largest.numel == 600 * CLASSES


def test_chunks_are_whole_tiles():
    assert rows_of_chunk(128256, 2, trained=False) == 512 and rows_of_chunk(128256, 2, trained=True) == 2048
    assert rows_of_chunk(10**7, 4, trained=False) == 128
