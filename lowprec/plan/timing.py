"""From the products and the traffic of a traced step to its time on a machine."""

from dataclasses import dataclass

from lowprec.machine import Machine
from lowprec.plan.operators import ATTENTION
from lowprec.plan.states import States
from lowprec.plan.tape import Product, Run, Stretched, Tape

ATTENTION_SHARE = 0.5
"""Of the rate of large bf16 products, what fused attention reaches. FlashAttention-2 on A100: 73 % of the peak forward
and 63 % backward (arXiv:2307.08691), on H100 35 to 40 % (arXiv:2407.08608, section 1), where products reach 75 %."""
CALLS_PER_GRAPH = 4
"""Of a layer that is replayed: its input copied to its place, the graph, its result copied from there, gradients."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Milliseconds of one optimizer step."""

    products_ms: float
    traffic_ms: float
    """Everything that is no product and moves device memory."""
    host_ms: float
    """The host's launches; they run beside the device."""
    update_ms: float
    """The optimizer's pass over weights, gradients and states."""
    link_ms: float
    """States over PCIe, activations that are offloaded, and rows of embeddings on the host."""
    disk_ms: float
    total_ms: float


def product_ms(machine: Machine, product: Product) -> float:
    """Predicted time of one call."""
    if product.kind == ATTENTION:
        flops = 2.0 * product.m * product.n * product.k * product.count / 2  # half is masked
        kind = "bf16" if "bf16" in machine.tflops else "fp32"
        return machine.launch_us / 1e3 + flops / (machine.tflops[kind] * 1e9 * ATTENTION_SHARE)
    kind = product.kind if product.kind in machine.tflops else "fp32"
    return product.count * machine.product_ms(kind, product.m, product.n, product.k)


def _host_us(machine: Machine, run: Run) -> float:
    own = machine.host_us if machine.own_host_us is None else machine.own_host_us
    return (run.calls - run.own_calls) * machine.host_us + run.own_calls * own


def step_time(
    tape: Tape | Stretched,
    machine: Machine,
    states: States,
    *,
    micro_batches: int,
    update_bytes: float,
    in_backward: bool,
    fetched_bytes: float = 0.0,
    offloaded_bytes: float = 0.0,
    in_graphs: bool = False,
    update_calls: int = 0,
) -> StepTime:
    """The time of one optimizer step.

    Args:
        tape: of one micro-batch and the update.
        update_bytes: that the optimizer reads and writes on the device.
        in_backward: whether transfers of states overlap with backward.
        fetched_bytes: that a micro-batch waits for from host memory.
        offloaded_bytes: activations sent to the host by a micro-batch.
        in_graphs: whether the host launches layers as CUDA graphs.
        update_calls: kernels that the optimizer launches one by one.
    """
    known: dict[Product, float] = {}
    products = traffic = 0.0
    host = update_calls * machine.host_us / 1e3
    for run in tape.runs:
        times = 1 if run.phase == "update" else micro_batches
        for product, count in run.products.items():
            if product not in known:
                known[product] = product_ms(machine, product)
            products += times * count * known[product]
        for nbytes, count in run.moves.items():
            traffic += times * count * machine.traffic_ms(nbytes)
        replayed = in_graphs and run.layer is not None
        host_us = min(run.calls, CALLS_PER_GRAPH) * machine.host_us if replayed else _host_us(machine, run)
        host += times * host_us / 1e3
    update = machine.traffic_ms(update_bytes)
    fetched = micro_batches * fetched_bytes / machine.h2d_gb_per_s / 1e6
    device = products + traffic + fetched
    link = states.step_to_device / machine.h2d_gb_per_s / 1e6 + states.step_to_device / machine.d2h_gb_per_s / 1e6
    sent = micro_batches * offloaded_bytes / machine.d2h_gb_per_s / 1e6
    disk = (states.step_read + states.step_written) / machine.disk_mixed_gb_per_s / 1e6
    busy = max(device, host, sent)  # a step is no faster than its host
    # Uploads, updates and downloads of chunks overlap with each other, and in backward with that.
    away = max(link, disk, update)
    total = max(busy, away) if in_backward and states.step_to_device else busy + away
    return StepTime(products, traffic, host, update, link + 2 * sent + fetched, disk, total)
