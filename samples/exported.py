"""What is found and patched in what other packages export: the second half of docs/evidence/coverage.md.

    python -m samples.exported --folder out/exported        # what is there already is not exported, or rehearsed, again
    python -m samples.exported --render                     # the page from docs/evidence/exported.json again

Small models with random weights of timm, vit-pytorch, torchvision and others are exported, each in its
ways, matched and rehearsed as `samples.coverage` does it. Packages that are not installed are left out and named.
`--fast` takes two models whose packages the lock has.
"""

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from atpatch_onnx.cli import progress_bars
from atpatch_onnx.files import write_whole
from samples import exported_others, exported_torch
from samples.coverage import SECONDS, Graph, examine_all, read
from samples.exported_model import Model
from samples.exported_page import BEGIN, section

DOCS = Path(__file__).parent.parent / "docs" / "evidence"
FAST = ("C2PSA", "bert")
MODELS = (*exported_torch.MODELS, *exported_others.MODELS)


def export(model: Model, way: str, folder: Path) -> dict[str, Any]:
    """Write a model's file and what is known of it beside it, if it is not there; gives what is known."""
    path = folder / f"{model.package}-{model.name}.{way}.onnx".replace(" ", "-").replace(",", "")
    known = path.with_suffix(".json")
    if known.is_file():
        found: dict[str, Any] = json.loads(known.read_text())
        return found
    found = {"name": model.name, "package": model.package, "way": way, "file": path.name}
    found |= {"error": "", "note": "", "softmaxes": None}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters' own, of the shapes that they fix and of old names
            found["note"] = model.ways[way](path)
            found["softmaxes"] = None if model.softmaxes is None else model.softmaxes()
    except Exception as error:  # of many families; said on the page
        path.unlink(missing_ok=True)
        found["error"] = cause(error)
    write_whole(known, json.dumps(found).encode())
    return found


def cause(error: BaseException) -> str:
    """What lies at the bottom of an exporter's error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    told, _, _ = first.partition("  [Caused by")  # where in the exporter's own files
    return f"{type(error).__name__}: {told}"


def row(exported: dict[str, Any], graph: Graph | None) -> dict[str, Any]:
    """What the page has of an export, JSON types."""
    if graph is None:
        return exported
    checks = graph.rehearsal.get("checks", [])
    return exported | {
        "sites": len(graph.sites),
        "chains": dict(Counter(site["chain"] for site in graph.sites)),
        "refused": dict(Counter(graph.refused)),
        "others": dict(Counter(graph.others)),
        "outcome": graph.outcome,
        "said": graph.error or graph.rehearsal.get("reason", ""),
        "failed": [f"{check['name']}: {check['detail']}" for check in checks if not check["passed"]],
        "mixing": graph.rehearsal.get("mixing", []),
    }


def versions() -> Iterator[tuple[str, str]]:
    """Of what exports, and of what it is exported with."""
    packages = {model.package for model in MODELS} | {"torch", "onnx"}
    for package in sorted(packages):
        try:
            yield package, version(package)
        except PackageNotFoundError:  # written by hand, or not installed
            continue


def run(models: Sequence[Model], folder: Path, seconds: float) -> dict[str, Any]:
    """Export, match and rehearse them; the figures of the page.

    Args:
        models: The models.
        folder: Where graphs are kept, and what was found out about them.
        seconds: Time limit for a graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    left_out = sorted({f"{model.package} needs {model.missing}" for model in models if model.missing})
    pairs = [(model, way) for model in models if not model.missing for way in model.ways]
    with progress_bars() as report:
        exports = []
        for number, (model, way) in enumerate(pairs, 1):
            exports.append(export(model, way, folder))
            report("exporting", number, len(pairs))
        paths = [folder / one["file"] for one in exports if not one["error"]]
        graphs = {graph.name: graph for graph in examine_all(paths, folder / "graphs.jsonl", 1, seconds, report)}
    rows = [row(one, graphs.get(one["file"])) for one in exports]
    return {"versions": dict(versions()), "left_out": left_out, "rows": rows}


def so_far(models: Sequence[Model], folder: Path) -> dict[str, Any]:
    """The figures of what an earlier run did before it was stopped; what it did not come to is left out, and said."""
    graphs = {graph.name: graph for graph in read(folder / "graphs.jsonl").values()}
    exports = [json.loads(known.read_text()) for known in folder.glob("*.json")]
    rows = [row(one, graphs.get(one["file"])) for one in exports if one["error"] or one["file"] in graphs]
    order = {model.name: number for number, model in enumerate(models)}
    rows = sorted((one for one in rows if one["name"] in order), key=lambda one: (order[one["name"]], one["way"]))
    done = {(one["name"], one["way"]) for one in rows}
    left = [
        f"{model.name}, {way}: not done yet" for model in models for way in model.ways if (model.name, way) not in done
    ]
    return {"versions": dict(versions()), "left_out": left, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a rehearsal fails or has no result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("out") / "exported", help="where the graphs are kept")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where the figures and the page are")
    parser.add_argument("--only", action="append", help="a model's name; may be repeated")
    parser.add_argument("--fast", action="store_true", help="two models, of packages that the lock has")
    parser.add_argument("--render", action="store_true", help="the page from the figures that are there")
    parser.add_argument("--so-far", action="store_true", help="the figures of a run that was stopped")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for a graph")
    options = parser.parse_args(arguments)
    options.docs.mkdir(parents=True, exist_ok=True)
    kept, page = options.docs / "exported.json", options.docs / "coverage.md"
    if options.render:
        figures = json.loads(kept.read_text())
    else:
        wanted = options.only or (FAST if options.fast else [model.name for model in MODELS])
        models = [model for model in MODELS if model.name in wanted]
        figures = so_far(models, options.folder) if options.so_far else run(models, options.folder, options.seconds)
        write_whole(kept, (json.dumps(figures, indent=1) + "\n").encode())
    before = page.read_text().partition(BEGIN)[0] if page.is_file() else ""
    write_whole(page, f"{before.rstrip()}\n\n{section(figures)}".lstrip().encode())
    outcomes = Counter(one.get("outcome", "not exported") for one in figures["rows"])
    Console(stderr=True).print(f"{page}: {', '.join(f'{count} {name}' for name, count in outcomes.most_common())}")
    return 1 if outcomes["fails"] or outcomes["no result"] else 0


if __name__ == "__main__":
    sys.exit(main())
