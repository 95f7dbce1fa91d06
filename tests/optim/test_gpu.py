"""What only a CUDA device can show: streams, pinned memory, the kernel in the optimizer, no host sync."""

import pytest
import torch
from lowprec_kernels.adamw.reference import join_master

from lowprec.optim import AdamW
from tests.optim.training import backward, make_model, same, train

pytestmark = pytest.mark.gpu
FORMATS = [("fp32", "split"), ("fp32", "none"), ("bf16", "split"), ("int8", "split"), ("int8", "fp32")]


def stores(tmp_path):
    small = {"chunk_bytes": 30_000}
    return [
        {"state_store": "cpu", **small},
        {"state_store": "ssd", "path": tmp_path / "states", "pinned_gib": 0.001, **small},
    ]


def run(stop, dtype, in_backward=False, **options):
    model = make_model(dtype).cuda()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, **options)
    if in_backward:
        optimizer.update_in_backward()
    weights = train(model, optimizer, stop)
    optimizer.close()
    return weights


@pytest.mark.parametrize(("state_dtype", "master"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_store_gives_the_same_bits_after_50_steps(tmp_path, dtype, state_dtype, master):
    format = {"state_dtype": state_dtype, "master": master}
    expected = run(50, dtype, **format)
    for store in stores(tmp_path):
        assert same(run(50, dtype, **format, **store), expected), store
        assert same(run(50, dtype, in_backward=True, **format, **store), expected), store


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_a_run_resumes_bit_identical_in_every_store(tmp_path, state_dtype):
    expected = run(12, torch.bfloat16, state_dtype=state_dtype)
    for number, store in enumerate([{}, *stores(tmp_path)]):
        model = make_model(torch.bfloat16).cuda()
        optimizer = AdamW(model.named_parameters(), lr=1e-2, state_dtype=state_dtype, **store)
        train(model, optimizer, 6)
        optimizer.save_states(tmp_path / str(number))
        optimizer.close()
        again = AdamW(model.named_parameters(), state_dtype=state_dtype, **store)
        again.load_states(tmp_path / str(number))
        assert same(train(model, again, 12, start=6), expected), store
        again.close()


def test_the_gpu_store_never_waits_for_the_device():
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.named_parameters())
    optimizer.found_inf = torch.zeros((), device="cuda")
    backward(model, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_updating_in_backward_never_waits_for_the_device(state_dtype):
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, state_dtype=state_dtype)
    optimizer.update_in_backward()
    optimizer.found_inf = torch.zeros((), device="cuda")
    x = torch.randn(8, 37, device="cuda", dtype=torch.bfloat16)
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes states and kernels
        try:
            model(x).float().square().mean().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_update_in_backward_stops_at_a_bad_gradient(state_dtype):
    model = make_model(torch.bfloat16).cuda()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, state_dtype=state_dtype, master="none")
    optimizer.update_in_backward()
    before = train(model, optimizer, 3)
    model(torch.full((1, 37), float("inf"), device="cuda", dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    after = [param.detach() for param in model.parameters()]
    assert not torch.isfinite(optimizer.grad_norm) and same(after[:-1], before[:-1]) and torch.isfinite(after[-1]).all()
    assert optimizer.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_found_inf_skips_the_step_on_the_device(tmp_path, state_dtype):
    for store in [{}, *stores(tmp_path)]:
        model = make_model(torch.bfloat16).cuda()
        optimizer = AdamW(model.named_parameters(), lr=1e-2, state_dtype=state_dtype, **store)
        before = train(model, optimizer, 3)
        states = {i: {k: v.clone() for k, v in f.items()} for i, f in optimizer.state_dict()["state"].items()}
        optimizer.found_inf = torch.ones(1, device="cuda")
        assert same(train(model, optimizer, 4, start=3), before)
        for i, fields in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, states[i][key]) for key, value in fields.items()), store
        optimizer.close()


@pytest.mark.parametrize(("state_dtype", "master"), FORMATS)
def test_many_small_parameters_in_few_launches_have_the_bits_of_one_each(monkeypatch, state_dtype, master):
    """Weights, biases whose sizes are no multiples of 16, and gradients that begin where a table cannot read them."""

    def trained(fewest):
        monkeypatch.setattr("lowprec.optim.update.FEWEST_TOGETHER", fewest)
        generator = torch.Generator("cuda").manual_seed(0)
        sizes = [(64, 48), (48,), (37,), (33, 64)] * 20
        params = [
            torch.nn.Parameter(torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16)) for s in sizes
        ]
        optimizer = AdamW(params, lr=1e-2, state_dtype=state_dtype, master=master)
        for step in range(3):
            for i, param in enumerate(params):
                shift = (i + step) % 3 == 0
                gradient = torch.randn(param.numel() + shift, generator=generator, device="cuda", dtype=param.dtype)
                param.grad = gradient[int(shift) :].view(param.shape)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                optimizer.step()
        launches = sum(row.count for row in profiler.key_averages() if "_adamw" in row.key)
        states = [value for fields in optimizer.state_dict()["state"].values() for value in fields.values()]
        return [param.detach() for param in params], states, launches

    weights, states, launches = trained(4)
    expected, its_states, many = trained(10**9)
    assert same(weights, expected) and same(states, its_states)
    assert many == 80 and launches < 50


def test_a_captured_step_takes_gradients_from_where_they_are():
    params = [torch.nn.Parameter(torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer, other = (AdamW(p, lr=1e-2, capturable=True) for p in (params, twins))
    for param, twin in zip(params, twins, strict=True):
        param.grad, twin.grad = torch.zeros_like(param), torch.zeros_like(twin)
    optimizer.step()
    other.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        for param, twin in zip(params, twins, strict=True):
            param.grad.normal_()
            twin.grad.copy_(param.grad)
        torch.empty(1 << 16, dtype=torch.int64, pin_memory=True).fill_(-1)  # host memory that is used again
        graph.replay()
        other.step()
    assert same(params, twins)


def test_split_master_is_fp32_adamw_over_100_steps():
    generator = torch.Generator("cuda").manual_seed(0)
    start = (torch.randn(100_000, generator=generator, device="cuda") * 0.05).bfloat16()
    exact, weight = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    reference, optimizer = torch.optim.AdamW([exact], lr=1e-3), AdamW([weight], lr=1e-3)
    for _ in range(100):
        weight.grad = (torch.randn(100_000, generator=generator, device="cuda") * 1e-3).bfloat16()
        exact.grad = weight.grad.float()
        reference.step()
        optimizer.step()
    master = join_master(weight.detach(), optimizer.state[weight]["residual"])
    assert (master - exact).norm() / exact.norm() < 1e-6


def test_an_update_on_the_cpu_brings_the_weights_back(tmp_path):
    expected = run(5, torch.bfloat16)
    for store in stores(tmp_path):
        found = run(5, torch.bfloat16, update_on="cpu", **store)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-3)


def test_device_memory_is_that_of_a_few_chunks(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(20_000_000, dtype=torch.bfloat16, device="cuda"))  # 200 MB of states
    optimizer = AdamW([("w", weight)], state_store="ssd", path=tmp_path, chunk_bytes=1 << 20, pinned_gib=0.02)
    weight.grad = torch.ones_like(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 16 << 20
    optimizer.close()
