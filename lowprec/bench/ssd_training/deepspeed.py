"""The same work with DeepSpeed's ZeRO-3, its optimizer on NVMe or on the CPU, in the setting that DeepSpeed's own
tuning guide arrives at: pipelined reads and writes, blocks of 1 MiB, 32 deep, 8 threads.

With as few buffers as one group needs (5) it stopped on an assertion, hence 16 of 100 M elements.
"""

import importlib.util
import os
import socket
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lowprec.bench.ssd_training.ours import build
from lowprec.bench.ssd_training.process import peak_gb, timed_step
from lowprec.bench.ssd_training.works import Work

BUFFERS = 16
GROUP_ELEMENTS = 100_000_000
AIO = {
    "block_size": 1 << 20,
    "queue_depth": 32,
    "intra_op_parallelism": 8,
    "single_submit": False,
    "overlap_events": True,
}


def why_not(folders: Sequence[str] = ()) -> str | None:
    """Why it cannot be measured here, or None. ``folders``: where packages of its own may be, too."""
    if not torch.cuda.is_available():
        return "DeepSpeed is measured on a CUDA device, and this machine has none"
    if importlib.util.find_spec("deepspeed") is None and not any((Path(f) / "deepspeed").is_dir() for f in folders):
        return (
            "DeepSpeed is not installed: pip install deepspeed, with libaio's headers (libaio-dev), or name the "
            "folders of its packages in LOWPREC_PEER_PATH_DEEPSPEED"
        )
    return None


def run(work: Work, path: Path, device: torch.device) -> dict[str, Any]:
    """Three steps after a first one. Its optimizer's device is ``work.peer``; it builds its operators at first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(alone)
    import deepspeed

    model = build(work, torch.device("cpu"))  # initialize brings it to the GPU, in its own order
    offload: dict[str, Any] = {"device": work.peer, "pin_memory": True}
    if work.peer == "nvme":
        path.mkdir(parents=True, exist_ok=True)
        offload |= {"nvme_path": str(path), "buffer_count": BUFFERS, "pipeline_read": True, "pipeline_write": True}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": work.batch,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "zero_optimization": {"stage": 3, "offload_optimizer": offload, "sub_group_size": GROUP_ELEMENTS},
            "zero_force_ds_cpu_optimizer": True,
            "aio": AIO,
        },
    )
    ids = torch.randint(0, work.shape["vocab_size"], (work.batch, work.length), device=device)
    peak_gb()

    def step() -> torch.Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    rows = []
    for _ in range(4):
        row, loss = timed_step(step)
        rows.append(row | {"loss": round(loss.item(), 4)})
    figures = {
        "parameters": sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters()),
        "step_s_p50": statistics.median(row["step_s"] for row in rows[1:]),
        "steps": rows,
        "peak_gb": peak_gb(),
        "version": deepspeed.__version__,
    }
    engine.destroy()
    return figures
