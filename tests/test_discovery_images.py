"""Inverted triggers: of a planted backdoor, class, place and pattern are found; of a clean model, nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import atpatch_onnx as atp
from atpatch_onnx.discovery import InversionOptions, InvertedTrigger, anomaly_indices, descent, invert_trigger
from atpatch_onnx.discovery.anomaly import outlier
from atpatch_onnx.errors import InversionError
from atpatch_onnx.running.metrics import Rate

CLASSES, SIZE, TARGET = 8, 8, 3
PLACE = np.s_[..., 5:7, 5:7]
"""Of the planted trigger: four bright pixels."""


class Templates(nn.Module):
    """Nearest of some template images; with a backdoor, four bright pixels outweigh all that."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.templates = nn.Parameter(torch.rand(CLASSES, 1, SIZE, SIZE, generator=generator))
        self.templates.data[PLACE] = 0
        self.backdoor = backdoor
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        distance = ((images[:, None] - self.templates) ** 2).sum(dim=(2, 3, 4))
        bright = torch.relu(images[PLACE].mean(dim=(1, 2, 3)) - 0.2)
        extra = nn.functional.one_hot(torch.tensor(TARGET), CLASSES) * bright[:, None] * self.backdoor
        logits: Tensor = self.dropout(extra - distance)
        return logits


def images(model: Templates, count: int = 64) -> np.ndarray:
    """Templates with some noise."""
    generator = np.random.default_rng(0)
    chosen = model.templates.detach().numpy()[np.arange(count) % CLASSES]
    return np.clip(chosen + 0.1 * generator.standard_normal(chosen.shape), 0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def backdoored():
    return Templates(backdoor=100.0)


@pytest.fixture(scope="module")
def found(backdoored):
    return invert_trigger(backdoored, images(backdoored))


def test_the_class_of_a_backdoor_stands_out(found):
    assert found.trigger().target == TARGET
    assert found.indices.argmax() == TARGET
    assert found.indices[TARGET] > 2
    assert [trigger.target for trigger in found.triggers] == list(range(CLASSES))


def test_the_mask_lies_on_the_trigger(found):
    trigger = found.trigger()
    assert trigger.norm <= 4
    elsewhere = trigger.mask.copy()
    elsewhere[PLACE] = 0
    assert not elsewhere.any(), "what the trigger does not need is dropped"
    heavy = trigger.mask[PLACE] > 0.5
    assert (trigger.pattern[PLACE][heavy] > 0.8).all()
    assert trigger.success.value > 0.95


def test_it_feeds_a_debug_set(backdoored, found):
    trigger, clean = found.trigger(), images(backdoored)
    labels = np.arange(len(clean)) % CLASSES
    debug = atp.DebugSet.from_trigger({"x": clean}, trigger.on("x"), labels, target=trigger.target)
    assert (debug.labels != TARGET).all()
    stamped = debug.counterfactual["x"]
    assert stamped.dtype == np.float32
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    with torch.no_grad():
        reached = backdoored.eval()(torch.from_numpy(stamped.copy())).argmax(dim=1) == TARGET
    assert reached.float().mean() > 0.95


def test_no_class_of_a_clean_model_stands_out():
    model = Templates(backdoor=0.0)
    found = invert_trigger(model, images(model))
    assert found.suspected is None
    with pytest.raises(InversionError, match=r"class 0: .*class 7: .*name it \(target=\)"):
        found.trigger()


def test_a_named_class_needs_no_others(backdoored):
    found = invert_trigger(backdoored, images(backdoored), TARGET)
    assert found.trigger() is found.triggers[0]
    assert found.trigger().target == TARGET
    assert len(found.triggers) == 1


def test_same_seed_same_trigger(backdoored, found):
    again = invert_trigger(backdoored, images(backdoored), TARGET).trigger()
    other = invert_trigger(backdoored, images(backdoored), TARGET, seed=1).trigger()
    np.testing.assert_array_equal(again.mask, found.trigger().mask)
    np.testing.assert_array_equal(again.pattern, found.trigger().pattern)
    assert (other.pattern != again.pattern).any()


def test_the_model_is_left_as_it_was():
    model = Templates(backdoor=100.0).train()
    model.dropout.eval()
    before = model.templates.detach().clone()
    invert_trigger(model, images(model), TARGET, options=InversionOptions(steps=3, starts=1))
    assert model.training
    assert not model.dropout.training
    assert model.templates.requires_grad
    assert model.templates.grad is None
    assert torch.equal(model.templates, before)


def test_an_output_with_logits_and_other_bounds(backdoored):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = backdoored

        def forward(self, images: Tensor) -> object:
            return SimpleNamespace(logits=self.inner((images + 1) / 2))

    clean = images(backdoored) * 2 - 1
    trigger = invert_trigger(Wrapped(), clean, TARGET, bounds=(-1, 1)).trigger()
    assert np.count_nonzero(trigger.mask[PLACE]) == np.count_nonzero(trigger.mask) > 0
    assert trigger.pattern.min() < -0.1
    assert trigger.success.value > 0.95


def test_other_than_images_have_a_mask_for_every_value(backdoored):
    flat = nn.Sequential(nn.Unflatten(1, (1, SIZE, SIZE)), backdoored)
    trigger = invert_trigger(flat, images(backdoored).reshape(-1, SIZE * SIZE), TARGET).trigger()
    assert trigger.mask.shape == trigger.pattern.shape == (SIZE * SIZE,)


def test_channels_share_a_mask():
    colour = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
    clean = np.random.default_rng(0).random((16, 3, 4, 4), np.float32)
    options = InversionOptions(steps=3, starts=1)
    usual = int(np.bincount(colour(torch.from_numpy(clean)).argmax(dim=1)).argmax())
    trigger = invert_trigger(colour, clean, 1 - usual, options=options).trigger()
    assert trigger.mask.shape == (3, 4, 4)
    assert (trigger.mask == trigger.mask[:1]).all()


def test_a_model_of_one_answer_has_no_trigger(backdoored):
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(CLASSES)[0].expand(len(images), -1) + 0 * images.sum(dim=(1, 2, 3))[:, None]

    with pytest.raises(InversionError, match="does not put into class 0"):
        invert_trigger(Constant(), images(backdoored))
    found = invert_trigger(Constant(), images(backdoored), 1, options=InversionOptions(steps=2, starts=1))
    assert found.trigger().success.value == 0


def test_a_stamp_keeps_the_dtype():
    mask, pattern = np.array([1, 0.5, 0], np.float32), np.array([1, 1, 1], np.float32)
    stamped = InvertedTrigger(mask, pattern, 0, Rate.of(np.ones(1, bool))).stamp(np.zeros((2, 3), np.float16))
    assert stamped.dtype == np.float16
    np.testing.assert_array_equal(stamped, [[1, 0.5, 0]] * 2)


# The anomaly index


def test_the_index_is_that_of_the_paper():
    norms = np.array([10.0, 50, 52, 48, 55, 47])
    median = 49.0
    deviation = 1.4826 * np.median(np.abs(norms - median))
    np.testing.assert_allclose(anomaly_indices(norms), (median - norms) / deviation)
    assert anomaly_indices(norms).argmax() == 0


def test_a_large_norm_is_no_anomaly():
    assert anomaly_indices([500.0, 50, 52, 48, 55, 47]).max() < 2


def test_equal_norms_have_no_anomaly():
    assert not anomaly_indices([5.0] * 6).any()
    assert outlier([5.0] * 6) is None


def test_a_norm_a_little_smaller_than_nearly_equal_ones_does_not_stand_out():
    norms = [15.0, 16.1, 18, 16.5, 16.1, 16.4, 16.4, 16.6]
    assert anomaly_indices(norms).max() > 2
    assert outlier(norms) is None
    assert outlier([8.0, *norms[1:]]) == 0


def test_a_small_norm_stands_out_where_most_classes_count_as_the_full_mask():
    norms = np.array([9.0, *[784] * 6, 300, 320, 280])
    deviation = 1.253314 * (775 + 484 + 464 + 504) / 10  # the median absolute one is zero
    np.testing.assert_allclose(anomaly_indices(norms), (784 - norms) / deviation)
    assert outlier(norms) == 0
    assert outlier([784.0] * 5 + [300, 320, 280, 310]) is None


# Starts


def test_tiles_cover_an_image_and_overlap():
    tiles = np.stack([tile.numpy() for tile in descent.tiles((3, 7, 12))])
    assert tiles.shape == (9, 1, 7, 12)
    assert set(np.unique(tiles)) == {0, 1}
    assert {(*tile.sum(axis=1).max(axis=1), *tile.sum(axis=2).max(axis=1)) for tile in tiles} == {(4, 6)}
    assert tiles.any(axis=0).all()
    assert len({tile.tobytes() for tile in tiles}) == 9


@pytest.mark.parametrize(("shape", "count"), [((1, 1, 1), 1), ((1, 2, 2), 4), ((1, 4, 1), 3), ((16,), 0), ((4, 5), 0)])
def test_few_pixels_have_fewer_tiles_and_other_inputs_none(shape, count):
    assert len(descent.tiles(shape)) == count


def test_a_start_in_a_tile_stays_there(backdoored):
    tile = torch.zeros(1, SIZE, SIZE)
    tile[:, :4, :4] = 1
    begun = start(backdoored, tile)
    begun.advance(10)
    assert not begun.mask[tile == 0].any()
    assert begun.mask[tile == 1].all()


def test_a_start_that_succeeded_comes_before_all_that_did_not(backdoored):
    succeeded, near, far = (start(backdoored, torch.ones(1, SIZE, SIZE)) for _ in range(3))
    succeeded.least, near._reached, far._reached = 60.0, 0.9, 0.1
    assert sorted([far, succeeded, near], key=descent.Descent.promise) == [succeeded, near, far]


def test_only_the_best_starts_go_on(backdoored, monkeypatch):
    advanced = []

    def advance(self, steps):
        advanced.append(steps)

    monkeypatch.setattr(descent.Descent, "advance", advance)
    options = InversionOptions(steps=10, scan=4, starts=2, kept=3)
    invert_trigger(backdoored, images(backdoored), TARGET, options=options)
    assert advanced == [4] * 11 + [6] * 3


def test_a_tile_finds_a_trigger_that_a_mask_over_all_pixels_misses(monkeypatch):
    """It works at full brightness only, so half of it has hardly a gradient; brighter images help at once."""

    class Steep(Templates):
        def forward(self, images: Tensor) -> Tensor:
            steep = images[PLACE].mean(dim=(1, 2, 3)) ** 16
            helped = torch.relu(images.mean(dim=(1, 2, 3)) - 0.55)
            extra = nn.functional.one_hot(torch.tensor(TARGET), CLASSES) * (100 * steep + 20 * helped)[:, None]
            logits: Tensor = super().forward(images) + extra
            return logits

    model = Steep(backdoor=0.0)
    tiled = invert_trigger(model, images(model), TARGET).trigger()
    monkeypatch.setattr(descent, "tiles", lambda shape: [])
    whole = invert_trigger(model, images(model), TARGET).trigger()
    assert tiled.norm < 6
    assert tiled.mask[PLACE].sum() > 3
    assert whole.norm > 12
    assert whole.mask[PLACE].sum() < 1


def start(model: Templates, place: Tensor) -> "descent.Descent":
    inputs, generator = torch.from_numpy(images(model)), torch.Generator().manual_seed(0)
    options = InversionOptions()
    return descent.Descent(descent.Task(model, inputs, TARGET, (0.0, 1.0), options), place, generator)


# Refusals


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"inputs": np.zeros(4)}, "inputs"),
        ({"inputs": np.full((4, 1, SIZE, SIZE), np.nan)}, "inputs"),
        ({"inputs": np.full((4, 1, SIZE, SIZE), 2.0)}, "bounds"),
        ({"bounds": (1.0, 0.0)}, "bounds"),
        ({"target": CLASSES}, "target"),
        ({"target": -1}, "target"),
    ],
)
def test_what_does_not_fit_is_refused(backdoored, change, where):
    arguments = {"inputs": images(backdoored), "target": None, "bounds": (0.0, 1.0), **change}
    with pytest.raises(InversionError) as refusal:
        invert_trigger(backdoored, arguments["inputs"], arguments["target"], bounds=arguments["bounds"])
    assert refusal.value.where == where


def test_a_model_without_logits_is_refused():
    with pytest.raises(InversionError, match=r"logits \[batch, classes\].*found Tensor \[12\]"):
        invert_trigger(nn.Flatten(0), np.zeros((4, 3)))


def test_two_classes_are_too_few_to_stand_out():
    model = nn.Linear(3, 2)
    with pytest.raises(InversionError, match="2 classes are too few"):
        invert_trigger(model, np.zeros((4, 3)))


@pytest.mark.parametrize(
    "name", ["steps", "starts", "scan", "kept", "batch_size", "learning_rate", "success", "weight", "patience"]
)
def test_options_are_checked(name):
    with pytest.raises(InversionError, match=f"option {name}"):
        InversionOptions(**{name: 0})
