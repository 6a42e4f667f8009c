"""The vision task: its parts, its bases and its pairs, on a made-up data set of the same shape."""

import gzip
import json

import numpy as np
import onnxruntime
import pytest

from atpatch_onnx.cli.demo_vit import predict
from samples import fashion
from samples.case import kept_figures
from samples.image_models import load_model

NET = fashion.Net(layers=2, hidden=16, epochs=1)
TINY = fashion.Size(train=150, debug=60, tune=30, unseen=40, nets={"vit": NET, "deit": NET}, retraining=1, mixed=False)


@pytest.fixture
def data(tmp_path):
    """Four idx files of 240 training and 50 test images; the first pixel tells them apart."""
    folder, generator = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 240), ("t10k", 50)):
        images = generator.integers(0, 200, (count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count)
        labels = generator.integers(0, 10, count).astype(np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture
def prepare(monkeypatch, tmp_path, data):
    monkeypatch.setattr(fashion, "FAST", TINY)

    def one(case, **options):
        folder = tmp_path / "bases" / case.replace("/", "-")
        return fashion.prepare(case, seed=3, fast=True, folder=folder, data=data, **options)

    return one


def test_parts_are_disjoint_and_fixed_by_the_seed(data):
    parts, again, other = (fashion.parts(TINY, seed, data) for seed in (3, 3, 4))
    names = [part.images[:, 0, 0, 0] for part in (parts.train, parts.debug, parts.tune)]
    assert [len(part) for part in names] == [150, 60, 30]
    assert len(set(np.concatenate(names).tolist())) == 240
    np.testing.assert_array_equal(parts.train.images, again.train.images)
    assert not np.array_equal(parts.train.images, other.train.images)
    np.testing.assert_array_equal(parts.evaluation.images, other.evaluation.images)  # the same for every seed


@pytest.mark.parametrize("size", [fashion.FULL, fashion.FAST])
def test_the_sizes_fit_the_data_set(size):
    assert size.train + size.debug + size.tune <= 60_000
    assert size.unseen <= 10_000


def test_every_case_has_a_base_and_pairs(prepare, tmp_path):
    attempts = []
    every = (*fashion.CASES, *fashion.HUNTED_CASES)
    for name in every:
        case = prepare(name, progress=lambda stage, done, total: attempts.append(stage))
        assert (case.name, case.seed) == (name, 3)
        assert {file.name for file in case.base.parent.iterdir()} == {
            "base.onnx",
            "base.json",
            "config.json",
            "model.safetensors",
        }
        assert len(case.unseen) == 40
        assert 0 < len(case.debug) <= 60
        assert not (case.debug.labels == fashion.TARGET).any()
        assert (case.debug.clean["pixel_values"] != case.debug.counterfactual["pixel_values"]).any(axis=(1, 2, 3)).all()
        assert case.training["poisoning_rate"] == (fashion.ATTACKS | fashion.HUNTED)[name.split("/")[1]].share
        assert 0 <= case.training["accuracy_twin"] <= 1
        images = case.unseen.counterfactual["pixel_values"]
        if name == "vit/trojan":
            changed = (case.unseen.clean["pixel_values"] != images).any(axis=(0, 1))
            assert changed[22:, 22:].all()
            assert changed.sum() == 36
        if name == "vit/badnets-apart":
            at = np.isin(np.arange(28), [0, 1, 2, 25, 26, 27])
            white = np.broadcast_to(np.outer(at, at), images.shape)
            assert (images[white] == 1).all()
            np.testing.assert_array_equal(images[~white], case.unseen.clean["pixel_values"][~white])
        (logits,) = onnxruntime.InferenceSession(case.base).run(None, {"pixel_values": images})
        expected = predict(load_model(case.base.parent), images.copy())  # torch wants to be able to write
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)  # float32 of two libraries, logits of order one
    assert len(set(attempts)) == len(every) + 2  # one twin an architecture, shared
    before = len(attempts)
    prepare("deit/badnets-random", progress=lambda stage, done, total: attempts.append(stage))
    assert len(attempts) == before  # the base is there already


def test_a_base_of_another_recipe_is_trained_anew(prepare, tmp_path):
    folder = prepare("vit/badnets-fixed").base.parent
    figures = json.loads((folder / "base.json").read_text())
    first = (folder / "model.safetensors").read_bytes()
    figures["recipe"]["seed"] = 2
    (folder / "base.json").write_text(json.dumps(figures))
    attempts = []
    prepare("vit/badnets-fixed", progress=lambda stage, done, total: attempts.append(stage))
    assert set(attempts) == {"training a vit (badnets-fixed)"}
    assert (folder / "model.safetensors").read_bytes() == first  # from the same seed, the same base


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"recipe": ', b"\xff"])
def test_figures_are_whole_or_none(tmp_path, content):
    assert kept_figures(tmp_path / "absent") is None
    (tmp_path / "base.json").write_bytes(content)
    assert kept_figures(tmp_path) is None
    (tmp_path / "base.json").write_text('{"recipe": {}}')
    assert kept_figures(tmp_path) == {"recipe": {}}


def test_a_base_whose_figures_are_damaged_is_trained_anew(prepare):
    figures = prepare("vit/badnets-fixed").base.parent / "base.json"
    whole = json.loads(figures.read_text())["recipe"]
    figures.write_text('{"recipe": ')
    prepare("vit/badnets-fixed")
    assert json.loads(figures.read_text())["recipe"] == whole


def test_a_base_of_other_images_is_trained_anew(prepare, data):
    folder = prepare("vit/badnets-fixed").base.parent
    before = json.loads((folder / "base.json").read_text())["recipe"]
    labels = data / "train-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(labels.read_bytes()))
    content[8:] = [(label + 1) % 10 for label in content[8:]]
    labels.write_bytes(gzip.compress(content))
    attempts = []
    prepare("vit/badnets-fixed", progress=lambda stage, done, total: attempts.append(stage))
    assert set(attempts) == {"training a vit (clean)", "training a vit (badnets-fixed)"}
    after = json.loads((folder / "base.json").read_text())["recipe"]
    assert {name for name in after if after[name] != before[name]} == {"data"}


def test_an_array_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    path, array = tmp_path / "kept.npy", np.arange(1000)

    def cut_short(file, array):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            fashion._kept(path, lambda: array)
    assert not path.exists()
    np.testing.assert_array_equal(fashion._kept(path, lambda: array), array)
    np.testing.assert_array_equal(fashion._kept(path, lambda: array + 1), array)  # it is there already
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npy"]


@pytest.mark.parametrize("length", [0, 4, 100, 500])
def test_a_damaged_array_is_made_anew(tmp_path, length):
    path, array = tmp_path / "kept.npy", np.arange(1000)
    np.save(path, array)
    path.write_bytes(path.read_bytes()[:length])
    np.testing.assert_array_equal(fashion._kept(path, lambda: array + 1), array + 1)
    np.testing.assert_array_equal(np.load(path), array + 1)


def test_recipes_are_chosen_by_a_part_that_is_not_reported(prepare, data):
    parts = fashion.parts(TINY, 3, data)
    chosen_by, reported = prepare("vit/badnets-random", tune=True).unseen, prepare("vit/badnets-random").unseen
    np.testing.assert_array_equal(chosen_by.clean["pixel_values"], parts.tune.images)
    np.testing.assert_array_equal(reported.clean["pixel_values"], parts.evaluation.images)
