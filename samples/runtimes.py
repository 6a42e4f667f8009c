"""Run the demo's patched model, written for every target, on every runtime at hand; write `docs/evidence/runtimes.md`.

    atpatch demo --out demo-out
    npm install --prefix samples/browser
    python -m samples.runtimes --demo demo-out --docs docs/evidence

Every runtime gets the same clean and triggered digits. It works if its flags are onnxruntime's and all other outputs
lie within `TOLERANCE` of onnxruntime's.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.cli import demo_digits as digits
from atpatch_onnx.cli.demo_run import TRIGGER
from atpatch_onnx.graph.names import FLAGGED
from samples.documented import section

BROWSER = Path(__file__).parent / "browser"
PAGE = Path(__file__).parent / "runtimes.md.j2"
TOLERANCE = 1e-4
"""Of an output, relative to its largest value."""

WORDS = 420
"""Characters kept of an error: OpenVINO names what it refuses at the end of many."""

IMAGES = 64
"""Digits, and as many with the trigger."""

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Path, Arrays], Arrays]


@dataclass(frozen=True)
class Runtime:
    """Something that runs a file."""

    name: str
    run: Run
    note: str = ""


@dataclass(frozen=True)
class Outcome:
    """A file on a runtime, held against onnxruntime."""

    target: str
    runtime: str
    works: bool
    detail: str
    """The largest difference, or why it does not work."""


def onnxruntime(*, threads: int = 0, optimize: bool = True) -> Run:
    """The CPU provider, with as many threads as it likes, unless told."""

    def run(path: Path, inputs: Arrays) -> Arrays:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return _named([output.name for output in session.get_outputs()], session.run(None, inputs))

    return run


def reference(path: Path, inputs: Arrays) -> Arrays:
    """The evaluator of the onnx package."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(onnx.load(path))
    return _named(evaluator.output_names, list(evaluator.run(None, inputs)))


def openvino(*, exact: bool = True) -> Run:
    """OpenVINO on the CPU, in float32 where `exact`, else in the precision that it chooses."""

    def run(path: Path, inputs: Arrays) -> Arrays:
        from openvino import Core

        core = Core()
        model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"} if exact else {})
        results = model(inputs)
        return {name: np.asarray(results[output]) for output in model.outputs for name in output.names}

    return run


def tract(path: Path, inputs: Arrays) -> Arrays:
    """Leaves sizes that are free to tract."""
    import tract as library

    model = library.onnx().load(path)
    feeds = [inputs[model.input_name(index)] for index in range(model.input_count())]
    results = model.into_model().into_runnable().run(feeds)
    names = [output.name for output in onnx.load(path, load_external_data=False).graph.output]
    return _named(names, [result.to_numpy() for result in results])


def javascript(package: str) -> Run:
    """onnxruntime-node or onnxruntime-web, in node."""

    def run(path: Path, inputs: Arrays) -> Arrays:
        feeds = {
            name: {"type": str(array.dtype), "dims": array.shape, "data": array.ravel().tolist()}
            for name, array in inputs.items()
        }
        done = subprocess.run(
            ["node", str(BROWSER / "runtimes.mjs"), package, str(path)],
            input=json.dumps(feeds),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "node failed")
        answer = json.loads(done.stdout)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return {name: np.array(one["data"], one["type"]).reshape(one["dims"]) for name, one in answer.items()}

    return run


RUNTIMES = (
    Runtime("onnxruntime", onnxruntime()),
    Runtime("onnxruntime, 1 thread", onnxruntime(threads=1)),
    Runtime("onnxruntime, 2 threads", onnxruntime(threads=2)),
    Runtime("onnxruntime, not optimized", onnxruntime(optimize=False)),
    Runtime("onnx reference", reference),
    Runtime("OpenVINO, f32", openvino()),
    Runtime("tract", tract),
    Runtime("onnxruntime-node", javascript("onnxruntime-node")),
    Runtime("onnxruntime-web", javascript("onnxruntime-web"), "WebAssembly, in node"),
)


def missing(runtime: Runtime) -> str | None:
    """What has to be installed for a runtime; None where all is there."""
    if runtime.name.startswith("onnxruntime-"):
        package = BROWSER / "node_modules" / runtime.name
        return (
            None
            if package.is_dir() and shutil.which("node")
            else f"npm install --prefix samples/browser, for {package.name}"
        )
    module = {"OpenVINO, f32": "openvino", "tract": "tract"}.get(runtime.name)
    if module is None:
        return None
    try:
        version(module)
    except ModuleNotFoundError:
        return f"pip install {module}"
    return None


def compare(target: str, path: Path, inputs: Arrays, runtimes: Sequence[Runtime] = RUNTIMES) -> Iterator[Outcome]:
    """A file on each runtime, beside onnxruntime."""
    expected = onnxruntime()(path, inputs)
    for runtime in runtimes:
        try:
            found = runtime.run(path, inputs)
        except Exception as error:  # runtimes have no exceptions in common
            yield Outcome(target, runtime.name, works=False, detail=_first_words(error))
            continue
        yield _judged(target, runtime.name, expected, found)


def _judged(target: str, runtime: str, expected: Arrays, found: Arrays) -> Outcome:
    worst = 0.0
    for name, wanted in expected.items():
        if name not in found or found[name].shape != wanted.shape:
            return Outcome(target, runtime, works=False, detail=f"the output {name} is missing or of another shape")
        if wanted.dtype == bool:
            other = int((found[name].astype(bool) != wanted).sum())
            if other:
                return Outcome(target, runtime, works=False, detail=f"{other} of {wanted.size} differ in {name}")
        else:
            differs = float(np.abs(found[name] - wanted).max() / np.abs(wanted).max())
            if not differs <= TOLERANCE:  # nor a NaN
                return Outcome(target, runtime, works=False, detail=f"runs, and computes another {name}")
            worst = max(worst, differs)
    return Outcome(target, runtime, works=True, detail=f"{worst:.0e}" if worst else "0")


def inputs(seed: int = 0, count: int = IMAGES) -> Arrays:
    """Digits that neither the demo's training nor its fit saw, then the same ones with the trigger."""
    data = digits.load()
    images = data.images[digits.split(data.labels, seed=seed).evaluation[:count]]
    stamped = TRIGGER.stamp(images, np.random.default_rng(seed))
    return {"pixel_values": np.concatenate([images, stamped]).astype(np.float32)}


def bake_all(demo: Path, folder: Path) -> dict[str, Path]:
    """The demo's patch, written for every target."""
    base, patch = atp.load(demo / "base.onnx"), atp.Patch.load(demo / "fix.safetensors")
    files = {}
    for name in atp.TARGETS:
        files[name] = folder / f"{name}.onnx"
        atp.save(atp.bake(base, patch, target=name), files[name])
    return files


def page(outcomes: Sequence[Outcome], runtimes: Sequence[Runtime], flipped: int) -> str:
    """`docs/evidence/runtimes.md`.

    Args:
        outcomes: Of every target on every runtime.
        runtimes: The columns.
        flipped: Decisions that OpenVINO changes in the precision that it chooses.
    """
    by_place = {(one.target, one.runtime): one for one in outcomes}
    reasons = list(dict.fromkeys(one.detail for one in outcomes if not one.works))

    def cell(one: Outcome) -> str:
        return one.detail if one.works else f"no [{reasons.index(one.detail) + 1}]"

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(PAGE.read_text()).render(
        inputs=2 * IMAGES,
        tolerance=f"{TOLERANCE:g}",
        runtimes=[runtime.name for runtime in runtimes],
        rows=[(target, [cell(by_place[target, runtime.name]) for runtime in runtimes]) for target in atp.TARGETS],
        reasons=reasons,
        versions=_versions(),
        targets=atp.TARGETS,
        flipped=flipped,
        documented=section(),
    )


def _versions() -> str:
    found = {name: version(name) for name in ("onnxruntime", "onnx", "openvino", "tract")}
    for name in ("onnxruntime-node", "onnxruntime-web"):
        found[name] = json.loads((BROWSER / "node_modules" / name / "package.json").read_text())["version"]
    return ", ".join(f"{name} {number}" for name, number in found.items())


def flipped_decisions(path: Path, of: Arrays) -> int:
    """How many of OpenVINO's decisions differ from onnxruntime's in the precision that it chooses itself."""
    expected, found = onnxruntime()(path, of), openvino(exact=False)(path, of)
    return int((expected[FLAGGED] != found[FLAGGED]).sum())


def _named(names: Sequence[str], arrays: Sequence[Any]) -> Arrays:
    return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}


def _first_words(error: Exception) -> str:
    """Without the backtraces of C++ and Rust that some runtimes append."""
    text = " ".join(str(error).split("Stack backtrace")[0].split())
    return text if len(text) <= WORDS else f"{text[:WORDS]} …"


def main(arguments: list[str] | None = None) -> int:
    """Run all, print what came of it, and write the page if asked; 1 where onnxruntime itself fails on a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"), help="what `atpatch demo` left")
    parser.add_argument("--docs", type=Path, help="folder for runtimes.md")
    options = parser.parse_args(arguments)
    lacking = [need for runtime in RUNTIMES if (need := missing(runtime))]
    if lacking:
        print(f"Not installed: {'; '.join(lacking)}", file=sys.stderr)
        return 2
    if options.docs is not None:
        options.docs.mkdir(parents=True, exist_ok=True)
    console, of, outcomes = Console(), inputs(), list[Outcome]()
    with tempfile.TemporaryDirectory() as folder:
        files = bake_all(options.demo, Path(folder))
        for target, path in files.items():
            for outcome in compare(target, path, of):
                outcomes.append(outcome)
                console.print(
                    f"{target:10} {outcome.runtime:28} {'works' if outcome.works else 'no':6} {outcome.detail}"
                )
        flipped = flipped_decisions(files["portable"], of)
    if options.docs is not None:
        (options.docs / "runtimes.md").write_text(page(outcomes, RUNTIMES, flipped))
    return 0


if __name__ == "__main__":
    sys.exit(main())
