"""What the probes of training cost: steps with and without them, taken in turn.

python -m lowprec.profiling.cost lora model.model_name_or_path=... data.path=... [key=value ...]
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lowprec.config import resolve
from lowprec.data import StepBatch
from lowprec.errors import UserError
from lowprec.profiling.probe import Probes
from lowprec.run_folder import RunFolder
from lowprec.train.clock import Mark
from lowprec.train.interrupt import StopRequest
from lowprec.train.launch import start_accelerator
from lowprec.train.loop import Run


def probe_cost(
    recipe: str, overrides: Sequence[str], *, warmup: int = 5, blocks: int = 10, steps: int = 5
) -> dict[str, float]:
    """Ratios of step times with the probes to those without, in blocks that alternate so that drift cancels.

    Returns:
        ``cost_share`` (median of the blocks' ratios minus 1), ``spread`` (half the range of the middle half of them),
        ``step_ms``, and ``host_share`` (time of the host in the probes, what ``report.json`` calls probe_cost_share).
    """
    resolved, _ = resolve(recipe, overrides)
    accelerator, _ = start_accelerator(resolved)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(resolved, RunFolder(Path(folder), None, messages=[]), accelerator, Console(quiet=True), StopRequest())
        run.build()
        batches = iter(run.loader)
        for _ in range(warmup):
            run.step(next(batches), stop=False).read()
        ratios, plain_s, host_s, probed_s = [], 0.0, 0.0, 0.0
        for _ in range(blocks):
            plain, probed = 0.0, 0.0
            for _ in range(steps):  # the same batch without and with
                batch = next(batches)
                plain += _seconds(run, batch, Probes([]))
                probes = Probes([run.step.phases])
                probed += _seconds(run, batch, probes)
                host_s += probes.host_s
            ratios.append(probed / plain)
            plain_s, probed_s = plain_s + plain, probed_s + probed
        run.close()
    quarters = statistics.quantiles(ratios, n=4)
    return {
        "cost_share": statistics.median(ratios) - 1,
        "spread": (quarters[2] - quarters[0]) / 2,
        "step_ms": 1000 * plain_s / blocks / steps,
        "host_share": host_s / probed_s,
    }


def _seconds(run: Run, batch: StepBatch, probes: Probes) -> float:
    run.step.phases.host_s = 0.0
    begin = Mark(run.accelerator.device)
    probes.on_step_start()
    scalars = run.step(batch, stop=False)
    with run.step.phases.waiting():
        scalars.read()
    if probes.probes:
        probes.on_step_end()
    return scalars.end.seconds_since(begin)


def main() -> None:
    """The command of the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m lowprec.profiling.cost", description=__doc__)
    parser.add_argument("recipe", help="a shipped recipe, or the path of a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe to change")
    options = parser.parse_args()
    try:
        found = probe_cost(options.recipe, options.overrides)
    except UserError as error:
        sys.exit(f"lowprec: {error}")
    print(
        f"a step takes {found['step_ms']:.2f} ms; with the probes {100 * found['cost_share']:+.2f} % "
        f"(+- {100 * found['spread']:.2f}); the host spends {100 * found['host_share']:.3f} % of it in them"
    )


if __name__ == "__main__":
    main()
