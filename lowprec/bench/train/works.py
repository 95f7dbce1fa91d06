"""What is trained: model shapes, batches, caps on memory, and which libraries are measured beside lowprec."""

from dataclasses import dataclass, replace
from typing import Any

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1_5B = {
    "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}  # fmt: skip
SMOL_135M = LLAMA_8B | {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
TINY = LLAMA_8B | {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 256,
}  # fmt: skip
GRAPHS, NO_GRAPHS = "train.cuda_graphs=true", "train.cuda_graphs=false"
QLORA_PEERS = ("transformers", "transformers+liger", "unsloth")


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    name: str
    """A family with variants writes ``family@variant``: they run in this order, and the first that fails ends them."""
    shape: dict[str, Any]
    """Fields of the transformers configuration."""
    batch: int
    length: int
    recipe: str
    overrides: tuple[str, ...] = ()
    """Of the recipe, as on the command line."""
    method: str = "nf4"
    """What peers train: ``nf4`` (LoRA on bitsandbytes' NF4), ``lora`` (LoRA on bf16), ``full``."""
    peers: tuple[str, ...] = ()
    cap_gib: float | None = None
    """Cap on the process's GPU memory while it trains."""
    warmup: int = 10
    timed: int = 20
    target: str = ""
    """What is to be reached, in words."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def family(self) -> str:
        return self.name.partition("@")[0]


def _qlora(name: str, shape: dict, batch: int, length: int, *more: str, **fields: Any) -> Work:
    """The product of each shape is chosen for at most 4096 tokens: longer rows take the same, and need no new trial."""
    tokens = min(batch * length, 4096)
    overrides = (f"weights.tokens={tokens}", GRAPHS, *more)
    return Work(name, shape, batch, length, "qlora_nf4", overrides, **fields)


def _full(name: str, shape: dict, batch: int, length: int, *more: str, **fields: Any) -> Work:
    overrides = ("weights=auto", f"weights.tokens={batch * length}", "train.max_grad_norm=null", GRAPHS, *more)
    return Work(name, shape, batch, length, "full", overrides, "full", **fields)


def _eight_bit() -> list[Work]:
    """The same loop of lowprec over 16-bit and over 8-bit weights, Liger's kernels in all."""
    lora = [
        Work(f"eight_bit_8b_{scheme}", LLAMA_8B, 2, 2048, "lora", (f"weights={scheme}", GRAPHS), "lora",
             target="1.15x the tokens/s of bf16 and 6.5 GB less, base frozen in one layout")
        for scheme in ("bf16", "fp8", "int8_hadamard")
    ]  # fmt: skip
    options = ("train.gradient_checkpointing=none", "optimizer.master=split", "optimizer.state_dtype=int8")
    full = []
    for scheme in ("bf16", "fp8", "int8_hadamard", "auto"):
        work = _full(f"eight_bit_1b_{scheme}", LLAMA_1B, 4, 2048, *options, target="1.10x the tokens/s of bf16")
        choice = work.overrides if scheme == "auto" else (f"weights={scheme}", *work.overrides[2:])
        full.append(replace(work, overrides=choice))
    return lora + full


def all_works() -> dict[str, Work]:
    """Name -> work, in the order of running."""
    short = {"warmup": 1, "timed": 2}
    # Layer inputs on the host, as unsloth has them. Its optimizer's states are int8; fp32 ones of adapters take 0.25 GB
    # more, and one kernel updates all of them, where 448 would have to be launched.
    lean = ("train.gradient_checkpointing=offload",)
    # Graphs hold memory of their own: where the least is asked for, layers are launched kernel by kernel.
    # With no clipping, no gradient outlives its update.
    leaner = (*lean, "train.offload_embeddings=true", "optimizer.state_dtype=int8", "train.max_grad_norm=null")
    least = (*leaner, "state_store=cpu", "weights.product=int8")
    works = [
        _qlora("qlora_8b", LLAMA_8B, 2, 2048, *lean, peers=QLORA_PEERS,
               target="1.5x unsloth's tokens/s in no more memory; 2.2x transformers'"),
        _qlora("qlora_8b_least", LLAMA_8B, 2, 2048, *lean, "train.offload_embeddings=true", peers=("unsloth",),
               target="less memory than unsloth at 1.5x its tokens/s"),
        Work("lora_8bit_8b", LLAMA_8B, 2, 2048, "lora", ("weights=fp8", GRAPHS), "lora",
             ("transformers", "transformers+liger"), target="2.4x transformers' tokens/s in at most 13 GB"),
        # No master, as PyTorch's AdamW keeps none of bf16 weights either.
        _full("full_1b", LLAMA_1B, 4, 2048, "train.gradient_checkpointing=none", "optimizer.state_dtype=int8",
              "optimizer.master=none",
              peers=("transformers", "transformers+liger", "torchao"),
              target="1.35x transformers+liger in no more memory"),
        _qlora("qlora_8b_1x2048", LLAMA_8B, 1, 2048, *lean, target="what the capped run is compared with"),
        _qlora("qlora_8b_capped@8GiB", LLAMA_8B, 1, 2048, *lean, cap_gib=8.0, target="0.9x of the uncapped speed"),
        *(_qlora(f"qlora_8b_capped@{cap:g}GiB", LLAMA_8B, 1, 2048, *options, NO_GRAPHS, cap_gib=cap, **short,
                 target="the smallest cap that runs is at most 6 GiB")
          for cap, options in ((7.0, lean), (6.5, leaner), (6.0, least), (5.75, least), (5.5, least), (5.25, least),
                               (5.0, least))),
        *(_full(f"full_1.5b_8gib_{store}", QWEN_1_5B, 1, 1024, "train.gradient_checkpointing=full",
                "optimizer.master=split", f"state_store={store}", NO_GRAPHS, cap_gib=8.0, warmup=2, timed=5,
                target="runs, with its step time") for store in ("cpu", "ssd")),
        *(_qlora(f"longest_8b@{length}", LLAMA_8B, 1, length, *lean, NO_GRAPHS, cap_gib=24.0, **short,
                 target="at least 32768 tokens")
          for length in (16384, 32768, 40960, 49152, 65536, 98304)),
        *(_qlora(f"grid_{name}_{length}", shape, 1, length, peers=("transformers",), warmup=5, timed=10,
                 target="no step slower than transformers + peft + bitsandbytes")
          for name, shape in (("135m", SMOL_135M), ("1b", LLAMA_1B), ("8b", LLAMA_8B))
          for length in (256, 1024, 2048, 8192)),
        *_eight_bit(),
        _qlora("tiny_qlora", TINY, 2, 32, peers=("transformers",), **short,
               target="tries this benchmark out, anywhere"),
        _full("tiny_full", TINY, 2, 32, "train.gradient_checkpointing=full", peers=("transformers",), **short,
              target="tries this benchmark out, anywhere"),
    ]  # fmt: skip
    return {work.name: work for work in works}


TABLE = ("qlora_8b", "lora_8bit_8b", "full_1b", "qlora_8b_1x2048", "qlora_8b_capped", "full_1.5b_8gib_cpu",
         "full_1.5b_8gib_ssd", "longest_8b")  # fmt: skip
"""The families of the table; ``grid`` and ``eight_bit`` are the other choices."""
TINY_WORKS = ("tiny_qlora", "tiny_full")
"""Those that run anywhere."""
