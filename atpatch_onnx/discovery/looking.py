"""What one pass over inputs tells, before they are asked by forward passes with tokens neutral (`fitting.board`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.errors import NoSiteError
from atpatch_onnx.fitting.collect import Means
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Neutral
from atpatch_onnx.running.executors import LOCAL, Executor, Kept
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Array, Progress, Session, silent
from atpatch_onnx.running.shards import Groups, SpreadSession


@dataclass(frozen=True, eq=False)
class Looked:
    """What one pass over the inputs tells."""

    predicted: NDArray[np.int64]
    """`[inputs]`."""

    mass: NDArray[np.float32] | None
    """Attention that tokens draw, the mean over sites `[inputs, tokens]`; None where no site's map can be read."""

    neutral: Mapping[str, Neutral]
    """By site."""

    spread: Mapping[str, tuple[Array, Array]]
    """Mean and standard deviation of keys over all tokens, `[features]` each, by site."""


def askable_sites(model: ir.Model) -> tuple[AttentionSite, ...]:
    """The sites on the token axis of the first that have one map a sample, in the order of the graph.

    Raises:
        NoSiteError: There are none.
    """
    found = [site for site in find_sites(model) if site.parts == 1 and site.self_attention]
    if not found:
        raise NoSiteError(
            "the model",
            expected="at least one site of self-attention with one map a sample",
            found="none",
            advice="See why with: atpatch sites MODEL --why",
        )
    return tuple(site for site in found if site.token_axis == found[0].token_axis)


def look(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    inputs: Mapping[str, Array],
    parts: NDArray[np.bool_],
    output: str,
    *,
    batch_size: int = 32,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> Looked:
    """One pass over inputs `[inputs, ...]`: predictions, what tokens draw, and the means over their `parts`."""
    session = SpreadSession(probe(model, sites, masses=True, kept=[output]), executor=executor)
    means = {site: Means(site) for site in sites}
    sums = {site: np.zeros((2, site.key.features)) for site in sites}
    predicted, masses = [], []
    groups: Groups = {"inputs": inputs, "marks": {"parts": parts}}
    run: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "stage": "looking at inputs"}
    for _, kept in session.keep(_Looking(tuple(sites), output), groups, **run):
        for number, site in enumerate(sites):
            of_site = {name.partition("/")[2]: a for name, a in kept.items() if name.startswith(f"{number}/")}
            means[site].add_sums(of_site)
            sums[site] += of_site["own"]
        predicted.append(kept["predicted"])
        if "mass" in kept:
            masses.append(kept["mass"])
    count = max(int(parts.sum()), 1)
    spread = {}
    for site, (total, squares) in sums.items():
        mean = total / count
        spread[site.name] = (mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12)))
    return Looked(
        np.concatenate(predicted),
        np.concatenate(masses) if masses else None,
        {site.name: means[site].neutral() for site in sites},
        spread,
    )


@dataclass(frozen=True)
class _Looking:
    """What is kept of a batch: sums of each site, predictions, and the attention that tokens draw."""

    sites: tuple[AttentionSite, ...]
    output: str

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        outputs, parts = sessions[0].batch(batch["inputs"]), batch["marks"]["parts"]
        found: dict[str, Array] = {"predicted": classes(outputs[self.output])}
        drawn = []
        for number, site in enumerate(self.sites):
            keys, values = outputs[key_output(site)], outputs[value_output(site)]
            name = mass_output(site)
            mass = None if name is None else outputs[name]
            own = keys[parts].astype(np.float64)
            sums = Means.sums(keys, values, mass, parts) | {"own": np.stack([own.sum(axis=0), (own**2).sum(axis=0)])}
            found |= {f"{number}/{what}": array for what, array in sums.items()}
            if mass is not None:
                drawn.append(mass)
        return found | ({"mass": np.asarray(np.mean(drawn, axis=0, dtype=np.float32))} if drawn else {})
