"""Counts and gauges as Prometheus' families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

PREFIX: Final = "roost_router_"


def counter(
    name: str, text: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]
) -> Metric:
    """A counter's series: `counts` by the values of `labels`, in their order."""
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for values, count in counts.items():
        family.add_metric(values, count)
    return family


def gauge(
    name: str, text: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]
) -> Metric:
    """Likewise of a gauge."""
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for of, value in values.items():
        family.add_metric(of, value)
    return family
