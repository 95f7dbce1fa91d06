"""From the products and the traffic of a traced step to its time on a machine."""

from dataclasses import dataclass

from lowprec.machine import Machine
from lowprec.plan.operators import ATTENTION
from lowprec.plan.states import States
from lowprec.plan.tape import Product, Run, Stretched, Tape
from lowprec.plan.tracker import FORWARD

ATTENTION_SHARE = 0.5
"""Of the rate of large bf16 products, what fused attention reaches. FlashAttention-2 on A100: 73 % of the peak forward
and 63 % backward (arXiv:2307.08691), on H100 35 to 40 % (arXiv:2407.08608, section 1), where products reach 75 %."""
CALLS_PER_REPLAY = 4
"""Of a layer that is replayed: its input copied to its place, the graph, its result copied from there, gradients."""
CALLS_PER_CHUNK = 10
"""Of states that come from host memory and go back: two waits, a copy and a wait for it; the update; the same back."""


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
    """States over PCIe, both ways at a time; activations that are offloaded; rows of embeddings on the host."""
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


def _host_us(machine: Machine, run: Run, replayed: bool) -> float:
    if replayed:
        whole = CALLS_PER_REPLAY * machine.host_us if machine.replay_us is None else machine.replay_us
        return whole if run.calls else 0.0
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
    gradient_bytes: float = 0.0,
    in_graphs: bool = False,
    selective: bool = False,
    update_calls: int = 0,
) -> StepTime:
    """The time of one optimizer step.

    Args:
        tape: of one micro-batch and the update.
        update_bytes: that the optimizer reads and writes on the device.
        in_backward: whether transfers of states overlap with backward.
        fetched_bytes: that a micro-batch waits for from host memory.
        offloaded_bytes: activations sent to the host by a micro-batch.
        gradient_bytes: that norms and clipping read and write beside what was traced.
        in_graphs: whether the host launches layers as CUDA graphs.
        selective: whether a mode in Python sees every operator of layers' forward and of its repetition, which takes
            the host as long as another operator.
        update_calls: kernels that the optimizer launches one by one.
    """
    known: dict[Product, float] = {}
    products, traffic = 0.0, machine.traffic_ms(gradient_bytes) if gradient_bytes else 0.0
    host = update_calls * machine.host_us / 1e3
    for run in tape.runs:
        times = 1 if run.phase == "update" else micro_batches
        for product, count in run.products.items():
            if product not in known:
                known[product] = product_ms(machine, product)
            products += times * count * known[product]
        for nbytes, count in run.moves.items():
            traffic += times * count * machine.traffic_ms(nbytes)
        host += times * _host_us(machine, run, in_graphs and run.layer is not None) / 1e3
        if selective and run.layer is not None and run.phase == FORWARD:
            host += times * 2 * run.calls * machine.host_us / 1e3
    update = machine.traffic_ms(update_bytes)
    fetched = micro_batches * fetched_bytes / machine.h2d_gb_per_s / 1e6
    device = products + traffic + fetched
    link = states.step_to_device / min(machine.h2d_gb_per_s, machine.d2h_gb_per_s) / 1e6
    staging = states.step_chunks * CALLS_PER_CHUNK * machine.host_us / 1e3
    sent = micro_batches * offloaded_bytes / machine.d2h_gb_per_s / 1e6
    disk = (states.step_read + states.step_written) / machine.disk_mixed_gb_per_s / 1e6
    # Uploads, updates and downloads of chunks overlap with each other, and in backward with that. The host does one
    # thing after the other, and a step is no faster than it.
    away = max(link, disk, update)
    if in_backward and states.step_to_device:
        total = max(device, host + staging, sent, away)
    elif states.step_to_device:
        total = max(device, host, sent) + max(away, staging)
    else:
        total = max(device + update, host, sent)
    return StepTime(products, traffic, host + staging, update, link + 2 * sent + fetched, disk, total)
