"""What tests share: tiny models of many architectures, a tokenizer built in memory, and the measure of noise in dB."""

import math
from pathlib import Path

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen3", "gemma", "mistral", "phi", "gpt2", "opt")

SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 272  # 256 bytes and the special tokens, rounded up to a multiple of 16 as real models do

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_SHAPES: dict[str, dict] = {
    "llama": _LLAMA_SHAPE,
    "qwen3": _LLAMA_SHAPE | {"head_dim": 16},
    "gemma": _LLAMA_SHAPE | {"head_dim": 16},
    "mistral": _LLAMA_SHAPE,
    "phi": _LLAMA_SHAPE | {"num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
    },
}


def tiny_model(arch: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A two-layer model of width 64 with random weights, in ``eval`` mode, for the vocabulary of ``tiny_tokenizer``.

    Tying of the embeddings is the architecture's own default (tied: gemma, gpt2, opt);
    ``tie_word_embeddings=True|False`` and every other config field can be overridden. The weights depend on ``seed``
    alone, and the process's random state is left as it was.
    """
    assert arch in _SHAPES, f"tiny_model knows {', '.join(_SHAPES)}, not {arch!r}"
    ids = {"bos_token_id": 257, "eos_token_id": 259, "pad_token_id": 256}
    fields = {"vocab_size": VOCAB_SIZE} | ids | _SHAPES[arch] | overrides
    config = AutoConfig.for_model(arch, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (ids 0 to 255), four special tokens, and a ChatML template; nothing is downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        model_max_length=512,
    )


def save_tiny(folder: str | Path, arch: str, **kwargs) -> Path:
    """Write ``tiny_model(arch, **kwargs)`` and its tokenizer as a Hugging Face folder (safetensors); returns it."""
    folder = Path(folder)
    tiny_model(arch, **kwargs).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_gguf(path: str | Path, **kwargs) -> Path:
    """Write ``tiny_model("llama", tie_word_embeddings=True, **kwargs)`` and its tokenizer as a GGUF file.

    Matrices are stored as Q8_0, so they come back with about 45 dB; the tokenizer has one token more (``ab``).
    """
    model, tokenizer = tiny_model("llama", tie_word_embeddings=True, **kwargs), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = [*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + [f"<|unused{i}|>" for i in range(config.vocab_size - len(tokens))])
    types = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * (config.vocab_size - len(tokens)))
    writer.add_token_merges(["a b", "c d"])  # readers want at least two
    writer.add_bos_token_id(tokenizer.eos_token_id + 1)  # another one: readers have mistaken it for the end token
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().float()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if projection in name:  # GGUF interleaves the two halves that a rotary embedding turns
                tensor = tensor.view(count, 2, -1, config.hidden_size).transpose(1, 2).reshape(tensor.shape)
        data = tensor.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if data.ndim == 2 else gguf.GGMLQuantizationType.F32
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def sqnr_db(reference: torch.Tensor, value: torch.Tensor) -> float:
    """Signal to quantisation noise, ``10 log10(sum reference^2 / sum (reference - value)^2)`` in dB, taken in fp64.

    Equal tensors give ``inf``; a value with NaN or infinity gives ``-inf``, so that every bound fails on it.
    """
    assert reference.shape == value.shape, f"shapes differ: {tuple(reference.shape)} and {tuple(value.shape)}"
    reference, value = reference.detach().cpu().double(), value.detach().cpu().double()
    noise = (reference - value).square().sum().item()
    if not math.isfinite(noise):
        return -math.inf
    signal = reference.square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
