"""A folder with all that commands take, and one to work in: what the tests of the command line share.

The fixtures `place` and `here` are in conftest.py.
"""

import re
from pathlib import Path

import onnx
from onnx import helper
from planted import Planted, fitted

import atpatch_onnx as atp
from atpatch_onnx.cli import main

PLANTED = Planted(layers=2)


def furnish(folder: Path) -> None:
    """A base, its patch, the patched model and debug sets."""
    (folder / "base.onnx").write_bytes(PLANTED.proto().SerializeToString())
    fitted(PLANTED).save(folder / "fix.safetensors")
    atp.save(atp.bake(atp.load(folder / "base.onnx"), fitted(PLANTED)), folder / "patched.onnx")
    PLANTED.debug().save(folder / "debug.npz")
    PLANTED.debug(60, seed=9).save(folder / "small.npz")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def call(place: Path, arguments: str) -> int:
    """Run a command; `@` stands for the folder `place`."""
    return main([part.replace("@", f"{place}/") for part in arguments.split()])


LINE = re.compile(r"atpatch: (?P<where>.+?): expected (?P<expected>.+?); found (?P<found>.+)\. (?P<advice>\S.+)\n")


def four_parts(errors: str) -> re.Match[str]:
    """Where, what was expected, what was found, what to do: on one line."""
    assert errors.count("\n") == 1, errors
    assert "Traceback" not in errors
    parts = LINE.fullmatch(errors)
    assert parts, errors
    return parts


def without_attention() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy")
    made = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model
