"""Run every task with three seeds, and write `docs/results.json`, `docs/results.md` and its pictures.

    python -m samples.results              # everything
    python -m samples.results --fast       # the small forms, one seed; docs/ is not touched

Each piece of work leaves its figures as a JSON file in `--out`, and a piece whose file is there is not done again: a
run that was cut short goes on where it stopped. After a change of the code, give another `--out` or remove the files of
what changed. The pieces of one task and seed share trained models, so they are one chain; chains run side by side.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from samples.case import folder_of

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
CHAINS = ("fashion", "sentiment", "tables")
"""Tasks, those that take longest first."""

INVERTED = ("vit/badnets-fixed", "minilm/token")
"""Cases that are fixed once more as if the trigger were not known."""

ABLATED = ("vit/badnets-fixed", "minilm/token", "adult/sex")
"""Cases that the ablations are made on, with the first seed."""


COMPARED = ABLATED
"""Cases on which AtPatch is held beside neuron edits, with every seed."""


@dataclass(frozen=True)
class Piece:
    """One piece of work: what to make of which case."""

    case: str
    seed: int
    work: str
    """A key of `samples.work.WORK`."""

    def file(self, out: Path) -> Path:
        """Where its figures are."""
        return folder_of(out, self.case, self.seed) / f"{self.work}.json"


def chain(task: str, seed: int) -> Iterator[Piece]:
    """The pieces of one task and seed, in order."""
    from samples.tasks import TASKS

    for case in TASKS[task].CASES:
        yield Piece(case, seed, "trained")
        yield Piece(case, seed, "measured")
        if case in INVERTED:
            yield Piece(case, seed, "inverted")
        if case in ABLATED and seed == SEEDS[0]:
            yield Piece(case, seed, "ablated")
        if case in COMPARED:
            yield Piece(case, seed, "compared")


def run_chain(task: str, seed: int, out: Path, fast: bool) -> tuple[str, int, float]:
    """Do what of a chain is not done yet; says which it was and the seconds it took."""
    from samples.work import do

    started = time.monotonic()
    for piece in chain(task, seed):
        file = piece.file(out)
        if not file.is_file():
            _write(file, do(piece.work, piece.case, seed=piece.seed, out=out, fast=fast))
    return task, seed, time.monotonic() - started


def _write(file: Path, figures: Any) -> None:
    """The file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".part")
    staged.write_text(json.dumps(figures, indent=1) + "\n")
    staged.replace(file)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, then write the page; 1 where a piece failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for models and figures; default out/results, or its -fast")
    parser.add_argument("--docs", type=Path, help="folder of the page; default docs/, and --out with --fast")
    parser.add_argument("--task", action="append", choices=CHAINS, help="which; all where none is named")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--jobs", type=int, default=2, help="chains at a time")
    parser.add_argument("--fast", action="store_true", help="the small forms, and seed 0 only")
    parser.add_argument("--render", action="store_true", help="only write the page, from the figures that are there")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "out" / ("results-fast" if options.fast else "results")
    out.mkdir(parents=True, exist_ok=True)
    seeds = options.seed or (SEEDS[:1] if options.fast else SEEDS)
    tasks = options.task or CHAINS
    failed = [] if options.render else _run(tasks, seeds, out, options.fast, options.jobs)
    from samples.results_page import write_page

    write_page(out, options.docs or (out if options.fast else ROOT / "docs"), _pieces(tasks, seeds))
    return 1 if failed else 0


def _pieces(tasks: Sequence[str], seeds: Sequence[int]) -> list[Piece]:
    return [piece for task in tasks for seed in seeds for piece in chain(task, seed)]


def _run(tasks: Sequence[str], seeds: Sequence[int], out: Path, fast: bool, jobs: int) -> list[str]:
    """Run the chains side by side; the failures, a line each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes
    console, failed = Console(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_chain, task, seed, out, fast): (task, seed) for task in tasks for seed in seeds}
        for done in as_completed(waiting):
            task, seed = waiting[done]
            error = done.exception()
            if error is None:
                console.print(f"{task}, seed {seed}: {done.result()[2]:.0f} s")
            else:
                failed.append(f"{task}, seed {seed}: {type(error).__name__}: {error}")
                console.print(failed[-1], style="bold")
    return failed


if __name__ == "__main__":
    sys.exit(main())
