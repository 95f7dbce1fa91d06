"""lowprec.AdamW: torch's numbers, the same numbers in every store, a real torch.optim.Optimizer."""

import pytest
import torch
from lowprec_kernels.adamw.reference import join_master

from lowprec.errors import UserError
from lowprec.optim import AdamW
from tests.optim.training import backward, make_model, run, same, stores, train

FORMATS = [
    ("fp32", "split"),
    ("fp32", "fp32"),
    ("fp32", "none"),
    ("bf16", "split"),
    ("int8", "split"),
    ("int8", "none"),
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
