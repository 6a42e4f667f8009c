"""What is found and patched in a corpus of exported graphs: writes its half of docs/evidence/coverage.md.

    python -m samples.coverage --corpus DIR --expected DIR/expected.json

`DIR` holds graphs `<architecture>.<way>.onnx`, or `graphs.tar.xz` and the `load.py` that unpacks it. `expected.json`
says of each how many attentions it holds (`softmax_sites` and `fused_sites`) and how many other softmaxes; without it,
what is found is only listed. Every graph is matched and rehearsed (`atpatch_onnx.rehearse`) in a separate process:
one that crashes or takes too long is reported and does not end the run. `--json FILE` keeps a line for every graph; a
run that is given the file again goes on where the last one ended.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli import progress_bars
from atpatch_onnx.matching.rules import label
from atpatch_onnx.matching.sites import Place
from samples.coverage_page import CHOICES, Expected, document, gap
from samples.exported_page import BEGIN

ROOT = Path(__file__).parent.parent
SECONDS = 300
MEMORY = 6 * 2**30
GRAPHS_A_PROCESS = 40
"""A worker's memory does not grow beyond what this many graphs leave behind."""


@dataclass(frozen=True)
class Graph:
    """What was found out about one graph."""

    name: str
    digest: str
    sites: tuple[dict[str, Any], ...] = ()
    """Name, layouts, chain of operators, map and nodes of each."""

    refused: tuple[str, ...] = ()
    """Why attention was not made a site."""

    others: tuple[str, ...] = ()
    """Why a softmax is not attention."""

    choices: tuple[str, ...] = ()
    """Its operators that draw at random, or choose by scores that may be nearly equal."""

    rehearsal: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why there is no rehearsal."""

    seconds: float = 0.0

    @property
    def architecture(self) -> str:
        """The name's first part."""
        return self.name.split(".")[0]

    @property
    def way(self) -> str:
        """How it was exported, the name's second part."""
        return self.name.split(".")[1]

    @property
    def outcome(self) -> str:
        """`ok`, `no attention`, `export broken`, `fails` or `no result`."""
        if not self.rehearsal:
            return "no result"
        if not self.rehearsal["runs"]:
            return "export broken"
        if not self.sites:
            return "no attention"
        return "ok" if self.rehearsal["passed"] else "fails"


# One graph


def examine(path: Path) -> Graph:
    """Match and rehearse one graph."""
    began = time.monotonic()
    model = atp.load(path)
    matches = atp.explain(model)
    operators = {label(node): node.op_type for node in model.graph}
    sites = tuple(
        {
            "name": site.name,
            "form": site.form.value,
            "layouts": " ".join((site.map_layout, _axes(site.key), _axes(site.value))),
            "chain": " > ".join(operators.get(node, "?") for node in site.nodes),
            "map": site.map,
            "product": site.nodes[-1],
        }
        for site in matches.sites
    )
    rehearsal = atp.rehearse(model, threads=1).to_json()
    rehearsal.pop("sites")
    return Graph(
        name=path.name,
        digest=digest(path),
        sites=sites,
        refused=tuple(miss.reason for miss in matches.near_misses if miss.attention),
        others=tuple(miss.reason for miss in matches.near_misses if not miss.attention),
        choices=tuple(sorted({operator for operator in operators.values() if operator in CHOICES})),
        rehearsal=rehearsal,
        seconds=round(time.monotonic() - began, 1),
    )


def _axes(place: Place) -> str:
    """What the axes of a tensor are: `n` maps, `k` tokens, `.` features; `+` where it holds others beside these."""
    return ",".join(letters or "." for letters in place.axes) + ("" if place.whole else "+")


def digest(path: Path) -> str:
    """Tells whether a graph changed since it was examined."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


class Worker:
    """A process that examines one graph after the other; another one takes over where it dies."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._count = 0

    def examine(self, path: Path) -> Graph:
        """Examine a graph, within the time limit."""
        if self._count == GRAPHS_A_PROCESS:
            self.stop()
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        timer = threading.Timer(self._seconds, process.kill)
        timer.start()
        with suppress(BrokenPipeError):
            process.stdin.write(f"{path}\n")
            process.stdin.flush()
        line = process.stdout.readline()
        late = not timer.is_alive()
        timer.cancel()
        self._count += 1
        if line:
            return Graph(**json.loads(line))
        self.stop()
        error = f"not done after {self._seconds:g} s" if late else f"crashed with exit code {process.returncode}"
        return Graph(path.name, digest(path), error=error)

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._count = None, 0

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            command = [sys.executable, "-m", "samples.coverage", "--worker"]
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        return self._process


def work() -> None:
    """What a worker does: a path a line in, a graph a line out."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    for line in sys.stdin:
        path = Path(line.strip())
        try:
            graph = examine(path)
        except Exception as error:  # said in the document; the run goes on
            graph = Graph(path.name, digest(path), error=f"{type(error).__name__}: {error}")
        print(json.dumps(asdict(graph)), flush=True)


# The corpus


@contextmanager
def unpacked(corpus: Path) -> Iterator[Path]:
    """The folder with the graphs; unpacked for the time of the run, if they are not."""
    loader = corpus / "load.py"
    if not loader.is_file() or any(corpus.glob("*.onnx")):
        yield corpus
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(loader), folder], check=True)
        yield Path(folder)


def one_way_each(paths: Iterable[Path]) -> list[Path]:
    """One graph of each architecture; the ways take turns."""
    by_architecture: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        by_architecture[path.name.split(".")[0]].append(path)
    return [ways[number % len(ways)] for number, ways in enumerate(by_architecture.values())]


def read(file: Path | None) -> dict[tuple[str, str], Graph]:
    """What earlier runs kept, by name and digest."""
    if file is None or not file.is_file():
        return {}
    kept = (Graph(**json.loads(line)) for line in file.read_text().splitlines())
    return {(graph.name, graph.digest): graph for graph in kept}


def examine_all(
    paths: Sequence[Path], file: Path | None, jobs: int, seconds: float, report: Callable[[str, int, int], None]
) -> list[Graph]:
    """Examine graphs, `jobs` at a time, and keep each in `file` as soon as it is done."""
    kept = read(file)
    done = {path: kept[key] for path in paths if (key := (path.name, digest(path))) in kept}
    left = iter([path for path in paths if path not in done])
    lock = threading.Lock()

    def take_turns() -> None:
        worker = Worker(seconds)
        while True:
            with lock:
                path = next(left, None)
            if path is None:
                break
            graph = worker.examine(path)
            with lock:
                done[path] = graph
                if file is not None:
                    with file.open("a") as stream:
                        stream.write(json.dumps(asdict(graph)) + "\n")
                report("rehearsing", len(done), len(paths))
        worker.stop()

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(take_turns) for _ in range(jobs)]:
            future.result()
    return [done[path] for path in paths]


# The document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 1 where a graph fails or has no result, or what the survey says is not explained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of .onnx files, or of graphs.tar.xz and load.py")
    parser.add_argument("--expected", type=Path, help="what each graph holds")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence" / "coverage.md", help="the document")
    parser.add_argument("--json", type=Path, help="a line for every graph; an existing one is gone on with")
    parser.add_argument("--fast", action="store_true", help="every architecture in one way, the ways taking turns")
    parser.add_argument("--jobs", type=int, default=1, help="graphs at a time")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for a graph")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work()
        return 0
    if options.corpus is None:
        parser.error("--corpus is missing")
    console = Console(stderr=True)
    with unpacked(options.corpus) as folder, progress_bars() as report:
        paths = sorted(folder.glob("*.onnx"))
        chosen = one_way_each(paths) if options.fast else paths
        graphs = examine_all(chosen, options.json, options.jobs, options.seconds, report)
    expected = Expected.read(options.expected)
    command = "python -m samples.coverage --corpus DIR" + (" --expected DIR/expected.json" if expected.graphs else "")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _, found, other_half = options.out.read_text().partition(BEGIN) if options.out.is_file() else ("", "", "")
    page = document(graphs, expected, command + (" --fast" if options.fast else ""))
    options.out.write_text(f"{page.rstrip()}\n\n{found}{other_half}" if found else page)
    outcomes = Counter(graph.outcome for graph in graphs)
    console.print(f"{options.out}: {', '.join(f'{count} {outcome}' for outcome, count in outcomes.most_common())}")
    wrong = [graph.name for graph in graphs if "not explained" in (gap(graph, expected) or "")]
    return 1 if wrong or outcomes["fails"] or outcomes["no result"] else 0


if __name__ == "__main__":
    sys.exit(main())
