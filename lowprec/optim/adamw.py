"""AdamW whose states live on the GPU, in host memory or on an SSD, with the same numbers in every place."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowprec.errors import UserError
from lowprec.optim import states_io
from lowprec.optim.arguments import check_hyper, check_modes, check_param, number
from lowprec.optim.backward import UpdateInBackward
from lowprec.optim.format import StateFormat
from lowprec.optim.layout import Chunk, gather, scatter
from lowprec.optim.saved_chunks import SavedChunks
from lowprec.optim.steps import Round, StepCounts
from lowprec.optim.stores import open_store
from lowprec.optim.traffic import Traffic, drive_facts
from lowprec.optim.update import Slice, update


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) with the arguments of ``torch.optim.AdamW``, over a state store.

    Args:
        params: parameters, ``model.named_parameters()``, or groups of either. Names key the states in checkpoints; an
            unnamed parameter is called by its place, ``param_0``. Parameters that require no gradient now are left out.
        lr, betas, eps, weight_decay, amsgrad, maximize: as in ``torch.optim.AdamW``.
        foreach, capturable, differentiable, fused: the update is always a fused one that keeps no graph, hence
            ``foreach=True``, ``fused=False``, ``differentiable=True`` are refused; ``capturable`` needs the gpu store.
        state_store: ``"gpu"`` (beside the weights, on whatever device they are), ``"cpu"`` (host memory) or ``"ssd"``.
        path: folder of the ssd store, or several, on different disks, to stripe over. One run at a time may use it.
        state_dtype: of the moments: ``"fp32"``, ``"bf16"`` or ``"int8"`` (8-bit codes, a scale for 256 elements).
        master: of bf16 weights: ``"split"`` keeps the missing 16 bits of an fp32 master (2 bytes), ``"fp32"`` a whole
            master (4 bytes), ``"none"`` rounds the weight stochastically. fp32 weights are their own master.
        seed: of all stochastic rounding; the same seed repeats a run bit for bit.
        update_on: ``"weights"`` updates on the device of the weights; ``"cpu"`` copies them to the host and back.
        drive_tbw: TB that can be written to the drive, by its maker; ``statistics`` then shows the run's share.
        store_options: further settings of the store, see ``lowprec.optim.stores.open_store``.

    ``found_inf`` (fp32, one element, on the weights' device, or None): where it is not zero, ``step`` leaves weights,
    states and step counts as they are, without asking the host.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_store: str = "gpu",
        path: str | Path | Sequence[str | Path] | None = None,
        state_dtype: str = "fp32",
        master: str = "split",
        seed: int = 0,
        update_on: str = "weights",
        drive_tbw: float | None = None,
        **store_options: Any,
    ):
        check_modes(state_store, foreach, capturable, differentiable, fused)
        if update_on not in ("weights", "cpu"):
            raise UserError(f"update_on={update_on!r} is unknown: choose weights or cpu.")
        self._built = False
        hyper = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        modes = {"maximize": maximize, "foreach": foreach, "capturable": capturable, "fused": fused}
        super().__init__(params, {**hyper, **modes, "differentiable": differentiable})
        self.found_inf: Tensor | None = None
        self.names, self._params, self._group_of = number(self.param_groups)
        self._formats: dict[int, StateFormat] = {}
        for i, param in enumerate(self._params):
            if param.requires_grad and param.numel():
                check_param(self.names[i], param)
                amsgrad = self.param_groups[self._group_of[i]]["amsgrad"]
                self._formats[i] = StateFormat.of(self.names[i], param, state_dtype, master, amsgrad)
        self._left_out = [i for i, p in enumerate(self._params) if i not in self._formats and p.numel()]
        self._keys = [zlib.crc32(f"{seed}/{name}".encode()) for name in self.names]
        cpu = torch.device("cpu")
        self._update_devices = {i: cpu if update_on == "cpu" else self._params[i].device for i in self._formats}
        self._store = open_store(
            state_store, path, self.names, self._params, self._formats, self._update_devices, **store_options
        )
        self._chunks_of: dict[int, list[Chunk]] = {i: [] for i in self._formats}
        for chunk in self._store.chunks:
            for parameter in chunk.parameters:
                self._chunks_of[parameter].append(chunk)
        self._order = list(self._store.chunks)
        self._counts = StepCounts(self._update_devices, self._group_of)
        self._round: Round | None = None
        self._kept: dict[int, list[Slice]] = {}
        self._in_backward: UpdateInBackward | None = None
        self._facts = {"state_store": state_store, "state_dtype": state_dtype, "master": master}
        self._drive_tbw = drive_tbw
        self._has_states = False
        self._num_steps = 0
        self._built = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only before the optimizer is built, because the places of all states are laid out once."""
        if self._built:
            raise UserError(
                "lowprec.AdamW lays out its states when it is built and takes no parameter group afterwards: give "
                "it all groups at once, with lr=0 for those that are to rest."
            )
        super().add_param_group(param_group)
        check_hyper(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what ``closure`` returns, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i in self._left_out:
            if self._params[i].grad is not None:
                raise UserError(
                    f"Parameter {self.names[i]} has a gradient but required none when the optimizer was built, so "
                    "it has no states: unfreeze it before building the optimizer."
                )
        if self._in_backward is not None:
            self._in_backward.flush()  # what waits since a backward that raised
        current = self._begin()
        found_inf = self._found_inf()
        self._update([chunk for chunk in self._order if chunk.index not in current.finished], found_inf)
        self._counts.advance(current.updated, found_inf)
        self._round = None
        self._num_steps += 1
        self._order = list(current.finished.values()) + [c for c in self._order if c.index not in current.finished]
        if self._in_backward is not None:
            self._in_backward.begin()
        if not self._has_states:
            self._show_states()
        self._store.prefetch(self._order[: len(current.finished)])  # what a step left out, the next may, too
        return loss

    def update_in_backward(self) -> None:
        """From now on, update each parameter in backward and free its gradient; ``step`` does what is left.

        ``grad_norm`` holds the norm of the last backward's gradients. A gradient that is not finite stops the updates
        that come after it in that backward, and those of small parameters that wait with it; those before it stand.
        Gradients cannot be clipped or accumulated.
        """
        if self._in_backward is None:
            params = {i: self._params[i] for i in self._formats}
            # Taken one by one in the first backward, states lie among activations, whose memory then cannot be given
            # back: 5.38 GB reserved where 4.58 were allocated (135M, 4 x 1024, H100), and 4.70 so.
            self._store.reserve()
            self._in_backward = UpdateInBackward(
                params, self._chunks_of, self._update, lambda: self.found_inf, self._store.resident
            )

    def stop_updates_in_backward(self) -> None:
        """Leave gradients where backward puts them from now on."""
        if self._in_backward is not None:
            self._in_backward.remove()

    def uses_gradient_at_once(self, param: Tensor) -> bool:
        """Whether the gradient of one of its parameters is used, and freed, as soon as backward has completed it."""
        return self._in_backward is not None and id(param) in self._in_backward.at_once

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients of this step so far (0-dim, on the device); None if not updating in backward."""
        return None if self._in_backward is None else self._in_backward.norm

    def _found_inf(self) -> Tensor | None:
        """``found_inf``, with the gradients that backward has shown."""
        if self._in_backward is None:
            return self.found_inf
        seen = self._in_backward.found_inf
        return seen if self.found_inf is None else torch.maximum(seen, self.found_inf.reshape(()).to(seen.device))

    def _begin(self) -> Round:
        if self._round is None:
            self._counts.begin(self.param_groups)
            self._round = Round()
        return self._round

    def _update(self, chunks: Sequence[Chunk], found_inf: Tensor | None) -> None:
        """Update the pieces of ``chunks`` whose parameters have gradients."""
        current = self._begin()
        grads = {i: grad for c in chunks for i in c.parameters if (grad := self._params[i].grad) is not None}
        for i, grad in grads.items():
            if grad.layout != torch.strided:
                raise UserError(
                    f"Parameter {self.names[i]} has a sparse gradient: build its embedding with sparse=False."
                )
        live = [c for c in chunks if not grads.keys().isdisjoint(c.parameters)]
        for batch in [live] if self._store.resident else [[chunk] for chunk in live]:
            buffers = [self._store.read(chunk) for chunk in batch]
            slices = [
                (part, part.gradient(grads[part.piece.parameter]))
                for chunk, buffer in zip(batch, buffers, strict=True)
                for part in self._slices(chunk, buffer)
                if part.piece.parameter in grads
            ]
            update(slices, found_inf)
            for part, _ in slices:
                if part.param is not part.weights:
                    part.weights.copy_(part.param)
            for chunk, buffer in zip(batch, buffers, strict=True):
                self._store.write(chunk, buffer)
        current.updated.update(grads)
        current.finished.update((chunk.index, chunk) for chunk in live)

    def _slices(self, chunk: Chunk, buffer: Tensor) -> list[Slice]:
        """The slices of the chunk, kept where its buffer stays: making them costs a dozen calls a parameter."""
        kept = self._kept.get(chunk.index)
        if kept is not None and all(part.address == self._params[part.piece.parameter].data_ptr() for part in kept):
            return kept
        made = []
        for piece, states in zip(chunk.pieces, chunk.views(buffer), strict=True):
            i = piece.parameter
            made.append(Slice.of(self._params[i], piece, states, self._counts.steps(i), self._keys[i]))
        if self._store.resident and all(part.param is part.weights for part in made):
            self._kept[chunk.index] = made
        return made

    def _show_states(self) -> None:
        """Fill torch's ``self.state``: all states of a store in memory, the step count alone of another."""
        self._has_states = True
        for i in self._formats:
            self.state[self._params[i]] = {"step": self._counts.of(i)}
            if self._store.resident:
                self.state[self._params[i]] |= self.states_of(i)

    def states_of(self, parameter: int) -> dict[str, Tensor]:
        """The fields of one parameter (numbered across the groups), elementwise ones in its shape."""
        fields = gather(self._chunks_of[parameter], self._store.peek, parameter, may_alias=self._store.resident)
        blocks = {field.name: field.block for field in self._formats[parameter].fields}
        shape = self._params[parameter].shape
        return {name: array.view(shape) if blocks[name] == 1 else array for name, array in fields.items()}

    def statistics(self, num_steps: int | None = None) -> dict[str, Any]:
        """What the report shows of the states: their place, size and traffic so far, and the wear of the drive.

        With ``num_steps``, the optimizer steps of the whole run, the bytes written so far are projected to its end.
        """
        numel = sum(self._params[i].numel() for i in self._formats)
        nbytes = sum(format.nbytes(self._params[i].numel()) for i, format in self._formats.items())
        facts: dict[str, Any] = self._facts | {
            "parameters": numel,
            "bytes_per_parameter": nbytes / max(numel, 1),
            "states_gib": nbytes / 2**30,
            "updates_in_backward": self._in_backward is not None,
            "steps": self._num_steps,
        }
        return facts | drive_facts(self._store.traffic, self._num_steps, num_steps, self._drive_tbw)

    @property
    def traffic(self) -> Traffic | None:
        """What the store has moved to and from a disk, and how long training waited for it; None without a disk."""
        return self._store.traffic

    @property
    def notes(self) -> list[str]:
        """What a user should know of the store, such as a file system without O_DIRECT; one sentence each."""
        return self._store.notes

    def flush(self) -> None:
        """Wait until all states are durable in their store."""
        self._store.flush()

    def close(self) -> None:
        """Give back the store: its memory, files and path. States that no checkpoint holds are gone."""
        self.stop_updates_in_backward()
        self.state.clear()
        self._kept.clear()
        self._store.close()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. States on a disk are brought to memory for it; ``save_states`` does without that."""
        packed = super().state_dict()
        if self._has_states:
            packed["state"] = {i: {"step": self._counts.of(i).clone()} | self.states_of(i) for i in self._formats}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a ``state_dict`` over bit for bit, of any ``state_store`` with the same ``state_dtype`` and ``master``.

        torch's own would cast the states to the dtype of the weights.
        """
        super().load_state_dict(state_dict | {"state": {}})
        if state_dict["state"]:
            states = state_dict["state"]
            for i, format in self._formats.items():
                states_io.check_fields(self.names[i], self._params[i].numel(), format, states.get(i, {}))
            self._load({i: float(states[i]["step"]) for i in self._formats}, lambda i: states[i])

    def _load(self, steps: dict[int, float], fields_of: Callable[[int], dict[str, Tensor]]) -> None:
        latest = lru_cache(maxsize=1)(fields_of)  # the chunks of a parameter come one after another
        for chunk in self._store.chunks:
            buffer = self._store.read(chunk)
            scatter(chunk, buffer, latest)
            self._store.write(chunk, buffer)
        self._take_over(steps)

    def _take_over(self, steps: dict[int, float]) -> None:
        self._counts.set(steps)
        self._show_states()
        self._store.prefetch(self._order)

    @torch.no_grad()
    def save_states(self, folder: str | Path) -> None:
        """Write settings and states into ``folder``, durably; ``optimizer.json`` comes last and makes it complete."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        header = states_io.Header(
            groups=[
                states_io.settings(group) | {"param_names": self._names_in(g)}
                for g, group in enumerate(self.param_groups)
            ],
            parameters={
                self.names[i]: {
                    "shape": list(self._params[i].shape),
                    "step": float(self._counts.of(i)),
                    "format": format.as_json(),
                }
                for i, format in self._formats.items()
            },
        )
        if self._has_states:
            header.store = self._store.snapshot(folder)
            if header.store is None:
                states = ((self.names[i], self.states_of(i)) for i in self._formats)
                header.shards = states_io.write_shards(folder, states)
        states_io.write_header(folder, header)

    def _names_in(self, group: int) -> list[str]:
        return [name for name, g in zip(self.names, self._group_of, strict=True) if g == group]

    @torch.no_grad()
    def load_states(self, folder: str | Path) -> None:
        """Continue from a folder that ``save_states`` of any store filled; the folder is only read."""
        folder = Path(folder)
        header = states_io.read_header(folder)
        numels = {self.names[i]: self._params[i].numel() for i in self._formats}
        formats = {self.names[i]: format for i, format in self._formats.items()}
        states_io.check_parameters(folder, header, numels, formats)
        states_io.apply_settings(self.param_groups, header.groups, folder)
        steps = {i: header.parameters[self.names[i]]["step"] for i in self._formats}
        if header.shards:
            shards = states_io.Shards(folder, header.shards)
            self._load(steps, lambda i: shards.fields_of(self.names[i]))
        elif header.store is not None:
            saved = SavedChunks(folder, header)
            if self._store.restore(saved):
                self._take_over(steps)
            else:
                self._load(steps, lambda i: saved.fields_of(self.names[i]))
                saved.close()
