"""Stream keys and values over a debug set: what detectors are trained on, and what neutral tokens are the mean of.

Of keys, those of anomalous tokens, those at the same positions on the clean side, and a sample of the others are kept,
each kind up to a third of `MAX_BYTES` a site, and of what both sides have, half of that for either. For the means, keys
and values of clean benign tokens are only summed up, those of padding and of attention sinks left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.graph import weights
from atpatch_onnx.matching import batching
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Array, Neutral
from atpatch_onnx.running.sessions import Progress, Session, silent

MAX_BYTES = 2**27
"""Keys kept for one site, all kinds together."""

SINK = 4.0
"""A token that draws more than so many even shares of the attention is a sink, and stays out of the neutral token."""

MAX_BENIGN = 8
"""Benign tokens kept of one input, besides the suspects' own positions."""

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
    name = value_output(first)
    session = Session(probe(model, [first]), batching=batching(model))  # what lies behind it is not run
    clean = session.stream(debug.clean, [name], batch_size=batch_size)
    other = session.stream(
        debug.counterfactual, [name], batch_size=batch_size, progress=progress, stage="finding the suspect tokens"
    )
    found = []
    for (_, before), (_, after) in zip(clean, other, strict=True):
        difference = np.abs(after[name] - before[name]).max(axis=2)
        largest = np.abs(before[name]).max(axis=(1, 2))
        most = difference.max(axis=1)
        least = np.maximum(_DIFFERENCE * largest, 0 if always else _CARRIES * most)
        found.append(difference > least[:, None])
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
    progress: Progress = silent,
) -> tuple[Tokens, ...]:
    """Keys and values of every site over a debug set whose suspects are known.

    Raises:
        FitError: A site's token axis is not the one that the suspects are positions of.
    """
    session = Session(probe(model, sites, masses=True), batching=batching(model))
    kept = {site: _Kept(site) for site in sites}
    generator = np.random.default_rng(seed)
    clean, counterfactual = anomalous_columns(debug)
    suspects = debug.suspects
    assert suspects is not None
    sides = (("clean", debug.clean, clean), ("counterfactual", debug.counterfactual, counterfactual))
    for side, inputs, anomalous in sides:
        stage = f"collecting, {side} inputs"
        for part, outputs in session.stream(inputs, batch_size=batch_size, progress=progress, stage=stage):
            for site in sites:
                keys, values = outputs[key_output(site)], outputs[value_output(site)]
                if keys.shape[1] != suspects.shape[1]:
                    raise FitError(
                        f"site {site.name}",
                        expected=f"{suspects.shape[1]} tokens, as the suspects have positions",
                        found=f"{keys.shape[1]}",
                        advice="Fit the sites of one token axis only (option sites=).",
                    )
                name = mass_output(site)
                mass = None if name is None else outputs[name]
                kept[site].add(keys, values, mass, suspects[part], anomalous[part], generator, is_clean=side == "clean")
    return tuple(kept[site].tokens() for site in sites)


class Means:
    """Sums of keys and values over the benign tokens of clean inputs, and the neutral token that is their mean."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.key_sum = np.zeros(site.key.features)
        self.value_sum = np.zeros(site.value.features)
        self.count = self.left_out = 0

    def add(self, keys: Array, values: Array, mass: Array | None, benign: NDArray[np.bool_]) -> None:
        """Add one batch: keys and values `[batch, tokens, features]`, the rest `[batch, tokens]`."""
        plain = benign if mass is None else benign & _plain(mass)
        self.key_sum += keys[plain].sum(axis=0, dtype=np.float64)
        self.value_sum += values[plain].sum(axis=0, dtype=np.float64)
        self.count += int(plain.sum())
        self.left_out += int((benign & ~plain).sum())

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


class _Kept:
    """What is kept of one site while streaming."""

    def __init__(self, site: AttentionSite) -> None:
        self.site = site
        self.rows: dict[str, list[Array]] = {"anomalous": [], "hard": [], "benign": []}
        self.bytes = dict.fromkeys(self.rows, 0)
        self.means = Means(site)

    def add(
        self,
        keys: Array,
        values: Array,
        mass: Array | None,
        suspects: NDArray[np.bool_],
        anomalous: NDArray[np.bool_],
        generator: np.random.Generator,
        *,
        is_clean: bool,
    ) -> None:
        """Keep of one batch: keys and values `[batch, tokens, features]`, the rest `[batch, tokens]`."""
        benign = ~anomalous
        if is_clean:
            self.means.add(keys, values, mass, benign)
        share = 0.5 if is_clean else 1.0  # the clean side comes first, and leaves room for the other
        self._keep("anomalous", keys[anomalous], share)
        self._keep("hard", keys[suspects & benign], 1.0)  # of the clean side only
        rank = np.where(benign & ~suspects, generator.random(benign.shape), np.inf).argsort(axis=1).argsort(axis=1)
        self._keep("benign", keys[benign & ~suspects & (rank < MAX_BENIGN)], share)

    def _keep(self, kind: str, rows: Array, share: float) -> None:
        left = int(share * MAX_BYTES / len(self.rows)) - self.bytes[kind]
        rows = rows[: max(left, 0) // rows[0].nbytes] if len(rows) else rows
        if len(rows):
            self.rows[kind].append(np.ascontiguousarray(rows))
            self.bytes[kind] += rows.nbytes

    def tokens(self) -> Tokens:
        empty = np.zeros((0, self.site.key.features), np.float32)
        kept = {kind: np.concatenate([empty, *rows]) for kind, rows in self.rows.items()}
        return Tokens(site=self.site, neutral=self.means.neutral(), left_out=self.means.left_out, **kept)
