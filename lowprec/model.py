"""From the recipe's group ``model`` to a transformers model and its tokenizer."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers  # its classes are imported when first used: the recipe's schema does not pay for them
from huggingface_hub import errors as hub
from omegaconf import MISSING
from safetensors import SafetensorError

from lowprec.errors import UserError
from lowprec.model_source import KEY, ModelSource, refuse_pickled, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

COMPUTE_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AUTO = "auto"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|endoftext|>")


@dataclass(kw_only=True, slots=True)
class Model:
    """Which model, and how its weights are stored and computed with."""

    model_name_or_path: str = MISSING
    """A Hugging Face folder, a hub name, a ``.gguf`` file, or ``pkg://package/file.gguf``."""
    dtype: str = "bf16"
    """``bf16``, ``fp16`` or ``fp32``: the dtype that parameters are stored in and products are computed in. ``auto`` is
    bf16 where the hardware has it, else fp32; ``settle_dtype`` says which."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None means its main branch."""
    attn_implementation: str | None = None
    """``sdpa``, ``eager``, ``flash_attention_2`` ... None lets transformers choose."""

    def __post_init__(self) -> None:
        if self.dtype not in (AUTO, *COMPUTE_DTYPE):
            raise UserError(f"model.dtype={self.dtype} is not one of {', '.join((AUTO, *COMPUTE_DTYPE))}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return COMPUTE_DTYPE[self.dtype]


def settle_dtype(options: Model, device: torch.device) -> str | None:
    """Replace ``dtype=auto`` in ``options`` by what the device computes fast.

    Returns:
        What the user should be told: what auto became and why, or that the dtype asked for is very slow here.
    """
    native = has_bf16(device)
    if options.dtype == AUTO:
        options.dtype = "bf16" if native else "fp32"
        units = "has bf16 units" if native else "has no bf16 units"
        return f"model.dtype=auto is {options.dtype} here: this {_kind(device)} {units}."
    if options.dtype == "bf16" and device.type == "cpu" and not native:
        # One LoRA step of SmolLM2-135M, 8 x 80 tokens, on 2 AVX2 cores: 268 s in bf16, 4 s in fp32.
        return (
            "This processor has no bf16 units and emulates model.dtype=bf16 very slowly; model.dtype=fp32 is fast here."
        )
    return None


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 itself, instead of emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "processor"


def load_model(options: Model, *, device: str | torch.device = "cpu") -> "PreTrainedModel":
    """Load a causal language model onto ``device``, every parameter in ``options.dtype``.

    Buffers such as rotary frequencies stay in fp32, as do parameters that the architecture itself keeps there, and
    the packed weights of a model saved in bitsandbytes' 4 bits stay packed. The model is in ``eval`` mode.

    Raises:
        UserError: the model is not there, is not a causal language model, needs code or a dtype that it may not
            have, or its files are damaged or incomplete.
    """
    device = torch.device(device)
    _check_dtype(options, device)
    source = resolve_source(options.model_name_or_path)
    config = load_config(options, source)
    path, keywords = _arguments(options, source, config)
    if source.kind == "gguf":
        # Unpack all blocks; transformers else keeps them packed wherever it finds a kernel, and the model untrainable.
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if options.attn_implementation is not None:
        keywords["attn_implementation"] = options.attn_implementation
    with explained(source):
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=options.torch_dtype,
            device_map={"": device},
            use_safetensors=True,
            output_loading_info=True,
            **keywords,
        )
    model, loading = loaded
    _check_complete(source, loading)
    if source.kind == "gguf":
        _make_plain(model, options.torch_dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see NF4Linear: repacked weights would pass no gradient
            module.support_avx512bf16_for_cpu = False
    # Adapters and saved configs name their base by this; transformers would leave a GGUF file's folder here.
    model.name_or_path = model.config.name_or_path = source.name
    return model


def load_config(options: Model, source: ModelSource | None = None) -> "PreTrainedConfig":
    """The model's configuration alone (on the hub: its config.json), checked to be one that can be trained."""
    source = source or resolve_source(options.model_name_or_path)
    path, keywords = _arguments(options, source)
    with explained(source):
        config = transformers.AutoConfig.from_pretrained(path, **keywords)
    vars(config).pop("_model_name_or_path", None)  # the title inside a GGUF file; saved configs would carry it on
    own_code = options.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise UserError(
            f"{KEY}={source.name} is of type '{config.model_type}', which transformers does not load as a causal "
            "language model (AutoModelForCausalLM). Name a model that predicts the next token."
        )
    quantization = getattr(config, "quantization_config", None) or {}
    quantization = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if quantization and source.kind != "gguf" and not quantization.get("load_in_4bit"):
        raise UserError(
            f"{KEY}={source.name} holds weights that are already quantised ({quantization.get('quant_method')}). Name "
            "the 16-bit model that they were made from; the group weights chooses how its layers are quantised here."
        )
    return config


def load_tokenizer(options: Model) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with an end token and a padding token, and no token that the model does not know.

    Where there is no padding token, a reserved token of the vocabulary serves, or else the end token: the
    embeddings are never resized. Padding is told apart by the attention mask, not by its id.
    """
    source = resolve_source(options.model_name_or_path)
    path, keywords = _arguments(options, source)
    with explained(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **keywords)
    # transformers 5.17 makes the first token of a GGUF file its end token; the configuration has the right one.
    if tokenizer.eos_token_id is None or source.kind == "gguf":
        end = load_config(options, source).eos_token_id
        end = end[0] if isinstance(end, list) else end
        token = None if end is None else tokenizer.convert_ids_to_tokens(end)
        if token is None:
            raise UserError(
                f"{KEY}={source.name}: neither the tokenizer nor config.json names an end token, so the model could "
                "not learn where an answer ends. Set eos_token in tokenizer_config.json."
            )
        tokenizer.eos_token = token
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = [token for token in PAD_TOKENS if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = spare[0] if spare else tokenizer.eos_token
    return tokenizer


def _arguments(
    options: Model, source: ModelSource, config: "PreTrainedConfig | None" = None
) -> tuple[str, dict[str, Any]]:
    """Name and keywords for ``from_pretrained``. With the config at hand the weights come from the same commit."""
    path, keywords = source.arguments()
    revision = getattr(config, "_commit_hash", None) or options.revision
    if source.kind == "hub" and revision is not None:
        keywords["revision"] = revision
    return path, {**keywords, "trust_remote_code": options.trust_remote_code}


def _check_dtype(options: Model, device: torch.device) -> None:
    if options.dtype == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise UserError(
            f"model.dtype=bf16 needs a GPU of compute capability 8.0 or newer, and {torch.cuda.get_device_name(device)}"
            f" has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Set model.dtype=fp16, or fp32."
        )


def _check_complete(source: ModelSource, loading: dict) -> None:
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{KEY}={source.name}: {len(missing)} tensors of the model are not in its files ({', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}), so they would be random. The files are incomplete, or hold a "
            "model for another task."
        )


def _make_plain(model: "PreTrainedModel", dtype: torch.dtype) -> None:
    """Leave no trace of the GGUF file's quantisation: plain parameters in ``dtype``, and no mark on the model.

    A marked model is refused by training loops and by ``save_pretrained``, although its layers are plain.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for owner in (model, model.config):
        for mark in ("hf_quantizer", "quantization_method", "quantization_config", "_is_quantized"):
            if mark in vars(owner):
                delattr(owner, mark)
    setattr(model, "is_quantized", False)  # noqa: B010  the class declares a read-only property of a later release


@contextmanager
def explained(source: ModelSource) -> Iterator[None]:
    """Turn what transformers, the hub client and safetensors raise into one paragraph each."""
    name = f"{KEY}={source.name}"
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{name}: a safetensors file is damaged or cut off ({error}). Copy the files again.") from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError, struct.error) as error:
        causes = _chain(error)
        text = " ".join(str(error).split())
        if any(isinstance(c, hub.GatedRepoError) for c in causes):
            reason = "is gated. Accept its terms on its page on the hub, then log in with: hf auth login"
        elif any(isinstance(c, hub.RevisionNotFoundError) for c in causes):
            reason = "has no such revision. Correct model.revision."
        elif any(isinstance(c, hub.RepositoryNotFoundError) for c in causes):
            reason = "is neither a local folder nor a model on the hub (a private one needs: hf auth login)."
        elif source.kind == "hub" and _is_offline(causes):
            reason = (
                "is not a local folder, and the hub cannot be reached, nor is the model in the local cache. Give the "
                "path of a folder or of a .gguf file, or try again with a network."
            )
        elif "trust_remote_code" in text:
            reason = (
                "needs Python code that comes with it, which is not run unless you say so. Read that code, then set "
                "model.trust_remote_code=true."
            )
        elif "safetensors" in text and "use_safetensors" in text:
            raise UserError(refuse_pickled(source.name, "pickled files")) from error
        elif "does not recognize this architecture" in text:
            reason = f"is of an architecture that the installed transformers does not know. {text}"
        else:
            reason = f"cannot be loaded: {text[:600]}"
        raise UserError(f"{name} {reason}") from error


def _chain(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _is_offline(causes: list[BaseException]) -> bool:
    kinds = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(c, kinds) or "ConnectError" in type(c).__name__ for c in causes)
