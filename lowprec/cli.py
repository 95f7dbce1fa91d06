"""The command line: one function a verb, each of which imports what it needs."""

import argparse
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lowprec.allocator import use_expandable_segments
from lowprec.display import make_console, quiet_bitsandbytes
from lowprec.errors import UserError

_TRAIN_HELP = """
examples:
  lowprec train quickstart
  lowprec train lora data.path=chats.jsonl train.output_dir=runs/mine
  lowprec train qlora_nf4 model.model_name_or_path=meta-llama/Llama-3.1-8B data.path=chats.jsonl
  lowprec train runs/mine/recipe.yaml train.resume_from_checkpoint=auto
  lowprec train lora data.path=chats.jsonl -m optimizer.learning_rate=1e-4,3e-4 adapter.r=8,16
  accelerate launch --num_processes 2 -m lowprec train full data.path=chats.jsonl

exit codes: 0 finished, 1 an error, 2 wrong usage, 75 stopped by a signal with a checkpoint saved
"""
_RECIPES_HELP = """
examples:
  lowprec recipes ls
  lowprec recipes show lora
  lowprec recipes show my.yaml adapter.r=8      the recipe as it would run, every key with its value
  lowprec recipes cp lora my_lora.yaml
"""
_MERGE_HELP = """
examples:
  lowprec merge runs/quickstart merged
  lowprec merge my_adapter merged --base meta-llama/Llama-3.1-8B
"""
_DOCTOR_HELP = """
examples:
  lowprec doctor
  lowprec doctor --quick --json
  lowprec doctor --measure --path /mnt/nvme      this machine's speed, for plans; up to 90 seconds
"""
_PLAN_HELP = """
examples:
  lowprec plan lora model.model_name_or_path=meta-llama/Llama-3.1-8B
  lowprec plan full model.model_name_or_path=./my_model --gpu "RTX 4060"
  lowprec plan qlora_nf4 model.model_name_or_path=./my_model data.max_length=4096 --vram 8GiB --json

Nothing but the model's config.json is read. The rates are those that lowprec doctor --measure found on this machine,
or a named card's.
exit codes: 0 it fits or nothing is known of the memory, 3 it does not fit, 1 an error, 2 wrong usage
"""
_PROFILE_HELP = """
examples:
  lowprec profile lora data.path=chats.jsonl model.model_name_or_path=./my_model
  lowprec profile lora profile.steps=50 profile.vram_limit_gib=8 data.path=chats.jsonl
  lowprec profile --compare profiles/lora profiles/qlora_nf4
  lowprec profile --study consumer_gpu --output studies/mine        goes on where it stopped
  lowprec profile --study consumer_gpu --reduced
  lowprec profile --study consumer_gpu --shape tiny --reduced       minutes without a GPU, to see it work

A recipe's figures go to profile.output_dir (profiles/<recipe>). Running out of memory is a result, with exit code 0.
exit codes: 0 profiled, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C
"""
_BENCH_HELP = """
examples:
  lowprec bench linear --peers        8-bit linear layers beside bf16 and torchao
  lowprec bench rotate --json rotate.json
  lowprec bench step --works attention,adamw        pieces of a step beside what they replace
  lowprec bench ssd --path /mnt/nvme/states
  lowprec bench ssd --path /mnt/nvme/states --works fp32,int8 --peers    training over that disk, beside DeepSpeed
  lowprec bench plan --minutes 9                    plans beside what steps take; goes on where it stopped
  lowprec bench train --peers                       whole training steps beside the libraries that are installed
  lowprec bench train --works qlora_8b,longest_8b --peers unsloth --minutes 9    goes on where it stopped
"""
_SSD_HELP = """
examples:
  lowprec ssd clean /mnt/nvme/states                                  remove what dead runs left there
  lowprec ssd export runs/mine/checkpoints/step-500/optimizer states  as fp32 states of torch.optim.AdamW
"""
_COMPLETION_HELP = """
examples:
  eval "$(lowprec completion bash)"
  lowprec completion zsh >> ~/.zshrc
"""


EXIT_DOES_NOT_FIT = 3
_STUDY_SHAPE = "qwen2.5-1.5b"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line. Returns the exit code; errors that a user can cause are one paragraph on standard error."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse stops collecting key=value at the first option (-m), so those after it arrive in ``rest``.
    wrong = [argument for argument in rest if argument.startswith("-") or not hasattr(options, "overrides")]
    if wrong:
        parser.error(f"unknown argument {wrong[0]}; keys are given as key=value, without dashes")
    if rest:
        options.overrides += rest
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' bars would fill a log file
    quiet_bitsandbytes()
    use_expandable_segments()
    try:
        return options.run(options)
    except UserError as error:
        if options.debug:
            raise
        Console(stderr=True, soft_wrap=True).print(f"[bold red]lowprec:[/] {_escape(str(error))}", highlight=False)
        return 1
    except KeyboardInterrupt:
        lost = "; nothing was saved since the last checkpoint" if options.run is _train else ""
        Console(stderr=True).print(f"lowprec: stopped at once{lost}.")
        return 130


def run() -> NoReturn:
    """The program ``lowprec``. A plan is seconds of imports and small objects, so its process does without the search
    for garbage, of which there is little and which takes a quarter of the time; without the compiler, which
    bitsandbytes imports with itself for half a second; and in the end without taking apart what was imported, which
    takes Python another second: there is nothing to close."""
    plans = sys.argv[1:2] == ["plan"]
    if plans:
        gc.disable()
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    code = main()
    if plans:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowprec", description="Low-precision fine-tuning of language models.")
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, examples: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=text, description=text, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=run)
        return sub

    train = verb("train", _train, "Fine-tune a model as a recipe says.", _TRAIN_HELP)
    train.add_argument("recipe", help="a shipped recipe (lowprec recipes ls), or the path of a YAML file")
    train.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys of the recipe to change")
    train.add_argument("-m", "--multirun", action="store_true", help="run every combination of key=a,b one by one")

    plan = verb("plan", _plan, "Predict what a recipe takes, and what would fit, before it runs.", _PLAN_HELP)
    plan.add_argument("recipe", help="a shipped recipe (lowprec recipes ls), or the path of a YAML file")
    plan.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys of the recipe to change")
    plan.add_argument("--vram", metavar="8GiB", help="device memory that there is; by default the card's")
    plan.add_argument("--gpu", metavar="NAME", help='a named card, such as "RTX 4060"; by default this machine')
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")

    profile = verb("profile", _profile, "Measure a recipe's steps: time, memory, kernels, energy.", _PROFILE_HELP)
    profile.add_argument("recipe", nargs="?", help="a shipped recipe, or the path of a YAML file")
    profile.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="keys of the recipe to change")
    profile.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two profiles side by side, folders or files")
    profile.add_argument("--study", choices=["consumer_gpu"], help="run a study of many cells")
    profile.add_argument("--reduced", action="store_true", help="the part of the study that ends in minutes (--study)")
    profile.add_argument("--shape", default=_STUDY_SHAPE, help="qwen2.5-1.5b, or tiny to try it out (--study)")
    profile.add_argument("--output", metavar="PATH", help="the study's folder; where the comparison's page goes")

    recipes = verb("recipes", _recipes, "List, show or copy recipes.", _RECIPES_HELP)
    recipes.add_argument("action", choices=["ls", "show", "cp"])
    recipes.add_argument("recipe", nargs="?")
    recipes.add_argument("overrides", nargs="*", default=[], metavar="key=value | target.yaml")

    merge = verb("merge", _merge, "Merge an adapter into its 16-bit base, tensor by tensor.", _MERGE_HELP)
    merge.add_argument("adapter", help="a run folder, or a PEFT adapter folder")
    merge.add_argument("output", help="the folder to write; must not exist or be empty")
    merge.add_argument("--base", help="the base model, where the adapter does not name one that can be found")

    doctor = verb("doctor", _doctor, "Try what this machine can run, and say why not.", _DOCTOR_HELP)
    doctor.add_argument("--json", action="store_true", help="print JSON instead of a table")
    doctor.add_argument("--quick", action="store_true", help="leave out the compiler and the disk's speed")
    doctor.add_argument("--measure", action="store_true", help="write this machine's profile, which plans read")
    doctor.add_argument("--path", default=".", help="a folder on the disk to measure (--measure)")

    bench = verb("bench", _bench, "Repeat a benchmark of docs/benchmarks on this machine.", _BENCH_HELP)
    bench.add_argument("what", choices=["linear", "rotate", "matmul", "step", "plan", "ssd", "train"])
    peers = (
        "measure other libraries, too (linear: torchao; ssd: DeepSpeed; train: all installed, or a list such as "
        "unsloth,transformers)"
    )
    bench.add_argument("--peers", nargs="?", const="all", default="", metavar="NAME,...", help=peers)
    bench.add_argument(
        "--works",
        metavar="NAME,...",
        help="lines of the table, or grid (train); parts of names (plan, step); all or names, to train (ssd)",
    )
    bench.add_argument(
        "--minutes", type=float, help="end after that long; the same command goes on (plan, ssd --works, train)"
    )
    bench.add_argument("--tokens", type=int, default=8192, help="rows of the input (linear, rotate, matmul)")
    bench.add_argument("--path", help="the folder on the disk to measure (ssd); where results are kept (plan, train)")
    bench.add_argument("--json", metavar="FILE", help="write the figures as JSON, too")

    ssd = verb("ssd", _ssd, "Look after optimizer states on a disk.", _SSD_HELP)
    ssd.add_argument("action", choices=["clean", "export"])
    ssd.add_argument("path", help="clean: the state_store.path; export: the optimizer folder of a checkpoint")
    ssd.add_argument("target", nargs="?", help="export: the folder to write")
    ssd.add_argument(
        "--weights", help="export: a safetensors file with the same checkpoint's weights, for split masters"
    )

    completion = verb("completion", _completion, "Print a shell completion script.", _COMPLETION_HELP)
    completion.add_argument("shell", choices=["bash", "zsh"])
    return parser


def _train(options: argparse.Namespace) -> int:
    from lowprec.config import resolve
    from lowprec.run_folder import Status
    from lowprec.train.interrupt import EXIT_INTERRUPTED
    from lowprec.train.loop import train

    if options.multirun:
        from lowprec.sweep import sweep

        return sweep(options.recipe, options.overrides)
    recipe, messages = resolve(options.recipe, options.overrides)
    console = make_console()
    _quiet_libraries(console)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for message in messages:
            console.print(f"[yellow]Note:[/] {_escape(message)}", highlight=False)
    return EXIT_INTERRUPTED if train(recipe, console) is Status.INTERRUPTED else 0


def _profile(options: argparse.Namespace) -> int:
    chosen = [name for name in ("recipe", "compare", "study") if getattr(options, name)]
    if len(chosen) != 1:
        raise UserError("lowprec profile takes one of: a recipe, --compare A B, or --study consumer_gpu.")
    if options.recipe and options.output:
        raise UserError(
            f"--output is of --compare and --study; for a recipe write profile.output_dir={options.output}."
        )
    if not options.study and (options.reduced or options.shape != _STUDY_SHAPE):
        raise UserError("--reduced and --shape choose what --study consumer_gpu measures, and nothing else.")
    console = make_console()
    _quiet_libraries(console)
    if options.compare:
        from lowprec.profiling.folder import read_two, write_comparison
        from lowprec.profiling.table import side_by_side

        first, second = read_two(*options.compare)
        console.print(side_by_side(first, second))
        print(f"wrote {write_comparison(first, second, Path(options.output or 'profiles_compared.html'))}")
    elif options.study:
        from lowprec.profiling.study import run_study

        run_study(console, shape=options.shape, reduced=options.reduced, output=options.output)
    else:
        from lowprec.config import resolve
        from lowprec.profiling.run import profile_recipe

        recipe, messages = resolve(options.recipe, options.overrides)
        for message in messages:
            console.print(f"[yellow]Note:[/] {_escape(message)}", highlight=False)
        profile_recipe(recipe, console)
    return 0


def _plan(options: argparse.Namespace) -> int:
    console = make_console()
    _quiet_libraries(console)
    with Console(stderr=True).status("Tracing one step without data"):
        from lowprec.plan import plan

        result = plan(options.recipe, options.overrides, vram=options.vram, gpu=options.gpu)
    if options.json:
        print(json.dumps(result.to_dict(), indent=1))
    else:
        result.render(console)
    return EXIT_DOES_NOT_FIT if result.fits is False else 0


def _recipes(options: argparse.Namespace) -> int:
    from rich.table import Table

    from lowprec.recipes import copy_recipe, purpose, recipe_text, shipped_recipes

    if options.action == "ls":
        table = Table("recipe", "purpose", box=None)
        for name in shipped_recipes():
            table.add_row(name, purpose(name))
        make_console().print(table)
    elif options.recipe is None:
        raise UserError(f"lowprec recipes {options.action} needs the name of a recipe: {', '.join(shipped_recipes())}.")
    elif options.action == "cp":
        if len(options.overrides) != 1:
            raise UserError("lowprec recipes cp needs one target: lowprec recipes cp lora my_lora.yaml.")
        print(f"wrote {copy_recipe(options.recipe, options.overrides[0])}")
    elif not options.overrides and options.recipe in shipped_recipes():
        print(recipe_text(options.recipe), end="")
    else:
        from lowprec.config import resolve

        recipe, messages = resolve(options.recipe, options.overrides)
        for message in messages:
            print(f"# {message}", file=sys.stderr)  # the recipe on standard output may go into a file
        print(recipe.to_yaml(), end="")
    return 0


def _merge(options: argparse.Namespace) -> int:
    from lowprec.merge import merge

    merge(options.adapter, options.output, base=options.base).render(make_console())
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from lowprec.doctor import doctor, exit_code, measure_machine, render, to_json

    if options.measure:
        measure_machine(options.path, make_console(), options.json)
        return 0
    with Console(stderr=True).status("Trying") as trying:
        checks = doctor(options.quick, lambda name: trying.update(f"Tried {_escape(name)}"))
    if options.json:
        print(json.dumps(to_json(checks), indent=2))
    else:
        render(checks, make_console())
    return exit_code(checks)


def _bench(options: argparse.Namespace) -> int:
    from lowprec.bench.command import run

    run(options)
    return 0


def _ssd(options: argparse.Namespace) -> int:
    from lowprec.optim.export import export
    from lowprec.optim.path_lock import clean

    if options.action == "clean":
        removed = clean(options.path)
        for name, freed in removed.items():
            print(f"removed {name}, {freed:,} bytes freed")
        print(f"{len(removed)} files removed from {options.path}")
        return 0
    if options.target is None:
        raise UserError("lowprec ssd export needs a target folder: lowprec ssd export CHECKPOINT/optimizer TARGET.")
    export(options.path, options.target, weights=options.weights)
    print(f"wrote {options.target}")
    return 0


def _completion(options: argparse.Namespace) -> int:
    from lowprec.completion import script

    print(script(options.shell), end="")
    return 0


def _quiet_libraries(console: Console) -> None:
    """Keep other libraries' bars out of log files, and their notes to developers away from users."""
    from transformers.utils import logging

    if not console.is_terminal:
        logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")


def _version() -> str:
    from lowprec import __version__

    return f"lowprec {__version__} (Python {sys.version.split()[0]}, {Path(__file__).parent})"


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
