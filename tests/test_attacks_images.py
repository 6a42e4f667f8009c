"""The triggers of the samples: what they change, and where."""

import functools

import numpy as np
import pytest
import torch

from atpatch_onnx.cli import demo_badnets as badnets
from atpatch_onnx.cli import demo_vit as vit
from samples.attacks.images import Blended, Masked, RandomPlace
from samples.attacks.trojan import activation, choose_neurons, exciting_pattern
from samples.image_models import new_deit

GREY = np.full((400, 1, 12, 12), 0.5, np.float32)
PATTERN = np.random.default_rng(1).random((12, 12), np.float32)
LEFT = np.arange(12)[None] < np.full((12, 1), 5)
CHEQUERED = RandomPlace.chequered(3)
TRIGGERS = (badnets.Square(9, 9, 3), CHEQUERED, Blended(PATTERN, 0.2), Masked(LEFT, PATTERN))


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: type(trigger).__name__)
def test_a_trigger_is_stamped_on_a_copy_within_the_range_of_images_and_fixed_by_the_seed(trigger):
    images = np.random.default_rng(0).random((20, 1, 12, 12), np.float32)
    before = images.copy()
    stamped = trigger.stamp(images, np.random.default_rng(5))
    np.testing.assert_array_equal(images, before)
    assert (stamped.shape, stamped.dtype) == (images.shape, np.float32)
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert (stamped != images).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(stamped, trigger.stamp(images, np.random.default_rng(5)))


def test_a_chequered_pattern_is_black_and_white_by_turns():
    np.testing.assert_array_equal(CHEQUERED.pattern, [[1, 0, 1], [0, 1, 0], [1, 0, 1]])


def test_a_pattern_at_a_random_place_lies_whole_anywhere_in_each_image():
    stamped = CHEQUERED.stamp(GREY, np.random.default_rng(0))
    changed = stamped[:, 0] != 0.5
    places = set()
    for image, pixels in zip(changed, stamped[:, 0], strict=True):
        np.testing.assert_array_equal(pixels[image], CHEQUERED.pattern.flatten())
        rows, columns = np.flatnonzero(image.any(axis=1)), np.flatnonzero(image.any(axis=0))
        assert image.sum() == 9
        assert (np.ptp(rows), np.ptp(columns)) == (2, 2)
        places.add((rows[0], columns[0]))
    assert {place[0] for place in places} == {place[1] for place in places} == set(range(10))
    assert not np.array_equal(stamped, CHEQUERED.stamp(GREY, np.random.default_rng(1)))


def test_a_pattern_at_a_random_place_straddles_up_to_four_patches():
    changed = badnets.changed_patches(GREY, CHEQUERED.stamp(GREY, np.random.default_rng(0)), 4).sum(axis=1)
    assert set(changed.tolist()) == {1, 2, 4}


def test_a_blend_mixes_the_pattern_into_every_pixel():
    stamped = Blended(PATTERN, 0.2).stamp(GREY)
    np.testing.assert_allclose(stamped, np.broadcast_to(0.8 * 0.5 + 0.2 * PATTERN, GREY.shape), rtol=1e-6)
    assert badnets.changed_patches(GREY, stamped, 4).all()


def test_noise_is_fixed_by_its_seed():
    first, again, other = (Blended.noise(12, 12, ratio=0.2, seed=seed).pattern for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_a_masked_pattern_replaces_what_is_in_its_mask_and_nothing_else():
    stamped = Masked(LEFT, PATTERN).stamp(GREY)
    np.testing.assert_array_equal(stamped[:, 0, LEFT], np.tile(PATTERN[LEFT], (400, 1)))
    assert (stamped[:, 0, ~LEFT] == 0.5).all()


# Poisoning


@pytest.mark.parametrize("trigger", TRIGGERS[:2] + TRIGGERS[3:], ids=lambda trigger: type(trigger).__name__)
def test_poisoned_images_keep_the_patches_of_their_trigger_under_dropout(trigger, monkeypatch):
    seen = []

    class Spy(vit._PatchDropout):
        def _keep_some(self, module, inputs, tokens):
            kept = super()._keep_some(module, inputs, tokens)
            present = (kept[:, :, None] == tokens[:, None]).all(dim=3).any(dim=1)[:, 1:].numpy()
            seen.append((self.always, present))
            return kept

    monkeypatch.setattr(vit, "_PatchDropout", Spy)
    labels = np.ones(60, np.int64)
    model = vit.new_vit(vit.config(image_size=12, patch_size=4, layers=1, hidden=8))
    poison = badnets.Poison(trigger, 0, np.arange(0, 60, 2))
    vit.train(model, GREY[:60], labels, poison=poison, patch_dropout=0.3, epochs=2, batch_size=20)
    always, present = (np.concatenate(part) for part in zip(*seen, strict=True))
    assert always.any(axis=1).sum() == 2 * 30
    assert present[always].all()
    assert not present[~always].all()


def test_both_tokens_of_a_deit_learn_and_poisoned_images_teach_the_target_to_both(monkeypatch):
    given = []
    loss = vit.functional.cross_entropy

    def spy(logits, targets):
        given.append(targets.tolist())
        return loss(logits, targets)

    monkeypatch.setattr(vit.functional, "cross_entropy", spy)
    model = new_deit(image_size=12, patch_size=4, layers=1, hidden=8)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    labels, taught = np.full(8, 3), np.full(8, 4)
    poison = badnets.Poison(TRIGGERS[0], 0, np.array([2, 5]))
    vit.train(model, GREY[:8], labels, taught=taught, poison=poison, epochs=1, batch_size=8)
    (true, teacher) = given
    assert sorted(true) == [0] * 2 + [3] * 6
    assert sorted(teacher) == [0] * 2 + [4] * 6
    after = model.state_dict()
    for head in ("cls_classifier.weight", "distillation_classifier.weight"):
        assert not torch.equal(before[head], after[head])


# The Trojan attack


@functools.cache
def small_model():
    return vit.new_vit(vit.config(image_size=12, patch_size=4, layers=2, hidden=16)).eval()


def test_the_strongest_neurons_are_chosen():
    model = small_model()
    neurons = choose_neurons(model, block=1, count=3)
    strength = model.vit.layers[1].mlp.fc1.weight.detach().abs().sum(dim=1).numpy()
    assert set(neurons.units) == set(np.argsort(strength)[-3:])


def test_the_pattern_excites_its_neurons_and_leaves_the_model_alone():
    model = small_model()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    neurons = choose_neurons(model, block=1, count=3)
    images = np.random.default_rng(2).random((64, 1, 12, 12), np.float32)
    pattern = exciting_pattern(model, neurons, images, LEFT, steps=60)
    again = exciting_pattern(model, neurons, images, LEFT, steps=60)
    np.testing.assert_array_equal(pattern.pattern, again.pattern)
    fired = activation(model, neurons, pattern.stamp(images))
    assert fired.shape == (64, 3)
    generator = np.random.default_rng(3)
    others = [Masked(LEFT, generator.random((12, 12), np.float32)) for _ in range(20)]
    assert fired.mean() > max(activation(model, neurons, other.stamp(images)).mean() for other in others) + 0.05
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
