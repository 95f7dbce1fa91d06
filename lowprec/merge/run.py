"""``merge``: an adapter into its 16-bit base, one tensor at a time.

Merging into the 4-bit weights that a QLoRA adapter was trained on would round the update away; the original files take
it as it is. The update is added in fp32 and the sum is rounded once.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowprec.adapter import quiet_peft
from lowprec.checkpoint import MANIFEST, atomic_folder, damage
from lowprec.config import RECIPE_FILE, Recipe, resolve
from lowprec.errors import UserError
from lowprec.merge.base_tensors import INDEX, SINGLE, BaseTensors, FileTensors, LoadedTensors
from lowprec.merge.compare import LogitDifference, difference, logits_of, sample_tokens
from lowprec.merge.skeleton import AdaptedSkeleton
from lowprec.model import COMPUTE_DTYPE, Model, explained, load_config, load_model, load_tokenizer
from lowprec.model_source import ModelSource, resolve_source
from lowprec.prepare import wrap

MAX_SHARD_BYTES = 2 * 10**9
"""What is held of the output at any time."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What ``merge`` did."""

    output: Path
    base: str
    num_layers: int
    """Layers that a low-rank update was added to."""
    num_replaced: int
    """Tensors taken whole from the adapter (``modules_to_save``, biases)."""
    num_bytes: int
    dtypes: list[str]
    differences: list[LogitDifference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def render(self, console: Console) -> None:
        """Print a table, and the notes below it."""
        table = Table(box=None, show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        table.add_row("merged", str(self.output))
        table.add_row("base", self.base)
        table.add_row("layers updated", str(self.num_layers))
        if self.num_replaced:
            table.add_row("tensors replaced", str(self.num_replaced))
        table.add_row("size", f"{self.num_bytes / GIB:.2f} GiB, {', '.join(self.dtypes)}")
        for gap in self.differences:
            table.add_row(
                f"logits, against {gap.against}",
                f"largest difference {gap.largest:.4f}, rms {gap.root_mean_square:.4f}, where the largest logit is "
                f"{gap.largest_logit:.1f}; same top token at {gap.same_top_token:.0%} of {gap.num_tokens} positions",
            )
        console.print(table, highlight=False)
        for note in self.notes:
            console.print(f"Note: {note}", highlight=False)


def merge(
    adapter_or_run_folder: str | Path,
    output: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    text: str | None = None,
) -> MergeResult:
    """Write base plus adapter as a plain Hugging Face folder, and measure how far it is from the two.

    Of the base one tensor and of the output one shard is in memory at a time, and afterwards, for the comparison, one
    model at a time. A GGUF base, which has to be unpacked, is held whole, once.

    Args:
        adapter_or_run_folder: a PEFT adapter, or a run folder with one in ``final/``.
        output: a folder that does not exist or is empty. It appears whole or not at all.
        base: the 16-bit base model; by default the one that the run or the adapter names.
        dtype: ``bf16``, ``fp16`` or ``fp32``; by default that of the base's files, and bf16 where they are GGUF.
        text: what the logits are compared on; by default documentation of Python's standard library.

    Raises:
        UserError: no adapter is there, it is not as its manifest says, it does not fit the base, the base is not found,
            the output exists, or the disk has no room.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty. Name another output folder, or remove it.")
    adapter, run = _find_adapter(Path(adapter_or_run_folder))
    wrong = damage(adapter) if (adapter / MANIFEST).exists() else None
    if wrong is not None:
        raise UserError(f"{adapter} is damaged: {wrong}. Take another copy, or resume its run, which writes it again.")
    recipe = resolve(str(run / RECIPE_FILE))[0] if run is not None else None
    options = _base_options(adapter, recipe, base, dtype)
    source, config = _find_base(options)
    convert = options.torch_dtype if dtype or source.kind == "gguf" else None
    skeleton = AdaptedSkeleton(config, adapter, trust_remote_code=options.trust_remote_code)
    tensors = _base_tensors(options, source, skeleton)
    layout = _output_layout(tensors, skeleton, convert)
    num_bytes = sum(tensor.nbytes for tensor in layout.values())
    tokenizer = _tokenizer(adapter, options)
    with atomic_folder(output, needed_bytes=num_bytes) as writing:
        _write_weights(writing, tensors, skeleton, layout)
        _write_config(writing, source, config, skeleton, convert)
        tokenizer.save_pretrained(writing)
    model = tensors.model if isinstance(tensors, LoadedTensors) else None
    return MergeResult(
        output=output,
        base=source.name,
        num_layers=skeleton.num_layers,
        num_replaced=skeleton.num_replaced,
        num_bytes=num_bytes,
        dtypes=sorted({str(tensor.dtype).removeprefix("torch.") for tensor in layout.values()}),
        differences=_differences(output, adapter, options, recipe, model, tokenizer, text),
        notes=_notes(recipe, skeleton),
    )


def _find_adapter(folder: Path) -> tuple[Path, Path | None]:
    """The adapter's folder, and the run folder that it lies in (None for an adapter alone)."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Name a run folder, or a folder with adapter_config.json.")
    for adapter, run in ((folder, folder.parent), (folder / "final", folder)):
        if (adapter / "adapter_config.json").is_file():
            return adapter, run if (run / RECIPE_FILE).is_file() and adapter.name == "final" else None
    if (folder / "final" / "config.json").is_file() or (folder / "config.json").is_file():
        raise UserError(f"{folder} holds a whole model, not an adapter: there is nothing to merge.")
    if (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"{folder} is a run folder without final/: the run has not finished. Go on with it: lowprec train "
            f"{folder / RECIPE_FILE} train.resume_from_checkpoint=auto"
        )
    raise UserError(f"{folder} holds no adapter: neither it nor {folder / 'final'} has an adapter_config.json.")


def _base_options(adapter: Path, recipe: Recipe | None, base: str | None, dtype: str | None) -> Model:
    """The base to merge into, as ``load_model`` takes it. What is named on the command line comes first."""
    named = json.loads((adapter / "adapter_config.json").read_text())
    options = recipe.model if recipe else Model(model_name_or_path="", revision=named.get("revision"))
    name = base or named.get("base_model_name_or_path") or (recipe.model.model_name_or_path if recipe else None)
    if not name:
        raise UserError(f"{adapter} does not say which model it was trained on. Name it with --base.")
    if dtype is not None and dtype not in COMPUTE_DTYPE:
        raise UserError(f"dtype={dtype} is not one of {', '.join(COMPUTE_DTYPE)}.")
    return Model(
        model_name_or_path=name,
        dtype=dtype or "bf16",
        trust_remote_code=options.trust_remote_code,
        revision=None if base else options.revision,
        attn_implementation=options.attn_implementation,
    )


def _find_base(options: Model) -> tuple[ModelSource, PreTrainedConfig]:
    try:
        source = resolve_source(options.model_name_or_path)
        config = load_config(options, source)
    except UserError as error:
        raise UserError(f"The base model of the adapter is not usable. {error} Name another with --base.") from error
    if getattr(config, "quantization_config", None) and source.kind != "gguf":
        raise UserError(
            f"The base {source.name} is stored in 4 bits, where the adapter's update would be rounded away. Name the "
            "16-bit model that it was made from with --base."
        )
    return source, config


def _base_tensors(options: Model, source: ModelSource, skeleton: AdaptedSkeleton) -> BaseTensors:
    """Files where their names fit the model's, else the model loaded by transformers."""
    folder = source.path if source.kind == "folder" else _download(options, source) if source.kind == "hub" else None
    if folder is not None:
        tensors = FileTensors(folder, skeleton.names, skeleton.prefix)
        needed = {skeleton.tied.get(name, name) for name in skeleton.changed}
        if needed <= set(tensors.layout):
            return tensors
    return LoadedTensors(load_model(options))


def _download(options: Model, source: ModelSource) -> Path:
    with explained(source):
        patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.py"]
        return Path(snapshot_download(source.name, revision=options.revision, allow_patterns=patterns))


def _output_layout(
    tensors: BaseTensors, skeleton: AdaptedSkeleton, convert: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of what will be written, on the meta device."""
    layout = dict(tensors.layout)
    for name, other in skeleton.untied.items():
        layout.setdefault(name, layout[other])
        layout.setdefault(other, layout[name])
    if convert is not None:
        layout = {name: t.to(convert) if t.is_floating_point() else t for name, t in layout.items()}
    return layout


def _write_weights(
    folder: Path, tensors: BaseTensors, skeleton: AdaptedSkeleton, layout: dict[str, torch.Tensor]
) -> None:
    plan = split_state_dict_into_shards_factory(
        layout,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    same = skeleton.untied | {other: name for name, other in skeleton.untied.items()}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("merging", total=len(layout))
        for file, names in plan.filename_to_tensors.items():
            shard = {}
            for name in names:
                base = tensors.read(name if name in tensors.layout else same[name])
                shard[name] = skeleton.merged(name, base).to(layout[name].dtype).contiguous()
                progress.advance(task)
            save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    else:
        assert (folder / SINGLE).is_file()


def _write_config(
    folder: Path,
    source: ModelSource,
    config: PreTrainedConfig,
    skeleton: AdaptedSkeleton,
    convert: torch.dtype | None,
) -> None:
    if skeleton.untied:
        config.get_text_config(decoder=True).tie_word_embeddings = config.tie_word_embeddings = False
    if convert is not None:
        config.dtype = convert
    if "quantization_config" in vars(config):
        del config.quantization_config
    config.architectures = config.architectures or [skeleton.architecture]
    config.save_pretrained(folder)
    path, keywords = source.arguments()
    try:
        generation = GenerationConfig.from_pretrained(path) if not keywords else None
    except OSError:  # it is optional
        generation = None
    (generation or GenerationConfig.from_model_config(config)).save_pretrained(folder)
    if source.kind == "folder" and source.path is not None and getattr(config, "auto_map", None):
        for code in source.path.glob("*.py"):
            shutil.copy2(code, folder)


def _tokenizer(adapter: Path, options: Model) -> PreTrainedTokenizerBase:
    """The one saved with the adapter, else the base's."""
    if (adapter / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=options.trust_remote_code)
    return load_tokenizer(options)


def _differences(
    output: Path,
    adapter: Path,
    options: Model,
    recipe: Recipe | None,
    loaded: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    text: str | None,
) -> list[LogitDifference]:
    """Compare with base and adapter, and with the base as it was trained on where that was another; one at a time."""
    merged_options = Model(model_name_or_path=str(output), trust_remote_code=options.trust_remote_code)
    device, options.dtype = _where_to_compare(output)
    merged_options.dtype = options.dtype
    ids = sample_tokens(tokenizer, text)

    def with_adapter(model: Any) -> torch.Tensor:
        with quiet_peft():
            return logits_of(PeftModel.from_pretrained(model.to(device), str(adapter)), ids)

    base: Any = load_model(options, device=device) if loaded is None else loaded
    references = {"base + adapter": with_adapter(base.to(options.torch_dtype))}
    del base, loaded
    if recipe is not None and (recipe.choice("weights") != "bf16" or recipe.wrap.rules):
        trained = load_model(options)
        wrap(trained, recipe.weights, rules=recipe.wrap.schemes(recipe.weights), frozen=True, device=device)
        references[f"{recipe.choice('weights')} base + adapter, as trained"] = with_adapter(trained)
        del trained
    logits = logits_of(load_model(merged_options, device=device), ids)
    return [difference(against, reference, logits) for against, reference in references.items()]


def _where_to_compare(output: Path) -> tuple[torch.device, str]:
    """The GPU where there is room on it; on a CPU fp32, which has no noise of its own, where the memory allows it."""
    elements = sum(file.stat().st_size for file in output.glob("*.safetensors")) // 2
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * 2 * elements:
        dtype = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
        return torch.device("cuda"), dtype
    return torch.device("cpu"), "fp32" if psutil.virtual_memory().available > 1.3 * 4 * elements else "bf16"


def _notes(recipe: Recipe | None, skeleton: AdaptedSkeleton) -> list[str]:
    notes = []
    if recipe is not None and recipe.choice("weights") != "bf16":
        scheme = recipe.choice("weights")
        notes.append(
            f"the adapter was trained on the base in {scheme} and is merged into the original one; the row "
            f"'{scheme} base + adapter' says how far that moves the answers."
        )
    for name, other in skeleton.untied.items():
        notes.append(f"{name} and {other} were one tensor and are two now, since the adapter changes only one of them.")
    return notes
