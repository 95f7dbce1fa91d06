"""The verb ``bench``: from its arguments to a benchmark, and from its result to the terminal and files."""

import argparse
import json
from pathlib import Path

from lowprec.bench import linear, matmul, rotate, ssd
from lowprec.bench.plan import bench_plan
from lowprec.bench.ssd_training import bench_ssd_training
from lowprec.bench.step import bench_step
from lowprec.bench.train.run import bench_train
from lowprec.display import make_console
from lowprec.errors import UserError


def run(options: argparse.Namespace) -> None:
    """Run ``lowprec bench WHAT``; ``options`` as the command line's parser gives them.

    Raises:
        UserError: a path is missing, and what the benchmarks themselves refuse.
    """
    works, peers = _names(options.works), _names(options.peers)
    if options.what == "ssd":
        if options.path is None:
            raise UserError("lowprec bench ssd needs --path, a folder on the disk to measure.")
        if works or peers:
            table = bench_ssd_training(works or ["all"], path=options.path, peers=peers, minutes=options.minutes)
            return _tell(table, Path(options.path), "bench_ssd")
        report = ssd.run(options.path)
        make_console().print(report.table())
        return _write(report.to_dict(), options.json)
    if options.what == "plan":
        folder = Path(options.path or "bench_plan")
        return _tell(bench_plan(folder, names=works, minutes=options.minutes), folder, "bench_plan")
    if options.what == "train":
        folder = Path(options.path or "bench_train")
        return _tell(bench_train(works, peers, folder=folder, minutes=options.minutes), folder, "bench_train")
    if options.what == "linear":
        results = [linear.run(options.tokens, bool(peers)), linear.break_even()]
    elif options.what == "step":
        results = [bench_step(works)]
    else:
        results = [(rotate.run if options.what == "rotate" else matmul.run)(options.tokens)]
    make_console().print(*results)
    return _write(results[0].to_dict() | {"more": [result.to_dict() for result in results[1:]]}, options.json)


def _names(given: str | None) -> list[str]:
    return [name for name in (given or "").split(",") if name]


def _tell(table: str, folder: Path, name: str) -> None:
    print(table)
    print(f"The rows are in {folder / name}.jsonl, this table in {folder / name}.md.")


def _write(figures: dict, file: str | None) -> None:
    if file:
        Path(file).write_text(json.dumps(figures, indent=1), encoding="utf-8")
