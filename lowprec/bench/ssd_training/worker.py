"""One run in this process: ``python -m lowprec.bench.ssd_training.worker WORK BY PATH`` prints its figures as the last
line of its output, one line of JSON. ``BY`` is ``lowprec`` or ``deepspeed``."""

import json
import sys
from pathlib import Path

import torch

from lowprec.bench.ssd_training.works import KNOWN


def main(name: str, by: str, path: str) -> None:
    from lowprec.bench.ssd_training import deepspeed, ours

    work = KNOWN[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        figures = {"status": "ok"} | (ours if by == "lowprec" else deepspeed).run(work, Path(path), device)
    except torch.OutOfMemoryError as error:
        figures = {"status": "out of memory", "error": str(error).splitlines()[0][:300]}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
