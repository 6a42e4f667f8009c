"""Whatever a command is given: what is wrong is said on one line of four parts, and nothing is left half-written."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
from command_line import PLANTED, call, files, four_parts, without_attention
from models import Net
from planted import Planted, fitted

from atpatch_onnx.cli import main


def text_file(place: Path) -> None:
    Path("in.onnx").write_text("this is no model\n" * 20)


def truncated(place: Path) -> None:
    whole = (place / "base.onnx").read_bytes()
    Path("in.onnx").write_bytes(whole[: len(whole) // 2])


def empty(place: Path) -> None:
    Path("in.onnx").touch()


def no_attention(place: Path) -> None:
    Path("in.onnx").write_bytes(without_attention().SerializeToString())


def other_model(place: Path) -> None:
    Path("in.onnx").write_bytes(Planted(seed=1).proto().SerializeToString())


def old_opset(place: Path) -> None:
    proto = Net(opset=15, tokens=4).proto()
    proto.opset_import[0].version = 12
    proto.graph.input[0].type.tensor_type.ClearField("shape")  # of which nothing can be drawn to compare
    Path("in.onnx").write_bytes(proto.SerializeToString())


def damaged_patch(place: Path) -> None:
    Path("in.safetensors").write_bytes((place / "fix.safetensors").read_bytes()[:-40])


def edited_patch(place: Path) -> None:
    data = bytearray((place / "fix.safetensors").read_bytes())
    data[-2] ^= 1
    Path("in.safetensors").write_bytes(data)


def foreign_patch(place: Path) -> None:
    safetensors.numpy.save_file({"weight": np.zeros(3, np.float32)}, "in.safetensors")


def text_patch(place: Path) -> None:
    Path("in.safetensors").write_text("no patch")


def external(location: str) -> onnx.ModelProto:
    """A model whose readout lies in the file `location`."""
    proto = PLANTED.proto()
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "readout")
    data = tensor.raw_data
    onnx.external_data_helper.set_external_data(tensor, location, offset=0, length=len(data))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    Path("secret").write_bytes(data)
    return proto


def escaping_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("../secret").SerializeToString())


def absolute_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external(str(Path("secret").resolve())).SerializeToString())


def symlinked_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("weights").SerializeToString())
    Path("model/weights").symlink_to(Path("secret").resolve())


def missing_data(place: Path) -> None:
    Path("model").mkdir()
    Path("model/in.onnx").write_bytes(external("weights").SerializeToString())


def short_data(place: Path) -> None:
    missing_data(place)
    Path("model/weights").write_bytes(b"few")


def debug_arrays() -> dict[str, np.ndarray]:
    debug = PLANTED.debug(120)
    return {
        "clean/x": np.array(debug.clean["x"]),
        "counterfactual/x": np.array(debug.counterfactual["x"]),
        "labels": np.array(debug.labels),
    }


def nan_inputs(place: Path) -> None:
    arrays = debug_arrays()
    arrays["counterfactual/x"][7, 2, 3] = np.nan
    np.savez("in.npz", **arrays)


def few_pairs(place: Path) -> None:
    np.savez("in.npz", **debug_arrays())


def other_inputs(place: Path) -> None:
    arrays = debug_arrays()
    np.savez("in.npz", **{name.replace("/x", "/pixels"): array for name, array in arrays.items()})


def damaged_data(place: Path) -> None:
    Path("in.npz").write_bytes((place / "debug.npz").read_bytes()[:3000])


def nothing(place: Path) -> None:
    """All there is, is there already."""


def other_patch(place: Path) -> None:
    fitted(PLANTED).with_figures({}).save("in.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # name: what is prepared, the command, what the line says
    "no such model": (nothing, "bake in.onnx @fix.safetensors -o out", r"in\.onnx: .*nothing there"),
    "a folder": (lambda place: Path("in.onnx").mkdir(), "bake in.onnx @fix.safetensors -o out", "a folder"),
    "not an ONNX file": (text_file, "bake in.onnx @fix.safetensors -o out", "expected a complete ONNX model"),
    "a truncated model": (truncated, "bake in.onnx @fix.safetensors -o out", "expected a complete ONNX model"),
    "an empty file": (empty, "sites in.onnx", "expected a complete ONNX model"),
    "a truncated model, sites": (truncated, "sites in.onnx --json", "expected a complete ONNX model"),
    "no site found": (no_attention, "fit in.onnx @debug.npz -o out", "at least one attention site"),
    "a patch for another model": (other_model, "bake in.onnx @fix.safetensors -o out", "the model it was fitted on"),
    "an old opset": (old_opset, "bake in.onnx @fix.safetensors -o out", r"opset 13 or later.*found opset 12"),
    "a damaged patch": (
        damaged_patch,
        "bake @base.onnx in.safetensors -o out",
        r"in\.safetensors: expected a complete",
    ),
    "an edited patch": (edited_patch, "bake @base.onnx in.safetensors -o out", "content with the id"),
    "a foreign patch": (foreign_patch, "bake @base.onnx in.safetensors -o out", "the metadata entry 'atpatch'"),
    "no safetensors at all": (text_patch, "bake @base.onnx in.safetensors -o out", r"in\.safetensors"),
    "no such patch": (nothing, "bake @base.onnx in.safetensors -o out", "nothing there"),
    "data outside the folder": (
        escaping_data,
        "bake model/in.onnx @fix.safetensors -o out",
        "inside the model's folder",
    ),
    "data by absolute path": (absolute_data, "sites model/in.onnx", "inside the model's folder"),
    "data behind a symlink": (
        symlinked_data,
        "bake model/in.onnx @fix.safetensors -o out",
        "inside the model's folder",
    ),
    "data that is missing": (missing_data, "bake model/in.onnx @fix.safetensors -o out", "the file 'weights' beside"),
    "data cut short": (short_data, "bake model/in.onnx @fix.safetensors -o out", "a file of 3 bytes"),
    "NaN inputs, fit": (nan_inputs, "fit @base.onnx in.npz -o out", r"(?i)in\.npz.*(nan|finite)"),
    "NaN inputs, verify": (nan_inputs, "verify @base.onnx @patched.onnx in.npz", r"(?i)in\.npz.*(nan|finite)"),
    "NaN inputs, evaluate": (nan_inputs, "evaluate @base.onnx @patched.onnx in.npz", r"(?i)in\.npz.*(nan|finite)"),
    "a damaged debug set": (damaged_data, "fit @base.onnx in.npz -o out", r"in\.npz"),
    "too few pairs": (few_pairs, "fit @base.onnx in.npz -o out", "at least 100 pairs"),
    "inputs of other names": (other_inputs, "fit @base.onnx in.npz -o out", "missing: 'x'"),
    "a missed goal": (
        nothing,
        "fit @base.onnx @debug.npz -o out --accuracy-loss -0.5",
        "accuracy lost",
    ),
    "an unknown output": (nothing, "evaluate @base.onnx @patched.onnx @small.npz --output scores", "'scores'"),
    "an unknown target": (nothing, "bake @base.onnx @fix.safetensors -o out --target toaster", "'toaster'"),
    "an If where none is taken": (
        nothing,
        "bake @base.onnx @fix.safetensors -o out --target portable --conditional",
        "the operator If",
    ),
    "patched already": (nothing, "bake @patched.onnx @fix.safetensors -o out", "patched already"),
    "another base": (other_model, "unbake @patched.onnx -o out --base in.onnx", "a patch in in.onnx"),
    "another patch": (
        other_patch,
        "report @base.onnx @patched.onnx @small.npz --patch in.safetensors -o out",
        r"expected the patch \w+ in it",
    ),
    "nothing to unbake": (nothing, "unbake @base.onnx -o out", "a patched model"),
    "nothing to verify": (nothing, "verify @base.onnx @base.onnx", "a patched model"),
    "no folder to write to": (
        nothing,
        "bake @base.onnx @fix.safetensors -o no/such/out",
        "a place that can be written to",
    ),
    "no folder for the patch": (nothing, "fit @base.onnx @debug.npz -o no/out", "a place that can be written to"),
    "a folder in the way": (
        lambda place: Path("out").mkdir(),
        "unbake @patched.onnx -o out",
        "a place that can be written to",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_line_says_what_is_wrong(case, place, here, capfd):
    prepare, command, said = REFUSED[case]
    prepare(place)
    before = files(here), files(place)
    assert call(place, command) == 1
    shown, errors = capfd.readouterr()
    assert shown == ""
    four_parts(errors)
    assert re.search(said, errors), errors
    assert (files(here), files(place)) == before  # no output, nothing half-written, nothing left of staging


def test_a_failed_write_leaves_the_older_file(place, here, capsys, monkeypatch):
    Path("out.onnx").write_text("older")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert call(place, "bake @base.onnx @fix.safetensors -o out.onnx") == 1
    assert "No space left" in four_parts(capsys.readouterr().err)["found"]
    assert call(place, "fit @base.onnx @small.npz -o out.onnx") == 1
    capsys.readouterr()
    assert Path("out.onnx").read_text() == "older"
    assert files(here) == {"out.onnx"}


# Wrong usage: exit code 2


@pytest.mark.parametrize(
    "command",
    [
        "nonsense",
        "bake",
        "bake @base.onnx @fix.safetensors",
        "sites @base.onnx --nonsense",
        "fit @base.onnx @debug.npz -o out --thresholds deep",
        "fit @base.onnx @debug.npz -o out --seed one",
        "fit @base.onnx @debug.npz -o out --batch-size 0",
        "quantize @base.onnx @fix.safetensors -o out --precision int2",
    ],
)
def test_wrong_usage(command, place, here, capsys):
    assert call(place, command) == 2
    shown, errors = capsys.readouterr()
    assert "Traceback" not in errors
    assert "Usage:" in shown + errors
    assert files(here) == set()


def test_help_is_asked_for(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    verbs = ("sites", "fit", "bake", "unbake", "verify", "evaluate", "report", "export", "demo")
    assert all(re.search(rf"^\W*{verb}\b", shown, re.MULTILINE) for verb in verbs)
    for verb in verbs:
        assert main([verb, "--help"]) == 0


def test_no_arguments_give_the_help(capsys):
    assert main([]) == 2
    assert "Usage:" in "".join(capsys.readouterr())
