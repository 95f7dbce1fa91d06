"""Figures of named cards, from their datasheets, dense and with fp32 accumulation.

Sources, by card (all NVIDIA's):
- RTX 3060: "NVIDIA Ampere GA102 GPU Architecture" (whitepaper) for the rates of an SM, the product page for SMs, clock,
  memory and board power: 28 SMs at 1.777 GHz.
- RTX 4060, 4070: "NVIDIA Ada GPU Architecture" (whitepaper) for the rates of an SM, product pages for the rest: 24 SMs
  at 2.460 GHz, 46 at 2.475 GHz.
- RTX 4090: "NVIDIA Ada GPU Architecture", appendix A.
- RTX 5090: "NVIDIA RTX Blackwell GPU Architecture" (whitepaper), appendix A.
- A10G: datasheet "NVIDIA A10G Tensor Core GPU"; 80 SMs and 22.1 GiB as the driver reports them.
- L4, A100 80GB SXM, H100 SXM5, H200 SXM: their datasheets (halved where those count sparsity).

On GeForce cards tensor products that accumulate in fp32, as PyTorch's do, run at half the rate of those that accumulate
in fp16, and advertised rates count the latter, with sparsity: an RTX 4090's "1321 TOPS" are 165 TFLOP/s in bf16, 330 in
fp8. int8 is not halved (660).
"""

from dataclasses import dataclass

from lowprec.errors import UserError
from lowprec.machine.machine import Machine

PRODUCT_SHARE = {"bf16": 0.75, "fp16": 0.75, "tf32": 0.65, "fp32": 0.75, "fp8": 0.72, "int8": 0.66}
"""Of the peak, what large products reach: docs/benchmarks/matmul_h100_202611.md has bf16 0.72 to 0.78, fp8 0.70 to
0.78, int8 0.62 to 0.69 of an H100; OpenXLA's table tf32 0.6 to 0.8. Other cards and kinds are assumed alike: not
measured yet."""
MEMORY_SHARE = 0.87
"""Of the peak, what a copy reaches: 2.92 of 3.35 TB/s (docs/benchmarks/rotate_h100_202611.md)."""
PCIE_GB_PER_S_PER_LANE = {3: 0.985, 4: 1.969, 5: 3.938}
"""After the line code (PCI-SIG)."""
PCIE_SHARE = 0.8
"""Of that, what a pinned copy reaches: packet headers take the rest at payloads of 128 to 256 bytes."""
DISK_GB_PER_S = (5.0, 4.0, 4.0)
"""Read, write, mixed: an NVMe drive on four lanes of PCIe 4.0, assumed where no drive was measured."""
CONTEXT_MIB = 400.0
LAUNCH_US = 2.0
"""In replayed steps on an H100, 2026-11-26: the shortest kernels take 1.8 us, the gap after one 0.5 to 1."""
PRODUCT_US = 5.5
"""The smallest products of OpenXLA's table of an H100 take 5.9 us, of which arithmetic and traffic are 0.3."""


@dataclass(frozen=True, slots=True)
class Datasheet:
    """Peaks: TFLOP/s dense with fp32 accumulation (None: no such units), GB/s, board power in W."""

    capability: tuple[int, int]
    sm_count: int
    vram_gib: float
    memory_gb_per_s: float
    pcie: tuple[int, int]
    """Generation, lanes."""
    power_w: float
    tf16: float
    """bf16 and fp16."""
    tf32: float
    fp32: float
    fp8: float | None
    int8: float

    def peaks(self) -> dict[str, float]:
        peaks = {"bf16": self.tf16, "fp16": self.tf16, "tf32": self.tf32, "fp32": self.fp32, "int8": self.int8}
        return peaks if self.fp8 is None else peaks | {"fp8": self.fp8}


NAMED_CARDS = {
    "RTX 3060": Datasheet((8, 6), 28, 12, 360, (4, 16), 170, 25.5, 12.7, 12.7, None, 102),
    "RTX 4060": Datasheet((8, 9), 24, 8, 272, (4, 8), 115, 30.2, 15.1, 15.1, 60.5, 121),
    "RTX 4070": Datasheet((8, 9), 46, 12, 504, (4, 16), 200, 58.3, 29.1, 29.1, 116.6, 233.2),
    "RTX 4090": Datasheet((8, 9), 128, 24, 1008, (4, 16), 450, 165.2, 82.6, 82.6, 330.3, 660.6),
    "RTX 5090": Datasheet((12, 0), 170, 32, 1792, (5, 16), 575, 209.5, 104.8, 104.8, 419.0, 838.0),
    "A10G": Datasheet((8, 6), 80, 22.1, 600, (4, 16), 300, 70, 35, 35, None, 140),
    "L4": Datasheet((8, 9), 58, 24, 300, (4, 16), 72, 121, 60, 30.3, 242.5, 242.5),
    "A100": Datasheet((8, 0), 108, 80, 2039, (4, 16), 400, 312, 156, 19.5, None, 624),
    "H100": Datasheet((9, 0), 132, 80, 3350, (5, 16), 700, 989.4, 494.7, 66.9, 1978.9, 1978.9),
    "H200": Datasheet((9, 0), 132, 141, 4800, (5, 16), 700, 989.4, 494.7, 66.9, 1978.9, 1978.9),
}


def card_of(device_name: str, sm_count: int) -> str | None:
    """The named card that a driver's ``device_name`` is, or None. The same name with another number of multiprocessors
    is another card (H100 PCIe, RTX 4060 Ti, L40S)."""
    return next((n for n, sheet in NAMED_CARDS.items() if n in device_name and sheet.sm_count == sm_count), None)


def named_card(name: str) -> Machine:
    """The machine with that card, as far as a datasheet tells: ``named_card("RTX 4060")``.

    ``NVIDIA``, ``GeForce``, ``RTX``, case and spaces do not matter. Link and disk are those of a typical machine
    (``assumed``).

    Raises:
        UserError: a card that is not in the table.
    """
    wanted = _plain(name)
    found = next((card for card in NAMED_CARDS if _plain(card) == wanted), None)
    if found is None:
        raise UserError(f"No figures are known of the card '{name}'. Choose one of: {', '.join(NAMED_CARDS)}.")
    sheet = NAMED_CARDS[found]
    generation, lanes = sheet.pcie
    link = PCIE_GB_PER_S_PER_LANE[generation] * lanes * PCIE_SHARE
    return Machine(
        name=found,
        measured=False,
        vram_gib=sheet.vram_gib,
        sm_count=sheet.sm_count,
        capability=sheet.capability,
        tflops={kind: peak * PRODUCT_SHARE[kind] for kind, peak in sheet.peaks().items()},
        memory_gb_per_s=sheet.memory_gb_per_s * MEMORY_SHARE,
        h2d_gb_per_s=link,
        d2h_gb_per_s=link,
        disk_read_gb_per_s=DISK_GB_PER_S[0],
        disk_write_gb_per_s=DISK_GB_PER_S[1],
        disk_mixed_gb_per_s=DISK_GB_PER_S[2],
        power_w=sheet.power_w,
        context_mib=CONTEXT_MIB,
        launch_us=LAUNCH_US,
        product_us=PRODUCT_US,
        assumed=(
            "disk_read_gb_per_s",
            "disk_write_gb_per_s",
            "disk_mixed_gb_per_s",
            "context_mib",
            "launch_us",
            "host_us",
            "product_us",
        ),
    )


def _plain(name: str) -> str:
    plain = name.lower()
    for part in ("nvidia", "geforce", "rtx", " ", "-"):
        plain = plain.replace(part, "")
    return plain
