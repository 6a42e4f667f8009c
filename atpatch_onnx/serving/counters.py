"""Counts of what a service sees: inputs, flags by site, latency. Thread-safe; nothing about the inputs is kept."""

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds of the latency histogram, seconds."""


@dataclass(frozen=True)
class Stats:
    """What was counted so far."""

    inferences: int = 0
    """Inputs, not requests."""

    flagged: int = 0
    """Inputs with a flag at any site."""

    flagged_by_site: Mapping[str, int] = field(default_factory=dict)
    """Inputs with a flag at the site, its own or carried there."""

    requests: int = 0
    seconds: float = 0.0
    """Of all requests together."""

    latencies: tuple[int, ...] = (0,) * (len(BUCKETS) + 1)
    """Requests in each bucket of `BUCKETS`, and above the last."""

    @property
    def flagged_ratio(self) -> float:
        """Share of inputs that were flagged; 0 before the first."""
        return self.flagged / self.inferences if self.inferences else 0.0

    @property
    def cumulative_latencies(self) -> tuple[tuple[str, int], ...]:
        """Requests that took at most each bound, as text, the last one infinite."""
        bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
        return tuple(zip(bounds, accumulate(self.latencies), strict=True))

    def since(self, before: "Stats") -> "Stats":
        """What was counted between an earlier reading and this one: a window of the traffic."""
        return self._with(before, -1)

    def plus(self, more: "Stats") -> "Stats":
        """What was counted here and there."""
        return self._with(more, 1)

    def _with(self, other: "Stats", times: int) -> "Stats":
        sites = {site: self.flagged_by_site.get(site, 0) for site in {**self.flagged_by_site, **other.flagged_by_site}}
        return Stats(
            inferences=self.inferences + times * other.inferences,
            flagged=self.flagged + times * other.flagged,
            flagged_by_site={site: n + times * other.flagged_by_site.get(site, 0) for site, n in sites.items()},
            requests=self.requests + times * other.requests,
            seconds=self.seconds + times * other.seconds,
            latencies=tuple(n + times * m for n, m in zip(self.latencies, other.latencies, strict=True)),
        )


class Counters:
    """Counts requests; read them with `stats`."""

    def __init__(self) -> None:
        self._lock, self._stats = threading.Lock(), Stats()

    def count(
        self, flagged: NDArray[np.bool_], seconds: float, by_site: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> None:
        """Count one request.

        Args:
            flagged: Whether each input was flagged, `[batch]` or `[batch, 1]`.
            seconds: What the request took.
            by_site: Flags of the columns at each site, `[batch, columns]`.
        """
        sites = {
            site: int(flags.any(axis=tuple(range(1, flags.ndim))).sum()) for site, flags in (by_site or {}).items()
        }
        bucket = bisect.bisect_left(BUCKETS, seconds)
        latencies = tuple(int(number == bucket) for number in range(len(BUCKETS) + 1))
        request = Stats(flagged.size, int(flagged.sum()), sites, 1, seconds, latencies)
        with self._lock:
            self._stats = self._stats.plus(request)

    def stats(self) -> Stats:
        """What was counted so far."""
        return self._stats
