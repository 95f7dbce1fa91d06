"""One optimizer step over the micro-batches of an effective batch, without waiting for the device."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from lowprec.data.collate import Inputs, shifted, trained_positions
from lowprec.fused.loss_head import gives_loss
from lowprec.optim.options import follows_loss
from lowprec.profiling.phases import Phases
from lowprec.train.clock import Mark

if TYPE_CHECKING:
    from lowprec.data import StepBatch


@dataclass
class StepScalars:
    """What a step measured, on its way to the host. ``read`` waits for it; the loop calls that one step late."""

    values: torch.Tensor
    """fp32 ``[4]`` on the host: loss, gradient norm, bad (0 or 1), number of processes asked to stop."""
    end: Mark
    """When the step was done, and ``values`` had arrived."""

    def read(self) -> tuple[float, float, bool, bool]:
        self.end.wait()
        loss, grad_norm, bad, stop = self.values.tolist()
        return loss, grad_norm, bad > 0, stop > 0


def loss_sum(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Cross-entropy summed over the trained tokens of a batch, fp32.

    Labels follow Hugging Face's convention: unshifted, -100 where nothing is trained. A model that was given the loss
    of ``lowprec.fused`` never holds the logits of all tokens.
    """
    rest = {name: value for name, value in inputs.items() if name not in ("labels", "trained_positions")}
    if gives_loss(model):
        positions = inputs.get("trained_positions")
        positions = trained_positions(inputs["labels"]) if positions is None else positions
        return model(**rest, labels=inputs["labels"], trained_positions=positions).loss
    logits = model(**rest).logits
    # Shifting the labels, not the logits, spares a copy of the logits, the largest tensor there is.
    return F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), shifted(inputs["labels"]), ignore_index=-100, reduction="sum"
    )


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """Backward in the caller's thread. In one of autograd's own it took the host longer (135M, 1 x 512, layers
    replayed, H100: 15.5 ms a step, and 13.5 so), and cuBLAS kept a workspace for that one, too, 32 MiB on Hopper."""
    with torch.autograd.set_multithreading_enabled(False):
        accelerator.backward(loss)


class TrainStep:
    """Forward, backward, clipping and update.

    The loss is the mean over all trained tokens of the effective batch, whatever its division into micro-batches and
    processes. A loss or gradient that is not finite sets a flag on the device, which keeps this and every later update
    from touching the weights; the host learns of it one step late, while the weights still are what they were.
    """

    def __init__(
        self, model: nn.Module, optimizer: Any, schedule: Any, accelerator: Accelerator, max_grad_norm: float | None
    ) -> None:
        self.model, self.optimizer, self.schedule, self.accelerator = model, optimizer, schedule, accelerator
        self.bare_optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.max_grad_norm = max_grad_norm
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.bad = torch.zeros((), dtype=torch.float32, device=accelerator.device)
        self.phases = Phases(accelerator.device, getattr(self.bare_optimizer, "traffic", None))
        """Told where the step stands; measures nothing until it is made a probe of a loop."""

    def __call__(self, batch: "StepBatch", stop: bool) -> StepScalars:
        """Take one step.

        Args:
            batch: this process's micro-batches, on the device.
            stop: whether this process was asked to stop; every process learns of it with the scalars.
        """
        accelerator = self.accelerator
        scale = accelerator.num_processes / batch.num_trained_tokens_global  # DDP averages gradients over processes
        total = torch.zeros((), dtype=torch.float32, device=accelerator.device)
        for index, inputs in enumerate(batch.micro_batches):
            last = index == len(batch.micro_batches) - 1
            with accelerator.no_sync(self.model) if not last else nullcontext():
                self.phases.enter("forward")
                loss = loss_sum(self.model, inputs) * scale
                self.phases.enter("backward")
                backward(accelerator, loss)
            total += loss.detach()
        self.phases.enter("optimizer")
        grad_norm = self._clip()
        shared = accelerator.reduce(torch.stack([total, torch.full_like(total, float(stop))]), reduction="sum")
        loss = shared[0] / accelerator.num_processes
        self.bad = torch.maximum(self.bad, 1.0 - torch.isfinite(loss + grad_norm).float())
        self._update()
        scalars = self._send(torch.stack([loss, grad_norm.float(), self.bad, shared[1]]))
        self.phases.leave(scalars.end)  # one mark for both: the phases make up the step exactly
        return scalars

    def _clip(self) -> torch.Tensor:
        if self.max_grad_norm is not None:
            return self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        in_backward = getattr(self.bare_optimizer, "grad_norm", None)
        if in_backward is not None:
            return in_backward
        self.accelerator.unscale_gradients(self.optimizer)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _update(self) -> None:
        if hasattr(self.bare_optimizer, "found_inf"):
            self.bare_optimizer.found_inf = self.bad
        else:
            # Optimizers of other libraries know no such flag: give them zero gradients, which moves the weights by
            # the remaining momentum at most.
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = torch.where(self.bad > 0, 0, parameter.grad)
        self.optimizer.step()
        if not follows_loss(self.schedule):
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _send(self, values: torch.Tensor) -> StepScalars:
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values = host
        return StepScalars(values, Mark(self.accelerator.device))
