"""One run in this process: ``python -m lowprec.bench.train.worker WORK PEER FOLDER`` prints its figures as the last
line of its output, one line of JSON. ``PEER`` is ``lowprec``, ``limit``, or another library."""

import json
import os
import sys
from pathlib import Path


def main(name: str, peer: str, folder: str) -> None:
    if peer != "unsloth":  # whose settings are its own
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    else:
        os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_DISABLE_AUTO_UPDATES="1")
        import unsloth  # noqa: F401  # must be imported before transformers
    import torch

    from lowprec.bench.train import limit, ours, peers
    from lowprec.bench.train.works import all_works

    work = all_works()[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if peer == "limit":
            figures = limit.limit(work)
        elif peer == "lowprec":
            figures = ours.run(work, Path(folder), device)
        else:
            figures = peers.run(peer, work, Path(folder), device)
        figures = {"status": "ok"} | figures
    except torch.OutOfMemoryError as error:
        figures = {"status": "out of memory", "error": str(error).splitlines()[0][:300]}
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])
