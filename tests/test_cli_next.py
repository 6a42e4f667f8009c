"""The command line for people: groups of options, completion, what a model can, and the command to type next."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from command_line import PLANTED, call, without_attention
from models import Net
from onnx import helper
from planted import fitted

from atpatch_onnx.cli import main
from atpatch_onnx.cli.root import COMMANDS

NAMES = {command.__name__.replace("_", "-") for commands in COMMANDS.values() for command in commands}


def following(shown: str) -> list[str]:
    """The command that is printed last, as a shell reads it."""
    last = shown.rstrip("\n").split("\n")[-1]
    assert last.startswith("Next: "), shown
    return shlex.split(last.removeprefix("Next: "))


@pytest.mark.parametrize(
    ("command", "then"),
    [
        ("fit @base.onnx @debug.npz -o new.safetensors", "bake @base.onnx new.safetensors -o patched.onnx"),
        (
            "bake @base.onnx @fix.safetensors -o new.onnx",
            "verify @base.onnx new.onnx UNSEEN.npz --patch @fix.safetensors",
        ),
        ("verify @base.onnx @patched.onnx @small.npz", "evaluate @base.onnx @patched.onnx @small.npz"),
        ("verify @base.onnx @patched.onnx", "evaluate @base.onnx @patched.onnx UNSEEN.npz"),
        (
            "evaluate @base.onnx @patched.onnx @small.npz",
            "report @base.onnx @patched.onnx @small.npz --patch FIX.safetensors -o report.html",
        ),
        (
            "report @base.onnx @patched.onnx @small.npz --patch @fix.safetensors -o r.html",
            "benchmark @base.onnx @patched.onnx",
        ),
        ("unbake @patched.onnx -o new.onnx", "sites new.onnx"),
    ],
)
def test_the_command_to_type_next(command, then, place, here, capsys):
    assert call(place, command) == 0
    assert following(capsys.readouterr().out) == ["atpatch", *then.replace("@", f"{place}/").split()]
    if not command.startswith("report"):
        assert call(place, f"{command} --json") == 0
        json.loads(capsys.readouterr().out)


def test_after_a_check_that_fails_nothing_comes_next(place, here, capsys):
    fitted(PLANTED).with_figures({}).save("other.safetensors")
    assert call(place, "verify @base.onnx @patched.onnx --patch other.safetensors") == 1
    assert "Next:" not in capsys.readouterr().out


def beside(name: str, shape: list[object], kind: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    """A model with attention, and an input of this shape beside its own."""
    proto = Net().proto()
    proto.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    proto.graph.node.append(helper.make_node("Identity", [name], [f"{name}_out"]))
    return proto


@pytest.mark.parametrize(
    ("proto", "kind"),
    [
        (PLANTED.proto(), "table"),
        (beside("pixels", ["batch", 3, 8, 8]), "images"),
        (beside("input_ids", ["batch", "tokens"], onnx.TensorProto.INT64), "text"),
    ],
)
def test_sites_say_first_that_a_model_can_be_patched_and_last_how_to_begin(proto, kind, here, capsys):
    Path("my model.onnx").write_bytes(proto.SerializeToString())
    assert main(["sites", "my model.onnx"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("my model.onnx can be patched: ")
    assert following(shown)[:3] == ["atpatch", "pairs", kind]


def test_sites_say_first_that_a_model_cannot_be_patched(here, capsys):
    Path("none.onnx").write_bytes(without_attention().SerializeToString())
    assert main(["sites", "none.onnx"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("none.onnx cannot be patched: no attention was found.\n")
    assert following(shown) == ["atpatch", "sites", "none.onnx", "--why"]


def test_a_file_may_be_named_like_markup(place, here, capsys):
    assert call(place, "unbake @patched.onnx -o a[red]b.onnx") == 0
    assert "wrote a[red]b.onnx" in capsys.readouterr().out


def test_help_groups_the_options(capsys):
    assert main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    places = [shown.index(group) for group in ("─ Options", "─ Goal", "─ Budget", "─ Expert")]
    assert places == sorted(places)
    assert "--asr-above-floor" in shown[places[1] : places[2]]
    assert "--accuracy-loss" in shown[places[2] : places[3]]
    assert "--seed" in shown[places[3] :]
    assert "--out" in shown[places[0] : places[1]]


def completed(words: str) -> list[str]:
    """What a bash offers behind these words."""
    environment = {
        "_ATPATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    script = "import sys; sys.argv[0] = 'atpatch'; from atpatch_onnx.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_a_shell_completes_commands_and_options():
    assert completed("atpatch ev") == ["evaluate"]
    assert "--clean-flag-rate" in completed("atpatch fit --cl")
    assert set(completed("atpatch ")) >= NAMES
