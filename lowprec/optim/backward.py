"""Update each parameter as soon as backward has completed its gradient, and free that gradient at once."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim.layout import Chunk


class UpdateInBackward:
    """Calls ``update(chunks)`` from backward, for every chunk when the last of its gradients is there.

    A gradient is freed when all chunks of its parameter are updated. ``norm_squared`` sums the squares of
    the gradients that came: it is not finite from the first bad one on, and what comes after that must be skipped.
    """

    def __init__(
        self,
        params: Mapping[int, Tensor],
        chunks_of: Mapping[int, Sequence[Chunk]],
        update: Callable[[Sequence[Chunk]], None],
    ):
        self._params, self._chunks_of, self._update = params, chunks_of, update
        self._members: dict[int, set[int]] = {}
        for i, chunks in chunks_of.items():
            for chunk in chunks:
                self._members.setdefault(chunk.index, set()).add(i)
        device = next(iter(params.values())).device
        self.norm_squared = torch.zeros((), device=device)
        self._missing: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self.begin()
        self._handles = [
            param.register_post_accumulate_grad_hook(lambda _, i=i: self._arrived(i)) for i, param in params.items()
        ]

    def begin(self) -> None:
        """Expect every gradient once more; the norm of the last ones stays until the first of them comes."""
        self._is_first = True
        self._missing = {index: len(members) for index, members in self._members.items()}
        self._left = {i: len(chunks) for i, chunks in self._chunks_of.items()}

    @torch.no_grad()
    def _arrived(self, parameter: int) -> None:
        grad = self._params[parameter].grad
        assert grad is not None
        if self._is_first:
            self._is_first = False
            self.norm_squared = torch.zeros_like(self.norm_squared)
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        self.norm_squared = self.norm_squared + (norm * norm).to(self.norm_squared.device)
        for chunk in self._chunks_of[parameter]:
            self._missing[chunk.index] -= 1
            if self._missing[chunk.index] < 0:
                raise UserError(
                    "A second backward came before optimizer.step(): updating in backward frees each gradient at "
                    "once and cannot accumulate. Use train.gradient_accumulation_steps=1, or set train.max_grad_norm."
                )
            if self._missing[chunk.index] == 0:
                self._update([chunk])
                for member in self._members[chunk.index]:
                    self._left[member] -= 1
                    if self._left[member] == 0:
                        self._params[member].grad = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
