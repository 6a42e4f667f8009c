"""The command of a task: run its cases and say what came of them."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from atpatch_onnx.cli import progress_bars
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.report import text
from samples.bounds import shortfalls
from samples.case import Case, folder_of, measure
from samples.inverted import inverted

Prepare = Callable[..., Case]
"""A task's `prepare`."""


def run_task(
    name: str, description: str | None, cases: Sequence[str], prepare: Prepare, arguments: Sequence[str] | None
) -> int:
    """Run the cases that the arguments name; 0 where all figures are within their bounds, 1 otherwise."""
    parser = argparse.ArgumentParser(
        prog=f"python -m samples.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=cases, help="may be repeated; all where none is named")
    parser.add_argument("--data", type=Path, help="data of your own; else the data set is taken from where it is kept")
    parser.add_argument("--out", type=Path, default=Path("out") / name, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="smaller models, less data: weaker figures, sooner")
    parser.add_argument("--tune", action="store_true", help="measure on the part that recipes are chosen by")
    parser.add_argument("--inverted", action="store_true", help="as if the trigger were not known: search for it")
    options = parser.parse_args(arguments)
    console, missed = Console(), 0
    for chosen in options.case or cases:
        folder = folder_of(options.out, chosen, options.seed)
        try:
            with progress_bars() as progress:
                case = prepare(
                    chosen,
                    seed=options.seed,
                    fast=options.fast,
                    folder=folder,
                    data=options.data,
                    tune=options.tune,
                    progress=progress,
                )
                if options.inverted:
                    case, folder = inverted(case, folder, progress=progress), folder / "inverted"
                measured = measure(case, folder, force=True, progress=progress)  # what it misses is named below
        except AtPatchError as error:
            print(f"{name}, {chosen}: {error}", file=sys.stderr)
            return 1
        (folder / "result.json").write_text(json.dumps(measured.to_json(), indent=2) + "\n")
        console.print(case.name, text.fit_table(measured.patch), text.evaluation_table(measured.evaluation), sep="\n")
        for title, figures in (("training", case.training), ("more", measured.more)):
            if figures:
                console.print(f"{title}: {json.dumps(dict(figures))}")
        for line in shortfalls(measured.to_json(), case.bounds):
            console.print(line)
            missed += 1
        console.print(f"{sum(measured.seconds.values()):.0f} s after the training; everything is in {folder}")
    return 1 if missed else 0
