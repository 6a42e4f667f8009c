"""Counters for monitoring systems: by the conventions of Prometheus, and as instruments of OpenTelemetry.

| Prometheus | OpenTelemetry |
|---|---|
| `atpatch_inferences_total` | `atpatch.inferences` |
| `atpatch_flagged_inferences_total{site=...}` | `atpatch.flagged_inferences`, attribute `atpatch.site` |
| `atpatch_flagged_ratio` | `atpatch.flagged_ratio` |
| `atpatch_request_seconds` (a histogram) | `atpatch.requests` and `atpatch.request.duration`, their sum in seconds |

The label `site=""` is any site. Both are read from `Stats` when they are asked for, so that a request costs one lock.
"""

import typing
from collections.abc import Callable, Iterable, Iterator

from atpatch_onnx.errors import require
from atpatch_onnx.serving.counters import Stats

if typing.TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

Read = Callable[[], Stats]
"""Such as `Counters.stats`."""


def register_prometheus(read: Read, registry: "CollectorRegistry | None" = None) -> None:
    """Let Prometheus scrape what `read` answers, from the default registry or another.

    Raises:
        MissingExtraError: prometheus_client is not installed.
    """
    require("prometheus_client", "serve", "counters for Prometheus")
    from prometheus_client import REGISTRY
    from prometheus_client.registry import Collector

    class _Collector(Collector):
        def collect(self) -> "Iterable[Metric]":
            return _metrics(read())

    (REGISTRY if registry is None else registry).register(_Collector())


def _metrics(stats: Stats) -> "Iterator[Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    yield CounterMetricFamily("atpatch_inferences", "Inputs that were run.", value=stats.inferences)
    flagged = CounterMetricFamily("atpatch_flagged_inferences", "Inputs that were flagged.", labels=["site"])
    for site, count in {"": stats.flagged, **stats.flagged_by_site}.items():
        flagged.add_metric([site], count)
    yield flagged
    yield GaugeMetricFamily("atpatch_flagged_ratio", "Share of inputs that were flagged.", value=stats.flagged_ratio)
    yield HistogramMetricFamily(
        "atpatch_request_seconds",
        "What requests took.",
        buckets=list(stats.cumulative_latencies),
        sum_value=stats.seconds,
    )


def register_opentelemetry(read: Read, meter: "Meter | None" = None) -> None:
    """Let OpenTelemetry observe what `read` answers, through the global meter provider or another meter.

    Raises:
        MissingExtraError: opentelemetry-api is not installed.
    """
    require("opentelemetry", "serve", "counters for OpenTelemetry")
    from opentelemetry.metrics import Observation, get_meter

    meter = get_meter("atpatch_onnx") if meter is None else meter

    def observing(of: "Callable[[Stats], float]") -> "Callable[[CallbackOptions], Iterable[Observation]]":
        return lambda options: [Observation(of(read()))]

    def flagged(options: "CallbackOptions") -> "Iterable[Observation]":
        stats = read()
        counts = {"": stats.flagged, **stats.flagged_by_site}
        return [Observation(count, {"atpatch.site": site}) for site, count in counts.items()]

    meter.create_observable_counter("atpatch.inferences", [observing(lambda stats: stats.inferences)], "{input}")
    meter.create_observable_counter("atpatch.flagged_inferences", [flagged], "{input}")
    meter.create_observable_gauge("atpatch.flagged_ratio", [observing(lambda stats: stats.flagged_ratio)], "1")
    meter.create_observable_counter("atpatch.requests", [observing(lambda stats: stats.requests)], "{request}")
    meter.create_observable_counter("atpatch.request.duration", [observing(lambda stats: stats.seconds)], "s")
