"""Whether live traffic is flagged more often than clean inputs are: an attack under way, or data that drifted."""

from dataclasses import dataclass

from atpatch_onnx.errors import ServingError, require
from atpatch_onnx.serving.counters import Stats

CONFIDENCE = 0.999
"""Of the interval. An alarm is looked at by a person, and traffic is tested again and again."""


@dataclass(frozen=True)
class Drift:
    """The flag rate of some traffic beside that of clean inputs."""

    rate: float
    low: float
    high: float
    """The exact interval of the rate (Clopper and Pearson, 1934)."""

    calibrated: float
    inferences: int

    @property
    def alarm(self) -> bool:
        """Whether the traffic is flagged more often than clean inputs would be."""
        return self.low > self.calibrated


def drift(stats: Stats, calibrated: float, *, confidence: float = CONFIDENCE) -> Drift:
    """Compare the share of flagged inputs with the clean flag rate.

    Args:
        stats: Of the traffic; of a window, with `Stats.since`.
        calibrated: The clean flag rate that the patch was calibrated to: `goal.clean_flag_rate` of its figures.
        confidence: Of the interval.

    Raises:
        ServingError: A rate or the confidence is no share, or there was no traffic.
        MissingExtraError: SciPy is not installed.
    """
    if stats.inferences == 0:
        raise ServingError(
            "the traffic", expected="at least one input", found="none", advice="Ask again once there were requests."
        )
    if not (0 <= calibrated <= 1 and 0 < confidence < 1):
        raise ServingError(
            "the clean flag rate and the confidence",
            expected="shares",
            found=f"{calibrated} and {confidence}",
            advice="Give the rate of the patch's goal, such as 0.01.",
        )
    require("scipy", "serve", "the interval of a flag rate")
    from scipy.stats import binomtest

    interval = binomtest(stats.flagged, stats.inferences).proportion_ci(confidence, method="exact")
    return Drift(stats.flagged_ratio, float(interval.low), float(interval.high), calibrated, stats.inferences)
