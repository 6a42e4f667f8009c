"""Beside what people would pick instead, and against attackers who know: docs/evidence/beside.md and its figures.

    python -m samples.beside --out out/results              # what is not measured yet: many hours
    python -m samples.beside --part rivals --seed 0         # one part, one seed
    python -m samples.beside --fast --out out/fast --docs out/fast
    python -m samples.beside --render                       # the page from its figures again

Bases are trained unless `--out` holds them. Figures of each part, case and seed are one file below `--out`; what is
there is not measured again.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.files import write_whole
from samples.beside.page import file_of, gathered, read, write_page
from samples.beside.part import Part
from samples.beside.parts import PARTS
from samples.pieces import ROOT, SEEDS


def measure(part: Part, case: str, seed: int, out: Path, *, fast: bool) -> None:
    """Measure what is not there yet."""
    file = file_of(out, part, case, seed)
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with progress_bars() as progress:
        found = part.measure(case, seed, out, fast, progress)
    write_whole(file, (json.dumps(found, indent=1) + "\n").encode())


def main(arguments: list[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models and figures")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "evidence", help="folder of the page")
    parser.add_argument("--part", action="append", choices=[part.name for part in parts], help="which; all by default")
    parser.add_argument("--case", action="append", help="which; all of a part by default")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--fast", action="store_true", help="small bases, seed 0")
    parser.add_argument("--render", action="store_true", help="only write the page again, of beside.json")
    options = parser.parse_args(arguments)
    if options.render:
        write_page(read(json.loads((options.docs / "beside.json").read_text())), parts, options.docs, fast=options.fast)
        return 0
    for seed in options.seed or ((0,) if options.fast else SEEDS):
        for part in parts:
            if part.name in (options.part or [part.name]):
                for case in part.cases(options.fast):
                    if case in (options.case or [case]):
                        measure(part, case, seed, options.out, fast=options.fast)
    write_page(gathered(options.out, parts, fast=options.fast), parts, options.docs, fast=options.fast)
    return 0


if __name__ == "__main__":
    sys.exit(main())
