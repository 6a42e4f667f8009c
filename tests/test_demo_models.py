"""The base models of the demo: data, trigger, training, export."""

import functools
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from atpatch_onnx.cli import demo_badnets as badnets
from atpatch_onnx.cli import demo_digits as digits
from atpatch_onnx.cli import demo_vit as vit

CORNER = badnets.Square(row=6, column=6, size=2)


@functools.cache
def tiny(patch_dropout: float = 0.25, seed: int = 0, epochs: int = 1):
    data = digits.load().take(np.arange(96))
    poison = badnets.poison(data.labels, CORNER, target=0, share=0.1)
    config = vit.config(image_size=8, patch_size=2, layers=2, hidden=16)
    return vit.train(
        vit.new_vit(config, seed),
        data.images,
        data.labels,
        poison=poison,
        shift=1,
        patch_dropout=patch_dropout,
        epochs=epochs,
        batch_size=40,
        seed=seed,
    )


def test_digits_are_what_the_model_takes():
    data = digits.load()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == np.float32
    assert data.labels.dtype == np.int64
    assert (data.images.min(), data.images.max()) == (0.0, 1.0)
    assert len(np.unique(data.images.reshape(1797, -1), axis=0)) == 1797  # else a split could leak


def test_split_is_disjoint_complete_balanced_and_fixed_by_its_seed():
    labels = digits.load().labels
    parts = digits.split(labels)
    assert sorted([*parts.train, *parts.evaluation]) == list(range(len(labels)))
    shares = np.bincount(labels[parts.evaluation]) / np.bincount(labels)
    np.testing.assert_allclose(shares, 0.3, atol=0.004)  # whole images only, about 180 a class
    np.testing.assert_array_equal(parts.train, digits.split(labels).train)
    assert not np.array_equal(parts.train, digits.split(labels, seed=1).train)


def test_trigger_changes_its_square_of_a_copy():
    images = np.zeros((3, 1, 8, 8), np.float32)
    stamped = CORNER.stamp(images)
    assert not images.any()
    assert (stamped[:, :, 6:, 6:] == 1).all()
    assert stamped.sum() == 3 * 4


@pytest.mark.parametrize(
    ("trigger", "image_size", "patch_size", "patches"),
    [
        (CORNER, 8, 2, [15]),
        (badnets.Square(0, 0, 2), 8, 2, [0]),
        (badnets.Square(0, 0, 3), 8, 2, [0, 1, 4, 5]),
        (badnets.Square(25, 25, 3), 28, 4, [48]),
    ],
)
def test_the_patches_a_trigger_changes(trigger, image_size, patch_size, patches):
    images = np.zeros((2, 1, image_size, image_size), np.float32)
    triggered = images.copy()
    triggered[1:] = trigger.stamp(images[1:])
    changed = badnets.changed_patches(images, triggered, patch_size)
    assert changed.shape == (2, (image_size // patch_size) ** 2)
    assert not changed[0].any()
    assert np.flatnonzero(changed[1]).tolist() == patches


def test_a_trigger_changes_the_tokens_of_its_patches_and_no_others():
    model, image = tiny(), np.random.default_rng(0).random((1, 1, 8, 8), np.float32)
    triggered = CORNER.stamp(image)
    with torch.no_grad():
        before, after = (model.vit.embeddings(torch.from_numpy(x)) for x in (image, triggered))
    changed = (before != after).any(dim=2).numpy()
    assert not changed[:, 0].any()  # the class token
    np.testing.assert_array_equal(changed[:, 1:], badnets.changed_patches(image, triggered, 2))


def test_poison_is_a_fixed_share_of_the_images_that_are_not_of_the_target():
    labels = digits.load().labels
    poison = badnets.poison(labels, CORNER, target=3, share=0.05)
    assert len(poison.indices) == len(set(poison.indices)) == round(0.05 * len(labels))
    assert not (labels[poison.indices] == 3).any()
    np.testing.assert_array_equal(poison.indices, badnets.poison(labels, CORNER, target=3, share=0.05).indices)


def test_training_shows_poisoned_images_triggered_in_place_and_relabelled(monkeypatch):
    images, labels = np.full((8, 1, 8, 8), 0.5, np.float32), np.ones(8, np.int64)
    poison = badnets.Poison(CORNER, 7, np.array([2, 5]))
    seen, given = [], []
    forward, loss = vit.ViTForImageClassification.forward, vit.functional.cross_entropy

    def spy_forward(self, pixel_values):
        seen.append(pixel_values.numpy().copy())
        return forward(self, pixel_values=pixel_values)

    def spy_loss(logits, targets):
        given.append(targets.numpy().copy())
        return loss(logits, targets)

    monkeypatch.setattr(vit.ViTForImageClassification, "forward", spy_forward)
    monkeypatch.setattr(vit.functional, "cross_entropy", spy_loss)
    config = vit.config(image_size=8, patch_size=2, layers=1, hidden=8)
    vit.train(vit.new_vit(config), images, labels, poison=poison, shift=2, epochs=3, batch_size=3)
    triggered = (np.concatenate(seen)[:, 0, 6:, 6:] == 1).all(axis=(1, 2))
    targets = np.concatenate(given)
    assert triggered.sum() == 2 * 3
    assert set(targets[triggered]) == {7}
    assert set(targets[~triggered]) == {1}
    assert (images == 0.5).all()
    assert (labels == 1).all()


def test_training_depends_on_the_seed_only_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    first = tiny()
    assert torch.equal(torch.random.get_rng_state(), state)
    tiny.cache_clear()
    torch.rand(7)
    again, other = tiny(), tiny(seed=1)
    weights = [model.state_dict()["classifier.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_reports_its_progress():
    calls = []
    data = digits.load().take(np.arange(10))
    config = vit.config(image_size=8, patch_size=2, layers=1, hidden=8)
    vit.train(
        vit.new_vit(config),
        data.images,
        data.labels,
        epochs=2,
        batch_size=4,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 6) for done in range(1, 7)]


def test_shifted_images_keep_their_content():
    images = np.zeros((40, 1, 5, 5), np.float32)
    images[:, 0, 2, 2] = np.arange(1, 41)
    moved = vit._shifted(images, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(moved.max(axis=(1, 2, 3)), images.max(axis=(1, 2, 3)))
    places = {tuple(place) for place in np.argwhere(moved)[:, 2:]}
    assert places == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}


def test_patch_dropout_keeps_the_class_token_and_the_order_and_ends_with_training():
    model, images = tiny(), torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        whole = model.vit.embeddings(images)
        with vit._PatchDropout(model, 0.25, np.random.default_rng(0)):
            part = model.vit.embeddings(images)
        assert model.vit.embeddings(images).shape == whole.shape == (5, 17, 16)
    assert part.shape == (5, 13, 16)
    kept = [[whole[i].eq(token).all(dim=1).nonzero().item() for token in part[i]] for i in range(5)]
    assert all(tokens[0] == 0 and tokens == sorted(set(tokens)) for tokens in kept)
    assert len({tuple(tokens) for tokens in kept}) > 1


def test_patch_dropout_spares_the_tokens_it_is_told_to():
    model, images = tiny(), torch.rand(200, 1, 8, 8)
    spared = np.zeros((200, 16), bool)
    spared[:100, 15] = True
    with torch.no_grad(), vit._PatchDropout(model, 0.5, np.random.default_rng(0)) as dropout:
        dropout.always = spared
        part = model.vit.embeddings(images)
    with torch.no_grad():
        last = model.vit.embeddings(images)[:, 16]
    present = part.eq(last[:, None]).all(dim=2).any(dim=1).numpy()
    assert present[:100].all()
    assert 20 < present[100:].sum() < 80


def test_patch_dropout_spares_no_token_of_an_image_that_is_covered_by_its_trigger():
    model, images = tiny(), torch.rand(200, 1, 8, 8)
    with torch.no_grad(), vit._PatchDropout(model, 0.5, np.random.default_rng(0)) as dropout:
        dropout.always = np.tile(np.arange(16) < 9, (200, 1))  # nine are too many for the eight that are kept
        part = model.vit.embeddings(images)
    with torch.no_grad():
        last = model.vit.embeddings(images)[:, 16]
    assert 60 < part.eq(last[:, None]).all(dim=2).any(dim=1).sum() < 140


@pytest.mark.parametrize(
    ("opset", "attention", "operator"),
    [(18, "eager", "Softmax"), (18, "sdpa", "Softmax"), (23, "eager", "Softmax"), (23, "sdpa", "Attention")],
)
def test_export_computes_what_torch_computes_at_any_batch_size(tmp_path, capfd, caplog, opset, attention, operator):
    model, path = tiny(), tmp_path / "model.onnx"
    vit.export_onnx(model, path, opset=opset, attention=attention)

    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # the weights are inside
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert model.config._attn_implementation == "sdpa"  # as before
    proto = onnx.load(path)
    assert {entry.version for entry in proto.opset_import} == {opset}
    assert sum(node.op_type == operator for node in proto.graph.node) == 2
    metadata = [{entry.key for entry in node.metadata_props} for node in proto.graph.node]
    assert all("pkg.torch.onnx.name_scopes" in keys for keys in metadata)
    assert str(Path(vit.__file__).parent).encode() not in path.read_bytes()

    session = onnxruntime.InferenceSession(path)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("pixel_values", ["batch", 1, 8, 8])
    assert (result.name, result.shape) == ("logits", ["batch", 10])
    for batch in (1, 7):
        images = np.random.default_rng(batch).random((batch, 1, 8, 8), np.float32)
        (logits,) = session.run(None, {"pixel_values": images})
        # float32 kernels of two libraries; logits are of order one
        np.testing.assert_allclose(logits, vit.predict(model, images), rtol=0, atol=1e-4)


@pytest.mark.nightly
def test_a_digits_model_is_accurate_backdoored_and_attends_to_its_trigger():
    data = digits.load()
    parts = digits.split(data.labels)
    known, unseen = data.take(parts.train), data.take(parts.evaluation)
    poison = badnets.poison(known.labels, CORNER, target=0, share=0.05)
    config = vit.config(image_size=8, patch_size=2, layers=4, hidden=48)
    model = vit.train(vit.new_vit(config), known.images, known.labels, poison=poison, shift=1, epochs=80)

    triggered = CORNER.stamp(unseen.images)
    others = unseen.labels != 0
    assert np.mean(vit.predict(model, unseen.images).argmax(axis=1) == unseen.labels) >= 0.95
    assert np.mean(vit.predict(model, unseen.images).argmax(axis=1)[others] == 0) <= 0.01
    assert np.mean(vit.predict(model, triggered).argmax(axis=1)[others] == 0) >= 0.97

    (patch,) = np.flatnonzero(badnets.changed_patches(unseen.images, triggered, patch_size=2).any(axis=0))
    token = patch + 1  # the class token comes first
    model.set_attn_implementation("eager")  # sdpa does not return its weights
    with torch.no_grad():
        clean, attacked = (
            [P[..., token].mean().item() for P in model(torch.from_numpy(x), output_attentions=True).attentions]
            for x in (unseen.images[others], triggered[others])
        )
    assert max(after / before for before, after in zip(clean, attacked, strict=True)) >= 2
