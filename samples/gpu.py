"""What a patch costs on a GPU: ViT-B/16 and BERT-base at 128 tokens; writes `gpu.json`, from which the page is made.

    python -m samples.gpu                              # on a machine with an NVIDIA GPU and onnxruntime-gpu
    python -m samples.gpu --fast --provider cpu        # tiny models: that all of it works
    python -m samples.gpu --counts                     # kernels are counted anew, all else is kept; needs no GPU

Exports, bakes, checks (`atp.verify` on the device: bits of unflagged inputs, flags beside the CPU's, what ran where),
then times: base and patched file in turns, with CUDA graphs and without, inputs and outputs bound to the device. The
base is the fastest unpatched form there. After `--seconds` nothing more is begun; what lacks is named. The page is
written by `python -m samples.performance --render`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import atpatch_onnx as atp
from atpatch_onnx.baking.quantize import quantize
from atpatch_onnx.errors import AtPatchError, one_line
from atpatch_onnx.files import write_whole
from atpatch_onnx.measuring.benchmark import opens, synthetic_patch
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.providers import first
from atpatch_onnx.running.sessions import Array
from atpatch_onnx.running.timing import in_turns, ratio
from samples.gpu_cells import HOOKS, MODELS, PRECISIONS, Cell, cells, few, firing
from samples.kernel_counts import counts
from samples.speed_models import FORMS, export, hooked, quiet, torch_model

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
LENGTH = 128


@dataclass(frozen=True)
class Made:
    """The files of a model in a precision."""

    base: Path
    """The fastest form on the device."""

    form: str
    patched: Mapping[str, Path]
    """By patch."""


class Bench:
    """All that is measured, until time is up."""

    def __init__(self, provider: str, folder: Path, *, fast: bool, seconds: float) -> None:
        self.provider, self.folder, self.fast = provider, folder, fast
        self._until = time.monotonic() + seconds
        self._exports: dict[str, Mapping[str, Path]] = {}
        self._made: dict[tuple[str, str], Made] = {}

    @property
    def is_over(self) -> bool:
        """Whether time is up."""
        return time.monotonic() > self._until

    def made(self, model: str, precision: str) -> Made:
        """Export, choose the fastest form, and bake both patches into it."""
        if (model, precision) not in self._made:
            if model not in self._exports:
                self._exports[model] = export(model, self.folder, fast=self.fast)
            forms = {form: self._in(precision, self._exports[model][form]) for form in FORMS}
            form = self._fastest(forms)
            base = atp.load(forms[form])
            whole = synthetic_patch(base)
            patched = {}
            for name, patch in {"few": few(whole), "all": whole}.items():
                patched[name] = forms[form].with_name(f"{forms[form].stem}-{name}.onnx")
                atp.save(atp.bake(base, patch, target="cuda"), patched[name], external="link")
            self._made[model, precision] = Made(forms[form], form, patched)
        return self._made[model, precision]

    def _in(self, precision: str, path: Path) -> Path:
        if precision == "fp32":
            return path
        target = path.with_name(f"{path.stem}-{precision}.onnx")
        atp.save(quantize(atp.load(path), "fp16"), target)
        return target

    def _fastest(self, forms: Mapping[str, Path]) -> str:
        inputs = self.inputs(next(iter(forms.values())), 1)
        opened = {form: opens(path, {}, inputs, 2, [self.provider]) for form, path in forms.items()}
        taken = in_turns(opened, sessions=1, rounds=3 if self.fast else 20)
        return min(taken, key=lambda form: float(np.median(taken[form])))

    def inputs(self, path: Path, batch: int, seed: int = 0) -> dict[str, Array]:
        """Such as `atpatch benchmark` draws."""
        length = 12 if self.fast else LENGTH
        return draw_inputs(atp.load(path), np.random.default_rng(seed), samples=batch, length=length)

    def time(self, cell: Cell) -> dict[str, Any]:
        """Base and patched file in turns."""
        made = self.made(cell.model, cell.precision)
        inputs = self.inputs(made.base, cell.batch)
        opened = {
            name: opens(path, {}, inputs, 2, [self.provider], cell.cuda_graph)
            for name, path in {"base": made.base, "patched": made.patched[cell.patch]}.items()
        }
        rounds = 3 if self.fast else max(20, 200 // cell.batch)
        taken = in_turns(opened, sessions=2, rounds=rounds)
        found = ratio(taken["patched"], taken["base"])
        base_ms = float(1000 * np.median(taken["base"]))
        return {"form": made.form, "base_ms": base_ms, "ratio": [found.value, found.low, found.high], "goal": cell.goal}

    def check(self, model: str, precision: str) -> dict[str, Any]:
        """Prove a patch on the device that flags some tokens of clean inputs and of others."""
        made = self.made(model, precision)
        base = atp.load(made.base)
        clean, other = (self.inputs(made.base, 4, seed) for seed in (0, 1))
        patch = firing(base, few(synthetic_patch(base)), clean)
        path = made.base.with_name(f"{made.base.stem}-firing.onnx")
        atp.save(atp.bake(base, patch, target="cuda"), path, external="link")
        pairs = atp.DebugSet.from_pairs(clean, other)
        result = atp.verify(made.base, path, pairs, patch=patch, providers=[self.provider], batch_size=2)
        kept = ("placement", "flags", "unflagged")
        return {
            "passed": result.passed,
            "checks": len(result.checks),
            "failed": {check.name: check.detail for check in result.failures},
            "said": {check.name: check.detail for check in result.checks if check.name.startswith(kept)},
        }

    def hooks(self, model: str) -> list[float]:
        """Torch with hooks over the patched file, batch 1, on the same device, float32."""
        device = first([self.provider]).device
        made = self.made(model, "fp32")
        loaded = atp.load(made.base)
        module = hooked(torch_model(model, fast=self.fast, attention="eager").to(device), synthetic_patch(loaded))
        inputs = self.inputs(made.base, 1)
        tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}

        def run() -> None:
            module(**tensors)
            if device == "cuda":
                torch.cuda.synchronize()

        opened = {"torch": lambda: run, "file": opens(made.patched["all"], {}, inputs, 2, [self.provider])}
        with torch.inference_mode():
            taken = in_turns(opened, sessions=2, rounds=3 if self.fast else 40, pause=0.0 if device == "cuda" else 0.02)
        found = ratio(taken["torch"], taken["file"])
        return [found.value, found.low, found.high]


def measure(figures: dict[str, Any], bench: Bench, keep: Callable[[], None], *, graphs: bool) -> None:
    """Add to `figures` (JSON types) what there is time for, checks first; what fails is said, and ends nothing else.

    Args:
        figures: As in `nothing`.
        bench: What measures.
        keep: Called after each step.
        graphs: Whether the provider records runs.
    """

    def steps() -> Iterator[tuple[str, str, Callable[[], Any]]]:
        for model, precision in product(MODELS, PRECISIONS):
            yield "checks", f"{model}, {precision}", partial(bench.check, model, precision)
        for cell in cells(graphs):
            yield "rows", cell.key, partial(bench.time, cell)
        for model in MODELS:
            yield "hooks", model, partial(bench.hooks, model)

    console = Console()
    for part, name, step in steps():
        if bench.is_over:
            figures["lacking"].append(name)
            continue
        try:
            figures[part][name] = step()
        except (AtPatchError, AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            figures["failed"][name] = one_line(error)
        console.print(part, name, figures[part].get(name, figures["failed"].get(name)))
        keep()


def nothing() -> dict[str, Any]:
    """What there is before anything is measured."""
    return {"machine": None, "kernels": [], "rows": {}, "checks": {}, "hooks": {}, "lacking": [], "failed": {}}


def kept(file: Path) -> dict[str, Any]:
    """The figures of an earlier run, or none."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else nothing()
    return found


def machine(provider: str) -> dict[str, Any]:
    """The device, the versions and the commit that figures are of."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    libraries = {}
    for name in ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "onnx"):
        with suppress(PackageNotFoundError):
            libraries[name] = version(name)
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": device,
        "provider": first([provider]).name,
        "cuda": torch.version.cuda,
        "versions": libraries,
        "commit": done.stdout.strip() or "unknown",
    }


def table(figures: Mapping[str, Any]) -> Table:
    """The ratios beside their goals, short."""
    made = Table(title=f"Patched over base, {figures['machine']['device']}")
    for column in ("cell", "base, ms", "ratio", "95 %", "goal"):
        made.add_column(column)
    for name, row in figures["rows"].items():
        value, low, high = row["ratio"]
        goal = "" if row["goal"] is None else f"{row['goal']} {'met' if value <= row['goal'] else 'MISSED'}"
        made.add_row(name, f"{row['base_ms']:.3f}", f"{value:.3f}", f"{low:.3f} to {high:.3f}", goal)
    for name, (value, low, high) in figures["hooks"].items():
        goal = f"{HOOKS:g} {'met' if value >= HOOKS else 'MISSED'}"
        made.add_row(f"{name}, torch with hooks", "", f"{value:.2f}", f"{low:.2f} to {high:.2f}", goal)
    for name, check in figures["checks"].items():
        made.add_row(f"{name}, verify", "", "passed" if check["passed"] else "FAILED", f"{check['checks']} checks", "")
    for name, why in figures["failed"].items():
        made.add_row(name, "", "failed", why[:60], "")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a short table last, write the figures; 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="cuda", help="what runs the models")
    parser.add_argument("--seconds", type=float, default=220, help="when to begin nothing more")
    parser.add_argument("--out", type=Path, default=DOCS / "gpu.json", help="the file with the figures")
    parser.add_argument("--fast", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--counts", action="store_true", help="count kernels anew, and keep the timings that there are")
    options = parser.parse_args(arguments)
    quiet()
    earlier = kept(options.out)
    figures = earlier if options.counts else {**nothing(), "kernels": earlier["kernels"]}

    def keep() -> None:
        write_whole(options.out, (json.dumps(figures, indent=1) + "\n").encode())

    if options.counts:
        figures["kernels"] = counts()
    else:
        graphs = bool(first([options.provider]).recording)
        figures["machine"] = machine(options.provider)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(options.provider, Path(folder), fast=options.fast, seconds=options.seconds)
            measure(figures, bench, keep, graphs=graphs)
        Console().print(table(figures))
    keep()
    print(f"wrote {options.out}")
    return int(bool(figures["failed"]) or not all(check["passed"] for check in figures["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
