"""What a patch costs on large models: timings, memory, a plot over lengths; writes `docs/evidence/performance.md`.

    python -m samples.performance                 # or: make benchmark
    python -m samples.performance --go-on         # a run that was stopped: its figures are kept
    python -m samples.performance --render        # the page from docs/evidence/performance.json again

Every timing is `atpatch benchmark` with a synthetic patch that detects and redistributes at every site. Run it on a
machine that does nothing else: goals are hundredths, and each ratio stands beside its interval, and beside what other
sessions of the same base come to. `--fast` takes tiny models and few rounds, to see that it works.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.measuring.benchmark import opens, synthetic_patch
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Array
from atpatch_onnx.running.timing import in_turns, ratio
from samples.gpu import kept as kept_of_a_gpu
from samples.kernels import kernels
from samples.speed_models import EAGER, FUSED, OFFLINE, export, hooked, quiet, torch_model
from samples.tasks import prepare

PAGE = Path(__file__).parent / "performance.md.j2"
DOCS = Path(__file__).parents[1] / "docs" / "evidence"
THREADS = 2
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
WITHOUT_IF = "tensorrt"
"""A target whose files have no `If` of the patch and that takes every opset."""

GOAL = 1.01
"""Of clean and flagged inputs and of memory, in all rows."""

SESSIONS = 5
"""How often each form is opened."""

PAIRS = 1000
"""Of the fit that is timed."""


@dataclass(frozen=True)
class Case:
    """A row of the table: a model at a length and a batch."""

    name: str
    model: str
    length: int
    batch: int
    whole: bool = True
    """Whether files without `If` and memory are measured as well."""

    @property
    def label(self) -> str:
        """What its figures stand under."""
        return f"{self.name}, {self.length} tokens, batch {self.batch}"


CASES = (
    Case("ViT-B/16", "vit", 197, 1),
    Case("BERT-base", "bert", 128, 1),
    Case("BERT-base", "bert", 512, 1),
    Case("GPT-2 (small)", "gpt2", 1024, 1, whole=False),
    Case("ViT-B/16", "vit", 197, 8),
    Case("BERT-base", "bert", 128, 8),
    Case("BERT-base", "bert", 512, 8, whole=False),
)


def measure(figures: dict[str, Any], out: Path, keep: Callable[[], None], *, fast: bool, seconds: float) -> None:
    """Add to `figures` (JSON types) what they lack, piece by piece.

    Args:
        figures: Those of an earlier run that was stopped, or `nothing()`.
        out: Where the Fashion-MNIST base is kept.
        keep: Called after each piece.
        fast: Tiny models, few rounds.
        seconds: About how long a row takes to time.
    """
    console = Console()
    torch.set_num_threads(THREADS)
    seconds = 0.0 if fast else seconds
    with tempfile.TemporaryDirectory() as folder:

        @cache
        def files(name: str) -> Mapping[str, Path]:
            console.print(f"exporting {name}")
            return export(name, Path(folder), fast=fast)

        def add(where: dict[str, Any], name: str, of: Callable[[], Any]) -> None:
            if name not in where:
                where[name] = of()
                console.print(name, where[name])
                keep()

        def base() -> Path:
            return prepare("vit/badnets-fixed", seed=0, fast=fast, out=out)[0].base

        def vit() -> Any:
            return torch_model("vit", fast=fast, attention="eager")

        def row(case: Case) -> dict[str, Any]:
            return measured_row(case, files(case.model), min(case.length, 48) if fast else case.length, seconds)

        def at_length(length: int) -> dict[str, Any]:
            return _at_length(files("two layers")[FUSED], length, seconds / 4)

        add(figures["seconds"], "fit", lambda: _seconds_to_fit(out, fast=fast))
        for case in CASES:
            add(figures["rows"], case.label, partial(row, case))
        add(figures["seconds"], "bake", lambda: _seconds_to_bake(files("vit")[FUSED], Path(folder) / "baked.onnx"))
        add(figures["hooks"], "Fashion-MNIST ViT", lambda: _against_hooks(base(), _fashion_vit(base())))
        add(figures["hooks"], "ViT-B/16", lambda: _against_hooks(files("vit")[FUSED], vit()))
        for length in (16, 32) if fast else LENGTHS:
            add(figures["lengths"], str(length), partial(at_length, length))


def nothing() -> dict[str, Any]:
    """The figures of a run that has not begun."""
    pieces: dict[str, Any] = {name: {} for name in ("rows", "lengths", "hooks", "seconds")}
    return {"machine": _machine(), "sessions": SESSIONS, "pairs": PAIRS, **pieces}


def _machine() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    libraries = {name: version(name) for name in ("onnxruntime", "torch", "transformers", "onnx")}
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": libraries,
    }


def measured_row(case: Case, forms: Mapping[str, Path], length: int, seconds: float) -> dict[str, Any]:
    """The forms of the base, and what a patch of the second one costs against it."""
    base = forms[FUSED]
    options: dict[str, Any] = {"length": length, "batches": [case.batch], "threads": [THREADS], "sessions": SESSIONS}
    rounds = _rounds(base, length, case.batch, seconds)
    found = atp.benchmark(base, rounds=rounds, memory=case.whole, **options)
    [timing] = found.timings
    row: dict[str, Any] = {
        "name": case.name,
        "length": length,
        "batch": case.batch,
        "goal": GOAL,
        "rounds": timing.rounds,
        "base_ms": timing.base_ms,
        **{name: _interval(getattr(timing, name)) for name in ("clean", "flagged", "itself")},
        "memory": found.memory,
        "kernels": kernels(base, benchmark_inputs(base, case.batch, length), THREADS),
        "forms": _forms(forms, length, case.batch, rounds),
    }
    if case.whole:
        plain = atp.benchmark(base, target=WITHOUT_IF, rounds=rounds, memory=False, **options)
        row["without_if"] = _interval(plain.timings[0].clean)
    return row


def _interval(found: Any) -> list[float]:
    return [found.value, found.low, found.high]


def _rounds(path: Path, length: int, batch: int, seconds: float) -> int:
    """How many rounds of four forms fit into this time; at least 3."""
    inputs = benchmark_inputs(path, batch, length)
    taken = in_turns({"base": opens(path, {}, inputs, THREADS)}, sessions=1, rounds=1)
    return max(3, int(seconds / (4 * float(taken["base"][0, 0]))))


def _forms(forms: Mapping[str, Path], length: int, batch: int, rounds: int) -> dict[str, list[float]]:
    """Each form of the base against the second one, in turns."""
    inputs = benchmark_inputs(forms[FUSED], batch, length)
    opened = {form: opens(path, {}, inputs, THREADS) for form, path in forms.items()}
    taken = in_turns(opened, sessions=SESSIONS, rounds=max(3, rounds // 3))
    return {form: _interval(ratio(taken[form], taken[FUSED])) for form in (EAGER, OFFLINE)}


def benchmark_inputs(path: Path, batch: int, length: int) -> dict[str, Array]:
    """Inputs such as `atpatch benchmark` draws."""
    return draw_inputs(atp.load(path), np.random.default_rng(0), samples=batch, length=length)


def _seconds(do: Any) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started


def _at_length(base: Path, length: int, seconds: float) -> dict[str, Any]:
    """Clean and flagged ratios, with and without `If`."""
    rounds = _rounds(base, length, 1, seconds)
    point: dict[str, Any] = {}
    for form, target in (("with If", "cpu"), ("without If", WITHOUT_IF)):
        [timing] = atp.benchmark(
            base, target=target, length=length, batches=[1], threads=[THREADS], rounds=rounds, memory=False
        ).timings
        point[form] = {"clean": _interval(timing.clean), "flagged": _interval(timing.flagged)}
    return point


def _against_hooks(base: Path, module: Any) -> list[float]:
    """Torch with hooks over the patched file, on a clean input: the same detectors in both."""
    model = atp.load(base)
    patch = synthetic_patch(model)
    return _torch_over_file(hooked(module, patch), model, patch)


def _fashion_vit(base: Path) -> Any:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(base.parent, attn_implementation="eager").eval()


def _torch_over_file(module: Any, model: Any, patch: atp.Patch, rounds: int = 40) -> list[float]:
    """In turns with a pause between, for onnxruntime's threads wait busily for a while after a run."""
    config = module.config
    pixels = np.random.default_rng(0).normal(size=(1, config.num_channels, config.image_size, config.image_size))
    inputs = {"pixel_values": pixels.astype(np.float32)}
    tensor = torch.from_numpy(inputs["pixel_values"])
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        path = Path(folder) / "patched.onnx"
        atp.save(atp.bake(model, patch), path)
        forms = {"torch": lambda: lambda: module(tensor), "file": opens(path, {}, inputs, THREADS)}
        taken = in_turns(forms, sessions=SESSIONS, rounds=rounds, pause=0.02)
    return _interval(ratio(taken["torch"], taken["file"]))


def _seconds_to_bake(base: Path, target: Path) -> float:
    """From file to file, weights included."""
    patch = synthetic_patch(atp.load(base))
    return _seconds(lambda: atp.save(atp.bake(atp.load(base), patch), target))


def _seconds_to_fit(out: Path, *, fast: bool) -> float:
    small, _ = prepare("vit/badnets-fixed", seed=0, fast=fast, out=out)
    pairs = small.debug.take(np.arange(min(PAIRS, len(small.debug))))
    forced = atp.FitOptions(goal=small.options.goal, seed=small.options.seed, force=True)
    return _seconds(lambda: atp.fit(atp.load(small.base), pairs, forced))


def page(figures: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    """The page in Markdown, of the figures of a CPU and of those of a GPU (`samples.gpu`)."""

    def shown(of: list[float] | None) -> str:
        return "" if of is None else f"{of[0]:.3f} ({of[1]:.3f} to {of[2]:.3f})"

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["ratio"] = shown
    rows = list(figures["rows"].values())
    whole = [row for row in rows if "without_if" in row]
    met = {
        "clean": sum(row["clean"][0] <= row["goal"] for row in rows),
        "flagged": sum(row["flagged"][0] <= row["goal"] for row in rows),
        "whole": len(whole),
        "memory": sum(row["memory"] is not None and row["memory"] <= row["goal"] for row in whole),
    }
    lacking = [case.label for case in CASES if case.label not in figures["rows"]]
    lacking += [f"two layers at {length} tokens" for length in LENGTHS if str(length) not in figures["lengths"]]
    document = {**figures, "rows": rows, "lacking": lacking, "met": met, "gpu": gpu}
    return environment.from_string(PAGE.read_text()).render(**document, forms=[EAGER, OFFLINE], base=FUSED)


def plot(figures: Mapping[str, Any], path: Path) -> None:
    """Overhead over length, with and without `If`."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lengths = [int(length) for length in figures["lengths"]]
    for form, color in (("with If", "tab:blue"), ("without If", "tab:orange")):
        for kind, style in (("clean", "-"), ("flagged", "--")):
            of = np.array([point[form][kind] for point in figures["lengths"].values()]).reshape(-1, 3) - 1
            axes.plot(lengths, 100 * of[:, 0], style, color=color, marker="o", label=f"{form}, {kind}")
            axes.fill_between(lengths, 100 * of[:, 1], 100 * of[:, 2], color=color, alpha=0.15)
    axes.set(xscale="log", xlabel="tokens", ylabel="time added by the patch, %", xticks=lengths, xticklabels=lengths)
    axes.minorticks_off()
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the figures, draw the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for performance.md, .json and .png")
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="where the Fashion-MNIST base is kept")
    parser.add_argument("--seconds", type=float, default=30, help="about how long a row of the table takes to time")
    parser.add_argument("--fast", action="store_true", help="tiny models, few rounds")
    parser.add_argument("--go-on", action="store_true", help="keep the figures of a run that was stopped, add the rest")
    parser.add_argument("--render", action="store_true", help="write the page from the figures again")
    options = parser.parse_args(arguments)
    options.docs.mkdir(parents=True, exist_ok=True)
    kept = options.docs / "performance.json"
    if not options.render:
        quiet()
        figures = json.loads(kept.read_text()) if options.go_on else nothing()

        def keep() -> None:
            kept.write_text(json.dumps(figures, indent=1) + "\n")

        measure(figures, options.out, keep, fast=options.fast, seconds=options.seconds)
    figures = json.loads(kept.read_text())
    plot(figures, options.docs / "performance.png")
    (options.docs / "performance.md").write_text(page(figures, kept_of_a_gpu(options.docs / "gpu.json")))
    print(f"wrote {options.docs / 'performance.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
