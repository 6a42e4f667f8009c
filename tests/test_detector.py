"""Detectors: the loss against a naive loop, what they separate, and that nothing depends on the machine."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import Planted
from torch.nn import functional

from atpatch_onnx.baking.features import choose_features
from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting.collect import Columns, collect
from atpatch_onnx.fitting.detector import contrastive_loss, train_detector
from atpatch_onnx.fitting.training import Loss, Training
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import OFFSET, Detector, Features

ARRAYS = ("mean", "scale", "weight_1", "bias_1", "weight_2", "bias_2", "prototypes")


def naive_loss(z: np.ndarray, labels: list[int], tau: float) -> float:
    """Khosla et al. 2020, equation 2 (`L_out`), as a loop over anchors, positives and all others."""
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        positives = [p for p in others if labels[p] == labels[i]]
        denominator = sum(np.exp(z[i] @ z[a] / tau) for a in others)
        terms = [np.log(np.exp(z[i] @ z[p] / tau) / denominator) for p in positives]
        total += -sum(terms) / max(len(positives), 1)
    return total / len(z)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=12), st.floats(0.1, 2), st.integers(0, 99))
def test_the_loss_is_that_of_a_naive_loop(labels, tau, seed):
    z = np.random.default_rng(seed).normal(size=(len(labels), 5))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    found = contrastive_loss(torch.from_numpy(z), torch.tensor(labels), tau).item()
    # float64 rounding of sums of exponentials up to e^10
    assert found == pytest.approx(naive_loss(z, labels, tau), rel=1e-9, abs=1e-9)


def test_the_gradient_is_that_of_finite_differences():
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.autograd.gradcheck(lambda raw: contrastive_loss(functional.normalize(raw, dim=1), labels, 0.5), (z,))


def test_a_step_down_the_gradient_draws_classes_apart():
    z = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([0, 1] * 4)

    def loss(raw: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(functional.normalize(raw, dim=1), labels, 0.5)

    before = loss(z)
    before.backward()
    assert torch.isfinite(z.grad).all()
    assert loss(z - 0.1 * z.grad).item() < before.item()


def test_a_class_of_one_and_embeddings_that_coincide_give_no_nan():
    z = functional.normalize(torch.ones(4, 3), dim=1).requires_grad_()
    loss = contrastive_loss(z, torch.tensor([0, 1, 1, 2]), 0.1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def scores(detector: Detector, rows: np.ndarray) -> np.ndarray:
    """Similarity to the anomalous minus similarity to the benign prototype, in float64."""
    x = (np.log(rows.astype(np.float64) + OFFSET) - detector.mean.T) / detector.scale.T
    hidden = np.maximum(x @ detector.weight_1.T.astype(np.float64) + detector.bias_1.T, 0)
    embedding = hidden @ detector.weight_2.T + detector.bias_2.T
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    return embedding @ (detector.prototypes[1] - detector.prototypes[0])


@pytest.fixture(scope="module")
def planted_columns() -> tuple[Columns, ...]:
    planted = Planted(drawn=(0, 2), harmful=(2,))
    model = planted.model()
    return collect(
        model, {site: choose_features(site) for site in find_sites(model)}, planted.debug(240, suspects=True)
    )


@pytest.mark.parametrize("loss", get_args(Loss))
def test_planted_columns_are_separated_and_innocent_ones_are_not(planted_columns, loss):
    for columns in planted_columns:
        detector = train_detector(columns, Training(steps=300), loss)
        anomalous, benign = scores(detector, columns.anomalous), scores(detector, np.r_[columns.hard, columns.benign])
        if columns.site.index in (0, 2):
            assert anomalous.min() > benign.max() + 0.1
        else:
            assert np.median(anomalous) < benign.max()


def test_planted_columns_of_other_inputs_are_separated_too(planted_columns):
    planted = Planted(drawn=(0, 2), harmful=(2,))
    model = planted.model()
    kinds = {find_sites(model)[0]: choose_features(find_sites(model)[0])}
    (fresh,) = collect(model, kinds, planted.debug(200, seed=9, suspects=True))
    detector = train_detector(planted_columns[0], Training(steps=300))
    assert scores(detector, fresh.anomalous).min() > scores(detector, np.r_[fresh.hard, fresh.benign]).max()


def drawn(seed: int = 0, *, hard: int = 40) -> Columns:
    rng = np.random.default_rng(seed)
    site = find_sites(Planted().model())[0]

    def rows(count: int, mean: float) -> np.ndarray:
        return rng.lognormal(mean, 1, size=(count, 16)).astype(np.float32)

    return Columns(site, Features.WHOLE, rows(50, 3), rows(hard, 0), rows(100, 0), np.zeros((2, 4), np.float32))


QUICK = Training(steps=20)


def test_a_detector_has_the_shapes_of_the_patch_file():
    columns = drawn()
    detector = train_detector(columns, Training(hidden=7, embedding=5, steps=5))
    shapes = {name: getattr(detector, name).shape for name in ARRAYS}
    assert shapes == {
        "mean": (16, 1),
        "scale": (16, 1),
        "weight_1": (7, 16),
        "bias_1": (7, 1),
        "weight_2": (5, 7),
        "bias_2": (5, 1),
        "prototypes": (2, 5),
    }
    assert all(getattr(detector, name).dtype == np.float32 for name in ARRAYS)
    assert detector.threshold == 0.0
    assert detector.features is Features.WHOLE
    # unit norm, to float32 rounding
    np.testing.assert_allclose(np.linalg.norm(detector.prototypes, axis=1), 1, rtol=1e-6)
    benign = np.log(np.concatenate([columns.hard, columns.benign]).astype(np.float64) + OFFSET)
    # a float32 mean of float32 logarithms
    np.testing.assert_allclose(detector.mean[:, 0], benign.mean(axis=0), rtol=1e-6, atol=1e-6)


def test_the_logistic_loss_learns_a_direction_of_its_own():
    """Its prototypes are opposite; those of the contrastive loss are means of embeddings."""
    contrastive, logistic = train_detector(drawn(), QUICK), train_detector(drawn(), QUICK, "logistic")
    np.testing.assert_array_equal(logistic.prototypes[0], -logistic.prototypes[1])
    assert contrastive.prototypes[0] @ contrastive.prototypes[1] > -0.999
    np.testing.assert_allclose(np.linalg.norm(logistic.prototypes, axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_same_bits_on_any_number_of_threads_which_are_left_as_they_were(threads):
    expected, before = train_detector(drawn(), QUICK), torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(threads)  # nor does torch's own generator matter
    try:
        found = train_detector(drawn(), QUICK)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(getattr(found, name).tobytes() == getattr(expected, name).tobytes() for name in ARRAYS)


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(FitError):
            train_detector(replace(drawn(), anomalous=np.zeros((0, 16), np.float32)), QUICK)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_another_seed_gives_another_detector():
    one, other = train_detector(drawn(), QUICK), train_detector(drawn(), QUICK, seed=1)
    assert not np.array_equal(one.weight_1, other.weight_1)


def test_hard_negatives_may_be_missing():
    detector = train_detector(drawn(hard=0), QUICK)
    assert np.isfinite(detector.prototypes).all()


@pytest.mark.parametrize(
    ("missing", "found"),
    [(("anomalous",), "0 anomalous, 140 benign"), (("hard", "benign"), "50 anomalous, 0 benign")],
)
def test_without_columns_of_both_kinds_there_is_nothing_to_learn(missing, found):
    columns = replace(drawn(), **dict.fromkeys(missing, np.zeros((0, 16), np.float32)))
    with pytest.raises(
        FitError, match=rf"site layer0\.attention: expected anomalous and benign columns.*found {found}"
    ):
        train_detector(columns, QUICK)


def test_a_feature_that_never_varies_does_not_explode():
    columns = drawn()
    for rows in (columns.anomalous, columns.hard, columns.benign):
        rows[:, 0] = 1
    columns.anomalous[0, 0] = 1.001
    detector = train_detector(columns, QUICK)
    assert detector.scale.min() >= 1e-3
    assert all(np.isfinite(getattr(detector, name)).all() for name in ARRAYS)
    assert abs(scores(detector, columns.anomalous[:1])[0]) <= 2
