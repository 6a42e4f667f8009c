"""Cases whose trigger is hidden: which class is taken, how its triggers are varied, and what is refused."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from planted import QUICK, Planted
from torch import nn

import atpatch_onnx as atp
from atpatch_onnx.discovery import Inversion, InvertedTrigger, anomaly_indices
from atpatch_onnx.errors import InversionError, VerificationError
from atpatch_onnx.running.metrics import Rate
from samples import inverted
from samples.case import Case, measure

SHAPE = (1, 4, 4)


def trigger(target: int = 0, *, size: int = 2, success: float = 1.0, strength: float = 0.5) -> InvertedTrigger:
    """A mask on the first `size` pixels, all of one strength."""
    mask = np.zeros(SHAPE, np.float32)
    mask.reshape(-1)[:size] = strength
    return InvertedTrigger(mask, np.ones(SHAPE, np.float32), target, Rate.of(np.arange(20) < 20 * success))


def case_of(clean: dict[str, np.ndarray]) -> Case:
    """A case of which an inversion reads the debug data alone."""
    other = {name: 1 - array for name, array in clean.items()}
    debug = atp.DebugSet.from_pairs(clean, other, np.arange(len(next(iter(clean.values())))) % 3)
    return Case("net/attack", 7, Path("base.onnx"), debug, debug, atp.FitOptions())


@pytest.fixture
def of_images(monkeypatch):
    """Runs the inversion of a case of grey images, with these triggers in place of a search."""

    def run(*found: InvertedTrigger, suspected: InvertedTrigger | None = None) -> Case:
        def search(model, images, target=None, *, seed, progress):
            if target is not None:
                return Inversion((found[target],), np.zeros(1), found[target])
            return Inversion(found, anomaly_indices([one.norm for one in found]), suspected)

        monkeypatch.setattr(inverted, "invert_trigger", search)
        monkeypatch.setattr(inverted.image_models, "load_model", lambda folder: nn.Identity())
        return inverted.inverted(case_of({"pixel_values": np.full((30, *SHAPE), 0.25, np.float32)}), Path())

    return run


def test_the_class_that_stands_out_is_taken(of_images):
    small, large = trigger(0, size=1), trigger(1, size=8)
    case = of_images(small, large, suspected=large)
    assert case.training["inversion"]["target"] == 1
    assert case.training["inversion"]["stands_out"]
    assert case.name == "net/attack/inverted"
    assert case.debug.target == 1
    changed = case.debug.counterfactual["pixel_values"] != 0.25
    np.testing.assert_array_equal(changed, np.broadcast_to(large.mask > 0, changed.shape))


def test_else_the_smallest_mask_of_those_that_succeed(of_images):
    """The smallest of all is that of a failure; were it the index, which is zero throughout, the first class."""
    found = trigger(0, size=8), trigger(1, size=4), trigger(2, size=1, success=0.3)
    case = of_images(*found)
    assert case.training["inversion"]["target"] == 1
    assert not case.training["inversion"]["stands_out"]


def test_else_the_one_that_succeeds_most_often(of_images):
    case = of_images(trigger(0, success=0.1), trigger(1, success=0.5), trigger(2, size=1, success=0.3))
    assert case.training["inversion"]["target"] == 1


def test_there_is_no_trigger_to_search_for_in_a_table():
    with pytest.raises(InversionError, match=r"images \(pixel_values\) or texts \(input_ids\); found table") as refusal:
        inverted.inverted(case_of({"table": np.zeros((6, 3), np.float32)}), Path())
    assert "\n" not in str(refusal.value)


# Variation


def test_a_mask_is_varied_between_its_own_strength_and_the_whole():
    images = np.zeros((200, *SHAPE), np.float32)
    masks = inverted.varied([trigger(strength=0.3)], images, seed=0)  # the pattern is one, the images are zero
    touched = masks[:, :, 0, :2]
    assert touched.min() >= np.float32(0.3)
    assert touched.max() <= 1
    assert touched.min() < 0.35, "some are as they were found"
    assert touched.max() > 0.95, "some are hard"
    assert (touched == touched[..., :1]).all(), "one exponent for an image"
    touched[:] = 0
    assert not masks.any(), "where the mask is zero it stays so"


def test_every_trigger_is_used():
    one, other = trigger(size=2), trigger(size=4)
    stamped = inverted.varied([one, other], np.zeros((50, *SHAPE), np.float32), seed=0)
    assert {int(count) for count in (stamped > 0).sum(axis=(1, 2, 3))} == {2, 4}


def test_a_variation_depends_on_the_seed_only_and_leaves_the_images_alone():
    images = np.full((20, *SHAPE), 0.5, np.float32)
    first, again, other = (inverted.varied([trigger()], images, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (images == 0.5).all()
    assert first.dtype == np.float32


# Measuring


def test_a_patched_model_that_does_not_unbake_to_its_base_is_an_error(tmp_path, monkeypatch):
    planted, counter = Planted(), itertools.count()
    atp.save(planted.model(), tmp_path / "base.onnx")
    case = Case("planted", 0, tmp_path / "base.onnx", planted.debug(480), planted.debug(100), QUICK)
    assert measure(case, tmp_path / "whole").unbake_identical
    monkeypatch.setattr("samples.case.to_bytes", lambda model: bytes([next(counter)]))
    with pytest.raises(VerificationError, match="the base, byte for byte"):
        measure(case, tmp_path / "other")
