"""Counters and alarms: exact under threads, by the conventions of Prometheus, by the exact binomial interval."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from atpatch_onnx.errors import ServingError
from atpatch_onnx.serving.counters import Counters, Stats
from atpatch_onnx.serving.drift import drift
from atpatch_onnx.serving.telemetry import register_opentelemetry, register_prometheus


def counted() -> Counters:
    counters = Counters()
    columns = np.array([[False, True, True], [False, False, False]])
    counters.count(np.array([[True], [False]]), 0.004, {"layer0": columns, "layer1": columns[::-1] & False})
    counters.count(np.array([False, False, True]), 7.0, {"layer0": np.zeros((3, 3), bool)})
    return counters


def test_inputs_are_counted_not_requests_or_columns():
    stats = counted().stats()
    assert (stats.inferences, stats.flagged, stats.requests) == (5, 2, 2)
    assert stats.flagged_by_site == {"layer0": 1, "layer1": 0}
    assert stats.flagged_ratio == 0.4
    assert stats.seconds == pytest.approx(7.004)
    latencies = dict(stats.cumulative_latencies)
    assert (latencies["0.0025"], latencies["0.005"], latencies["5"], latencies["+Inf"]) == (0, 1, 1, 2)


@pytest.mark.parametrize("columns", [0, 4])
def test_a_request_without_an_input_is_counted(columns):
    counters = Counters()
    counters.count(np.zeros((0, 1), bool), 0.1, {"layer0": np.zeros((0, columns), bool)})
    stats = counters.stats()
    assert (stats.inferences, stats.flagged, stats.requests, stats.flagged_by_site) == (0, 0, 1, {"layer0": 0})


def test_before_the_first_request():
    assert Counters().stats() == Stats()
    assert Stats().flagged_ratio == 0


def test_a_window_is_the_difference_of_two_readings():
    counters = counted()
    before = counters.stats()
    counters.count(np.array([True]), 0.5, {"layer1": np.ones((1, 2), bool), "new": np.ones((1, 2), bool)})
    window = counters.stats().since(before)
    assert (window.inferences, window.flagged, window.requests, window.seconds) == (1, 1, 1, 0.5)
    assert window.flagged_by_site == {"layer0": 0, "layer1": 1, "new": 1}
    assert sum(window.latencies) == 1
    assert counters.stats().since(Stats()) == counters.stats()


def test_threads_lose_no_count():
    counters = Counters()

    def work() -> None:
        for _ in range(500):
            counters.count(np.array([True, False]), 0.001, {"s": np.array([[True], [False]])})

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = counters.stats()
    assert (stats.inferences, stats.flagged, stats.requests, stats.flagged_by_site["s"]) == (8_000, 4_000, 4_000, 4_000)


def test_prometheus_scrapes_what_was_counted():
    registry, counters = CollectorRegistry(), counted()
    register_prometheus(counters.stats, registry)
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(registry).decode())}
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert samples["atpatch_inferences_total",] == 5
    assert samples["atpatch_flagged_inferences_total", ("site", "")] == 2
    assert samples["atpatch_flagged_inferences_total", ("site", "layer0")] == 1
    assert samples["atpatch_flagged_ratio",] == 0.4
    assert samples["atpatch_request_seconds_count",] == 2
    assert samples["atpatch_request_seconds_bucket", ("le", "0.005")] == 1
    counters.count(np.array([True]), 0.1)
    assert "atpatch_inferences_total 6.0" in generate_latest(registry).decode()


def test_opentelemetry_observes_what_was_counted():
    reader, counters = InMemoryMetricReader(), counted()
    provider = MeterProvider([reader])
    register_opentelemetry(counters.stats, provider.get_meter("test"))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    found = {
        (metric.name, point.attributes.get("atpatch.site")): point.value
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    assert found["atpatch.inferences", None] == 5
    assert found["atpatch.flagged_inferences", ""] == 2
    assert found["atpatch.flagged_inferences", "layer0"] == 1
    assert found["atpatch.flagged_ratio", None] == 0.4
    assert found["atpatch.request.duration", None] == pytest.approx(7.004)
    provider.shutdown()


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 300), st.data(), st.floats(0.5, 0.999))
def test_the_interval_is_that_of_binomial_tails(inputs, data, confidence):
    """Clopper-Pearson: at the bounds, what was seen or more, or less, has half of the rest of the probability."""
    flagged = data.draw(st.integers(0, inputs))
    found = drift(Stats(inferences=inputs, flagged=flagged), 0.01, confidence=confidence)

    def tail(rate: float, counts: range) -> float:
        return math.fsum(math.comb(inputs, k) * rate**k * (1 - rate) ** (inputs - k) for k in counts)

    half = (1 - confidence) / 2
    # a root of a sum of up to 300 terms in float64
    assert (
        found.low == 0 if flagged == 0 else tail(found.low, range(flagged, inputs + 1)) == pytest.approx(half, rel=1e-6)
    )
    assert (
        found.high == 1 if flagged == inputs else tail(found.high, range(flagged + 1)) == pytest.approx(half, rel=1e-6)
    )
    assert found.low <= found.rate <= found.high


def test_an_alarm_is_for_more_flags_than_clean_inputs_have():
    assert not drift(Stats(inferences=1_000, flagged=12), 0.01).alarm  # 1.2 % by chance
    assert drift(Stats(inferences=1_000, flagged=40), 0.01).alarm
    assert not drift(Stats(inferences=10, flagged=1), 0.01).alarm  # ten inputs tell little
    assert not drift(Stats(inferences=1_000, flagged=0), 0.01).alarm


@pytest.mark.parametrize(
    ("stats", "rate", "confidence"),
    [
        (Stats(), 0.01, 0.99),
        (Stats(inferences=1), 1.01, 0.99),
        (Stats(inferences=1), -0.1, 0.99),
        (Stats(inferences=1), 0.1, 1),
    ],
)
def test_what_tells_nothing_is_refused(stats, rate, confidence):
    with pytest.raises(ServingError):
        drift(stats, rate, confidence=confidence)
