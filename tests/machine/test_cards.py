import pytest

from lowprec.errors import UserError
from lowprec.machine import NAMED_CARDS, named_card
from lowprec.machine.roofline import efficiency, waves


def test_every_card_of_the_issue_is_there_and_found_by_its_driver_name():
    wanted = ("RTX 3060", "RTX 4060", "RTX 4070", "RTX 4090", "RTX 5090", "A10G", "L4", "A100", "H100")
    assert set(wanted) <= set(NAMED_CARDS)
    for name in NAMED_CARDS:
        assert named_card(f"NVIDIA GeForce {name}".lower()).name == name
        assert named_card(name.removeprefix("RTX ")).name == name
    with pytest.raises(UserError, match="RTX 4060"):
        named_card("RTX 2080")


@pytest.mark.parametrize("name", NAMED_CARDS)
def test_figures_agree_with_the_units_of_an_sm(name):
    """Dense rates an SM and clock: tensor products with fp32 sums 1024 operations on GeForce (half of their fp16-sum
    rate), int8 4096 and, where there is fp8, twice the 16-bit rate."""
    sheet = NAMED_CARDS[name]
    assert sheet.tf32 == pytest.approx(sheet.tf16 / 2, rel=0.02)
    assert sheet.fp8 is None or sheet.fp8 == pytest.approx(2 * sheet.tf16, rel=0.01)
    assert (sheet.fp8 is None) == (sheet.capability < (8, 9))
    if name.startswith("RTX"):
        assert sheet.int8 == pytest.approx(4 * sheet.tf16, rel=0.01), "int8 is not halved"
        assert sheet.fp32 == pytest.approx(sheet.tf16 / 2, rel=0.01)
        clock_ghz = sheet.tf16 * 1e3 / (sheet.sm_count * 512)
        assert 1.7 < clock_ghz < 2.6
    else:
        assert sheet.int8 == pytest.approx(2 * sheet.tf16, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "shape", "tflops"),
    [
        ("bf16", (8192, 4096, 4096), 770),
        ("bf16", (8192, 14336, 4096), 712),
        ("bf16", (8192, 4096, 14336), 708),
        ("bf16", (14336, 4096, 8192), 712),
        ("fp8", (8192, 4096, 4096), 1434),
        ("fp8", (8192, 14336, 4096), 1440),
        ("fp8", (8192, 4096, 14336), 1541),
        ("fp8", (14336, 4096, 8192), 1509),
        ("fp8", (4096, 14336, 8192), 1385),
        ("int8", (8192, 4096, 4096), 1229),
        ("int8", (8192, 14336, 4096), 1299),
        ("int8", (8192, 4096, 14336), 1359),
        ("int8", (14336, 4096, 8192), 1322),
        ("int8", (4096, 14336, 8192), 1132),
    ],
)
def test_the_datasheet_h100_is_near_the_measured_one(kind, shape, tflops):
    """docs/benchmarks/matmul_h100_202611.md. Large products only: nothing else was measured there."""
    m, n, k = shape
    assert named_card("H100").product_ms(kind, m, n, k) == pytest.approx(2 * m * n * k / tflops / 1e9, rel=0.16)


@pytest.mark.parametrize(
    ("shape", "us"),
    [((512, 256, 256), 5.9), ((256, 2048, 4096), 15.0), ((1024, 1024, 2048), 12.3), ((2048, 4096, 1024), 28.9)],
)
def test_small_products_of_the_datasheet_h100_are_near_published_ones(shape, us):
    """OpenXLA's table of an H100 in bf16 (docs/benchmarks/product_prediction_202611.md)."""
    assert 1e3 * named_card("H100").product_ms("bf16", *shape) == pytest.approx(us, rel=0.16)


def test_kinds_without_units_are_refused_and_nothing_takes_a_launch():
    with pytest.raises(UserError, match="no fp8"):
        named_card("RTX 3060").product_ms("fp8", 64, 64, 64)
    card = named_card("RTX 4060")
    assert card.product_ms("bf16", 0, 64, 64) == card.product_us / 1e3
    assert card.traffic_ms(card.memory_gb_per_s * 1e6) == pytest.approx(1 + card.launch_us / 1e3)
    assert card.product_ms("bf16", 1, 4096, 4096) > 4096 * 4096 * 2 / card.memory_gb_per_s / 1e6, "it reads the weight"


def test_tiles_come_in_waves():
    assert waves(128, 128 * 133, 128, 128, 132) == 2 and waves(1, 1, 128, 128, 132) == 1
    assert efficiency(256, 128 * 132, 132) == 1.0, "one full wave"
    assert efficiency(256, 128 * 133, 132) < 0.85, "a second wave for one tile"
    assert efficiency(64, 64, 132) < 0.01, "one multiprocessor works"
    assert efficiency(7, 7, 0) == 1.0, "a processor"
