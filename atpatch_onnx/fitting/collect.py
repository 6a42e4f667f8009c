"""Stream column features over a debug set: what the detectors are trained on.

Maps are never kept. Per batch the probe gives column features and values. The anomalous columns, the same positions on
the clean side, and a sample of the others are kept, each kind up to a third of `MAX_BYTES` a site, and of what
both sides have, half of that for either; values are only summed up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from atpatch_onnx.baking.features import shares_in_one
from atpatch_onnx.baking.read import features_output, probe, values_output
from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.graph import weights
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Array, Features
from atpatch_onnx.running.sessions import Progress, Session, silent

MAX_BYTES = 2**27
"""Column features kept for one site, all kinds together."""

MAX_BENIGN = 8
"""Benign columns kept of one input, besides the suspects' own positions."""

_DIFFERENCE = 1e-3
"""A token's values differ when they do by this share of the largest value of the pair: far above rounding."""

_CARRIES = 0.5
"""A token carries the difference when its values differ by this share of what the pair's most different token does."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What was kept of one site. Weights are in units of the row's uniform share."""

    site: AttentionSite
    features: Features

    anomalous: Array
    """`[columns, features]`: the suspects' columns where they are anomalous."""

    hard: Array
    """`[columns, features]`: the same positions on clean inputs, the hard negatives."""

    benign: Array
    """`[columns, features]`: a sample of the other columns of both sides."""

    neutral: Array
    """`[kv heads, depth]`: the mean value over all benign columns of the clean inputs."""


def input_specs(model: ir.Model) -> dict[str, InputSpec]:
    """What a debug set has to bring for this model."""
    initialized = weights(model)
    return {
        value.name or "": InputSpec(
            value.name or "",
            np.dtype(value.dtype.numpy()) if value.dtype is not None else np.dtype(np.float32),
            tuple(size if isinstance(size, int) else (size.value if size is not None else None) for size in value.shape)
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
    batch_size: int = 32,
    progress: Progress = silent,
) -> DebugSet:
    """The debug set with its suspects: those it has, or the tokens whose values differ most at the first site.

    At the first site of a token axis no attention has mixed the tokens yet, so only those differ that the trigger or
    the attribute is in. Of a trigger that lies across several, those that hold little of it draw no attention: taken
    for anomalous, they would teach the detector that benign columns are (`_CARRIES`).

    Args:
        model: The base.
        sites: Its sites on one token axis, the first one first.
        debug: Pairs for it.
        batch_size: Pairs at a time.
        progress: Told after every batch.

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
        return debug
    name = values_output(first)
    session = Session(_only(probe(model, {first: Features.SUMMARY}), [name]))  # what lies behind it is not run
    clean = session.stream(debug.clean, [name], batch_size=batch_size)
    other = session.stream(
        debug.counterfactual, [name], batch_size=batch_size, progress=progress, stage="finding the suspect tokens"
    )
    found = []
    for (_, before), (_, after) in zip(clean, other, strict=True):
        difference = np.abs(after[name] - before[name]).max(axis=(1, 3))
        largest = np.abs(before[name]).max(axis=(1, 2, 3))
        most = difference.max(axis=1)
        found.append(difference > np.maximum(_DIFFERENCE * largest, _CARRIES * most)[:, None])
    suspects = np.concatenate(found)
    if not suspects.any():
        raise DebugSetError(
            "the debug set",
            expected=f"tokens whose values differ between the two sides at site {first.name}",
            found="none in any pair",
            advice="Check that the trigger survives preprocessing, or name the suspects yourself.",
        )
    return debug.with_suspects(suspects)


def anomalous_columns(debug: DebugSet) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which columns a detector should name, on the clean and on the counterfactual side, bool `[pairs, tokens]` each.

    A backdoor's trigger is only on the counterfactual side. A protected attribute is in every input, on both.
    """
    assert debug.suspects is not None, "the suspects were found before"
    clean = debug.suspects if debug.kind == "attribute" else np.zeros_like(debug.suspects)
    return clean, debug.suspects


def collect(
    model: ir.Model,
    features: Mapping[AttentionSite, Features],
    debug: DebugSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Columns, ...]:
    """Column features of every site over a debug set whose suspects are known.

    Args:
        model: The base.
        features: The sites and what their detectors read.
        debug: Pairs for it, the fit part.
        batch_size: Inputs at a time.
        seed: Of the sample of benign columns.
        progress: Told after every batch.

    Raises:
        FitError: A site's token axis is not the one that the suspects are positions of.
    """
    session = Session(_only(probe(model, features), _outputs(features)))
    kept = {site: _Kept() for site in features}
    generator = np.random.default_rng(seed)
    clean, counterfactual = anomalous_columns(debug)
    suspects = debug.suspects
    assert suspects is not None
    sides = (("clean", debug.clean, clean), ("counterfactual", debug.counterfactual, counterfactual))
    for side, inputs, anomalous in sides:
        for part, outputs in session.stream(
            inputs, _outputs(features), batch_size=batch_size, progress=progress, stage=f"collecting, {side} inputs"
        ):
            for site, kind in features.items():
                X, V = outputs[features_output(site)], outputs[values_output(site)]
                if X.shape[2] != suspects.shape[1]:
                    raise FitError(
                        f"site {site.name}",
                        expected=f"{suspects.shape[1]} keys, as the suspects have positions",
                        found=f"{X.shape[2]}",
                        advice="Fit the sites of one token axis only (option sites=).",
                    )
                X = X * np.float32(shares_in_one(site, kind))
                kept[site].add(X, V, suspects[part], anomalous[part], generator, is_clean=side == "clean")
    return tuple(kept[site].columns(site, kind) for site, kind in features.items())


def _only(probed: ir.Model, names: Sequence[str]) -> ir.Model:
    """A probe that computes nothing but these outputs; changed in place."""
    probed.graph.outputs[:] = [output for output in probed.graph.outputs if output.name in names]
    RemoveUnusedNodesPass()(probed)
    return probed


def _outputs(features: Mapping[AttentionSite, Features]) -> list[str]:
    return [name for site in features for name in (features_output(site), values_output(site))]


class _Kept:
    """What is kept of one site while streaming."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Array]] = {"anomalous": [], "hard": [], "benign": []}
        self.bytes = dict.fromkeys(self.rows, 0)
        self.value_sum: NDArray[np.float64] | None = None
        self.value_count = 0

    def add(
        self,
        X: Array,
        V: Array,
        suspects: NDArray[np.bool_],
        anomalous: NDArray[np.bool_],
        generator: np.random.Generator,
        *,
        is_clean: bool,
    ) -> None:
        """Keep of one batch: X `[batch, features, keys]`, V `[batch, kv heads, keys, depth]`, masks `[batch, keys]`."""
        seen = X.sum(axis=1) > 0
        benign = seen & ~anomalous
        if is_clean:
            total = (V * benign[:, None, :, None]).sum(axis=(0, 2), dtype=np.float64)
            self.value_sum = total if self.value_sum is None else self.value_sum + total
            self.value_count += int(benign.sum())
        rows = X.transpose(0, 2, 1)
        share = 0.5 if is_clean else 1.0  # the clean side comes first, and leaves room for the other
        self._keep("anomalous", rows[anomalous & seen], share)
        self._keep("hard", rows[suspects & benign], 1.0)  # of the clean side only
        rank = np.where(benign & ~suspects, generator.random(benign.shape), np.inf).argsort(axis=1).argsort(axis=1)
        self._keep("benign", rows[benign & ~suspects & (rank < MAX_BENIGN)], share)

    def _keep(self, kind: str, rows: Array, share: float) -> None:
        left = int(share * MAX_BYTES / len(self.rows)) - self.bytes[kind]
        rows = rows[: max(left, 0) // rows[0].nbytes] if len(rows) else rows
        if len(rows):
            self.rows[kind].append(np.ascontiguousarray(rows))
            self.bytes[kind] += rows.nbytes

    def columns(self, site: AttentionSite, features: Features) -> Columns:
        assert self.value_sum is not None
        width = next((rows[0].shape[1] for rows in self.rows.values() if rows), 0)
        empty = np.zeros((0, width), np.float32)
        kept = {kind: np.concatenate([empty, *rows]) for kind, rows in self.rows.items()}
        neutral = (self.value_sum / max(self.value_count, 1)).astype(np.float32)
        return Columns(site=site, features=features, neutral=neutral, **kept)
