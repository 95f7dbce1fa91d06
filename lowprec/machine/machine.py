"""``Machine``: rates of one GPU (or of a processor without one), its links, its disk; and the times that follow."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowprec.errors import UserError
from lowprec.machine.correction import Correction
from lowprec.machine.roofline import Rates, bound_ms

KINDS = ("bf16", "fp16", "tf32", "fp32", "fp8", "int8")
"""Kinds of products. ``fp32`` is PyTorch's default for fp32 tensors (no tf32); ``fp8`` and ``int8`` are lowprec's
``scaled_matmul`` on codes, without the casts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Rates are those that a program reaches, not datasheet peaks; GB are 1e9 bytes, GiB 2**30."""

    name: str
    measured: bool
    """Whether ``lowprec doctor --measure`` found the figures; else they follow from datasheets."""
    vram_gib: float
    """Device memory; of the processor's machine, 0."""
    sm_count: int
    """Streaming multiprocessors; 0 for a processor."""
    capability: tuple[int, int] | None
    """CUDA compute capability; None for a processor."""
    tflops: Mapping[str, float]
    """Kind -> 1e12 operations a second of a large product (two operations a multiply-add)."""
    memory_gb_per_s: float
    """Device memory, bytes read and written both counted."""
    h2d_gb_per_s: float
    """From pinned host memory to the device."""
    d2h_gb_per_s: float
    disk_read_gb_per_s: float
    disk_write_gb_per_s: float
    disk_mixed_gb_per_s: float
    """Bytes read plus bytes written, while as many are written as read."""
    power_w: float | None
    """The board's limit; None where none is known (a processor)."""
    context_mib: float
    """Device memory that a process holds before its first tensor."""
    launch_us: float
    """The least time of a kernel among others in a row."""
    product_us: float
    """The least time of a product, which has to fill and drain its pipeline."""
    host_us: float = 10.0
    """What the host takes to launch one operator of a training step, autograd included."""
    own_host_us: float | None = None
    """The same for one of lowprec's operators, whose kernels Triton launches; None: as for any."""
    replay_us: float | None = None
    """What it takes to replay one pass of a decoder layer as a CUDA graph, with what follows for the layer's parameters
    (clipping and the update, or the sum of gradients). None: as for four operators."""
    assumed: tuple[str, ...] = ()
    """Names of the fields that are assumptions about a typical machine, neither measured nor in a datasheet."""
    corrections: Mapping[str, Correction] = field(default_factory=dict, repr=False)
    """Kind -> what measured products take beside the bound; a kind that is not there takes its bound."""

    def product_ms(self, kind: str, m: int, n: int, k: int) -> float:
        """Predicted ms of ``[m, k] @ [k, n]`` on this machine.

        Raises:
            UserError: the machine has no units for that kind, or nothing is known of them.
        """
        if kind not in self.tflops:
            known = ", ".join(self.tflops)
            raise UserError(f"{self.name} runs no {kind} products that are known here; it runs {known}.")
        if 0 in (m, n, k):
            return self.product_us / 1e3
        rates = self.rates(kind)
        correction = self.corrections.get(kind)
        return bound_ms(kind, m, n, k, rates) * (correction.factor(kind, m, n, k, rates) if correction else 1.0)

    def rates(self, kind: str) -> Rates:
        """What bounds a kind of product here."""
        return Rates(self.tflops[kind], self.memory_gb_per_s, self.sm_count, self.product_us)

    def traffic_ms(self, num_bytes: float) -> float:
        """Predicted ms of a kernel that moves ``num_bytes`` of device memory, read and written, and little else."""
        return self.launch_us / 1e3 + num_bytes / self.memory_gb_per_s / 1e6
