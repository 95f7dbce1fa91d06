"""``lowprec.profile``: the probes around any training loop.

    with lowprec.profile(model, optimizer) as profile:
        for batch in loader:
            with profile.step(tokens=batch["input_ids"].numel()):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if profile.done:
                break
    print(profile)
    profile.save("profiles/mine")

After the warm-up come the steps that are timed, with probes that wait for nothing; then three that are looked at
closely and not timed: a trace of the kernels, on CUDA the allocator's history, memory and FLOPs operator by operator.
"""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from lowprec.machine.footprint import WORLD_G_CO2E_PER_KWH
from lowprec.profiling.alive import Alive, Timeline
from lowprec.profiling.flops import Flops
from lowprec.profiling.kernels import Kernels, traced
from lowprec.profiling.loop_hooks import watch_loop
from lowprec.profiling.memory import PeakMemory
from lowprec.profiling.phases import PHASES, Phases
from lowprec.profiling.power import Power
from lowprec.profiling.probe import Probes

TRACE = "trace.json.gz"
HISTORY_FILE = "memory_snapshot.pickle"
WARM_UP, MEASURED, MEMORY, KERNELS, HISTORY, DONE = "warm-up", "measured", "memory", "kernels", "history", "done"


class Session:
    """One profile. Use it as a context, and ``step`` around each step of the loop.

    Args:
        model: names modules and tells weights from the rest; None leaves that out, and times by phase too.
        optimizer: tells its states; its ``step`` marks that phase.
        device: where the work is done; by default where the model is, else CUDA where there is one.
        phases: of a loop that says itself where it stands; by default the model and the optimizer are watched.
        warmup_steps: left out of all figures.
        steps: timed.
        name: in the title of what is printed and drawn.
        closely: whether the steps that are not timed follow.
        grid_g_co2e_per_kwh: intensity of the electricity's grid, grams of CO2 equivalent a kWh.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Any = None,
        *,
        device: torch.device | str | None = None,
        phases: Phases | None = None,
        warmup_steps: int = 3,
        steps: int = 20,
        name: str = "loop",
        closely: bool = True,
        grid_g_co2e_per_kwh: float = WORLD_G_CO2E_PER_KWH,
    ) -> None:
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.device = _device(model, device)
        self.phases = phases or Phases(self.device, getattr(self.optimizer, "traffic", None))
        self.peak = PeakMemory(self.phases)
        self.power = Power(self.device)
        self.probes = Probes([self.phases, self.peak, self.power])
        self.warmup_steps, self.steps, self.name = warmup_steps, steps, name
        self.grid_g_co2e_per_kwh = grid_g_co2e_per_kwh
        self.num_steps = 0
        """Steps taken, warm-up included."""
        self.rows: list[dict[str, float]] = []
        """A row of figures for each measured step."""
        self.probe_host_s = 0.0
        """Time of the host in the probes during them."""
        self.timeline: Timeline | None = None
        self.flops: Flops | None = None
        self.followed_tokens = 0
        """Tokens, padding too, of the step that ``flops`` counted; 0 where they are not known."""
        self.kernels: Kernels | None = None
        self.ran_out_of_memory = False
        self.bad = False
        """Whether the loss or a gradient was not finite, where the loop says so."""
        self._stages = [MEASURED] * steps
        if closely:
            # Memory last: it is followed on the ordinary path, for which graphs of layers have to make room.
            self._stages += [KERNELS] + ([HISTORY] if self.device.type == "cuda" else []) + [MEMORY]
        self._host_s_before = 0.0
        self._watches = phases is None
        self._under_way: list[tuple[str, dict[str, float]]] = []
        self._hooks = ExitStack()
        self._temporary = tempfile.TemporaryDirectory(prefix="lowprec-profile-")
        self.folder = Path(self._temporary.name)
        """Holds the trace until it is saved."""

    def __enter__(self) -> "Session":
        if self._watches:
            self._hooks.enter_context(watch_loop(self.model, self.optimizer, self.phases))
        self.phases.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ran_out_of_memory |= isinstance(error, torch.OutOfMemoryError)
        self._hooks.close()
        if error is None:
            self._read(0)
        self.phases.listeners.clear()

    @property
    def stage(self) -> str:
        """What the next step is for."""
        place = self.num_steps - self.warmup_steps
        return WARM_UP if place < 0 else self._stages[place] if place < len(self._stages) else DONE

    @property
    def done(self) -> bool:
        """Whether all steps that a whole profile needs were taken."""
        return self.stage == DONE

    @property
    def num_steps_wanted(self) -> int:
        """Of a whole profile, warm-up included."""
        return self.warmup_steps + len(self._stages)

    @contextmanager
    def step(self, *, tokens: int = 0, trained_tokens: int = 0, padding: int = 0) -> Iterator[None]:
        """One optimizer step.

        Args:
            tokens: of its batch, without padding.
            trained_tokens: of them, those that give loss; 0 where that is not known.
            padding: tokens of padding beside them.
        """
        stage = self.stage
        if stage == DONE:
            yield
            return
        closely = stage in (MEMORY, KERNELS, HISTORY)
        if stage == MEMORY:
            self.followed_tokens = tokens + padding
        with self._looking_closely(stage):
            self.probes.on_step_start()
            counts: dict[str, float] = {"tokens": tokens, "trained_tokens": trained_tokens, "padding": padding}
            self._under_way.append((stage, counts))
            if self._watches and self.model is None:
                self.phases.enter("other")  # nothing tells more, and all of it would count as data
            yield
            self.phases.leave()
        self.num_steps += 1
        # One step is left under way while the next is called, so that the device has work: not before another stage.
        self._read(1 if self.stage == stage == MEASURED else 0)
        if stage == WARM_UP and self.stage == MEASURED:
            gc.collect()
            self.peak.restart()
            self._host_s_before = self.probes.host_s
        if self.stage != stage or closely:
            self.phases.begin()

    def figures(self) -> dict[str, Any]:
        """All figures, as ``profile.json`` has them (docs/profile.md)."""
        from lowprec.profiling.figures import figures

        return figures(self)

    def save(self, folder: str | Path) -> Path:
        """Write ``profile.json``, ``profile.html``, the trace and, on CUDA, the allocator's history.

        Returns:
            The folder.

        Raises:
            UserError: the folder is not empty.
        """
        from lowprec.profiling.folder import write

        return write(self.figures(), Path(folder), files=sorted(self.folder.iterdir()))

    def __rich__(self) -> Any:
        from lowprec.profiling.table import table

        return table(self.figures())

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as captured:
            console.print(self)
        return captured.get()

    def _read(self, left: int) -> None:
        """Wait for the steps under way but ``left``, and take their figures down."""
        while len(self._under_way) > left:
            self.phases.wait_for_oldest()
            figures = self.probes.on_step_end()
            stage, counts = self._under_way.pop(0)
            if stage == MEASURED:
                step_ms = sum(figures.get(f"{phase}_ms", 0.0) for phase in PHASES)
                self.rows.append(figures | counts | {"step_time_ms": step_ms})
                self.probe_host_s = self.probes.host_s - self._host_s_before

    @contextmanager
    def _looking_closely(self, stage: str) -> Iterator[None]:
        if stage == MEMORY:
            alive, flops = Alive(self.device, self.model, self.optimizer), Flops(self.model)
            self.phases.listeners.append(alive.enter_phase)
            try:
                with alive, flops:
                    yield
                self.flops = flops
            finally:
                self.phases.listeners.remove(alive.enter_phase)
                self.timeline = Timeline.of(alive)
        elif stage == KERNELS:
            with traced(self.device, self.folder / TRACE) as kernels:
                yield
            self.kernels = kernels
        elif stage == HISTORY:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
            try:
                yield
                torch.cuda.memory._dump_snapshot(str(self.folder / HISTORY_FILE))
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
        else:
            yield


def _device(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(model.parameters(), None) if model is not None else None
    if parameter is not None:
        return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


profile = Session
"""What ``lowprec.profile`` is."""
