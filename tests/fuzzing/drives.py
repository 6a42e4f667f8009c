"""What commands do with a file; whatever it holds, the answer is right or of one line."""

import contextlib
import io
import random
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import is_patched, read_record
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.cli.printing import show
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset import files as debug_files
from atpatch_onnx.errors import AtPatchError, PatchFileError
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring import drawn
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report import text
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session
from fuzzing import mutations, seeds

LONGEST = 20_000
"""Characters of a message."""


def check_message(error: AtPatchError) -> None:
    said = str(error)
    assert said.isprintable(), f"a message that is not one harmless line: {said!r}"
    assert len(said) < LONGEST, f"a message of {len(said)} characters"


def check_printed(shown: dict, renderables: list) -> None:
    for as_json in (False, True):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            show(shown, renderables, as_json)
        printed = said.getvalue().replace("\n", "")
        assert printed.isprintable(), f"output that a terminal would obey: {printed!r}"


# Models


def make_model(rng: random.Random, folder: Path) -> Path:
    content = seeds.model(rng.choice(sorted(seeds.MODELS)))
    change = mutations.change_bytes if rng.random() < 0.2 else mutations.change_model
    (folder / "case.onnx").write_bytes(change(rng, content))
    (folder / seeds.DATA).write_bytes(seeds.external_data())
    return folder / "case.onnx"


def check_runs_alike(path: Path, model: ir.Model) -> None:
    """onnxruntime, given the file itself, computes what it computes of our reading of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        theirs = ort.InferenceSession(str(path), options)
        feed = draw_inputs(model, np.random.default_rng(0))
        names = [output.name for output in theirs.get_outputs()]
        wanted = theirs.run(names, feed)
    except Exception:  # nothing to compare with
        return
    found = Session(model, optimize=False).run(feed, names)
    for name, array in zip(names, wanted, strict=True):
        assert np.array_equal(array, found[name], equal_nan=array.dtype.kind == "f"), f"{name} is computed differently"


def drive_model(path: Path) -> None:
    """As `sites`, `unbake`, `verify` and `bake` with a drawn patch; what is baked is unbaked to the same bytes."""
    model = graph.load(path)
    matches, layers = explain(model), find_hidden_layers(model)
    tables = [text.sites_table(matches, True), text.sites_table(matches), text.near_misses_table(matches)]
    check_printed(matches.to_json(), [*tables, text.layers_table(layers)])
    fingerprint = graph.fingerprint(model)
    assert graph.fingerprint(graph.load(path)) == fingerprint
    check_runs_alike(path, model)
    if is_patched(model):
        record = read_record(model)
        check_printed({}, [text.fit_table(record), text.fit_summary(record)])
        verification = verify(unbake(model), model)
        check_printed({}, [text.verification_table(verification)])
        return
    before = graph.to_bytes(model)
    patch = drawn.draw_patch(model, matches.sites, np.random.default_rng(0))
    baked = bake(model, patch)
    out = path.with_name("out.onnx")
    graph.save(baked, out)
    assert graph.to_bytes(unbake(graph.load(out))) == before, "unbake gives another model"
    verify(model, graph.load(out))


# Patches


def make_patch(rng: random.Random, folder: Path) -> Path:
    content = seeds.patch_file(folder)
    change = mutations.change_bytes if rng.random() < 0.2 else mutations.change_patch
    path = folder / "case.safetensors"
    path.write_bytes(change(rng, content))
    if rng.random() < 0.7:
        _sign(path)
    return path


def _sign(path: Path) -> None:
    """Give a changed patch the id of its content, as whoever changes it on purpose will."""
    try:
        Patch.load(path)
    except PatchFileError as error:
        wanted, found = error.expected.rpartition(" ")[2], error.found.rpartition(" ")[2]
        content = path.read_bytes()
        if "content with the id" in error.found and len(wanted) == len(found):
            path.write_bytes(content.replace(wanted.encode(), found.encode()))
    except Exception:  # the drive will find it
        return


def drive_patch(path: Path) -> None:
    patch = Patch.load(path)
    check_printed({"figures": dict(patch.figures)}, [text.fit_table(patch), text.fit_summary(patch)])
    baked = bake(seeds.base(), patch)
    assert graph.to_bytes(unbake(baked)) == graph.to_bytes(seeds.base())
    patch.save(path.with_name("again.safetensors"))
    assert Patch.load(path.with_name("again.safetensors")).id == patch.id


# Debug sets


@cache
def _arrays() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        seeds.debug_set().save(f"{folder}/seed.npz")
        with np.load(f"{folder}/seed.npz") as found:
            return dict(found)


def make_archive(rng: random.Random, folder: Path) -> Path:
    path = folder / "case.npz"
    path.write_bytes(mutations.archived(rng, mutations.change_arrays(rng, _arrays())))
    return path


def make_folder(rng: random.Random, folder: Path) -> Path:
    path = folder / "case"
    arrays = dict(_arrays())
    header = str(arrays.pop(debug_files.HEADER))
    for key, content in mutations.change_arrays(rng, arrays).items():
        file = path / f"{key}.npy"
        with contextlib.suppress(OSError, ValueError):  # names that no file can have
            if file.resolve().is_relative_to(folder.resolve()):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    path.mkdir(exist_ok=True)
    (path / debug_files.HEADER).write_text(
        header if rng.random() < 0.6 else mutations.change_json(rng, header), errors="surrogatepass"
    )
    return path


def drive_debug_set(path: Path) -> None:
    debug = DebugSet.load(path)
    again = path.with_name("again.npz")
    debug.save(again)
    assert DebugSet.load(again).clean.keys() == debug.clean.keys()


Make = Callable[[random.Random, Path], Path]
Drive = Callable[[Path], None]

KINDS: dict[str, tuple[Make, Drive]] = {
    "onnx": (make_model, drive_model),
    "safetensors": (make_patch, drive_patch),
    "npz": (make_archive, drive_debug_set),
    "npy": (make_folder, drive_debug_set),
}
