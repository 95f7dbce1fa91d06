"""``python_docs``: questions and answers from the signatures and docstrings of Python's standard library.

It is on every machine, needs no network, and is the same for the same Python version. Only modules that import
quietly, everywhere and without optional C libraries are listed.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType

from lowprec.data.records import Record
from lowprec.errors import UserError

NAME = "python_docs"

_MODULES = """
abc argparse array ast asyncio base64 bdb binascii bisect builtins calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg csv
cProfile dataclasses datetime decimal difflib dis doctest email email.charset email.generator email.header
email.headerregistry email.message email.mime.text email.parser email.policy email.utils enum errno faulthandler filecmp
fileinput fnmatch fractions ftplib functools gc getopt gettext glob graphlib gzip hashlib heapq hmac html html.entities
html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.metadata
importlib.resources importlib.util inspect io ipaddress itertools json json.decoder json.encoder keyword linecache
locale logging logging.config logging.handlers mailbox marshal math mimetypes mmap modulefinder multiprocessing
multiprocessing.pool multiprocessing.queues multiprocessing.shared_memory netrc numbers opcode operator optparse os
os.path pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc
queue quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket
socketserver stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny
tarfile tempfile textwrap threading time timeit token tokenize tomllib trace traceback tracemalloc types typing
unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings wave
weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util xml.dom.minidom
xml.dom.pulldom xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp
zipfile zipimport zlib zoneinfo
"""

MAX_ANSWER_CHARACTERS = 480
MIN_ANSWER_CHARACTERS = 24

_PURPOSE = {
    "function": ("What does `{call}` do?", "Explain `{call}`.", "In Python, what is `{call}` for?"),
    "method": ("What does `{call}` do?", "Explain the method `{call}`.", "What happens when I call `{call}`?"),
    "class": (
        "What is the class `{name}` for?",
        "Describe Python's `{name}`.",
        "What does the class `{name}` represent?",
    ),
    "module": ("What is Python's module `{name}` for?",),
}
_ARGUMENTS = ("Which arguments does `{name}` take?", "What is the signature of `{name}`?", "How do I call `{name}`?")


def python_docs() -> Iterator[Record]:
    """Yield the pairs as prompt/completion records, in an order that depends on their contents alone.

    The questions about one object share their ``split_key``, and so do objects whose texts begin alike, so that a
    held-out answer has no near twin among the trained ones.

    Raises:
        UserError: Python runs with ``-OO``, which strips docstrings.
    """
    if inspect.cleandoc.__doc__ is None:
        raise UserError("data.path=python_docs needs docstrings: run Python without -OO and without PYTHONOPTIMIZE=2.")
    pairs: dict[str, Record] = {}
    for name, kind, described in sorted(_objects(), key=lambda entry: entry[0]):
        answer = _answer(described)
        call, signature = _call(name, described)
        if answer:
            key = _digest(re.sub(r"[^a-z]+", " ", re.split(r"(?<=[.!?])\s", answer.lower(), maxsplit=1)[0]))
            question = _pick(_PURPOSE[kind], name).format(name=name, call=call)
            pairs.setdefault(answer, Record(where=f"{NAME}, {name}", fields=_pair(question, answer), split_key=key))
        if signature and signature.parameters and answer and pairs[answer].where == f"{NAME}, {name}":
            usage = _usage(call, signature)
            question = _pick(_ARGUMENTS, name).format(name=name)
            pairs.setdefault(
                usage, Record(where=f"{NAME}, {name}, arguments", fields=_pair(question, usage), split_key=key)
            )
    yield from sorted(pairs.values(), key=lambda record: _digest(record.where))


def _pair(question: str, answer: str) -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _pick(choices: tuple[str, ...], name: str) -> str:
    return choices[int(_digest(name), 16) % len(choices)]


def _objects() -> Iterator[tuple[str, str, object]]:
    """(qualified name, kind, object) of every public documented thing, each under one name."""
    for module_name in _MODULES.split():
        module = importlib.import_module(module_name)
        yield module_name, "module", module
        for name in _public_names(module):
            value = getattr(module, name, None)
            if not (inspect.isclass(value) or inspect.isroutine(value)) or not _belongs(value, module):
                continue
            prefix = "" if module_name == "builtins" else f"{module_name}."
            yield f"{prefix}{name}", "class" if inspect.isclass(value) else "function", value
            if inspect.isclass(value) and not issubclass(value, BaseException):
                yield from _methods(f"{prefix}{name}", value)


def _public_names(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or vars(module)
    # Hooks are there to be replaced, so what they are depends on what else runs in the process.
    return sorted(name for name in names if not name.startswith("_") and not name.endswith(("hook", "showwarning")))


def _belongs(value: object, module: ModuleType) -> bool:
    """Whether this module is the thing's home, not one that imported it (C twins such as _json count as home)."""
    home = getattr(value, "__module__", None) or module.__name__
    listed = module.__name__
    return home.lstrip("_").split(".")[0] == listed.split(".")[0] or home in (
        "posixpath",
        "genericpath",
        "ntpath",
        "posix",
    )


def _methods(prefix: str, cls: type) -> Iterator[tuple[str, str, object]]:
    for name, value in sorted(vars(cls).items()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        if not name.startswith("_") and inspect.isroutine(value):
            yield f"{prefix}.{name}", "method", value


def _answer(described: object) -> str:
    """The first paragraphs of the docstring, unwrapped, up to the first example; empty where that says too little."""
    documentation = getattr(described, "__doc__", None)
    if not isinstance(documentation, str):
        return ""
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(documentation)):
        lines = block.splitlines()
        if not lines or any(line.lstrip().startswith((">>>", "===", "---", "+--")) for line in lines):
            break
        if re.fullmatch(r"[\w.]+\(.*\)\s*(->.*)?", " ".join(lines), re.DOTALL):
            continue  # the signature, which C functions repeat at the head of their docstring
        indented = any(line.startswith(" ") for line in lines)
        paragraph = block if indented else " ".join(line.strip() for line in lines)
        if sum(map(len, paragraphs)) + len(paragraph) > MAX_ANSWER_CHARACTERS:
            break
        paragraphs.append(paragraph)
    answer = "\n\n".join(paragraphs)
    return answer if len(answer) >= MIN_ANSWER_CHARACTERS and answer.isascii() and "0x" not in answer else ""


def _call(name: str, described: object) -> tuple[str, inspect.Signature | None]:
    """``name(arguments)`` as it is written, and the signature where Python knows one that is the same everywhere."""
    if inspect.ismodule(described):
        return name, None
    try:
        signature = inspect.signature(described)  # type: ignore[arg-type]
    except (TypeError, ValueError, AttributeError):  # some C functions have none, or a broken one
        return f"{name}()", None
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls", "type")]
    shown = str(signature.replace(parameters=_without_annotations(parameters), return_annotation=signature.empty))
    if re.search(r" at 0x|<|['\"]/\w", shown) or len(shown) > 160:  # addresses and paths of this process
        return f"{name}()", None
    return f"{name}{shown}", signature.replace(parameters=parameters)


def _without_annotations(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p.replace(annotation=inspect.Parameter.empty) for p in parameters]


def _usage(call: str, signature: inspect.Signature) -> str:
    """A sentence about the arguments."""
    required, optional = [], []
    kinds: dict[inspect._ParameterKind, Callable[[str], str]] = {
        inspect.Parameter.VAR_POSITIONAL: lambda name: f"any further positional arguments (`*{name}`)",
        inspect.Parameter.VAR_KEYWORD: lambda name: f"any further keyword arguments (`**{name}`)",
    }
    for parameter in signature.parameters.values():
        if parameter.kind in kinds:
            optional.append(kinds[parameter.kind](parameter.name))
        elif parameter.default is inspect.Parameter.empty:
            required.append(f"`{parameter.name}`")
        else:
            only = " (by keyword only)" if parameter.kind is inspect.Parameter.KEYWORD_ONLY else ""
            optional.append(f"`{parameter.name}`{only}, by default {parameter.default!r}")
    needs = f"It needs {_listed(required)}." if required else "It needs no argument."
    takes = f" Optional: {'; '.join(optional)}." if optional else ""
    return f"Call it as `{call}`. {needs}{takes}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
