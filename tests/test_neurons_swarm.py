"""The searches for the smallest cost."""

import numpy as np
import pytest

from atpatch_onnx.errors import MissingExtraError
from atpatch_onnx.neurons import swarm
from atpatch_onnx.neurons.swarm import evolve, minimise

searches = pytest.mark.parametrize("search", [minimise, evolve])
CENTRE = np.array([0.3, -0.5, 0.1])


def sphere(position: np.ndarray) -> float:
    return float(np.square(position - CENTRE).sum())


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@searches
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_minimum_of_a_sphere(search, seed):
    found = search(sphere, -1, 1, 3, tolerance=0, rng=rng(seed))
    assert found.cost == sphere(found.best)
    assert found.cost < 1e-3
    assert len(found.history) == 101


@searches
def test_it_stays_in_the_box(search):
    asked = []

    def outwards(position: np.ndarray) -> float:
        asked.append(position.copy())
        return -float(position.sum())

    found = search(outwards, -2, 0.5, 4, rng=rng())
    assert np.min(asked) >= -2
    assert np.max(asked) <= 0.5
    np.testing.assert_allclose(found.best, 0.5, atol=0.05)  # how near it comes before it stalls


@searches
def test_it_stops_when_nothing_gets_better(search):
    tried = []

    def flat(position: np.ndarray) -> float:
        tried.append(position)
        return 1.0 + 1e-9 * float(np.abs(position).sum())

    found = search(flat, -1, 1, 2, particles=6, patience=4, rng=rng())
    assert len(found.history) == 5
    assert len(tried) == 6 * 5


def test_patience_is_about_the_best_of_all():
    found = minimise(sphere, -1, 1, 3, tolerance=1e-3, patience=10, rng=rng())
    history = np.array(found.history)
    gains = history[:-10] - history[10:]
    assert gains[-1] < 1e-3
    assert (gains[:-1] >= 1e-3).all()
    assert (np.diff(history) <= 0).all()


@searches
def test_the_same_seed_gives_the_same(search):
    first, second, other = (search(sphere, -1, 1, 3, iterations=5, rng=rng(seed)) for seed in (1, 1, 2))
    assert first.best.tobytes() == second.best.tobytes()
    assert first.history == second.history
    assert first.best.tobytes() != other.best.tobytes()


@pytest.mark.parametrize("pull", ["inertia", "personal", "social"])
def test_every_pull_moves_particles(pull):
    usual = minimise(sphere, -1, 1, 3, iterations=20, tolerance=0, rng=rng())
    without = minimise(sphere, -1, 1, 3, iterations=20, tolerance=0, rng=rng(), **{pull: 0.0})
    assert usual.history[0] == without.history[0]
    assert usual.history[-1] != without.history[-1]


@searches
def test_it_ends_after_so_many_iterations(search):
    found = search(sphere, -1, 1, 3, iterations=3, tolerance=0, rng=rng())
    assert len(found.history) == 4


@searches
def test_one_particle_starts_where_it_is_told_to(search):
    def only_there(position: np.ndarray) -> float:
        return 0.0 if np.allclose(position, 1, rtol=1e-9) else 1.0  # SciPy scales positions, and back

    found = search(only_there, -10, 10, 4, start=1.0, rng=rng())
    assert found.cost == 0
    np.testing.assert_allclose(found.best, 1, rtol=1e-9)


def test_evolution_needs_scipy(monkeypatch):
    def missing(package: str, extra: str, purpose: str) -> None:
        raise MissingExtraError(package, extra, purpose)

    monkeypatch.setattr(swarm, "require", missing)
    with pytest.raises(MissingExtraError, match="the package scipy"):
        evolve(sphere, -1, 1, 3, rng=rng())


@pytest.mark.parametrize("search", [minimise, evolve])
def test_what_is_no_number_is_never_the_best(search):
    def cost(x: np.ndarray) -> float:
        return float("nan") if x[0] > 3 else abs(float(x[0]) - 2)

    found = search(cost, -10, 10, 1, start=5.0, rng=np.random.default_rng(0))
    assert found.cost < 0.1
    assert found.best[0] == pytest.approx(2, abs=0.1)
