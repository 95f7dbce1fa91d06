"""lowprec.AdamW: torch's numbers, the same numbers in every store, a real torch.optim.Optimizer."""

import pytest
import torch
from lowprec_kernels.adamw.reference import join_master
from torch.utils._python_dispatch import TorchDispatchMode

from lowprec.errors import UserError
from lowprec.optim import AdamW
from tests.optim.training import backward, make_model, run, same, train

FORMATS = [
    ("fp32", "split"),
    ("fp32", "fp32"),
    ("fp32", "none"),
    ("bf16", "split"),
    ("int8", "split"),
    ("int8", "none"),
]


def stores(tmp_path):
    small = {"chunk_bytes": 20_000}
    return [
        {"state_store": "cpu", **small},
        {"state_store": "ssd", "path": tmp_path / "one", "pinned_gib": 0.0005, **small},
        {"state_store": "ssd", "path": [tmp_path / "a", tmp_path / "b"], "pinned_gib": 0.0005, **small},
    ]


@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0, "eps": 1e-6}])
def test_fp32_is_torchs_fused_adamw_bit_for_bit(variant):
    model = make_model()
    expected = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, **variant), 10)
    weights, _ = run(10, **variant)
    assert same(weights, expected)


@pytest.mark.parametrize(
    ("dtype", "state_dtype", "master"),
    [(torch.float32, "fp32", "none"), (torch.float32, "int8", "none")]
    + [(torch.bfloat16, *format) for format in FORMATS],
)
def test_every_store_gives_the_same_bits_after_50_steps(tmp_path, dtype, state_dtype, master):
    format = {"state_dtype": state_dtype, "master": master}
    expected, _ = run(50, dtype, **format)
    for store in stores(tmp_path)[:2]:
        weights, optimizer = run(50, dtype, **format, **store)
        optimizer.close()
        assert same(weights, expected), store


def test_split_master_is_fp32_adamw_over_100_steps():
    """Fed the same gradients; and the bf16 weight is the master rounded to nearest."""
    generator = torch.Generator().manual_seed(0)
    start = (torch.randn(10_000, generator=generator) * 0.05).bfloat16()
    exact, weight = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    reference, optimizer = torch.optim.AdamW([exact], lr=1e-3), AdamW([weight], lr=1e-3)
    for _ in range(100):
        weight.grad = (torch.randn(10_000, generator=generator) * 1e-3).bfloat16()
        exact.grad = weight.grad.float()
        reference.step()
        optimizer.step()
    master = join_master(weight.detach(), optimizer.state[weight]["residual"])
    assert (master - exact).norm() / exact.norm() < 1e-6
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], master[~tie].bfloat16())


@pytest.mark.parametrize(
    ("state_dtype", "master", "bound"), [("bf16", "split", 0.02), ("int8", "split", 0.02), ("int8", "none", 0.05)]
)
def test_compressed_states_reach_the_loss_of_fp32(state_dtype, master, bound):
    """A regression to convergence: final loss within ``bound`` of fp32's, relative to where both began."""

    def final(**format):
        torch.manual_seed(0)
        x, target = torch.randn(512, 64), torch.randn(512, 8)
        weight = torch.nn.Parameter(torch.zeros(8, 64, dtype=torch.bfloat16))
        optimizer = AdamW([weight], lr=3e-3, weight_decay=0.0, **format)
        for _ in range(300):
            loss = ((x @ weight.float().T) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    exact = final()
    assert abs(final(state_dtype=state_dtype, master=master) - exact) / exact < bound


def test_a_seed_repeats_stochastic_rounding_and_another_does_not():
    def weights(seed):
        return run(5, torch.bfloat16, master="none", seed=seed)[0]

    assert same(weights(0), weights(0)) and not same(weights(0), weights(1))


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_found_inf_leaves_weights_states_and_counts(tmp_path, state_dtype):
    for store in [{}, *stores(tmp_path)]:
        model = make_model(torch.bfloat16)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, state_dtype=state_dtype, **store)
        train(model, optimizer, 3)
        before, states = [p.detach().clone() for p in model.parameters()], optimizer.state_dict()["state"]
        states = {i: {key: value.clone() for key, value in fields.items()} for i, fields in states.items()}
        optimizer.found_inf = torch.ones(1)
        backward(model, 3)
        model[0].weight.grad.fill_(float("nan"))
        optimizer.step()
        optimizer.zero_grad()
        assert same([p.detach() for p in model.parameters()], before)
        for i, fields in optimizer.state_dict()["state"].items():
            for key, value in fields.items():
                assert torch.equal(value, states[i][key]), (store, key)
        optimizer.found_inf = torch.zeros(1)
        train(model, optimizer, 4, start=3)
        assert optimizer.state_dict()["state"][0]["step"] == 4
        optimizer.close()


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


def test_a_parameter_may_move_between_steps():
    model = make_model()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    train(model, optimizer, 3)
    for param in model.parameters():
        param.data = param.data.clone()
    assert same(train(model, optimizer, 6, start=3), run(6)[0])


def test_it_is_an_optimizer():
    model = make_model()
    groups = [
        {"params": list(model[0].named_parameters("0")), "lr": 1e-3},
        {"params": list(model[2].named_parameters("2")), "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=1e-2)
    torch_groups = [
        {"params": list(model[0].parameters()), "lr": 1e-3},
        {"params": list(model[2].parameters()), "weight_decay": 0.0},
    ]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    copies = make_model()
    torch_groups = [
        {"params": list(copies[0].parameters()), "lr": 1e-3},
        {"params": list(copies[2].parameters()), "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(torch_groups, lr=1e-2, fused=True)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(reference, 5)

    def closure():
        optimizer.zero_grad()
        return backward(model, 0)

    for _ in range(3):
        loss = optimizer.step(closure)
        reference.zero_grad()
        assert backward(copies, 0) == loss
        reference.step()
        schedule.step()
        other.step()
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in copies.parameters()])
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (190, 37)


def test_frozen_parameters_and_parameters_without_gradients_are_left_out():
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    unused = torch.nn.Parameter(torch.ones(3))
    weights = train(model, optimizer, 3)
    assert torch.equal(weights[0], make_model()[0].weight) and model[0].weight not in optimizer.state
    both = AdamW([("used", model[2].weight), ("unused", unused)], lr=1e-2)
    backward(model, 0)
    both.step()
    assert torch.equal(unused, torch.ones(3)) and both.state[unused]["step"] == 0
    model[0].requires_grad_(True)
    backward(model, 0)
    with pytest.raises(UserError, match="0.weight has a gradient"):
        optimizer.step()


def test_accelerate_prepares_it():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make_model()
    model, optimizer = accelerator.prepare(model, AdamW(model.named_parameters(), lr=1e-2))
    for step in range(3):
        with accelerator.accumulate(model):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()
    assert same([p.detach() for p in model.parameters()], run(3)[0])


@pytest.mark.parametrize(("state_dtype", "master"), FORMATS)
def test_state_dict_is_exact_and_moves_between_stores(tmp_path, state_dtype, master):
    format = {"state_dtype": state_dtype, "master": master}
    expected, _ = run(8, torch.bfloat16, **format)
    for source, target in zip(stores(tmp_path), [{}, *stores(tmp_path / "to")], strict=False):
        model = make_model(torch.bfloat16)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, **format, **source)
        train(model, optimizer, 4)
        again = AdamW(model.named_parameters(), lr=3.0, **format, **target)
        again.load_state_dict(optimizer.state_dict())
        assert again.param_groups[0]["lr"] == 1e-2
        assert same(train(model, again, 8, start=4), expected)
        optimizer.close()
        again.close()


def test_a_state_dict_of_another_format_is_refused():
    _, optimizer = run(2, torch.bfloat16)
    other = AdamW(make_model(torch.bfloat16).named_parameters(), state_dtype="int8")
    with pytest.raises(UserError, match=r"0\.weight .*exp_avg should be torch.int8"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"foreach": True}, "foreach=True"),
        ({"fused": False}, "fused=False"),
        ({"differentiable": True}, "differentiable=True"),
        ({"capturable": True, "state_store": "cpu"}, "capturable=True"),
        ({"state_store": "disk"}, "gpu, cpu, ssd"),
        ({"state_store": "ssd"}, "state_store.path"),
        ({"path": "/tmp/x"}, "keeps no files"),
        ({"state_dtype": "fp8"}, "fp32, bf16, int8"),
        ({"master": "half"}, "split, fp32, none"),
        ({"update_on": "gpu"}, "weights or cpu"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        AdamW(make_model().named_parameters(), **arguments)


def test_parameters_that_cannot_be_updated_are_refused():
    with pytest.raises(UserError, match="half has dtype torch.float16"):
        AdamW([("half", torch.nn.Parameter(torch.zeros(3, dtype=torch.float16)))])
    with pytest.raises(UserError, match="turned .* not contiguous"):
        AdamW([("turned", torch.nn.Parameter(torch.zeros(3, 4).T))])
    with pytest.raises(UserError, match="takes no parameter group"):
        AdamW(make_model().named_parameters()).add_param_group({"params": []})
    sparse = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(sparse.named_parameters())
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(UserError, match="weight has a sparse gradient"):
        optimizer.step()
