"""What comes out of a rehearsal."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from atpatch_onnx.measuring.verify import Check


@dataclass(frozen=True)
class SiteNumbers:
    """What was measured at one site, with one emission, at one level of optimization."""

    site: str
    emission: str
    optimized: bool
    """Whether onnxruntime optimized the graph."""

    columns: int
    flagged: int
    """Columns with a flag, their own or a carried one."""

    difference: float
    """Largest absolute difference between the corrected output and the numpy reference."""

    product: float
    """Largest absolute difference between the base's output and `P V`: whether map and values are what they seem."""

    allowed: float
    """How much either may be: `verify.TOLERANCE`, relative to the largest value (at least 1)."""

    untouched: bool | None
    """Whether map and values are the base's own, bit for bit; None where flags of earlier sites changed them."""

    @property
    def passed(self) -> bool:
        """Whether it is as it should be."""
        return max(self.difference, self.product) <= self.allowed and self.untouched is not False


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

    sites: tuple[SiteNumbers, ...]

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
        return {
            "passed": self.passed,
            "runs": self.runs,
            "reason": self.reason,
            "found": self.found,
            "inputs": {name: list(shape) for name, shape in self.inputs.items()},
            "nonfinite": list(self.nonfinite),
            "mixing": list(self.mixing),
            "checks": [asdict(check) for check in self.checks],
            "sites": [asdict(of_site) for of_site in self.sites],
        }
