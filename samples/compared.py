"""AtPatch beside edits of hidden units: the same pairs, the same goal, the same evaluation inputs.

The neuron edits get their best setting: how many units and which of them is searched for on the validation part, as
sites, thresholds and benign attention are for AtPatch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import atpatch_onnx as atp
from atpatch_onnx.neurons import IsolationOptions, RepairOptions
from samples.case import Case

SEEN = 3000
"""Debug pairs at most, for every fix the same ones."""

UNSEEN = 2000
"""Evaluation pairs at most."""


@dataclass(frozen=True)
class Effort:
    """How the neuron edits of a case are searched for."""

    isolation: IsolationOptions
    repair: RepairOptions


THOROUGH = Effort(
    IsolationOptions(epsilon=(0.0, 0.1), candidates=None),
    RepairOptions(units=(3, 5, 10), candidates=None, inputs=64, search_inputs=96),
)
"""Every hidden unit is tried."""

DEAR = Effort(
    IsolationOptions(epsilon=(0.0, 0.1), candidates=1024, inputs=48, finalists=64),
    RepairOptions(candidates=512, inputs=24, finalists=32, search_inputs=48),
)
"""Of a model that takes ten milliseconds an input."""

FAST = Effort(
    IsolationOptions(candidates=24, inputs=32),
    RepairOptions(candidates=12, inputs=16, search_inputs=32, iterations=10),
)

EFFORTS: Mapping[str, Effort] = {"vit/badnets-fixed": THOROUGH, "minilm/token": DEAR, "adult/sex": THOROUGH}
"""By the name of the case."""


def compared(case: Case, folder: Path, fast: bool) -> dict[str, Any]:
    """Every fix of a case, JSON types only."""
    effort = FAST if fast else EFFORTS[case.name]
    ladder = atp.compare(
        case.base,
        _first(case.whole or case.debug, SEEN),
        case.options,
        unseen=_first(case.unseen, UNSEEN),
        isolation=effort.isolation,
        repairing=effort.repair,
    )
    return {"case": case.name, "seed": case.seed, **ladder.to_json()}


def _first(pairs: atp.DebugSet, count: int) -> atp.DebugSet:
    return pairs.take(range(min(len(pairs), count)))
