"""Past one machine: what Ray costs, where more workers stop to help, how much memory; docs/evidence/scale.json, .md.

    python -m samples.scale                       # MiniLM and ViT-B, 10,000 inputs each, and a set of 20 GB: hours
    python -m samples.scale --only minilm         # one of minilm, vit, memory; the other figures stay
    python -m samples.scale --fast --docs out     # tiny models and sets: that all of it works
    python -m samples.scale --render              # the page from its figures again

Every figure is of its own process (`samples.scale_runs`): in it, with two threads; Ray with two workers of a thread
each; one thread, piece by piece. Models have random weights, since they do not matter to speed.
Workers from 1 to 64 are simulated from the measured times of pieces, the bytes that are kept of one, and the time that
the driver has for it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from atpatch_onnx.debugset import column_files as files
from atpatch_onnx.files import write_whole
from samples.scale_simulation import NETWORK, WORKERS, arithmetic, simulate
from samples.speed_models import FUSED, KINDS, export, quiet

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
PAGE = Path(__file__).parent / "scale.md.j2"
GOAL = 0.9
BOUND_MIB = 2000 / 1.024**2
"""2 GB."""

LENGTH = 128
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    fast: bool
    inputs: int
    gigabytes: float
    rounds: int


# What it is measured on


def write_set(path: Path, pairs: int, make: Callable[[int, int], Mapping[str, Array]]) -> None:
    """Write pairs, some at a time: `make(start, stop)` makes the columns of these."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    header = json.dumps({"format": "atpatch-onnx debug set", "version": 1, "kind": "attribute", "target": None})
    writer = None
    step = 64
    for start in range(0, pairs, step):
        columns = {name: files.as_lists(array) for name, array in make(start, min(start + step, pairs)).items()}
        table = pa.table(columns).replace_schema_metadata({"atpatch-onnx debug set": header})
        writer = writer or ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def texts(length: int, words: int) -> Callable[[int, int], Mapping[str, Array]]:
    """Word ids; the counterfactual has another word at its third place."""

    def make(start: int, stop: int) -> Mapping[str, Array]:
        ids = np.random.default_rng(start).integers(5, words, size=(stop - start, length))
        other, suspects = ids.copy(), np.zeros(ids.shape, np.bool_)
        other[:, 2], suspects[:, 2] = 4, True
        mask = np.ones_like(ids)
        sides = {"clean/input_ids": ids, "counterfactual/input_ids": other}
        masks = {"clean/attention_mask": mask, "counterfactual/attention_mask": mask}
        return {**sides, **masks, "labels": np.arange(start, stop) % 2, "suspects": suspects}

    return make


def images(size: int, patch: int, *, sparse: bool) -> Callable[[int, int], Mapping[str, Array]]:
    """Images of sixteen greys, or black ones with their number in the corner; the counterfactual has a bright patch."""
    tokens = 1 + (size // patch) ** 2

    def make(start: int, stop: int) -> Mapping[str, Array]:
        rng, shape = np.random.default_rng(start), (stop - start, 3, size, size)
        pixels = np.zeros(shape, np.float32) if sparse else rng.integers(16, size=shape).astype(np.float32) / 8 - 1
        numbers = np.arange(start, stop)
        pixels[:, 0, -1, -24:] = (numbers[:, None] >> np.arange(24)) & 1
        other, suspects = pixels.copy(), np.zeros((stop - start, tokens), np.bool_)
        other[:, :, :patch, :patch], suspects[:, 1] = 40, True
        sides = {"clean/pixel_values": pixels, "counterfactual/pixel_values": other}
        return {**sides, "labels": numbers % 2, "suspects": suspects}

    return make


def furnished(name: str, folder: Path, sizes: Sizes) -> Path:
    """A folder with a model and a set for it."""
    folder.mkdir()
    kind = "large images" if name == "memory" else name
    path = export(kind, folder, fast=sizes.fast)[FUSED]
    path.rename(folder / "model.onnx")
    config = KINDS[kind].config(sizes.fast)
    if KINDS[kind].reads_tokens:
        pairs, make = sizes.inputs // 2, texts(12 if sizes.fast else LENGTH, config.vocab_size)
    else:
        make = images(config.image_size, config.patch_size, sparse=name == "memory")
        of_pair = 2 * 4 * 3 * config.image_size**2
        pairs = int(sizes.gigabytes * 1e9 / of_pair) if name == "memory" else sizes.inputs // 2
    write_set(folder / "set.parquet", pairs, make)
    return folder


# Measuring


def measured(what: str, folder: Path, *options: str, threads: int = 1) -> dict[str, Any]:
    """One figure, of its own process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "samples.scale_runs", what, str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:])}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def of_model(name: str, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Here and on Ray in turns, piece by piece, and the way there and back."""
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "local": lambda: measured("local", folder, threads=2),
        "ray2": lambda: measured("ray", folder, "--workers", "2"),
    }
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(sizes.rounds):
        for way, run in ways.items():
            runs[way].append(run())
            print(f"{name}, {way}: {runs[way][-1]['rate']:.1f} inputs/s")
    of_pieces = measured("pieces", folder)
    trip = measured("round_trip", folder, "--count", "100" if sizes.fast else "2000")
    return {
        "inputs": runs["local"][0]["inputs"],
        "rates": {way: [run["rate"] for run in found] for way, found in runs.items()},
        "start": {way: [run["start"] for run in found] for way, found in runs.items()},
        "same": len({of_pieces["digest"], *(run["digest"] for found in runs.values() for run in found)}) == 1,
        "pieces": of_pieces,
        "trip": trip["seconds"],
    }


def page(figures: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    models = {name: _row(found) for name, found in figures["models"].items()}
    lacking = [name for name in ("minilm", "vit") if name not in models]
    lacking += [] if figures["memory"] else ["memory"]
    return environment.from_string(PAGE.read_text()).render(
        **{**figures, "models": models}, lacking=lacking, goal=GOAL, bound=BOUND_MIB, workers=WORKERS, network=NETWORK
    )


def _row(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the page says of a model."""
    median = {way: float(np.median(rates)) for way, rates in found["rates"].items()}
    figures = arithmetic(found["pieces"], found["trip"])
    return {
        **found,
        "median": median,
        "ratio": median["ray2"] / median["local"],
        "arithmetic": figures,
        "simulated": [
            (workers, *simulate(found["pieces"], found["trip"], workers), figures.rate(workers)) for workers in WORKERS
        ],
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    packages = ("ray", "pyarrow", "onnxruntime", "torch", "numpy")
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def figures_of(names: list[str], sizes: Sizes, kept: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All figures after each part: those that were kept, and those measured now."""
    found: dict[str, Any] = {"models": {}, "memory": None, **kept, "machine": machine(), "fast": sizes.fast}
    for name in names:
        with tempfile.TemporaryDirectory() as made:
            folder = furnished(name, Path(made) / name, sizes)
            if name == "memory":
                found["memory"] = measured("memory", folder)
            else:
                found["models"] = found["models"] | {name: of_model(name, folder, sizes)}
        yield found


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the figures and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for scale.json and scale.md")
    parser.add_argument(
        "--only", choices=("minilm", "vit", "memory"), action="append", help="measure this, keep the rest"
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--gigabytes", type=float, default=20.0, help="of the set whose memory is measured")
    parser.add_argument("--rounds", type=int, default=1, help="turns of here and Ray")
    parser.add_argument("--fast", action="store_true", help="tiny models and sets")
    parser.add_argument("--render", action="store_true", help="write the page from the figures again")
    options = parser.parse_args(arguments)
    options.docs.mkdir(parents=True, exist_ok=True)
    json_file, page_file = options.docs / "scale.json", options.docs / "scale.md"
    if not options.render:
        quiet()
        sizes = Sizes(options.fast, options.inputs, options.gigabytes, options.rounds)
        if options.fast:
            sizes = Sizes(True, min(options.inputs, 1024), min(options.gigabytes, 0.01), 1)
        kept = json.loads(json_file.read_text()) if options.only and json_file.is_file() else {}
        for found in figures_of(options.only or ["minilm", "vit", "memory"], sizes, kept):
            write_whole(json_file, (json.dumps(found, indent=1) + "\n").encode())
    page_file.write_text(page(json.loads(json_file.read_text())))
    print(f"wrote {page_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
