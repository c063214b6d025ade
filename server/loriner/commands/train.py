"""`loriner train`: settings in, adapters out. Loads torch only once the settings are good."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from loriner.commands import publish
from loriner.config import add_flags
from loriner.errors import TrainError
from loriner.train.files import Settings, load_settings
from loriner.train.settings import JobConfig, PromoteConfig, PublishConfig, RunConfig

if TYPE_CHECKING:
    from loriner.train.base import Base
    from loriner.train.job import Job
    from loriner.train.prepare import Preparation
    from loriner.train.save import Finished

INTERRUPTED = 130
PACKAGES = ("bitsandbytes", "matplotlib")

_EXAMPLES = """examples:
  loriner train --name pirate --data pirate.jsonl --steps 60 --learning-rate 1e-3
  loriner train --name acme/intents --data train.csv --columns prompt=question,completion=intent \\
      --eval-data test.csv --gate exact --publish http://127.0.0.1:8000 --promote prod
  loriner train --jobs jobs.toml          # several adapters over one base, at the same time
  loriner train --config qlora.yml        # flat TOML or YAML, or Axolotl's
"""


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="make adapters for a base with QLoRA",
        description="Train LoRA adapters on the NF4 base that serves them. A flag wins over its "
        "environment variable, that over the file, that over the default.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML or YAML with settings")
    parser.add_argument("--jobs", type=Path, metavar="FILE", help="TOML or YAML with [[jobs]]")
    parser.add_argument(
        "--ignore-unknown", action="store_true", help="leave out keys that cannot be honoured"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and leave")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint (a flag alone: a file says what to make, and stays "
        "the same when a run goes on)",
    )
    add_flags(parser, RunConfig, JobConfig, PublishConfig, PromoteConfig)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    settings = load_settings(vars(args), args.config, args.jobs, ignore_unknown=args.ignore_unknown)
    for key in settings.ignored:
        console.print(f"ignored: {key}", markup=False)
    _require_packages()
    from loriner.train.plan import make_plan
    from loriner.train.prepare import prepare

    preparation = prepare(settings)
    for part in preparation.jobs:
        console.print(part.summary(), markup=False)
    for line in make_plan(preparation).lines():
        console.print(line, markup=False)
    if args.dry_run:
        return 0
    publish.check_target(settings)
    finished = _train(preparation, args, console)
    if finished is None:
        return INTERRUPTED
    return publish.publish_all(finished, settings, console)


def _train(
    preparation: Preparation, args: argparse.Namespace, console: Console
) -> list[Finished] | None:
    """The finished adapters; None when the run was stopped and can be resumed."""
    from loriner.train.base import open_base
    from loriner.train.checkpoints import list_checkpoints, resume
    from loriner.train.progress import Screen
    from loriner.train.qlora import train
    from loriner.train.save import finish

    _check_folders(preparation.settings, args.resume, list_checkpoints)
    base = open_base(preparation.settings.run)
    jobs = preparation.start(base)
    for job in jobs if args.resume else ():
        if list_checkpoints(job.settings.folder) or len(jobs) == 1:
            console.print(f"Resuming {resume(job, base)} at step {job.step}.")
        else:
            console.print(f"{job.settings.name} has no checkpoint and starts anew.")
    with Screen(jobs, console) as screen:
        is_done = train(base, jobs, screen)
        is_stopped = screen.wants_stop or not is_done
    tools = preparation.masker, preparation.tokenizer
    try:
        if is_stopped:
            raise KeyboardInterrupt
        made = [finish(job, base, *tools, _command(resume=False)) for job in jobs]
    except KeyboardInterrupt:  # the last step left a checkpoint, so this goes on as well
        console.print(f"Saved. To go on: {_command(resume=True)}", markup=False)
        return None
    for job, result in zip(jobs, made, strict=True):
        _show(job, base, result, console)
    return made


def _check_folders(settings: Settings, is_resuming: bool, checkpoints: Any) -> None:
    for job in settings.jobs:
        if not is_resuming and checkpoints(job.folder):
            raise TrainError(
                f"{job.folder} holds a run already: give --resume to go on with it, another --out, "
                "or remove it."
            )


def _show(job: Job, base: Base, result: Finished, console: Console) -> None:
    if result.samples:
        table = Table("question", "base", job.settings.name, "wanted", show_lines=True)
        for sample in result.samples:
            cells: Sequence[str] = (sample.question, sample.base, sample.adapter, sample.wanted)
            table.add_row(*(cell[:300].replace("[", r"\[") for cell in cells))
        console.print(table, soft_wrap=False)
    console.print(result.gate.line() + ".", markup=False)
    console.print(f"The adapter is in {result.folder} (base {base.digest[:12]}).", markup=False)


def _command(*, resume: bool) -> str:
    """This command line, to be typed again."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    secret = [i + 1 for i, word in enumerate(words) if word == "--key"]
    words = ["..." if i in secret else word for i, word in enumerate(words)]
    words = ["--key=..." if word.startswith("--key=") else word for word in words]
    return shlex.join(["loriner", *words, *(["--resume"] if resume else [])])


def _require_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise TrainError(
            f"training needs {', '.join(missing)}: install Loriner with its `train` extra."
        )
