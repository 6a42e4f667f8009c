"""Individual discriminatory instances by ADF's two-phase search (Zhang et al., ICSE 2020).

An instance discriminates if the model predicts otherwise for the same instance with other protected values. The global
phase starts from rows of the table and moves an instance and its variant towards the decision boundary, along which
discriminating ones lie; the local phase walks around those found, on attributes that matter little to the prediction.

Where the paper leaves a choice, or one search is done at a time: all seeds move together, in one batch. In the local
phase a move that ends the discrimination is taken back, so that a walk stays where discrimination is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.attributes import Attribute, Table, checked_table, protected_columns
from atpatch_onnx.errors import DebugSetError, check_at_least, require
from atpatch_onnx.running.metrics import Rate
from atpatch_onnx.running.sessions import Progress, silent

if TYPE_CHECKING:
    import torch

    from atpatch_onnx.discovery.judge import Judge


@dataclass(frozen=True)
class SearchOptions:
    """How far a search goes."""

    clusters: int = 4
    """Of the table's rows, by k-means; seeds are taken from each in turn."""

    seeds: int = 500
    """Rows that the global phase starts from; fewer where the table has fewer."""

    iterations: int = 10
    """Moves of the global phase."""

    walks: int = 500
    """Instances of the global phase that the local phase starts from, at most."""

    steps: int = 20
    """Moves of each walk of the local phase."""

    sample: int = 2000
    """Instances drawn for the individual discrimination rate."""

    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, DebugSetError, clusters=1, seeds=1, iterations=0, walks=0, steps=0, sample=1)


@dataclass(frozen=True, eq=False)
class Discrimination:
    """Individual discriminatory instances, each unlike the others in the unprotected attributes or in the protected."""

    clean: Table
    """Instances `[pairs, features]`."""

    counterfactual: Table
    """The same with other protected values, predicted otherwise; those with the largest output gap."""

    origin: NDArray[np.int64]
    """`[pairs]`: the row of the table that the search of each started from; a few moves away, so its label is the best
    guess there is."""

    is_local: NDArray[np.bool_]
    """`[pairs]`: found in the local phase, not in the global one."""

    sensitive: NDArray[np.int64]
    """`[pairs]`: a number for each combination of protected values on the clean side."""

    tried: Mapping[str, int]
    """How many different instances each phase, `global` and `local`, looked at."""

    rate: Rate
    """Individual discrimination rate: share of instances drawn uniformly from the attributes' values that discriminate.
    It is a property of the model alone; most of these instances are like nobody."""

    rate_table: Rate
    """The same share of the table's own rows."""

    def __len__(self) -> int:
        return len(self.clean)

    def debug_set(self, name: str, labels: ArrayLike | None = None) -> DebugSet:
        """The pairs as a debug set of kind "attribute".

        Args:
            name: The model's input that takes the table.
            labels: True labels `[pairs]`. Nobody was asked about a generated instance: take those of the rows that they
                come from, `table_labels[found.origin]`, or none.

        Raises:
            DebugSetError: Nothing was found, or what `DebugSet.from_pairs` refuses.
        """
        if not len(self):
            raise DebugSetError(
                "the search",
                expected="at least one discriminatory instance",
                found="none",
                advice="Search from more seeds or for more iterations; or the attribute does not matter to this model.",
            )
        return DebugSet.from_pairs(
            {name: self.clean}, {name: self.counterfactual}, labels, kind="attribute", sensitive=self.sensitive
        )


def discriminatory_pairs(
    model: "torch.nn.Module",
    table: ArrayLike,
    protected: str | Sequence[str],
    attributes: Sequence[Attribute],
    options: SearchOptions | None = None,
    *,
    progress: Progress = silent,
) -> Discrimination:
    """Search for individual discriminatory instances; the same arguments give the same ones.

    Args:
        model: A torch module from float32 `[rows, features]` to logits `[rows, classes]`, or `[rows, 1]` for two
            classes, in inference mode. It needs gradients with respect to categories as well: they say what the next
            category would do.
        table: Rows `[rows, features]` to start from, as the model reads them.
        protected: Names of the protected attributes; each instance is compared with every other combination of their
            values.
        attributes: What the features are, in order.
        options: How far to search.
        progress: Told of every move.

    Raises:
        DebugSetError: The table does not fit the attributes, unknown protected ones, or a model that answers no logits,
            has no gradients or is in training mode.
        MissingExtraError: torch or scikit-learn is not installed.
    """
    require("torch", "fit", "searching for discriminatory instances")
    require("sklearn", "fit", "searching for discriminatory instances")
    from atpatch_onnx.discovery.judge import Judge

    options = options or SearchOptions()
    rows = checked_table(table, attributes)
    columns = protected_columns(attributes, protected)
    judge = Judge(model, attributes, columns)
    search = _Search(judge, attributes, columns, np.random.default_rng(options.seed))
    seeds = _Walk.of(rows, round_robin(_clusters(rows, options), options.seeds, options.seed))
    globally, tried_globally = search.globally(seeds, options.iterations, progress)
    chosen = np.sort(search.generator.permutation(len(globally))[: options.walks])
    locally, tried_locally = search.locally(globally.take(chosen), options.steps, progress)
    clean, first = np.unique(np.concatenate([globally.table, locally.table]), axis=0, return_index=True)
    drawn = np.stack([attribute.drawn(options.sample, search.generator) for attribute in attributes], axis=1)
    combinations = np.unique(clean[:, columns], axis=0, return_inverse=True)[1]
    return Discrimination(
        clean=clean,
        counterfactual=judge.judge(clean).other if len(clean) else clean,
        origin=np.concatenate([globally.origin, locally.origin])[first],
        is_local=first >= len(globally),
        sensitive=combinations.reshape(-1).astype(np.int64),
        tried={"global": tried_globally, "local": tried_locally},
        rate=Rate.of(judge.judge(drawn).discriminates),
        rate_table=Rate.of(judge.judge(rows).discriminates),
    )


@dataclass(frozen=True, eq=False)
class _Walk:
    """Instances on their way."""

    table: Table
    """`[rows, features]`."""

    origin: NDArray[np.int64]
    """`[rows]`: the row of the user's table that each started from."""

    @classmethod
    def of(cls, rows: Table, origin: NDArray[np.int64]) -> "_Walk":
        return cls(rows[origin], origin)

    @classmethod
    def joined(cls, parts: Sequence["_Walk"]) -> "_Walk":
        """Every instance once, with the origin that came first."""
        table, first = np.unique(np.concatenate([part.table for part in parts]), axis=0, return_index=True)
        return cls(table, np.concatenate([part.origin for part in parts])[first])

    def __len__(self) -> int:
        return len(self.table)

    def take(self, rows: NDArray[Any] | slice) -> "_Walk":
        return _Walk(self.table[rows], self.origin[rows])

    def at(self, table: Table) -> "_Walk":
        """The same walks, elsewhere."""
        return _Walk(table, self.origin)


class _Search:
    """The two phases. Every random number comes from `generator`."""

    def __init__(
        self, judge: "Judge", attributes: Sequence[Attribute], columns: Sequence[int], generator: np.random.Generator
    ) -> None:
        self._judge, self._attributes, self.generator = judge, attributes, generator
        self._free = np.array([column for column in range(len(attributes)) if column not in columns])

    def globally(self, seeds: _Walk, iterations: int, progress: Progress) -> tuple[_Walk, int]:
        """Discriminating instances, and how many different ones were looked at."""
        found, seen = [seeds.take(slice(0))], [seeds]
        for done in range(iterations + 1):
            verdict = self._judge.judge(seeds.table)
            found.append(seeds.take(verdict.discriminates))
            seeds, other = seeds.take(~verdict.discriminates), verdict.other[~verdict.discriminates]
            progress("searching globally", done, iterations)
            if done == iterations or not len(seeds):
                break
            own, others = self._judge.gradients(seeds.table), self._judge.gradients(other)
            seeds = seeds.at(self._moved(seeds.table, global_directions(own, others, self._free, self.generator)))
            seen.append(seeds)
        return _Walk.joined(found), len(_Walk.joined(seen))

    def locally(self, walkers: _Walk, steps: int, progress: Progress) -> tuple[_Walk, int]:
        """Discriminating instances around `walkers`, and how many different ones were looked at."""
        found, seen = [walkers.take(slice(0))], [walkers]
        for done in range(steps if len(walkers) else 0):
            table = walkers.table
            own, others = (self._judge.gradients(side) for side in (table, self._judge.judge(table).other))
            moved = walkers.at(self._moved(table, local_directions(own, others, self._free, self.generator)))
            keeps = self._judge.judge(moved.table).discriminates
            walkers = walkers.at(np.where(keeps[:, None], moved.table, table))
            found.append(moved.take(keeps))
            seen.append(moved)
            progress("searching locally", done + 1, steps)
        return _Walk.joined(found), len(_Walk.joined(seen))

    def _moved(self, table: Table, directions: NDArray[np.int64]) -> Table:
        columns = zip(self._attributes, table.T, directions.T, strict=True)
        return np.stack([attribute.moved(column, direction) for attribute, column, direction in columns], axis=1)


def global_directions(
    own: NDArray[np.float32], others: NDArray[np.float32], free: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """Where each attribute moves, -1, 0 or 1 `[rows, features]`: where both gradients agree, along them.

    Args:
        own: Gradients of the loss at the instances `[rows, features]`.
        others: The same at their variants. Where one of the two is zero, the other decides.
        free: Which attributes may move. In a row where none agrees, a random one of them moves, either way.
        generator: For that.
    """
    own_sign, other_sign = np.sign(own[:, free]).astype(np.int64), np.sign(others[:, free]).astype(np.int64)
    agreed = np.where(own_sign == 0, other_sign, np.where((other_sign == 0) | (other_sign == own_sign), own_sign, 0))
    stuck = ~agreed.any(axis=1)
    random = _one_step(generator.integers(len(free), size=len(own)), len(free), generator)
    agreed[stuck] = random[stuck]
    return _spread(agreed, free, own.shape[1])


def local_directions(
    own: NDArray[np.float32], others: NDArray[np.float32], free: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.int64]:
    """One attribute a row moves, -1 or 1 `[rows, features]`, drawn with probability proportional to 1 / (|g| + |g'|).

    The arguments are those of `global_directions`. Attributes without any gradient, which the formula would give all
    the probability, count as a thousandth of the row's largest.
    """
    sizes = np.abs(own[:, free]).astype(np.float64) + np.abs(others[:, free])
    largest = sizes.max(axis=1, keepdims=True)
    weights = 1 / np.maximum(sizes, np.where(largest > 0, 1e-3 * largest, 1.0))
    steps = np.cumsum(weights, axis=1)
    drawn = (generator.random((len(own), 1)) * steps[:, -1:] > steps).sum(axis=1)
    return _spread(_one_step(np.minimum(drawn, len(free) - 1), len(free), generator), free, own.shape[1])


def _one_step(places: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    steps = np.zeros((len(places), count), np.int64)
    steps[np.arange(len(places)), places] = generator.choice([-1, 1], size=len(places))
    return steps


def _spread(directions: NDArray[np.int64], free: NDArray[np.int64], features: int) -> NDArray[np.int64]:
    every = np.zeros((len(directions), features), np.int64)
    every[:, free] = directions
    return every


def _clusters(rows: Table, options: SearchOptions) -> NDArray[np.int64]:
    """The cluster of each row `[rows]`; attributes count alike, whatever their unit."""
    from sklearn.cluster import KMeans

    scaled = (rows - rows.mean(axis=0)) / np.maximum(rows.std(axis=0), 1e-6)
    clusters = min(options.clusters, len(np.unique(rows, axis=0)))
    means = KMeans(clusters, n_init=1, random_state=options.seed)
    return np.asarray(means.fit_predict(scaled.astype(np.float64)), np.int64)


def round_robin(clusters: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """`count` rows `[count]`, or all, taken from each cluster in turn; within a cluster in random order.

    Args:
        clusters: The cluster of each row `[rows]`.
        count: How many.
        seed: Another seed gives another order.
    """
    order = np.random.default_rng(seed).permutation(len(clusters))
    turn = np.zeros(len(clusters), np.int64)
    for cluster in np.unique(clusters):
        members = order[clusters[order] == cluster]
        turn[members] = np.arange(len(members))
    return np.lexsort((clusters, turn))[:count]
