"""Updates in backward: the numbers of updates after it, in every store, few launches, and nothing unmeasured."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec.errors import UserError
from lowprec.optim import AdamW
from tests.optim.training import backward, make_model, run, same, stores, train


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_update_in_backward_gives_the_same_bits_and_frees_gradients(tmp_path, dtype):
    expected, _ = run(10, dtype)
    for store in [{}, *stores(tmp_path)]:
        model = make_model(dtype)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, **store)
        optimizer.update_in_backward()
        for step in range(10):
            backward(model, step)
            assert all(param.grad is None for param in model.parameters()), store
            optimizer.step()
        assert same([p.detach() for p in model.parameters()], expected), store
        optimizer.close()


@pytest.mark.parametrize("together", [1, 300, 10**9])
def test_small_parameters_are_updated_together(together, monkeypatch):
    """Some in the middle of backward, the rest at its end; the numbers are those of updates after it."""
    monkeypatch.setattr("lowprec.optim.backward.SMALL", 500)
    monkeypatch.setattr("lowprec.optim.backward.TOGETHER", together)
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    batches = []
    update = optimizer._update
    monkeypatch.setattr(optimizer, "_update", lambda chunks, flag: batches.append(len(chunks)) or update(chunks, flag))
    optimizer.update_in_backward()
    small = [p for p in model.parameters() if p.numel() <= 500]
    assert 2 < len(small) < len(list(model.parameters()))
    assert [p for p in model.parameters() if not optimizer.uses_gradient_at_once(p)] == small
    other = make_model()
    for step in range(3):
        backward(model, step)
        backward(other, step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
        other.zero_grad()
        if step == 0:
            torch.testing.assert_close(optimizer.grad_norm, norm)
            assert len(batches) == len(list(model.parameters())) if together == 1 else max(batches) > 1
            assert sum(batches) == len(list(model.parameters()))
        optimizer.step()
    assert same([p.detach() for p in model.parameters()], run(3)[0])


@pytest.mark.parametrize("store", ["gpu", "cpu"])
def test_states_whose_memory_is_there_before_begin_at_the_first_step(store):
    """Not with the weights that a model had before its checkpoint was loaded."""
    expected, _ = run(3, torch.bfloat16, master="fp32")
    model = make_model(torch.bfloat16)
    loaded = {name: value.clone() for name, value in model.state_dict().items()}
    for param in model.parameters():
        torch.nn.init.ones_(param)
    small = {} if store == "gpu" else {"chunk_bytes": 20_000}
    optimizer = AdamW(model.named_parameters(), lr=1e-2, master="fp32", state_store=store, **small)
    buffers = _watch_allocations(optimizer)
    optimizer.update_in_backward()
    assert len(buffers) == len(optimizer._store.chunks) > 1 and not optimizer.state
    model.load_state_dict(loaded)
    assert same(train(model, optimizer, 3), expected)
    assert len(buffers) == len(optimizer._store.chunks), "the states lie in them"


class _Raises(torch.autograd.Function):
    """Nothing forward; an error backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_backward_that_raised_leaves_nothing_unmeasured(zeroed):
    """Small parameters wait then, whose callback at the end of backward never came."""
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(3)]
    optimizer = AdamW([(str(i), p) for i, p in enumerate(params)], lr=0.1)
    optimizer.update_in_backward()

    def fails():
        with pytest.raises(RuntimeError, match="in the middle"):
            (params[0] + _Raises.apply(params[1] * 1.0) + params[2]).sum().backward()

    fails()
    waiting = [p for p in params if p.grad is not None]
    assert waiting, "one came before the error"
    if zeroed:
        optimizer.zero_grad()
    else:
        waiting[0].grad[0] = float("nan")
    before = [p.detach().clone() for p in params]
    (params[1].sum() * 2).backward()
    assert params[1].grad is None and all(p.grad is None for p in params)
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in params)
    assert torch.equal(params[1], before[1]) is not zeroed, "a bad gradient stops what is updated with it"
    if zeroed:
        torch.testing.assert_close(optimizer.grad_norm, torch.tensor(20.0).sqrt())
    (params[0] + params[1] + params[2]).sum().backward()
    optimizer.step()
    assert all((p != 1).all() for p in params)


def _watch_allocations(optimizer):
    """A list that grows with the buffers that the optimizer's store takes."""
    allocate, taken = optimizer._store._allocate, []
    optimizer._store._allocate = lambda chunk: taken.append(allocate(chunk)) or taken[-1]
    return taken


def test_update_in_backward_gives_the_gradient_norm_and_stops_at_a_bad_gradient():
    model, other = make_model(), make_model()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    optimizer.update_in_backward()
    backward(model, 0)
    backward(other, 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    torch.testing.assert_close(optimizer.grad_norm, norm)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    (model(torch.full((1, 37), float("inf"))).sum()).backward()
    optimizer.step()
    assert not torch.isfinite(optimizer.grad_norm)
    after = [p.detach() for p in model.parameters()]
    assert same(after[:-1], before[:-1]), "an update after the first bad gradient"
    assert torch.isfinite(after[-1]).all(), "the last bias comes before it, with a gradient that is good"
    with pytest.raises(UserError, match="gradient_accumulation_steps=1"):
        backward(model, 1)
        backward(model, 2)


def test_found_inf_stops_the_updates_of_the_next_backward():
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    optimizer.update_in_backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.found_inf = torch.ones(1)
    backward(model, 0)
    optimizer.step()
    assert same([p.detach() for p in model.parameters()], before) and torch.isfinite(optimizer.grad_norm)
    optimizer.found_inf = torch.zeros(1)
    assert same(train(model, optimizer, 3), run(3)[0])


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched, each of which would be a launch or a call of the host on a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def test_a_step_costs_few_operations_however_many_parameters(monkeypatch):
    """A slow host bounds a step otherwise: in backward a norm, a flag and an update for a large parameter."""

    def operations(count, in_backward):
        params = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(count)]
        optimizer = AdamW(params)
        optimizer.found_inf = torch.zeros(())
        if in_backward:
            optimizer.update_in_backward()
        for _ in range(2):
            loss = sum(p.sum() for p in params)
            with Operations() as backward:
                loss.backward()
            with Operations() as step:
                optimizer.step()
            optimizer.zero_grad()
        return backward.count, step.count

    assert operations(50, False)[1] == operations(10, False)[1] < 15
    plain = operations(50, False)[0] - operations(10, False)[0]
    for small, more in ((100, 0), (0, 40 * 3)):
        monkeypatch.setattr("lowprec.optim.backward.SMALL", small)
        (many, step), (few, same_step) = operations(50, True), operations(10, True)
        assert many - few - plain == more and step == same_step < 15
