"""The page that `coverage.py` writes: what was found and rehearsed, held against what a survey says."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samples.coverage import Graph

CHOICES = {
    "RandomNormalLike": "draws anew at every run",
    "RandomUniformLike": "draws anew at every run",
    "TopK": "may choose otherwise where scores are nearly equal",
}
"""Why outputs may differ although nothing is wrong."""

FAR = 1e-3
"""An export whose outputs are this far from the torch model's is not the same model."""


@dataclass(frozen=True)
class Expected:
    """What the survey says, by graph; empty where there is none."""

    graphs: Mapping[str, Mapping[str, Any]]
    ways: Mapping[str, str]

    @classmethod
    def read(cls, file: Path | None) -> Expected:
        """Read `expected.json`."""
        if file is None:
            return cls({}, {})
        content = json.loads(file.read_text())
        return cls(content["graphs"], content["ways"])

    def attentions(self, graph: Graph) -> int | None:
        """How many attentions a graph has, with and without a map of their own."""
        known = self.graphs.get(graph.name)
        return None if known is None else int(known["softmax_sites"] + known["fused_sites"])

    def others(self, graph: Graph) -> int | None:
        """How many softmaxes are something else."""
        known = self.graphs.get(graph.name)
        return None if known is None else int(known["softmax_not_attention"])

    def far(self, graph: Graph) -> float:
        """How far the export was from the torch model when the survey ran both."""
        return float(self.graphs.get(graph.name, {}).get("max_abs_diff_to_torch") or 0.0)


def second_products(graph: Graph) -> dict[str, list[str]]:
    """Products with values that read a map that an earlier site reads, by map."""
    by_map: dict[str, list[str]] = defaultdict(list)
    for site in graph.sites:
        if site["map"] is not None:
            by_map[site["map"]].append(site["product"])
    return {name: products for name, products in by_map.items() if len(products) > 1}


def gap(graph: Graph, expected: Expected) -> str | None:
    """Why a graph does not have what the survey says, where it does not."""
    attentions, others = expected.attentions(graph), expected.others(graph)
    if graph.error or attentions is None or (attentions, others) == (len(graph.sites), len(graph.others)):
        return None
    reasons = [
        f"one softmax feeds {len(products)} products with values, each a site, the survey counted softmaxes:"
        f" {', '.join(f'`{name}`' for name in products)}"
        for products in second_products(graph).values()
    ]
    explained = sum(len(products) - 1 for products in second_products(graph).values())
    reasons += [f"refused: {reason}" for reason in graph.refused]
    if len(graph.sites) - explained + len(graph.refused) != attentions or len(graph.others) != others:
        reasons.append(f"not explained: {attentions} and {others} others expected, {len(graph.others)} others found")
    return "; ".join(reasons)


def cell(graph: Graph, expected: Expected) -> str:
    """A graph in the table."""
    attentions = expected.attentions(graph)
    if graph.outcome == "no result":
        return graph.outcome
    as_expected = attentions in (None, len(graph.sites))
    count = str(len(graph.sites)) if as_expected else f"{len(graph.sites)} of {attentions}*"
    if graph.outcome == "no attention":
        return "none" if not attentions else count
    return f"{count} {graph.outcome}"


def document(graphs: Sequence[Graph], expected: Expected, command: str) -> str:
    """docs/evidence/coverage.md."""
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Written by `{command}`.",
            "",
            *_totals(graphs, expected),
            *_table(graphs, expected),
            *_list("Found, but not as many as the survey says", _gaps(graphs, expected)),
            *_list("Rehearsals that fail", _failures(graphs)),
            *_list("Graphs whose export itself is wrong in onnxruntime", _broken(graphs, expected)),
            *_list("Exports that onnxruntime runs, with NaN or infinite outputs", _nonfinite(graphs)),
            *_list("Softmaxes that are not attention", _others(graphs)),
            *_patterns(graphs),
        ]
    )


def _totals(graphs: Sequence[Graph], expected: Expected) -> Iterator[str]:
    outcomes = Counter(graph.outcome for graph in graphs)
    sites = sum(len(graph.sites) for graph in graphs)
    known = [graph for graph in graphs if expected.attentions(graph) is not None]
    as_expected = sum(gap(graph, expected) is None for graph in known)
    architectures = len({graph.architecture for graph in graphs})
    yield f"{len(graphs)} graphs of {architectures} architectures, {sites} attention sites."
    if known:
        yield (
            f"Of {len(known)} graphs, {as_expected} have exactly the attentions, and the softmaxes that are none, that"
            " the survey counted; the others are explained below."
        )
    yield ""
    yield from _rows(("Rehearsal", "Graphs"), outcomes.most_common())


def _table(graphs: Sequence[Graph], expected: Expected) -> Iterator[str]:
    ways = sorted({graph.way for graph in graphs})
    yield from ("## Architectures and ways of export", "")
    if expected.ways:
        yield from (f"- **{way}**: {expected.ways.get(way, 'not said')}" for way in ways)
        yield ""
    yield from (
        "A cell says how many attention sites were found and how the rehearsal went, with and without `If`, without and"
        " with onnxruntime's optimizations:",
        "",
        "- **6 ok**: 6 sites, as many as the survey says. A drawn patch that does not fire leaves every output"
        " bit-identical; where it fires, flagged tokens are neutral at every site, all others the base's bit for bit,"
        " outputs are those of the base that is given these keys and values, samples without a flag keep their outputs"
        " bit for bit, and unbaking gives the base's fingerprint back.",
        "- **4 of 2* ok**: not as many sites as the survey says; explained below.",
        "- **6 export broken**: the sites were found, but onnxruntime does not run the graph as it was exported.",
        "- **6 fails**: the rehearsal failed. **no result**: it crashed or took too long.",
        "- **none**: a graph without attention. An empty cell: not in the corpus.",
        "",
    )
    cells = {(graph.architecture, graph.way): cell(graph, expected) for graph in graphs}
    names = sorted({graph.architecture for graph in graphs})
    yield from _rows(("Architecture", *ways), ((name, *(cells.get((name, way), "") for way in ways)) for name in names))


def _gaps(graphs: Sequence[Graph], expected: Expected) -> Iterator[str]:
    for graph in graphs:
        if (reason := gap(graph, expected)) is not None:
            yield f"`{graph.name}`: {len(graph.sites)} sites, {expected.attentions(graph)} expected; {reason}"


def _failures(graphs: Sequence[Graph]) -> Iterator[str]:
    for graph in graphs:
        if graph.outcome == "no result":
            yield f"`{graph.name}`: {graph.error}"
        elif graph.outcome == "fails":
            for check in graph.rehearsal["checks"]:
                if not check["passed"]:
                    yield f"`{graph.name}`: {check['name']}: {check['detail']}"


def _broken(graphs: Sequence[Graph], expected: Expected) -> Iterator[str]:
    for graph in graphs:
        if graph.rehearsal.get("reason"):
            yield f"`{graph.name}`: {_cause(graph.rehearsal['reason'])}"
        if expected.far(graph) > FAR:
            causes = "".join(f"; its {operator} {CHOICES[operator]}" for operator in graph.choices)
            yield f"`{graph.name}`: its outputs are up to {expected.far(graph):.1f} from the torch model's{causes}"


def _cause(reason: str) -> str:
    """What onnxruntime says, without its own file names."""
    said = reason.split("found ", 1)[-1].split("; default optimization", 1)[0]
    said = said.removesuffix(" Check it with onnxruntime alone first.")
    return " ".join(word for word in said.split() if not word.startswith("/onnxruntime_src"))


def _nonfinite(graphs: Sequence[Graph]) -> Iterator[str]:
    for graph in graphs:
        if graph.rehearsal.get("nonfinite"):
            yield f"`{graph.name}`: {', '.join(graph.rehearsal['nonfinite'])}"


def _others(graphs: Sequence[Graph]) -> Iterator[str]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for graph in graphs:
        for reason in graph.others:
            by_reason[reason].append(graph.name)
    for reason, names in sorted(by_reason.items()):
        architectures = sorted({name.split(".")[0] for name in names})
        yield f"{reason} ({len(names)} in {', '.join(architectures)})"


def _patterns(graphs: Sequence[Graph]) -> Iterator[str]:
    for title, key in (
        ("Layouts of map, values and output", "layouts"),
        ("Operators from the scores to the values", "chain"),
    ):
        counts: Counter[str] = Counter()
        owners: dict[str, set[str]] = defaultdict(set)
        for graph in graphs:
            for site in graph.sites:
                counts[site[key]] += 1
                owners[site[key]].add(graph.architecture)
        yield from (f"## {title}", "", f"{len(counts)} are met.", "")
        rows = ((f"`{name}`", count, len(owners[name])) for name, count in counts.most_common())
        yield from _rows((title.split()[0], "Sites", "Architectures"), rows)


def _rows(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield f"| {' | '.join(str(entry) for entry in row)} |"
    yield ""


def _list(title: str, entries: Iterable[str]) -> Iterator[str]:
    found = list(entries)
    if found:
        yield from (f"## {title}", "", *(f"- {entry}" for entry in found), "")


# The command
