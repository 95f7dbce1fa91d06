"""Token embeddings that stay in pinned host memory (``train.offload_embeddings``): of a table of 1 GB a step reads the
rows of its tokens, and while it is frozen nothing else touches it. The results are the same bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.ops import gather_host_rows
from lowprec.ops.backends import no_triton
from lowprec.optim.disk import GIB, HostMemory, whole_pages

REMEDY = "set train.offload_embeddings=false"


class HostEmbedding(nn.Embedding):
    """The look-up of a frozen ``nn.Embedding`` whose table no ``.to(device)`` moves.

    The table, ``weight [num_embeddings, embedding_dim]``, is a buffer: it is saved under the same key, and it is no
    parameter, since the device of a model's first parameter is where transformers, PEFT and Accelerate take the whole
    model to be (``generate`` would bring its inputs to the host).
    """

    def __init__(self, table: nn.Embedding, pin: bool):
        """
        Args:
            table: whose rows are taken, on any device.
            pin: copy them to pinned memory, which CUDA devices read; else they stay where they are.

        Raises:
            UserError: the system refuses to pin as much.
        """
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, device="meta")
        self._pin = pin
        del self.weight
        self.register_buffer("weight", self._placed(table.weight.detach()))
        self.train(table.training)

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]  # F.embedding's name for them says less
        """``ids [...]`` on any device -> ``[..., embedding_dim]`` there; NaN for an id outside the table."""
        return gather_host_rows(ids, self.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostEmbedding":
        """Of what ``fn`` does to tensors, the dtype is followed, and the device is not."""
        dtype = fn(self.weight.new_empty(0)).dtype
        if dtype != self.weight.dtype:
            self.weight = self._placed(self.weight.to(dtype))
        return self

    def unpin(self) -> None:
        """Give pinned memory back now, not when Python finds the model unused; devices cannot read the table then."""
        if self._pin:
            self._memory.close()

    def _placed(self, weight: Tensor) -> Tensor:
        if not self._pin:
            return weight
        memory = HostMemory(whole_pages(weight.nbytes), pin=True, remedy=REMEDY)
        placed = memory.take(weight.nbytes).view(weight.dtype).view(weight.shape).copy_(weight)
        self._memory = memory  # it is unpinned when this goes
        return placed


def keep_on_host(model: Any, device: torch.device) -> str:
    """Put the token embeddings of ``model`` into pinned host memory before the model is moved to ``device``.

    Args:
        model: of transformers, with or without PEFT's layers, of which embeddings on a device are freed.
        device: where the model will train.

    Returns:
        A sentence for the user: what was moved, or why nothing was.

    Raises:
        UserError: the system refuses to pin as much memory.
    """
    if device.type != "cuda":
        return "train.offload_embeddings=true moved nothing: there is nothing to offload on a processor."
    reason = put_on_host(model, pin=True)
    if reason is not None:
        return f"train.offload_embeddings=true moved nothing: the token embeddings {reason}."
    nbytes = sum(table.nbytes for table in host_tables(model))
    slow = no_triton(device)
    how = "" if slow is None else f" Each look-up waits for the device: {slow}."
    return f"The token embeddings ({nbytes / GIB:.2f} GiB) stay in pinned host memory.{how}"


def put_on_host(model: Any, pin: bool) -> str | None:
    """Exchange the token embeddings for a ``HostEmbedding``; returns why not, in words that go on after their name."""
    table = model.get_input_embeddings()
    reason = why_not_on_host(model)
    if reason is None:
        model.set_input_embeddings(HostEmbedding(table, pin))
    return reason


def host_tables(model: nn.Module) -> list[Tensor]:
    """The tables that stay on the host."""
    return [module.weight for module in model.modules() if isinstance(module, HostEmbedding)]


def unpin_tables(model: nn.Module) -> None:
    """Give the pinned memory of all tables on the host back; the model then runs on the host alone."""
    for module in model.modules():
        if isinstance(module, HostEmbedding):
            module.unpin()


def why_not_on_host(model: Any) -> str | None:
    """Why the token embeddings of ``model`` have to stay on its device, in words that go on after their name."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        return f"are a {type(table).__name__}, which does more than nn.Embedding"
    if table.weight.requires_grad:
        return "are trained"
    changing = [name for name in ("max_norm", "scale_grad_by_freq", "sparse") if getattr(table, name)]
    if changing:
        return f"have {' and '.join(changing)} set"
    others = [m for m in model.modules() if m is not table and any(p is table.weight for p in m.parameters(False))]
    head = model.get_output_embeddings()
    if head is not None and any(module in others for module in head.modules()):
        return "are tied to the output head, whose product reads all of them on the GPU"
    if others:
        return f"are shared with a {type(others[0]).__name__}"
    return None
