"""Fairness, proven: what a fix that is always on costs, beside what people would pick instead.

    python -m samples.fairness --out out/results

Five tables (`samples.table_data`), an FT-Transformer for each and seed, as in `samples.tables`. Each protected
attribute, and all of a table's at once, is made neutral in every input (`FitOptions.always`). `verify` proves on the
graph that no path leads from it to the output; beside that, every row of the evaluation part is run with every value
of the attribute, in every combination where there are several.

Beside it, on the same rows: the base; fairlearn's ThresholdOptimizer behind it; ExponentiatedGradient around boosted
trees, and these trees alone; and an FT-Transformer trained without the attribute. See `samples.fairness_rivals`.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.running.groups import demographic_parity, equalized_odds
from atpatch_onnx.running.metrics import Difference, Rate
from atpatch_onnx.running.predictions import classes, prediction_output
from atpatch_onnx.running.sessions import Progress, Session, silent
from samples import fairness_page, tables
from samples.case import VERIFIED, folder_of
from samples.fetch import fetched
from samples.ft_transformer import Recipe
from samples.pieces import ROOT, SEEDS
from samples.table_data import TableData, load_table

Rows = NDArray[np.float32]
Classes = NDArray[np.int64]

SETS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "compas": (("sex",), ("race",), ("age-cat",), ("sex", "race", "age-cat")),
    "german": (("sex",), ("age",), ("sex", "age")),
    "law": (("Sex",), ("Race",), ("Sex", "Race")),
    "adult": (("sex",), ("race",), ("age",), ("sex", "race", "age")),
    "credit": (("SEX",), ("AGE",), ("SEX", "AGE")),
}
"""What is made neutral, by table: each attribute, and all of them; the tables that take least come first."""

SIZES = {
    **tables.FULL,
    "law": replace(
        tables.FULL["adult"], train=11_000, debug=2_500, tune=2_500, evaluation=5_000, recipe=Recipe(epochs=10)
    ),
    "credit": replace(
        tables.FULL["adult"], train=15_000, debug=3_000, tune=4_000, evaluation=6_000, recipe=Recipe(epochs=8)
    ),
}

FAST = {"german": replace(tables.FULL["german"], recipe=Recipe(epochs=8, batch=64))}

BATCH = 1024

GOAL = atp.Goal(flip_rate=0.0, accuracy_loss=0.2)
"""Of the fit: nothing may flip; what it costs is the question here."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A table, what of it is protected, and a base."""

    name: str
    table: TableData
    protected: tuple[str, ...]
    parts: tables.Parts
    base: Path
    seed: int

    @property
    def columns(self) -> list[int]:
        """Where the protected attributes stand."""
        return [self.table.column(name) for name in self.protected]

    @cached_property
    def values(self) -> list[tuple[float, ...]]:
        """All combinations of their values."""
        sizes = [len(self.table.attributes[column].values) for column in self.columns]
        return [tuple(map(float, one)) for one in itertools.product(*map(range, sizes))]

    @property
    def evaluation(self) -> Rows:
        """The rows of the evaluation part."""
        return self.table.rows[self.parts.evaluation]

    def groups(self, rows: Rows) -> NDArray[np.int64]:
        """The number of the combination that each row has `[rows]`."""
        sizes = [len(self.table.attributes[column].values) for column in self.columns]
        return np.asarray(np.ravel_multi_index(tuple(rows[:, self.columns].astype(int).T), sizes), np.int64)

    def with_values(self, rows: Rows, values: Sequence[float]) -> Rows:
        """The rows with these values of the protected attributes."""
        changed = rows.copy()
        changed[:, self.columns] = values
        return changed


Predict = Callable[[Rows], Classes]
"""Classes `[rows]` of rows `[rows, features]`."""


def answers(model: Path) -> Predict:
    """What a model says of rows."""
    run = logits(model)
    return lambda rows: classes(run(rows))


def logits(model: Path) -> Callable[[Rows], NDArray[np.float32]]:
    """What a model makes of rows `[rows, 2]`."""
    loaded = atp.load(model)
    output, session = prediction_output(loaded), Session(loaded)
    return lambda rows: session.collect({tables.INPUT: rows}, [output], batch_size=BATCH)[output]


def pairs(setting: Setting, rows: NDArray[np.int64], seed: int) -> atp.DebugSet:
    """Each row beside the same with another value of every protected attribute, drawn from all others."""
    table, columns = setting.table, setting.columns
    clean, rng = table.rows[rows], np.random.default_rng(seed)
    counterfactual = clean.copy()
    for column in columns:
        count = len(table.attributes[column].values)
        counterfactual[:, column] = (clean[:, column] + rng.integers(1, count, size=len(rows))) % count
    return atp.DebugSet.from_pairs(
        {tables.INPUT: clean}, {tables.INPUT: counterfactual}, table.labels[rows], kind="attribute"
    )


def figures(setting: Setting, predict: Predict) -> dict[str, Any]:
    """Of one way to predict, on the evaluation part: JSON types.

    UF is by exhaustion: the share of rows that get another class under any combination of values.
    """
    rows, labels = setting.evaluation, setting.table.labels[setting.parts.evaluation]
    found = predict(rows)
    flips = np.zeros(len(rows), bool)
    first: Classes | None = None
    for values in setting.values:
        under = predict(setting.with_values(rows, values))
        first = under if first is None else first
        flips |= under != first
    return {
        "accuracy": asdict(Rate.of(found == labels)),
        "uf": asdict(Rate.of(flips)),
        "groups": {
            name: {
                "dpd": asdict(demographic_parity(labels, found, rows[:, column])),
                "eod": asdict(equalized_odds(labels, found, rows[:, column])),
            }
            for name, column in zip(setting.protected, setting.columns, strict=True)
        },
    }


def ours(setting: Setting, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Fit, bake, verify and measure the fix that is always on; leaves both files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    options = atp.FitOptions(goal=GOAL, always=True, seed=setting.seed)
    patch = atp.fit(setting.base, pairs(setting, setting.parts.debug, setting.seed), options, progress=progress)
    patch.save(folder / "always.safetensors")
    seconds = round(time.process_time() - started, 1)
    patched = folder / "always.onnx"
    atp.save(atp.bake(atp.load(setting.base), patch), patched)
    unseen = pairs(setting, setting.parts.evaluation, setting.seed + 1)
    verified = atp.verify(
        setting.base, patched, unseen.take(range(min(VERIFIED, len(unseen)))), patch=patch, progress=progress
    )
    said = {check.name: check.detail for check in verified.checks}
    before, after = (answers(path)(setting.evaluation) for path in (setting.base, patched))
    labels = setting.table.labels[setting.parts.evaluation]
    return {
        **figures(setting, answers(patched)),
        "accuracy_lost": asdict(Difference.paired(before == labels, after == labels)),
        "verified": verified.passed,
        "failures": [check.name for check in verified.failures],
        "no path": said["no path"],
        "every value": said["every value"],
        "fit_seconds": seconds,
    }


def measure(setting: Setting, size: tables.Size, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Everything of one setting, as JSON types."""
    from samples import fairness_rivals as rivals

    fixed = ours(setting, folder, progress)
    return {
        "case": setting.name,
        "seed": setting.seed,
        "rows": len(setting.evaluation),
        "combinations": len(setting.values),
        "base": figures(setting, answers(setting.base)),
        "ours": fixed,
        **rivals.measured(setting, size, folder, figures, progress),
        "proxies": rivals.guessed(setting),
    }


def named(table: str, protected: tuple[str, ...]) -> str:
    """The name of a case."""
    return f"{table}/{'+'.join(protected)}"


def settings(name: str, seed: int, out: Path, data: Path | None, fast: bool, progress: Progress) -> list[Setting]:
    """All that is protected of a table, over one base, which is trained unless it is there."""
    table = load_table(name, fetched("tables") if data is None else data)
    size = (FAST if fast else SIZES)[name]
    parts = tables.divide(table, size, seed)
    folder = out / f"base-{name}-{seed}{'-fast' if fast else ''}"
    tables.trained(table, parts.train, size.recipe, folder, seed, progress)
    return [
        Setting(named(name, protected), table, protected, parts, folder / "base.onnx", seed) for protected in SETS[name]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure what is not there yet and write the page; 1 where a fix is not certified."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="folder of models and figures")
    parser.add_argument("--docs", type=Path, help="folder of the page; default docs/evidence, and --out with --fast")
    parser.add_argument("--data", type=Path, help="folder of the tables; else they are fetched")
    parser.add_argument("--table", action="append", choices=SETS, help="which; all where none is named")
    parser.add_argument("--seed", action="append", type=int, help="which; 0, 1 and 2 where none is named")
    parser.add_argument("--fast", action="store_true", help="German credit, seed 0, a base trained for less")
    parser.add_argument("--render", action="store_true", help="only write the page, of what was measured")
    options = parser.parse_args(arguments)
    names = options.table or list(FAST if options.fast else SETS)
    for seed, name in itertools.product(options.seed or (SEEDS[:1] if options.fast else SEEDS), names):
        if options.render:
            break
        with progress_bars() as progress:
            for setting in settings(name, seed, options.out, options.data, options.fast, progress):
                file = folder_of(options.out, setting.name, seed) / "fairness.json"
                if not file.is_file():
                    found = measure(setting, (FAST if options.fast else SIZES)[name], file.parent, progress)
                    file.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
                    file.with_suffix(".part").replace(file)
    document = gathered(options.out, names)
    docs = options.docs or (options.out if options.fast else ROOT / "docs" / "evidence")
    fairness_page.write_page(document, docs)
    uncertified = fairness_page.uncertified(document)
    for line in uncertified:
        Console().print(f"NOT CERTIFIED: {line}")
    return int(bool(uncertified))


def gathered(out: Path, names: Sequence[str]) -> dict[str, Any]:
    """What was measured, by case, one a seed."""
    runs: dict[str, list[Any]] = {}
    for name in (one for one in SETS if one in names):
        for protected in SETS[name]:
            case = named(name, protected)
            files = sorted(out.glob(f"{case.replace('/', '-')}-[0-9]*/fairness.json"))
            runs |= {case: [json.loads(file.read_text()) for file in files]} if files else {}
    return {"runs": runs}


if __name__ == "__main__":
    sys.exit(main())
