"""Work that is done piece by piece: run, kept as files, and gathered for a page.

Each piece leaves its figures as a JSON file in `--out`, and a piece whose file is there is not done again: a run that
was cut short goes on where it stopped, on another machine with `--kept`. After a change of the code, give another
`--out` or remove the files of what changed. The pieces of one task and seed share trained models, so they are one
chain; chains run side by side.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from samples.case import folder_of

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
TASKS = ("fashion", "sentiment", "tables")
"""Tasks, those that take longest first."""


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


Chain = Callable[[str, int], Iterable[Piece]]
"""The pieces of one task and seed, in order."""

Writer = Callable[[Path, Path, Sequence[Piece]], None]
"""Writes a page: from the folder of the pieces, into the folder of the page, of these pieces."""


def command(description: str | None, chain: Chain, write: Writer, arguments: list[str] | None) -> int:
    """Run what is missing, then write the page; 1 where a piece failed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for models and figures; default out/results, or its -fast")
    parser.add_argument("--docs", type=Path, help="folder of the page; default docs/evidence, and --out with --fast")
    parser.add_argument("--task", action="append", choices=TASKS, help="which; all where none is named")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--jobs", type=int, default=2, help="chains at a time")
    parser.add_argument("--fast", action="store_true", help="the small forms, and seed 0 only")
    parser.add_argument("--kept", type=Path, help="folder of figures from before: a piece that is there is taken over")
    parser.add_argument("--render", action="store_true", help="only write the page, from the figures that are there")
    options = parser.parse_args(arguments)
    out = options.out or ROOT / "out" / ("results-fast" if options.fast else "results")
    out.mkdir(parents=True, exist_ok=True)
    seeds = options.seed or (SEEDS[:1] if options.fast else SEEDS)
    chains = {f"{task}, seed {seed}": tuple(chain(task, seed)) for task in options.task or TASKS for seed in seeds}
    if options.kept is not None:
        take_over((piece for pieces in chains.values() for piece in pieces), options.kept, out)
    failed = False if options.render else _run(chains, out, options.fast, options.jobs)
    pieces = [piece for pieces in chains.values() for piece in pieces]
    write(out, options.docs or (out if options.fast else ROOT / "docs" / "evidence"), pieces)
    return int(failed)


def take_over(pieces: Iterable[Piece], kept: Path, out: Path) -> None:
    """Copy the figures of pieces that are done in another folder, and not in this one; models are not needed for it."""
    for piece in pieces:
        before, file = piece.file(kept), piece.file(out)
        if before.is_file() and not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(before.read_bytes())


def run_pieces(pieces: Iterable[Piece], out: Path, fast: bool) -> float:
    """Do, one after the other, what is not done yet; the seconds it took."""
    from samples.work import do

    started = time.monotonic()
    for piece in pieces:
        file = piece.file(out)
        if not file.is_file():
            _write(file, do(piece.work, piece.case, seed=piece.seed, out=out, fast=fast))
    return time.monotonic() - started


def figures_of(pieces: Iterable[Piece], out: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The figures that are there, by work and case, one a seed."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for piece in pieces:
        if piece.file(out).is_file():
            found.setdefault((piece.work, piece.case), []).append(json.loads(piece.file(out).read_text()))
    return found


def _write(file: Path, figures: Any) -> None:
    """The file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_suffix(".part")
    staged.write_text(json.dumps(figures, indent=1) + "\n")
    staged.replace(file)


def _run(chains: dict[str, tuple[Piece, ...]], out: Path, fast: bool, jobs: int) -> bool:
    """Run the chains side by side; whether one failed, which is said."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes
    console, failed = Console(), False
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = {pool.submit(run_pieces, pieces, out, fast): name for name, pieces in chains.items() if pieces}
        for done in as_completed(waiting):
            error = done.exception()
            if error is None:
                console.print(f"{waiting[done]}: {done.result():.0f} s")
            else:
                failed = True
                console.print(f"{waiting[done]}: {type(error).__name__}: {error}", style="bold")
    return failed
