"""Stream keys and values over a debug set: what detectors are trained on, and what neutral tokens are the mean of.

Of keys, those of anomalous tokens, those at the same positions on the clean side, and a sample of the others are kept,
each kind up to a third of `MAX_BYTES` a site, and of what both sides have, half of that for either: beyond it, those
that are drawn for the number of their row (`fitting.sampled`). For the means, keys and values of clean benign tokens
are only summed up, those of padding and of attention sinks left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.fitting.sampled import Bounded, Draw, Shares
from atpatch_onnx.graph import weights
from atpatch_onnx.matching import batching
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Array, Neutral
from atpatch_onnx.running.executors import LOCAL, Executor, Kept
from atpatch_onnx.running.sessions import Progress, Session, silent
from atpatch_onnx.running.shards import Groups, SpreadSession

MAX_BYTES = 2**27
"""Keys kept for one site, all kinds together."""

SINK = 4.0
"""A token that draws more than so many even shares of the attention is a sink, and stays out of the neutral token."""

_DIFFERENCE = 1e-3
"""A token's values differ when they do by this share of the largest value of the pair: far above rounding."""

_CARRIES = 0.5
"""A token carries the difference when its values differ by this share of what the pair's most different token does."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """What was kept of one site."""

    site: AttentionSite

    anomalous: Array
    """`[tokens, features]`: the suspects' keys where they are anomalous."""

    hard: Array
    """`[tokens, features]`: the same positions on clean inputs, the hard negatives."""

    benign: Array
    """`[tokens, features]`: a sample of the other tokens of both sides."""

    neutral: Neutral
    """The means over the benign tokens of the clean inputs, without padding and attention sinks where the map tells."""

    left_out: int
    """How many benign tokens these were."""


def input_specs(model: ir.Model) -> dict[str, InputSpec]:
    """What a debug set has to bring for this model: samples first, wherever the model has them."""
    initialized, where = weights(model), batching(model)
    return {
        value.name or "": InputSpec(
            value.name or "",
            np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32),
            where.declared(
                value.name or "",
                tuple(
                    size if isinstance(size, int) else (size.value if size is not None else None)
                    for size in value.shape
                ),
            )
            if value.shape is not None
            else (),
        )
        for value in model.graph.inputs
        if value.name not in initialized
    }


def find_suspects(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    debug: DebugSet,
    *,
    always: bool = False,
    batch_size: int = 32,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> DebugSet:
    """The debug set with its suspects: those it has, or the tokens whose values differ most at the first site.

    At the first site of a token axis no attention has mixed the tokens yet, so only those differ that the trigger or
    the attribute is in. Of a trigger that lies across several, those that hold little of it draw no attention: taken
    for anomalous, they would teach the detector that benign columns are (`_CARRIES`). Of a fix that is `always` on,
    which teaches nothing, suspects are all tokens that differ in any pair, the same in every pair.

    Raises:
        NoSiteError: There are no sites.
        DebugSetError: The suspects do not fit the token axis, or no token differs in any pair.
    """
    if not sites:
        raise NoSiteError(
            "the model",
            expected="at least one attention site",
            found="none",
            advice="See why with: atpatch sites MODEL --why",
        )
    first = sites[0]
    if debug.suspects is not None:
        columns = debug.suspects.shape[1]
        if isinstance(first.columns, int) and first.columns != columns:
            raise DebugSetError(
                "the suspects of the debug set",
                expected=f"{first.columns} token positions, as at site {first.name}",
                found=f"{columns}",
                advice="Mark positions of the model's token axis, class token included, or use suspects='auto'.",
            )
        return _everywhere(debug) if always else debug
    probed = probe(model, [first])  # what lies behind it is not run
    session = SpreadSession(probed, executor=executor, batching=batching(model))
    sides = {"clean": debug.clean, "counterfactual": debug.counterfactual}
    run: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "stage": "finding the suspect tokens"}
    found = [kept["suspects"] for _, kept in session.keep(_Differing(value_output(first), always), sides, **run)]
    suspects = np.concatenate(found)
    if not suspects.any():
        raise DebugSetError(
            "the debug set",
            expected=f"tokens whose values differ between the two sides at site {first.name}",
            found="none in any pair",
            advice="Check that the trigger survives preprocessing, or name the suspects yourself.",
        )
    debug = debug.with_suspects(suspects)
    return _everywhere(debug) if always else debug


def _everywhere(debug: DebugSet) -> DebugSet:
    """The debug set in which the suspects of any pair are those of all."""
    assert debug.suspects is not None, "the suspects were found before"
    return debug.with_suspects(np.broadcast_to(debug.suspects.any(axis=0), debug.suspects.shape))


@dataclass(frozen=True)
class _Differing:
    """Which tokens' values differ between the two sides, bool `[pairs, tokens]`."""

    name: str
    always: bool
    """Whether tokens count that differ little beside others of their input."""

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        before, after = (sessions[0].batch(batch[side], [self.name])[self.name] for side in ("clean", "counterfactual"))
        difference = np.abs(after - before).max(axis=2)
        largest = np.abs(before).max(axis=(1, 2))
        most = difference.max(axis=1)
        least = np.maximum(_DIFFERENCE * largest, 0 if self.always else _CARRIES * most)
        return {"suspects": difference > least[:, None]}


def anomalous_columns(debug: DebugSet) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which columns a detector should name, on the clean and on the counterfactual side, bool `[pairs, tokens]` each.

    A backdoor's trigger is only on the counterfactual side. A protected attribute is in every input, on both.
    """
    assert debug.suspects is not None, "the suspects were found before"
    clean = debug.suspects if debug.kind == "attribute" else np.zeros_like(debug.suspects)
    return clean, debug.suspects


def collect(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    debug: DebugSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> tuple[Tokens, ...]:
    """Keys and values of every site over a debug set whose suspects are known.

    Raises:
        FitError: A site's token axis is not the one that the suspects are positions of.
    """
    session = SpreadSession(probe(model, sites, masses=True), executor=executor, batching=batching(model))
    suspects = debug.suspects
    assert suspects is not None
    anomalous = dict(zip(("clean", "counterfactual"), anomalous_columns(debug), strict=True))
    means, bounded = [Means(site) for site in sites], [Bounded(site.key.features) for site in sites]
    for side, inputs in (("clean", debug.clean), ("counterfactual", debug.counterfactual)):
        marks = {"suspects": suspects, "anomalous": anomalous[side]}
        shares = tuple(one.shares(MAX_BYTES, side, suspects, anomalous[side]) for one in bounded)
        start = np.arange(len(debug)) + (side != "clean") * len(debug)
        work = _Reading(tuple(sites), seed, side == "clean", shares)
        run: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
        groups: Groups = {"inputs": inputs, "marks": {**marks, "row": start}}
        for _, kept in session.keep(work, groups, stage=f"collecting, {side} inputs", **run):
            for number, (mean, rows) in enumerate(zip(means, bounded, strict=True)):
                of_site = {name.partition("/")[2]: a for name, a in kept.items() if name.startswith(f"{number}/")}
                if side == "clean":
                    mean.add_sums(of_site)
                rows.add(side, of_site)
    return tuple(
        Tokens(site=site, neutral=mean.neutral(), left_out=mean.left_out, **rows.rows())
        for site, mean, rows in zip(sites, means, bounded, strict=True)
    )


@dataclass(frozen=True)
class _Reading:
    """What is kept of a batch: sums of each site, and the keys that detectors may be trained on."""

    sites: tuple[AttentionSite, ...]
    seed: int
    is_clean: bool
    shares: tuple[Shares, ...]

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        outputs = sessions[0].batch(batch["inputs"])
        suspects, anomalous, rows = (batch["marks"][name] for name in ("suspects", "anomalous", "row"))
        draw = Draw(self.seed, rows, suspects.shape[1], len(self.sites))
        found: dict[str, Array] = {}
        for number, site in enumerate(self.sites):
            keys, values = outputs[key_output(site)], outputs[value_output(site)]
            if keys.shape[1] != suspects.shape[1]:
                raise FitError(
                    f"site {site.name}",
                    expected=f"{suspects.shape[1]} tokens, as the suspects have positions",
                    found=f"{keys.shape[1]}",
                    advice="Fit the sites of one token axis only (option sites=).",
                )
            name = mass_output(site)
            if self.is_clean:
                sums = Means.sums(keys, values, None if name is None else outputs[name], ~anomalous)
                found |= {f"{number}/{what}": array for what, array in sums.items()}
            kept = draw.kept(keys, suspects, anomalous, self.shares[number], number)
            found |= {f"{number}/{what}": array for what, array in kept}
        return found


class Means:
    """Sums of keys and values over the benign tokens of clean inputs, and the neutral token that is their mean."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.key_sum = np.zeros(site.key.features)
        self.value_sum = np.zeros(site.value.features)
        self.count = self.left_out = 0

    def add(self, keys: Array, values: Array, mass: Array | None, benign: NDArray[np.bool_]) -> None:
        """Add one batch: keys and values `[batch, tokens, features]`, the rest `[batch, tokens]`."""
        self.add_sums(self.sums(keys, values, mass, benign))

    @staticmethod
    def sums(keys: Array, values: Array, mass: Array | None, benign: NDArray[np.bool_]) -> dict[str, Array]:
        """What one batch adds: sums `[features]` in float64, and how many tokens are in them, and left out."""
        plain = benign if mass is None else benign & _plain(mass)
        return {
            "keys": keys[plain].sum(axis=0, dtype=np.float64),
            "values": values[plain].sum(axis=0, dtype=np.float64),
            "counts": np.array([plain.sum(), (benign & ~plain).sum()]),
        }

    def add_sums(self, sums: Mapping[str, Array]) -> None:
        """Add what one batch does; batches in their order, so that the sum has the same bits wherever they were run."""
        self.key_sum += sums["keys"]
        self.value_sum += sums["values"]
        self.count += int(sums["counts"][0])
        self.left_out += int(sums["counts"][1])

    def neutral(self) -> Neutral:
        """The neutral token."""
        key, value = (
            (total / max(self.count, 1)).astype(np.float32).reshape(place.heads, place.depth)
            for total, place in ((self.key_sum, self.site.key), (self.value_sum, self.site.value))
        )
        return Neutral(key, value)


def _plain(mass: Array) -> NDArray[np.bool_]:
    """Which tokens `[batch, tokens]` are seen, and draw no more than `SINK` times an even share of the attention."""
    seen = mass > 0
    return np.asarray(seen & (mass * seen.sum(axis=1, keepdims=True) <= SINK))
