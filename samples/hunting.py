"""Triggers that nobody told of: hunt in traffic and scan with clean inputs, on the tasks' own bases and their twins.

    python -m samples.hunting --out out/results --case vit/badnets-fixed --seed 0
    python -m samples.hunting --out out/results --render          # the tables, of all that was measured

A base is trained unless `--out` holds it. Traffic is drawn from its debug inputs; a share of them is triggered. What is
found is fitted, and measured on inputs that neither saw, with the real trigger. Each figure is a JSON file in the
folder of its case and seed; what is there is not measured again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.discovery import HuntOptions, ScanOptions, Search
from atpatch_onnx.discovery.vocabulary import read_vocabulary
from atpatch_onnx.report.tables import table
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Array, Progress, silent
from samples.case import Case, folder_of
from samples.tasks import CASES, prepare

TRAFFIC = 2_000
SHARES = (0.02, 0.005)
RESAMPLED = 20
"""Traffics that a twin is hunted in."""

CLEAN = 1_000
"""Clean inputs that a model is scanned with."""

IMAGES_AND_TEXTS = tuple(case for case in CASES if case.split("/")[0] in ("vit", "deit", "minilm"))
TABLES = ("adult/sex", "german/sex", "compas/sex")
"""One case a table: all share its base, and a scan exchanges every column."""


def traffic(case: Case, share: float, seed: int, count: int = TRAFFIC) -> tuple[dict[str, Array], int]:
    """Unlabelled inputs, `share` of them triggered, in any order; and how many these are."""
    debug, generator = case.whole or case.debug, np.random.default_rng(seed)
    rows = generator.permutation(len(debug))[:count]
    triggered = round(share * len(rows))
    assert debug.labels is not None, "the tasks have labels"
    assert debug.target is not None, "and a target"
    others = np.flatnonzero(debug.labels[rows] != debug.target)[:triggered]
    taken = {name: array[rows].copy() for name, array in debug.clean.items()}
    for name, array in debug.counterfactual.items():
        taken[name][others] = array[rows[others]]
    return taken, len(others)


def untouched(case: Case, seed: int, count: int = TRAFFIC) -> dict[str, Array]:
    """Clean inputs of all parts but the training's, drawn anew for each seed."""
    debug = case.whole or case.debug
    every = {name: np.concatenate([array, case.unseen.clean[name]]) for name, array in debug.clean.items()}
    rows = np.random.default_rng(seed).permutation(len(next(iter(every.values()))))[:count]
    return {name: array[rows] for name, array in every.items()}


def hunted(case: Case, folder: Path, share: float, progress: Progress = silent) -> dict[str, Any]:
    """Hunt, and where something is found, fit and measure."""
    inputs, triggered = traffic(case, share, case.seed)
    found, seconds = _timed(lambda: atp.hunt(case.base, inputs, HuntOptions(seed=case.seed), progress=progress))
    figures = {**_figures(found, seconds), "triggered": triggered, "target": _target(case)}
    return figures | _repaired(case, folder, found, progress)


def scanned(case: Case, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Scan with clean inputs, and where something is found, fit and measure."""
    found, seconds = _timed(lambda: _scan(case, case.base, folder, progress))
    return {**_figures(found, seconds), "target": _target(case)} | _repaired(case, folder, found, progress)


def control(case: Case, twin: Path, number: int, progress: Progress = silent) -> dict[str, Any]:
    """Hunt for what is not there."""
    inputs = untouched(case, number)
    found, seconds = _timed(lambda: atp.hunt(twin, inputs, HuntOptions(seed=number), progress=progress))
    return _figures(found, seconds)


def control_scan(case: Case, twin: Path, progress: Progress = silent) -> dict[str, Any]:
    """Scan a twin."""
    found, seconds = _timed(lambda: _scan(case, twin, twin.parent, progress))
    return _figures(found, seconds)


def audited(case: Case, progress: Progress = silent) -> dict[str, Any]:
    """The columns of a table, in the order of their flip rates."""
    from samples.fetch import fetched
    from samples.table_data import load_table

    names = tuple(attribute.name for attribute in load_table(case.name.split("/")[0], fetched("tables")).attributes)
    options = ScanOptions(columns=names, protected=(case.name.split("/")[1],), kind="tables", seed=case.seed)
    found, seconds = _timed(lambda: atp.scan(case.base, case.unseen.clean, options, progress=progress))
    return _figures(found, seconds)


def twin_of(case: Case, folder: Path) -> Path:
    """The unpoisoned model beside a case."""
    kind = case.name.split("/")[0]
    return (
        folder.parent / (f"minilm-twin-{case.seed}" if kind == "minilm" else f"{kind}-clean-{case.seed}") / "base.onnx"
    )


def _scan(case: Case, model: Path, folder: Path, progress: Progress) -> Search:
    debug = case.whole or case.debug
    clean = {name: array[:CLEAN] for name, array in debug.clean.items()}
    options = ScanOptions(seed=case.seed)
    if case.name.startswith("minilm"):
        vocabulary = read_vocabulary(folder / "tokenizer.json")
        options = replace(options, vocabulary=vocabulary.plain, words=vocabulary.words)
    return atp.scan(model, clean, options, progress=progress)


def _repaired(case: Case, folder: Path, found: Search, progress: Progress) -> dict[str, Any]:
    """What a fit on the pairs found comes to; nothing where there are none."""
    pairs, base = found.pairs, atp.load(case.base)
    if pairs is None:
        return {}
    options = atp.FitOptions(force=True, seed=case.seed)
    patch, seconds = _timed(lambda: atp.fit(base, pairs, options, progress=progress))
    atp.save(atp.bake(base, patch), folder / "found.onnx")
    evaluation = atp.evaluate(base, folder / "found.onnx", case.unseen, progress=progress)
    return {
        "fit": {"seconds": seconds, "meets_target": patch.figures["meets_target"]},
        "evaluation": evaluation.to_json(),
        "robust_accuracy_twin": case.training.get("robust_accuracy_twin"),
    }


def _figures(found: Search, seconds: float) -> dict[str, Any]:
    return {**found.to_json(), "seconds": seconds}


def _target(case: Case) -> int | None:
    return case.debug.target


def _timed(make: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    return make(), round(time.process_time() - started, 1)


def pieces(case: str, controls: int) -> list[str]:
    """What is measured of a case: the names of its files."""
    if case in TABLES:
        return ["audit"]
    found = [*(f"hunt-{share}" for share in SHARES), "scan"]
    if case in ("vit/badnets-fixed", "deit/badnets-fixed", "minilm/token"):  # one case a twin
        found += ["control-scan", *(f"control-{number}" for number in range(controls))]
    return found


def do(piece: str, case: Case, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """The figures of one piece."""
    work, _, which = piece.partition("-")
    if work == "hunt":
        return hunted(case, folder, float(which), progress)
    if work == "scan":
        return scanned(case, folder, progress)
    if work == "audit":
        return audited(case, progress)
    if which == "scan":
        return control_scan(case, twin_of(case, folder), progress)
    return control(case, twin_of(case, folder), int(which), progress)


def measure(case: str, seed: int, out: Path, names: Sequence[str], *, fast: bool, progress: Progress = silent) -> None:
    """Measure what is not there yet."""
    left = [name for name in names if not (folder_of(out, case, seed) / f"{name}.json").is_file()]
    if not left:
        return
    made, folder = prepare(case, seed=seed, fast=fast, out=out, progress=progress)
    for name in left:
        figures, file = do(name, made, folder, progress), folder / f"{name}.json"
        file.with_suffix(".part").write_text(json.dumps(figures, indent=1) + "\n")
        file.with_suffix(".part").replace(file)


def rows(out: Path, cases: Sequence[str]) -> dict[str, Any]:
    """All that was measured, by case, seed and name."""
    found: dict[str, Any] = {}
    for case in cases:
        for file in sorted(out.glob(f"{case.replace('/', '-')}-[0-9]*/*.json")):
            if file.stem.split("-")[0] in ("hunt", "scan", "control", "audit"):
                seed = file.parent.name.rsplit("-", 1)[1]
                found.setdefault(case, {}).setdefault(seed, {})[file.stem] = json.loads(file.read_text())
    return found


def summary(measured: Mapping[str, Any]) -> dict[str, Any]:
    """The issue's table: found of how many, and what was left after the fit."""
    lines: dict[str, Any] = {}
    for case, seeds in measured.items():
        names = dict.fromkeys(name for pieces_ in seeds.values() for name in pieces_)
        for name in (one for one in names if not one.startswith("control")):
            own = [pieces_[name] for pieces_ in seeds.values() if name in pieces_]
            lines[f"{name} {case}"] = _line(own)
    alarms = [
        one["verdict"] in ("backdoored", "suspicious")
        for seeds in measured.values()
        for pieces_ in seeds.values()
        for name, one in pieces_.items()
        if name.startswith("control-") and name != "control-scan"
    ]
    if alarms:
        rate = Rate.of(np.array(alarms))
        lines["controls, hunts"] = {"alarms": sum(alarms), "of": len(alarms), "interval": [rate.low, rate.high]}
    return lines


def _line(own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "seeds": len(own),
        "found": sum(_is_found(one) for one in own),
        "passes per input": round(max(one["passes_per_input"] for one in own), 1),
        "CPU seconds": [one["seconds"] for one in own],
        "said": [one["sentence"] for one in own],
    }
    done = [one for one in own if "evaluation" in one]
    if done:
        attacks = [one["evaluation"]["backdoor"] for one in done]
        line["ASR above floor"] = [attack["asr_above_floor"]["value"] for attack in attacks]
        line["accuracy lost"] = [one["evaluation"]["accuracy_lost"]["value"] for one in done]
        line["robust accuracy"] = [attack["robust_accuracy_patched"]["value"] for attack in attacks]
        line["twin's"] = [one["robust_accuracy_twin"] for one in done]
    if own and own[0]["columns"]:
        line["columns"] = [{one["name"]: one["flips"][0] for one in figures["columns"]} for figures in own]
    return line


def _is_found(figures: Mapping[str, Any]) -> bool:
    parts = figures["parts"]
    return figures["verdict"] == "backdoored" and bool(parts) and parts[0]["class"] == figures.get("target")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models and figures")
    parser.add_argument("--docs", type=Path, help="folder of hunting.json; default --out")
    parser.add_argument("--case", action="append", choices=(*IMAGES_AND_TEXTS, *TABLES), help="which; all by default")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--only", action="append", default=[], help="pieces whose name begins so: hunt, scan, control")
    parser.add_argument("--controls", type=int, help=f"traffics of a twin; {RESAMPLED}, or 1 with --fast")
    parser.add_argument("--fast", action="store_true", help="small bases, seed 0, fixed patches")
    parser.add_argument("--render", action="store_true", help="only print, and write, what was measured")
    options = parser.parse_args(arguments)
    cases = options.case or (("vit/badnets-fixed",) if options.fast else (*IMAGES_AND_TEXTS, *TABLES))
    controls = options.controls if options.controls is not None else 1 if options.fast else RESAMPLED
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        for seed in options.seed or ((0,) if options.fast else (0, 1, 2)):
            for case in cases:
                names = [one for one in pieces(case, controls) if one.startswith(tuple(options.only) or "")]
                with progress_bars() as progress:
                    measure(case, seed, options.out, names, fast=options.fast, progress=progress)
    lines = summary(rows(options.out, cases))
    (options.docs or options.out).mkdir(parents=True, exist_ok=True)
    ((options.docs or options.out) / "hunting.json").write_text(json.dumps(lines, indent=1) + "\n")
    cells = ((name, "\n".join(f"{key}: {value}" for key, value in line.items())) for name, line in lines.items())
    Console().print(table("Hunts and scans", {"What": {}, "Figures": {"overflow": "fold"}}, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
