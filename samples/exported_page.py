"""The half of docs/evidence/coverage.md that `exported.py` writes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from samples.page_tables import table

BEGIN = "# What other packages export"

Row = Mapping[str, Any]


def section(figures: Mapping[str, Any]) -> str:
    """From this heading on to the end of the page."""
    rows: Sequence[Row] = figures["rows"]
    lines = [
        BEGIN,
        "",
        "Written by `python -m samples.exported`.",
        "",
        *_totals(rows),
        f"Versions: {', '.join(f'{name} {version}' for name, version in figures['versions'].items())}.",
        "",
        "A cell is as above; *in torch* is how many softmaxes run in the module itself, those of fused attention"
        " included. What is refused, and softmaxes that are no attention, are read out below.",
        "",
        *_table(rows),
        *_list("Refused", _reasons(rows, "refused")),
        *_list("Softmaxes and modules that are not attention sites", _reasons(rows, "others")),
        *_list("More or fewer than softmaxes in torch", _unlike(rows)),
        *_list("Rehearsals that fail", _failures(rows)),
        *_list("What was done for an export", _notes(rows)),
        *_list("Not exported", _errors(rows)),
        *_list("Left out", figures["left_out"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _totals(rows: Sequence[Row]) -> Iterator[str]:
    found = [row for row in rows if "outcome" in row]
    sites = sum(row["sites"] for row in found)
    models = len({(row["package"], row["name"]) for row in found})
    yield f"{len(found)} graphs of {models} models, {sites} attention sites."
    yield ""


def _unlike(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        if "outcome" in row and row["softmaxes"] not in (None, _told(row)):
            yield f"{row['name']}, {row['way']}: {row['softmaxes']} in torch, {_told(row)} named here"


def _told(row: Row) -> int:
    return int(row["sites"] + sum(row["refused"].values()) + sum(row["others"].values()))


def _table(rows: Sequence[Row]) -> Iterator[str]:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    models: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        models[row["package"], row["name"]][row["way"]] = row
    lines = []
    for (package, name), by_way in models.items():
        softmaxes = next((row["softmaxes"] for row in by_way.values() if row["softmaxes"] is not None), "")
        lines.append((package, name, str(softmaxes), *(_cell(by_way.get(way)) for way in ways)))
    yield from (table(("Package", "Model", "In torch", *ways), lines), "")


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if "outcome" not in row:
        return "not exported" if row["error"] else "not rehearsed"
    refused = sum(row["refused"].values())
    said = f"{row['sites']} {row['outcome']}" if row["sites"] else "none"
    return f"{said}, {refused} refused" if refused else said


def _reasons(rows: Iterable[Row], kind: str) -> Iterator[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for reason, count in row.get(kind, {}).items():
            by_reason[_general(reason)].append(f"{count} in {row['name']}, {row['way']}")
    for reason, where in sorted(by_reason.items()):
        yield f"{reason} ({'; '.join(dict.fromkeys(where))})"


def _general(reason: str) -> str:
    """A reason without the name of the one module that it is about."""
    before, found, after = reason.partition("the module ")
    return reason if not found else f"{before}a module {after.partition(' ')[2]}"


def _failures(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        for failed in row.get("failed", ()):
            yield f"{row['name']}, {row['way']}: {failed}"
        if row.get("said"):
            yield f"{row['name']}, {row['way']}: {row['said']}"


def _notes(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        if row.get("note"):
            yield f"{row['name']}, {row['way']}: {row['note']}"


def _errors(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        if row["error"]:
            yield f"{row['name']}, {row['way']}: {row['error']}"


def _list(title: str, entries: Iterable[str]) -> Iterator[str]:
    found = list(entries)
    if found:
        yield from (f"## {title}", "", *(f"- {entry}" for entry in found), "")
