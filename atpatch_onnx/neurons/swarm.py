"""Search a box for the smallest cost, without gradients: a particle swarm, or differential evolution.

The swarm is the global-best form of Kennedy and Eberhart, Particle swarm optimization (ICNN 1995), with the inertia of
Shi and Eberhart (1998):

    v <- inertia v + personal r1 (best of the particle - x) + social r2 (best of all - x),    x <- x + v

with r1, r2 drawn from [0, 1) for every coordinate. A particle that would leave the box stops at its wall. CARE uses
pyswarms, whose last release is of 2021; these few lines need no such library. Its own implementation starts all
particles at the network as it is; here one does (`start`), the others are anywhere in the box.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import require

Floats = NDArray[np.float64]
Cost = Callable[[Floats], float]

_SPEED = 0.25
"""A particle's first velocity is up to this share of the box, either way."""


@dataclass(frozen=True, eq=False)
class Minimum:
    """What a search found."""

    best: Floats
    """`[dimensions]`."""

    cost: float

    history: tuple[float, ...]
    """The smallest cost so far: at the beginning, and after every iteration."""


def minimise(
    cost: Cost,
    low: float,
    high: float,
    dimensions: int,
    *,
    particles: int = 20,
    iterations: int = 100,
    inertia: float = 0.8,
    personal: float = 0.41,
    social: float = 0.41,
    tolerance: float = 1e-3,
    patience: int = 10,
    start: float | None = None,
    rng: np.random.Generator,
) -> Minimum:
    """Search by a particle swarm; `cost` is of a position `[dimensions]`, each coordinate from `low` to `high`.

    It is asked `particles` times at the beginning, and as often in each of the `iterations`. The search stops when the
    best cost fell by less than `tolerance` over `patience` of them. One particle begins with `start` everywhere.
    """
    cost = _finite(cost)
    shape = (particles, dimensions)
    position = _first(low, high, shape, start, rng)
    velocity = rng.uniform(-1, 1, shape) * _SPEED * (high - low)
    own, own_cost = position.copy(), np.array([cost(one) for one in position])
    best = own_cost.argmin()
    history = [float(own_cost[best])]
    while len(history) <= iterations and not _stalled(history, tolerance, patience):
        r1, r2 = rng.random(shape), rng.random(shape)
        velocity = inertia * velocity + personal * r1 * (own - position) + social * r2 * (own[best] - position)
        moved = position + velocity
        position = np.clip(moved, low, high)
        velocity[moved != position] = 0.0
        found = np.array([cost(one) for one in position])
        better = found < own_cost
        own[better], own_cost[better] = position[better], found[better]
        best = own_cost.argmin()
        history.append(float(own_cost[best]))
    return Minimum(own[best], history[-1], tuple(history))


def evolve(
    cost: Cost,
    low: float,
    high: float,
    dimensions: int,
    *,
    particles: int = 20,
    iterations: int = 100,
    tolerance: float = 1e-3,
    patience: int = 10,
    start: float | None = None,
    rng: np.random.Generator,
) -> Minimum:
    """Search by SciPy's differential evolution (Storn and Price, 1997), with the budget and the end of the swarm.

    Raises:
        MissingExtraError: SciPy is not installed.
    """
    require("scipy", "fit", "searching by differential evolution")
    from scipy.optimize import differential_evolution

    cost = _finite(cost)
    first = _first(low, high, (particles, dimensions), start, rng)
    known: list[float] = []  # costs, as they are asked for
    history: list[float] = []

    def counted(position: Floats) -> float:
        known.append(cost(position))
        return known[-1]

    def after_iteration(intermediate_result: Any) -> bool:
        if not history:
            history.append(min(known[:particles]))
        history.append(float(intermediate_result.fun))
        return _stalled(history, tolerance, patience)

    found = differential_evolution(
        counted,
        [(low, high)] * dimensions,
        init=first,
        maxiter=iterations,
        tol=0.0,
        polish=False,
        callback=after_iteration,
        seed=rng,
    )
    return Minimum(np.asarray(found.x, np.float64), float(found.fun), tuple(history or [float(found.fun)]))


def _finite(cost: Cost) -> Cost:
    """The same cost, infinite where it is none: a comparison with NaN would keep it for ever."""

    def finite(position: Floats) -> float:
        found = cost(position)
        return found if math.isfinite(found) else math.inf

    return finite


def _first(low: float, high: float, shape: tuple[int, int], start: float | None, rng: np.random.Generator) -> Floats:
    position = rng.uniform(low, high, shape)
    if start is not None:
        position[0] = start
    return position


def _stalled(history: list[float], tolerance: float, patience: int) -> bool:
    """Whether the last `patience` iterations made the best cost smaller by less than `tolerance`."""
    return len(history) > patience and history[-1 - patience] - history[-1] < tolerance
