"""Full fine-tuning of a Llama of random weights over a state store: seconds a step and its parts, bytes, peak memory.

    python -m lowprec.bench.ssd_training --shape 1b --store ssd --path /mnt/nvme/states --state-dtype int8

Prints one line of JSON. Needs a CUDA device.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowprec.optim import AdamW

SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


def build(shape: str, checkpointing: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def without_optimizer_gb(model: nn.Module, ids: torch.Tensor) -> float:
    """Peak GB of forward and backward alone, each gradient freed as it comes: weights and activations."""

    def free(param: torch.Tensor) -> None:
        param.grad = None

    handles = [param.register_post_accumulate_grad_hook(free) for param in model.parameters()]
    model(input_ids=ids, labels=ids).loss.backward()
    for handle in handles:
        handle.remove()
    return peak_gb()


def peak_gb() -> float:
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def disk_bytes() -> dict[str, int]:
    """Bytes that this process has had read from and written to disks (/proc/self/io)."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {key: int(value) for key, value in lines if key in ("read_bytes", "write_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--store", choices=("gpu", "cpu", "ssd"), default="ssd")
    parser.add_argument("--path")
    parser.add_argument("--state-dtype", default="fp32")
    parser.add_argument("--master", default="split")
    parser.add_argument("--pinned-gib", type=float, default=2.0)
    parser.add_argument("--clip", type=float, help="exact global norm: the update then begins after backward")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--cap-gib", type=float, help="cap on this process's GPU memory")
    args = parser.parse_args()

    if args.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / total)
    model = build(args.shape, args.checkpointing)
    ids = torch.randint(0, 32000, (args.batch, args.length), device="cuda")
    bare_gb = without_optimizer_gb(model, ids)
    ssd = {"pinned_gib": args.pinned_gib, "reserve_checkpoints": 0} if args.store == "ssd" else {}
    optimizer = AdamW(
        model.named_parameters(),
        lr=1e-5,
        state_store=args.store,
        path=args.path,
        state_dtype=args.state_dtype,
        master=args.master,
        **ssd,
    )
    if args.clip is None:
        optimizer.update_in_backward()
    steps = []
    for _ in range(args.steps):
        io = disk_bytes()
        marks = [time.perf_counter()]
        loss = model(input_ids=ids, labels=ids).loss
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        loss.backward()
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if args.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        now = disk_bytes()
        steps.append(
            {
                "step_s": round(marks[-1] - marks[0], 3),
                "forward_backward_step_s": [round(b - a, 3) for a, b in zip(marks, marks[1:], strict=False)],
                "read_gb": round((now["read_bytes"] - io["read_bytes"]) / 1e9, 2),
                "written_gb": round((now["write_bytes"] - io["write_bytes"]) / 1e9, 2),
                "loss": round(loss.item(), 4),
            }
        )
    begin = time.perf_counter()
    optimizer.flush()
    flush_s = round(time.perf_counter() - begin, 3)
    facts = {key: value for key, value in vars(args).items() if value is not None}
    facts |= {"parameters": sum(param.numel() for param in model.parameters()), "flush_s": flush_s}
    facts |= {"peak_gb": round(peak_gb(), 2), "weights_and_activations_gb": round(bare_gb, 2)}
    print(json.dumps(facts | {"steps": steps, "statistics": optimizer.statistics()}))
    optimizer.close()


if __name__ == "__main__":
    main()
