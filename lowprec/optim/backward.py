"""Update parameters as soon as backward has completed their gradients, and free those gradients."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.ops.backends import no_triton
from lowprec.optim.layout import Chunk

SMALL, TOGETHER = 1 << 20, 8 << 20
"""Elements of a parameter that waits for others, and of those that are updated together: a launch for each of the 272
parameters of a 135M model, and one for its norm, took the host 25 ms a step beside an H100. Copies of gradients that
share memory (lowprec.activations.places) are none of larger parameters, which would wait with them."""


class UpdateInBackward:
    """Calls ``update(chunks, found_inf)`` from backward, for every chunk when the last of its gradients is there.

    A gradient is freed when all chunks of its parameter are updated. ``small`` parameters, which have chunks of their
    own in a store where all are at hand, are updated ``TOGETHER``. ``found_inf`` (fp32, 0-dim, on the device) is what
    the optimizer was given before this backward (``given()``), and 1 from the first gradient on that is not finite:
    what comes after that must be skipped, and what is updated together with it.
    """

    def __init__(
        self,
        params: Mapping[int, Tensor],
        chunks_of: Mapping[int, Sequence[Chunk]],
        update: Callable[[Sequence[Chunk], Tensor], None],
        given: Callable[[], Tensor | None],
        resident: bool,
    ):
        self._params, self._chunks_of, self._update, self._given = params, chunks_of, update, given
        self._members = {chunk.index: chunk.parameters for chunks in chunks_of.values() for chunk in chunks}
        device = next(iter(params.values())).device
        self.found_inf = torch.zeros((), device=device)
        self._norms = torch.zeros(len(params), device=device)
        self._norm_of = dict(zip(params, self._norms.unbind(), strict=True))
        self._one = torch.ones((), device=device)
        self._scratch: Tensor | None = None
        if no_triton(device) is None:
            # Imported where it runs: lowprec itself needs no Triton.
            from lowprec_kernels.gradient_norm import triton_kernel

            self._norm_kernel, self._scratch = triton_kernel.norm_, triton_kernel.make_scratch(device)
        alone = {i for i, chunks in chunks_of.items() if all(len(chunk.parameters) == 1 for chunk in chunks)}
        small = {i for i, param in params.items() if param.numel() <= SMALL and param.device == device}
        self.small = small & alone if resident else set()
        self.at_once = {id(params[i]) for i in alone - self.small}
        """Identities of parameters whose gradients nobody needs when the hook that they arrive in has returned."""
        self._waiting: list[int] = []
        self._waiting_elements = 0
        self._missing: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self.begin()
        self._handles = [
            param.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i)) for i, param in params.items()
        ]

    @property
    def norm(self) -> Tensor:
        """The norm of the gradients that came, fp32, 0-dim."""
        self.flush()
        return torch.linalg.vector_norm(self._norms)

    def begin(self) -> None:
        """Expect every gradient once more; the norms of the last ones stay until the first of them comes."""
        self._is_first = True
        self._waiting, self._waiting_elements = [], 0
        self._missing = {index: len(members) for index, members in self._members.items()}
        self._left = {i: len(chunks) for i, chunks in self._chunks_of.items()}

    def _forget(self) -> None:
        """Begin the norms and the flag of a backward."""
        self._is_first = False
        self._norms.zero_()
        given = self._given()
        if given is None:
            self.found_inf.zero_()
        else:
            self.found_inf.copy_(given.reshape(()))

    @torch.no_grad()
    def _arrived(self, parameter: int) -> None:
        grad = self._params[parameter].grad
        assert grad is not None
        if self._is_first:
            self._forget()
        for chunk in self._chunks_of[parameter]:
            self._missing[chunk.index] -= 1
            if self._missing[chunk.index] < 0:
                raise UserError(
                    "A second backward came before optimizer.step(): updating in backward frees each gradient at "
                    "once and cannot accumulate. Use train.gradient_accumulation_steps=1, or set train.max_grad_norm."
                )
        if parameter not in self.small:
            self._measure(grad, self._norm_of[parameter])
            self._update_chunks_of([parameter])
            return
        # At the end of this backward: where an earlier one raised, its callback is gone, and some may wait since.
        torch.autograd.Variable._execution_engine.queue_callback(self.flush)
        self._waiting.append(parameter)
        self._waiting_elements += grad.numel()
        if self._waiting_elements >= TOGETHER:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Update what waits, but for gradients that were taken away meanwhile."""
        waiting, self._waiting, self._waiting_elements = self._waiting, [], 0
        grads = {i: grad for i in waiting if (grad := self._params[i].grad) is not None}
        if not grads:
            return
        norms = torch._foreach_norm(list(grads.values()), dtype=torch.float32)
        torch._foreach_copy_([self._norm_of[i] for i in grads], norms)
        torch._amp_foreach_non_finite_check_and_unscale_([torch.stack(norms)], self.found_inf, self._one)
        self._update_chunks_of(list(grads))

    def _update_chunks_of(self, parameters: Sequence[int]) -> None:
        """Update chunks whose last gradient these parameters' are, and free what is not needed any more."""
        ready = [chunk for i in parameters for chunk in self._chunks_of[i] if self._missing[chunk.index] == 0]
        if not ready:
            return
        self._update(ready, self.found_inf)
        for chunk in ready:
            for member in self._members[chunk.index]:
                self._left[member] -= 1
                if self._left[member] == 0:
                    self._params[member].grad = None

    def _measure(self, grad: Tensor, norm: Tensor) -> None:
        """The gradient's norm into its place, and the flag, which is 1 from a norm on that is not finite."""
        if self._scratch is not None and grad.device == norm.device and grad.is_contiguous():
            self._norm_kernel(grad, norm, self.found_inf, self._scratch)
            return
        # Two launches. The second is GradScaler's own, which also multiplies what it looks at by a scale, here one.
        if grad.device == norm.device:
            torch.linalg.vector_norm(grad, dtype=torch.float32, out=norm)
        else:
            norm.copy_(torch.linalg.vector_norm(grad, dtype=torch.float32))
        torch._amp_foreach_non_finite_check_and_unscale_([norm], self.found_inf, self._one)

    def remove(self) -> None:
        """Leave gradients to others from now on."""
        self.at_once.clear()
        for handle in self._handles:
            handle.remove()
