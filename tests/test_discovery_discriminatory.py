"""ADF's search against closed forms, a planted model and brute force."""

from itertools import product

import numpy as np
import pytest
import torch

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery import Attribute, SearchOptions, discriminatory_pairs
from atpatch_onnx.discovery.discriminatory import global_directions, local_directions, round_robin
from atpatch_onnx.discovery.judge import Judge
from atpatch_onnx.errors import DebugSetError

COLOURS = Attribute.categorical("colour", (2.0, 3.0, 5.0))
INCOME = Attribute.numeric("income", 0, 10, step=1)
DEBT = Attribute.numeric("debt", 0, 10, step=1)
SEX = Attribute.categorical("sex", 2)
ATTRIBUTES = (COLOURS, INCOME, DEBT, SEX)


class Linear(torch.nn.Module):
    """One logit `table @ weights - bias`; discriminates exactly where the protected weight crosses zero."""

    def __init__(self, weights: list[float], bias: float) -> None:
        super().__init__()
        self.weights, self.bias = torch.nn.Buffer(torch.tensor(weights)), bias
        self.eval()

    def forward(self, table: torch.Tensor) -> torch.Tensor:
        return (table @ self.weights - self.bias)[:, None]


LEANS = Linear([0.25, 1.0, -1.0, 2.0], bias=4.6)
FAIR = Linear([0.25, 1.0, -1.0, 0.0], bias=4.6)


def rows(count: int = 200, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([attribute.drawn(count, generator) for attribute in ATTRIBUTES], axis=1)


def discriminates(table: np.ndarray) -> np.ndarray:
    """By the formula of LEANS."""
    without_sex = table[:, 0] / 4 + table[:, 1] - table[:, 2] - 4.6
    return (without_sex > 0) != (without_sex + 2 > 0)


@pytest.fixture(scope="module")
def found():
    return discriminatory_pairs(LEANS, rows(), "sex", ATTRIBUTES)


def test_every_instance_found_discriminates_and_differs_in_the_protected_attribute_only(found):
    assert len(found) > 20
    assert discriminates(found.clean).all()
    np.testing.assert_array_equal(found.clean[:, :3], found.counterfactual[:, :3])
    np.testing.assert_array_equal(found.counterfactual[:, 3], 1 - found.clean[:, 3])
    assert len(np.unique(found.clean, axis=0)) == len(found)


def test_both_phases_find_some(found):
    assert found.is_local.any()
    assert not found.is_local.all()
    assert found.tried["global"] > 0
    assert found.tried["local"] > 0


def test_instances_are_a_few_moves_from_the_rows_that_they_come_from():
    found = discriminatory_pairs(LEANS, rows(), "sex", ATTRIBUTES, SearchOptions(iterations=2, steps=3))
    moves = np.abs(found.clean - rows()[found.origin])
    assert (moves[:, 1:3].max(axis=1) <= np.where(found.is_local, 5, 2)).all()
    assert (moves[:, 3] == 0).all()


def test_instances_stay_within_their_attributes(found):
    for attribute, column in zip(ATTRIBUTES, found.clean.T, strict=True):
        assert attribute.valid(column).all(), attribute.name
    assert set(np.unique(found.clean[:, 0])) <= {2.0, 3.0, 5.0}


def test_the_whole_of_a_small_domain_is_found():
    found = discriminatory_pairs(LEANS, rows(), "sex", ATTRIBUTES, SearchOptions(steps=60))
    domain = np.array(list(product(*(attribute.every_value() for attribute in ATTRIBUTES))), np.float32)
    wanted = {tuple(row) for row in domain[discriminates(domain)]}
    assert {tuple(row) for row in found.clean} == wanted


def test_the_rate_is_that_of_the_domain_and_of_the_table(found):
    domain = np.array(list(product(*(attribute.every_value() for attribute in ATTRIBUTES))), np.float32)
    assert found.rate.low <= discriminates(domain).mean() <= found.rate.high
    assert found.rate.count == SearchOptions().sample
    assert found.rate_table.value == discriminates(rows()).mean()


def test_a_fair_model_discriminates_nowhere():
    found = discriminatory_pairs(FAIR, rows(), "sex", ATTRIBUTES)
    assert len(found) == 0
    assert (found.rate.value, found.rate_table.value) == (0, 0)
    with pytest.raises(DebugSetError, match="found none"):
        found.debug_set("table")


def test_the_same_seed_finds_the_same(found):
    again = discriminatory_pairs(LEANS, rows(), "sex", ATTRIBUTES)
    np.testing.assert_array_equal(again.clean, found.clean)
    np.testing.assert_array_equal(again.counterfactual, found.counterfactual)


def test_pairs_make_a_debug_set(found):
    debug = found.debug_set("table")
    assert isinstance(debug, DebugSet)
    assert (debug.kind, len(debug)) == ("attribute", len(found))
    np.testing.assert_array_equal(debug.sensitive, found.clean[:, 3])


def test_several_protected_attributes_change_together():
    model = Linear([1.0, 0.0, 0.0, 1.0], bias=5.5)  # 5 + 1 only: both protected attributes are needed
    found = discriminatory_pairs(model, rows(), ["sex", "colour"], ATTRIBUTES)
    worst = found.counterfactual[found.clean[:, 0] + found.clean[:, 3] < 5.5]
    assert (worst[:, [0, 3]] == (5, 1)).all()


def test_progress_is_told():
    told = []
    discriminatory_pairs(LEANS, rows(20), "sex", ATTRIBUTES, progress=lambda *news: told.append(news))
    assert {stage for stage, _, _ in told} == {"searching globally", "searching locally"}


# Gradients and gaps


def test_gradients_are_those_of_the_cross_entropy_against_the_own_label():
    table = rows(50)
    logits = LEANS(torch.from_numpy(table)).numpy()
    own = np.where(logits > 0, 1, 0)
    expected = (1 / (1 + np.exp(-logits)) - own) * LEANS.weights.numpy()  # of -log p(own)
    np.testing.assert_allclose(Judge(LEANS, ATTRIBUTES, [3]).gradients(table), expected, atol=1e-6)


def test_the_variant_has_the_largest_gap_of_those_predicted_otherwise():
    steep = Linear([1.0, 0.0, 0.0, 0.0], bias=4.9)
    verdict = Judge(steep, ATTRIBUTES, [0]).judge(np.array([[2, 0, 0, 0], [3, 0, 0, 0], [5, 0, 0, 0]], np.float32))
    assert verdict.discriminates.all()
    assert verdict.other[:, 0].tolist() == [5, 5, 2]


# Directions


def signs(*values: float) -> np.ndarray:
    return np.array([[*values, 9.0]], np.float32)  # the last column is protected


def test_globally_attributes_move_where_the_gradients_agree():
    free = np.arange(4)
    moves = global_directions(signs(1, -1, 0, 2), signs(3, 2, -1, 0), free, np.random.default_rng(0))
    assert moves.tolist() == [[1, 0, -1, 1, 0]]


def test_globally_a_random_attribute_moves_where_none_agrees():
    generator = np.random.default_rng(0)
    moves = [global_directions(signs(1, -1), signs(-1, 1), np.arange(2), generator)[0] for _ in range(50)]
    assert {tuple(move) for move in moves} == {(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)}


def test_locally_attributes_are_drawn_by_the_inverse_of_their_gradients():
    count = 20_000
    own, others = np.repeat(signs(1, 0.5, 2), count, axis=0), np.repeat(signs(-1, -0.5, 2), count, axis=0)
    moves = local_directions(own, others, np.arange(3), np.random.default_rng(0))
    assert (np.abs(moves).sum(axis=1) == 1).all()
    np.testing.assert_allclose(np.abs(moves).mean(axis=0), [2 / 7, 4 / 7, 1 / 7, 0], atol=0.02)
    assert abs(moves.sum(axis=1).mean()) < 0.02


def test_locally_an_attribute_without_gradient_is_drawn_too():
    moves = local_directions(signs(0, 0, 0), signs(0, 0, 0), np.arange(3), np.random.default_rng(0))
    assert np.abs(moves).sum() == 1


def test_seeds_come_from_each_cluster_in_turn():
    clusters = np.array([0] * 6 + [1] * 2 + [2])
    assert clusters[round_robin(clusters, 7, seed=0)].tolist() == [0, 1, 2, 0, 1, 0, 0]
    assert len(set(round_robin(clusters, 99, seed=0))) == len(clusters)


# Attributes


def test_categories_move_to_their_neighbours_and_numbers_by_steps_within_bounds():
    assert COLOURS.moved(np.array([2, 2, 3, 5], np.float32), np.array([-1, 1, 1, 1])).tolist() == [2, 3, 5, 5]
    half = Attribute.numeric("half", -1, 1, step=0.5)
    assert half.moved(np.array([-1, 0, 0.9], np.float32), np.array([-1, 1, 1])).tolist() == [-1, 0.5, 1]
    assert half.every_value().tolist() == [-1, -0.5, 0, 0.5, 1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Attribute.categorical("a", 1),
        lambda: Attribute.categorical("a", (1.0, 1.0)),
        lambda: Attribute.categorical("a", (1.0, float("nan"))),
        lambda: Attribute.numeric("a", 1, 1),
        lambda: Attribute.numeric("a", 0, float("inf")),
        lambda: Attribute.numeric("a", 0, 1, step=0),
        lambda: Attribute("a", "ordinal"),  # type: ignore[arg-type]
        lambda: SearchOptions(seeds=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(DebugSetError):
        make()


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"table": [[4, 1, 1, 0]]}, "attribute 'colour'.* 4 in row 0"),
        ({"table": [[2, 11, 1, 0]]}, "attribute 'income'.*0 to 10"),
        ({"table": [[2, 1, 0]]}, r"shape \[rows, 4\]"),
        ({"table": [["red", 1, 1, 0]]}, "numbers"),
        ({"protected": "age"}, "'age'"),
        ({"protected": []}, "none"),
        ({"protected": ["colour", "income", "debt", "sex"]}, "not all"),
        ({"attributes": (COLOURS, INCOME, COLOURS, SEX)}, "names that differ"),
        ({"attributes": (COLOURS, INCOME, DEBT, Attribute.numeric("sex", 0, 1, step=1e-4))}, "1024 combinations"),
        ({"model": torch.nn.Linear(4, 2)}, "training mode"),
        ({"model": torch.nn.Flatten(0).eval()}, "logits"),
    ],
)
def test_what_does_not_fit_is_refused(change, where):
    arguments = {"model": LEANS, "table": rows(20), "protected": "sex", "attributes": ATTRIBUTES, **change}
    with pytest.raises(DebugSetError, match=where):
        discriminatory_pairs(**arguments)


def test_a_model_without_gradients_is_refused():
    class Lookup(torch.nn.Module):
        def forward(self, table: torch.Tensor) -> torch.Tensor:
            return torch.eye(2)[(table[:, 1] > 99).long()]

    with pytest.raises(DebugSetError, match="gradients"):
        discriminatory_pairs(Lookup().eval(), rows(20), "sex", ATTRIBUTES)
