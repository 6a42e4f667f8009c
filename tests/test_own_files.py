"""Nothing that a command reads is written over: models, their external data, patches, debug sets."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import Net, draw_patch

import atpatch_onnx as atp
from atpatch_onnx.cli import main
from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import to_bytes

NET = Net(batch="batch", tokens="tokens")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A model with external data, a patch of it and a debug set, and what is in them."""
    base = NET.model()
    proto = onnx.load_from_string(to_bytes(base))
    model = tmp_path / "model.onnx"
    onnx.save(proto, model, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    draw_patch(atp.load(model)).save(tmp_path / "fix.safetensors")
    rng = np.random.default_rng(0)
    clean, other = (NET.feed(rng, 8, 6) for _ in range(2))
    atp.DebugSet.from_pairs(clean, other, np.zeros(8, int)).save(tmp_path / "debug.npz")
    names = {"model": "model.onnx", "weights": "model.onnx.data", "patch": "fix.safetensors", "data": "debug.npz"}
    return {name: tmp_path / file for name, file in names.items()}


@pytest.fixture
def refused(files, capsys):
    """Runs a command that would lose a file: it says so in one line, and no file is changed or left behind."""

    def run(*arguments: object) -> None:
        before = {path: path.read_bytes() for path in files["model"].parent.iterdir()}
        assert main([str(argument) for argument in arguments]) == 1
        said = capsys.readouterr().err.strip()
        assert "would be lost" in said
        assert said.count("\n") == 0
        assert {path: path.read_bytes() for path in files["model"].parent.iterdir()} == before

    return run


@pytest.mark.parametrize("target", ["weights", "model", "patch"])
def test_bake_does_not_write_over_what_it_reads(files, refused, target):
    refused("bake", files["model"], files["patch"], "-o", files[target])


def test_a_link_to_the_weights_is_the_weights(files, refused, tmp_path):
    link = tmp_path / "linked.onnx"
    os.link(files["weights"], link)
    refused("bake", files["model"], files["patch"], "-o", link)


@pytest.mark.parametrize("target", ["model", "data"])
def test_fit_does_not_write_over_what_it_reads(files, refused, target):
    refused("fit", files["model"], files["data"], "-o", files[target])


def test_report_does_not_write_over_its_data(files, refused):
    report = ("report", files["model"], files["model"], files["data"], "--patch", files["patch"])
    refused(*report, "-o", files["data"])


def test_save_refuses_the_data_of_the_model(files):
    with pytest.raises(ModelFileError, match="external data of it"):
        atp.save(atp.load(files["model"]), files["weights"])
