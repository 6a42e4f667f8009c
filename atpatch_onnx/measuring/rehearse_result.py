"""What comes out of a rehearsal."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from atpatch_onnx.measuring.verify import Check


@dataclass(frozen=True)
class SiteResult:
    """What was seen at one site, in one form of the patch, at one level of optimization."""

    site: str
    form: str
    """`with If` or `without If`."""

    optimized: bool
    """Whether onnxruntime optimized the graph."""

    tokens: int
    flagged: int
    """Tokens with a flag, their own or a carried one."""

    exact: bool
    """Whether flagged tokens are neutral, and all others the base's bit for bit."""


@dataclass(frozen=True)
class Rehearsal:
    """What a random patch does to a model."""

    runs: bool
    """Whether onnxruntime runs the base."""

    reason: str
    """What onnxruntime says of the base where it does not run it; empty if it always does."""

    found: int
    """Attention sites of the model; with none, there is nothing to patch."""

    inputs: Mapping[str, tuple[int, ...]]
    """Shapes of the inputs."""

    nonfinite: tuple[str, ...]
    """Outputs of the base with NaN or infinite values."""

    mixing: tuple[str, ...]
    """Outputs whose samples depend on each other in the base already; samples without a flag may change there."""

    checks: tuple[Check, ...]
    """Everything that was checked; those of the sites are summed up from `sites`."""

    sites: tuple[SiteResult, ...]

    @property
    def passed(self) -> bool:
        """Whether a patch of this model would be exact: it runs, has sites, and every check passed."""
        return self.runs and self.found > 0 and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON types."""
        return {"passed": self.passed, **json.loads(json.dumps(asdict(self)))}


def together(found: Mapping[str, Rehearsal]) -> Rehearsal:
    """What came of each of a file's graphs, as one; checks say of which they are."""
    each = list(found.values())
    return Rehearsal(
        runs=all(one.runs for one in each),
        reason=next((one.reason for one in each if one.reason), ""),
        found=min(one.found for one in each),
        inputs={name: shape for one in each for name, shape in one.inputs.items()},
        nonfinite=tuple(dict.fromkeys(name for one in each for name in one.nonfinite)),
        mixing=tuple(dict.fromkeys(name for one in each for name in one.mixing)),
        checks=tuple(
            replace(check, name=f"{name}: {check.name}") for name, one in found.items() for check in one.checks
        ),
        sites=tuple(site for one in each for site in one.sites),
    )
