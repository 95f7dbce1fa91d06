"""The AdamW update and its formats against fp64, torch and the Triton kernel (interpreted where there is no GPU)."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowprec_kernels.adamw import cases, reference

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel's module is imported
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


UNIT = 2.0**-24
"""The relative error of one rounding to fp32."""


def rounding_bounds(p, m, v, g, v_max, step: float, coded: bool) -> dict[str, torch.Tensor]:
    """How far two fp32 updates of the same numbers can lie apart, by field, to first order in ``UNIT``.

    Sums are bounded by their terms and not by themselves, since a fused multiply-add keeps what the other way has
    rounded off where the terms cancel. ``coded``: m and v were decoded from 8 bits, by a division or by a product.
    """
    p, m, v, g = (t.double() for t in (p, m, v, g))
    decoded_m, decoded_v = (12 * UNIT, 24 * UNIT) if coded else (0.0, 0.0)  # t^2 s and t^4 s with t = q/127, q/255
    new_p, new_m, new_v, used = reference.adamw(
        p, m, v, g, step=step, v_max=torch.zeros_like(v) if v_max is None else v_max.double(), **HYPER
    )
    tiny = torch.finfo(torch.float32).tiny  # what is smaller may be flushed
    terms = HYPER["beta1"] * m.abs() + (1 - HYPER["beta1"]) * g.abs()
    of_m = 4 * UNIT * terms + decoded_m * m.abs() + tiny  # a product and the sum, on both sides
    of_v = 6 * UNIT * new_v + decoded_v * v + tiny  # two products and the sum
    of_used = torch.maximum(of_v, decoded_v * used)
    rate = HYPER["lr"] / (1 - HYPER["beta1"] ** step)
    denominator = (used / (1 - HYPER["beta2"] ** step)).sqrt() + HYPER["eps"]
    change = rate * new_m.abs() / denominator
    # A dozen operations and constants on either side of the quotient, of which two may be off by four units.
    of_change = change * (20 * UNIT + of_used / used / 2) + rate * of_m / denominator
    of_p = 2 * UNIT * (p.abs() + new_p.abs()) + of_change + tiny
    bounds = {"param": of_p, "master": of_p}
    for name, bound in {"exp_avg": of_m, "exp_avg_sq": of_v, "max_exp_avg_sq": of_used}.items():
        bounds |= {name: bound, reference.SCALE_OF[name]: reference._blocks(bound).amax(1)}
    return bounds


def sqnr_db(expected: torch.Tensor, found: torch.Tensor) -> float:
    noise = (expected.double() - found.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise.clamp_min(1e-300)))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_update_is_torchs_in_fp64(amsgrad, maximize):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1000, dtype=torch.float64, generator=generator)
    ours, m, v, v_max = p.clone(), torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p) if amsgrad else None
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, amsgrad=amsgrad, maximize=maximize)
    for step in range(1, 21):
        theirs.grad = torch.randn(1000, dtype=torch.float64, generator=generator) / step
        optimizer.step()
        ours, m, v, v_max = reference.adamw(ours, m, v, theirs.grad, step=step, maximize=maximize, v_max=v_max, **HYPER)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


SPECIAL_BITS = [
    0,
    1,
    0x7FFF,
    0x8000,
    0x8001,
    0x18000,
    0x3F808000,
    0x3F818000,
    0x3FFFFFFF,
    0x007FFFFF,
    0x00008000,
    0x7F7FFFFF,
]


@settings(max_examples=300)
@given(st.lists(st.one_of(st.integers(0, 2**32 - 1), st.sampled_from(SPECIAL_BITS)), min_size=1, max_size=64))
def test_split_master_is_exact_and_its_weight_nearest(bits):
    """Every fp32 value, ties, carries into the exponent, negative and subnormal ones among them."""
    signed = [b - 2**32 if b >= 2**31 else b for b in [*bits, *SPECIAL_BITS, *(b | 0x80000000 for b in SPECIAL_BITS)]]
    master = torch.tensor(signed, dtype=torch.int32).view(torch.float32)
    weight, residual = reference.split_master(master)
    number = ~master.isnan()
    assert torch.equal(
        reference.join_master(weight, residual)[number].view(torch.int32), master[number].view(torch.int32)
    )
    assert weight[~number].isnan().all()
    cast = master.to(torch.bfloat16)
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[number & ~tie], cast[number & ~tie])
    finite = number & weight.isfinite() & cast.isfinite()
    distance = (weight.double() - master.double()).abs()
    assert torch.equal(distance[finite], (cast.double() - master.double()).abs()[finite])
    assert (weight.double().abs() > master.double().abs())[finite & tie].all()  # a tie goes away from zero


def test_stochastic_bf16_is_one_of_the_neighbours_and_unbiased():
    x = torch.cat([torch.randn(64) * 10.0**e for e in range(-6, 6)])
    draws = torch.stack(
        [reference.round_to_bf16(x, (torch.arange(len(x)) * 7919 + k * 509) % 65536) for k in range(4096)]
    )
    low = (x.view(torch.int32) & -65536).view(torch.float32)
    assert ((draws.float() - low).abs() <= (low * 2**-7).abs()).all()
    error = (draws.double().mean(0) - x.double()) / (x.abs() * 2**-7)
    assert error.abs().max() < 5 / 4096**0.5, "more than five standard errors from the value"
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.3895e38, 1e-40])
    rounded = reference.round_to_bf16(special, torch.full((6,), 65535))
    assert torch.equal(rounded[2:4].float(), special[2:4]) and rounded[4].isfinite()
    assert reference.round_to_bf16(torch.tensor([float("nan")]), torch.tensor([5])).isnan().all()


@pytest.mark.parametrize(("signed", "bound"), [(True, 38.0), (False, 40.0)])
def test_8bit_codes(signed, bound):
    """Moments of Gaussian gradients: measured 40.0 dB (m) and 42.0 dB (v); unbiased; a positive v stays positive."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator)
    x = x if signed else x.square()
    bits = reference.random_bits(0, len(x), 1, torch.ones(()))[0] & 0xFFFF
    codes, scale = reference.encode8(x, bits, signed)
    decoded = reference.decode8(codes, scale, signed)
    assert sqnr_db(x, decoded) > bound
    assert abs(float((decoded - x).sum() / x.abs().sum())) < 1e-3
    assert signed or (decoded[x > 0] > 0).all()
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 256)).view(-1, 256)
    assert torch.equal(scale, blocks.abs().amax(1))
    zeros, no_scale = reference.encode8(torch.zeros(300), torch.zeros(300, dtype=torch.int64), signed)
    assert not zeros.any() and not no_scale.any()


def test_8bit_second_moment_follows_a_change_that_rounding_to_nearest_would_swallow():
    """v falls by 0.1 % a step, an eighth of a code: after 2000 steps of decay it must be where fp32 has it."""
    v = torch.rand(25600) + 0.5
    codes, scale = reference.encode8(v, torch.zeros(25600, dtype=torch.int64), signed=False)
    exact = reference.decode8(codes, scale, signed=False)
    target = torch.full((25600,), 0.9)
    target[::256] = 1.5  # holds the block's scale
    for step in range(1, 501):
        exact = 0.999 * exact + 0.001 * target
        decoded = 0.999 * reference.decode8(codes, scale, signed=False) + 0.001 * target
        bits = reference.random_bits(0, 25600, 3, torch.tensor(float(step)))[0] >> 16
        codes, scale = reference.encode8(decoded, bits, signed=False)
    found = reference.decode8(codes, scale, signed=False)
    assert abs(float((found - exact).mean() / exact.mean())) < 3e-3


def test_random_bits_do_not_depend_on_the_slice_and_differ_by_key_and_step():
    step = torch.tensor(5.0)
    whole = reference.random_bits(0, 1000, 42, step)
    part = reference.random_bits(300, 100, 42, step)
    assert all(torch.equal(a[300:400], b) for a, b in zip(whole, part, strict=True))
    for other in (reference.random_bits(0, 1000, 43, step), reference.random_bits(0, 1000, 42, step + 1)):
        assert (whole[0] == other[0]).sum() < 3


def contingency(a: torch.Tensor, b: torch.Tensor, bins: int = 32) -> float:
    """How far two sequences of 16-bit numbers are from independent ones, beyond chance: 0, or 1 where a gives b."""
    counts = torch.bincount((a >> 11) * bins + (b >> 11), minlength=bins**2).double()
    excess = (counts - len(a) / bins**2).square().sum() / (len(a) / bins**2) - (bins**2 - 1)
    return float((excess.clamp_min(0) / len(a) / (bins - 1)).sqrt())


def test_random_bits_are_independent_of_their_neighbours_and_of_other_steps():
    """Measured: 0.002 at most among those that are compared; two halves of one word, too."""
    first, second = reference.random_bits(0, 1 << 20, 42, torch.tensor(5.0))
    later = reference.random_bits(0, 1 << 20, 42, torch.tensor(6.0))
    words = {"m": first & 0xFFFF, "v": first >> 16, "weight": second}
    next_words = {"m": later[0] & 0xFFFF, "v": later[0] >> 16, "weight": later[1]}
    pairs = {(a, b): (words[a], words[b]) for a, b in (("m", "v"), ("m", "weight"), ("v", "weight"))}
    pairs |= {(name, "next step"): (word, next_words[name]) for name, word in words.items()}
    for lag in (1, 2, 3, 4, 8, 16, 32, 255, 256, 2048, 4096, 65536):
        pairs |= {(name, lag): (word[lag:], word[:-lag]) for name, word in words.items()}
    assert max(contingency(*pair) for pair in pairs.values()) < 0.005
    for word in words.values():
        assert abs(word.double().mean() / 65536 - 0.5) < 0.002
        assert (torch.bincount(word >> 8) / 4096 - 1).abs().max() < 0.1


@pytest.mark.parametrize("master", ["none", "split"])
def test_kernel_at_the_ends_of_the_8bit_format(master):
    """Blocks of zeros, of numbers that fp32 barely holds, of equal ones, of one element beside tiny ones, and a NaN."""
    pytest.importorskip("triton")
    from lowprec_kernels.adamw import triton_kernel

    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(6 * 256, generator=generator)
    for block, factor in enumerate((0.0, 1e-16, 1e16)):
        grad[256 * block : 256 * (block + 1)] *= factor
    grad[768:1024] = 0.5
    grad[1025:1280] *= 1e-9
    grad[1300] = float("nan")
    grad = grad.bfloat16().to(DEVICE)
    param = torch.randn(6 * 256, generator=generator).bfloat16().to(DEVICE)
    states = {"residual": torch.zeros(len(param), dtype=torch.int16, device=DEVICE)} if master == "split" else {}
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        states[name] = torch.zeros(len(param), dtype=dtype, device=DEVICE)
        states[reference.SCALE_OF[name]] = torch.zeros(6, device=DEVICE)
    corrections = [torch.tensor(c, device=DEVICE) for c in (0.1, 0.001**0.5)]
    step = torch.ones((), device=DEVICE)
    before = param.clone()
    triton_kernel.run(
        param, grad, states, step=step, corrections=corrections, start=0, key=1, maximize=False, found_inf=None, **HYPER
    )
    _, m, v, _ = reference.decode(param, states)
    for name, found, exact in (("exp_avg", m, 0.1 * grad.double()), ("exp_avg_sq", v, 1e-3 * grad.double().square())):
        scale = states[reference.SCALE_OF[name]]
        torch.testing.assert_close(scale[:5].double(), exact.view(6, 256).abs().amax(1)[:5], rtol=1e-5, atol=0)
        assert (found[1024] / exact[1024] - 1).abs() < 1e-5 and (
            found[768:1024] / exact[768:1024] - 1
        ).abs().max() < 1e-5
        noise = (found[256:768].double() - exact[256:768]).view(2, 256).norm(dim=1)
        assert (noise / exact[256:768].view(2, 256).norm(dim=1)).max() < 0.02, f"{name}: {noise}"
    assert not states["exp_avg"][:256].any() and not states["exp_avg_sq"][:256].any()
    assert (states["exp_avg_sq"][256:1280] > 0).all(), "a positive v became zero"
    assert param[1300].isnan() and param.isfinite().sum() == len(param) - 1
    torch.testing.assert_close(param[:256], before[:256], rtol=2**-7, atol=0)


@pytest.mark.parametrize(
    ("weight_dtype", "master", "moments", "amsgrad"),
    [(*weight, moments, False) for weight in cases.WEIGHTS for moments in cases.MOMENTS]
    + [(torch.float32, "none", moments, True) for moments in cases.MOMENTS],
)
def test_kernel_agrees_with_the_reference(weight_dtype, master, moments, amsgrad):
    pytest.importorskip("triton")
    from lowprec_kernels.adamw import triton_kernel

    generator = torch.Generator().manual_seed(0)
    for numel in cases.NUMELS if DEVICE == "cuda" else (1, 257, 600):
        param, grad, states = cases.make_states(numel, weight_dtype, master, moments, amsgrad, DEVICE, generator)
        step = torch.tensor(7.0, device=DEVICE)
        p, m, v, v_max = reference.decode(param, states)
        g = -grad.float() if amsgrad else grad.float()
        bounds = rounding_bounds(p, m, v, g, v_max, 7.0, moments == "int8")  # before the kernel writes over them
        updated = reference.adamw(p, m, v, grad.float(), step=7.0, v_max=v_max, maximize=amsgrad, **HYPER)
        dtypes = {"param": param.dtype} | {name: tensor.dtype for name, tensor in states.items()}
        expected = reference.encode(*updated, dtypes, reference.random_bits(512, numel, 123456789, step))
        corrections = [torch.tensor(c, device=DEVICE) for c in (1 - 0.9**7, (1 - 0.999**7) ** 0.5)]
        arguments = dict(step=step, corrections=corrections, start=512, key=123456789, maximize=amsgrad, **HYPER)
        before = {name: tensor.clone() for name, tensor in ({"param": param} | states).items()}
        triton_kernel.run(param, grad, states, found_inf=torch.ones((), device=DEVICE), **arguments)
        for name, tensor in ({"param": param} | states).items():
            assert torch.equal(tensor, before[name]), f"{name} changed in a step that was to be skipped"
        triton_kernel.run(param, grad, states, found_inf=None, **arguments)

        found = {"param": param} | states
        if "residual" in states:  # a weight and its residual mean something together
            for fields in (found, expected):
                fields["param"] = reference.join_master(fields.pop("param"), fields.pop("residual"))
        if master == "fp32" and DEVICE == "cpu":
            # Triton's interpreter cuts where the GPU rounds: a unit in bf16's last place.
            torch.testing.assert_close(found.pop("param"), expected.pop("param"), rtol=2**-7, atol=0)
        for name, tensor in expected.items():
            if tensor.dtype in (torch.int8, torch.uint8):
                apart = (tensor.int() - found[name].int()).abs()
                assert apart.max() <= 1 and apart.float().mean() < 1e-3, f"{name}: other codes than by chance"
            elif tensor.dtype == torch.bfloat16:
                assert (tensor != found[name]).float().mean() <= 2e-3, f"{name}: rounded otherwise than by chance"
            else:
                share = ((found[name].double() - tensor.double()).abs() / bounds[name]).max()
                assert share <= 1, f"{name} is off by {share:.2f} of what rounding explains"


@pytest.mark.parametrize(("num_steps", "lr_is_tensor"), [(100, False), (5, True)])
def test_kernel_with_a_split_master_is_torchs_adamw(num_steps, lr_is_tensor):
    """Fed the same gradients. Measured after 100 steps: 8e-8 of the weights' norm."""
    pytest.importorskip("triton")
    from lowprec_kernels.adamw import triton_kernel

    generator, numel = torch.Generator().manual_seed(0), 256
    start = (torch.randn(numel, generator=generator) * 0.05).bfloat16()
    exact = torch.nn.Parameter(start.float().to(DEVICE))
    optimizer = torch.optim.AdamW([exact], lr=HYPER["lr"])
    weight = start.clone().to(DEVICE)
    states = {"residual": torch.zeros(numel, dtype=torch.int16, device=DEVICE)}
    states |= {name: torch.zeros(numel, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")}
    arguments = HYPER | ({"lr": torch.tensor(HYPER["lr"], device=DEVICE)} if lr_is_tensor else {})
    for count in range(1, num_steps + 1):
        grad = (torch.randn(numel, generator=generator) * 1e-3).bfloat16().to(DEVICE)
        exact.grad = grad.float()
        optimizer.step()
        corrections = [torch.tensor(c, device=DEVICE) for c in (1 - 0.9**count, (1 - 0.999**count) ** 0.5)]
        step = torch.tensor(float(count), device=DEVICE)
        triton_kernel.run(
            weight,
            grad,
            states,
            step=step,
            corrections=corrections,
            start=0,
            key=1,
            maximize=False,
            found_inf=None,
            **arguments,
        )
    master = reference.join_master(weight, states["residual"])
    assert (master - exact).norm() / exact.norm() < 1e-6


@pytest.mark.parametrize(
    ("weight_dtype", "master", "moments", "amsgrad"),
    [(*weight, moments, False) for weight in cases.WEIGHTS for moments in cases.MOMENTS]
    + [(torch.bfloat16, "split", moments, True) for moments in cases.MOMENTS],
)
def test_slices_of_one_launch_get_the_bits_of_their_own(weight_dtype, master, moments, amsgrad):
    """Of several sizes, one of more blocks than a program takes; with a flag that skips them; by a rate that is one."""
    pytest.importorskip("triton")
    from lowprec_kernels.adamw import triton_kernel

    generator = torch.Generator().manual_seed(0)
    numels = (16, 256, 608, 256 * triton_kernel.BLOCKS + 16)
    slices = [cases.make_states(n, weight_dtype, master, moments, amsgrad, DEVICE, generator) for n in numels]
    counts = torch.tensor([[7.0, 1 - 0.9**7, (1 - 0.999**7) ** 0.5]] * len(numels), device=DEVICE)
    places = [
        {"step": counts[i, 0], "corrections": (counts[i, 1], counts[i, 2]), "start": 512 * i, "key": 2**32 - 1 - i}
        for i in range(len(numels))
    ]
    settings = HYPER | {"lr": torch.tensor(HYPER["lr"], device=DEVICE), "maximize": amsgrad}
    apart = [(param.clone(), grad, {name: t.clone() for name, t in states.items()}) for param, grad, states in slices]
    for (param, grad, states), place in zip(apart, places, strict=True):
        triton_kernel.run(param, grad, states, found_inf=None, **place, **settings)

    rows = [triton_kernel.table_row(p, states, **place) for (p, _, states), place in zip(slices, places, strict=True)]
    arguments = rows, [grad for _, grad, _ in slices], slices[0][0], slices[0][2]
    before = [param.clone() for param, _, _ in slices]
    triton_kernel.run_table(*arguments, found_inf=torch.ones((), device=DEVICE), **settings)
    assert all(torch.equal(param, old) for (param, _, _), old in zip(slices, before, strict=True))
    triton_kernel.run_table(*arguments, found_inf=torch.zeros((), device=DEVICE), **settings)
    for (param, _, states), (alone, _, its_states), numel in zip(slices, apart, numels, strict=True):
        assert torch.equal(param, alone), numel
        for name, tensor in states.items():
            assert torch.equal(tensor, its_states[name]), (numel, name)


def test_slices_that_no_table_takes():
    pytest.importorskip("triton")
    from lowprec_kernels.adamw import triton_kernel

    place = {"step": torch.ones(()), "corrections": (torch.ones(()), torch.ones(())), "start": 0, "key": 1}

    def row(numel, begin=0):
        param = torch.zeros(numel + begin, dtype=torch.bfloat16)[begin:]
        return triton_kernel.table_row(param, {"exp_avg": param, "exp_avg_sq": param}, **place)

    assert row(256) is not None
    assert row(257) is None, "its mask would be read element by element"
    assert row(256, begin=1) is None, "its memory does not begin at a multiple of 16 bytes"
    assert row(triton_kernel.LARGEST_IN_TABLE + 16) is None
