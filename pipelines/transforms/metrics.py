"""Beam's metrics of workers: segments in, counters, distributions and gauges of the engine out.

Their namespace is the kind of worker; a name ends with its unit.
"""

from collections.abc import Set
from typing import Any

from apache_beam.metrics import Metrics

from agents.config import STALENESS_BOUNDS
from infra.parameter_server.protocol import WORKER_KINDS
from pipelines.monitoring.beam_counters import UNWRITTEN, merged
from pipelines.workers.segment import Segment

COUNTERS = {
    'agent_steps': 'agent_steps',
    'gradients': 'gradients',
    'outlier_gradients': 'outliers',
    'stale_gradients': 'stale',
    'invalid_gradients': 'invalid',
}
"""The field of a segment that a counter sums, by the counter's name."""


class WorkerMetrics:
    """The metrics of one kind of worker."""

    def __init__(self, kind: str):
        self._counters = {name: Metrics.counter(kind, name) for name in (*COUNTERS, 'episodes')}
        self._return = Metrics.distribution(kind, 'return_points')
        self._length = Metrics.distribution(kind, 'episode_length_agent_steps')
        self._staleness = Metrics.distribution(kind, 'staleness_updates')
        self._gradient = Metrics.distribution(kind, 'microseconds_per_gradient')
        self._segment = Metrics.distribution(kind, 'segment_milliseconds')
        self._start = Metrics.distribution(kind, 'start_milliseconds')
        self._last = Metrics.gauge(kind, 'last_segment')

    def started(self, seconds: float) -> None:
        """Adds the start of an element or of its next part."""
        self._start.update(round(1e3 * seconds))

    def update(self, segment: Segment) -> None:
        """Adds a segment."""
        for name, field in COUNTERS.items():
            self._counters[name].inc(getattr(segment, field))
        self._counters['episodes'].inc(len(segment.episodes))
        for episode in segment.episodes:
            self._return.update(round(episode.raw_return))
            self._length.update(episode.agent_steps)
        # By the upper bounds of the histogram's bins; the last bin has none.
        bounds = (*STALENESS_BOUNDS, STALENESS_BOUNDS[-1])
        for staleness, count in zip(bounds, segment.staleness):
            for _ in range(count):
                self._staleness.update(staleness)
        if segment.gradients:
            self._gradient.update(round(1e6 * segment.seconds / segment.gradients))
        self._segment.update(round(1e3 * segment.seconds))
        self._last.set(segment.segment)


def committed(result: Any) -> dict[str, dict[str, Any]]:
    """What a job's engine has counted, by kind of worker and name; empty if it tells nothing.

    A counter is a number, a distribution has `count`, `sum`, `min` and `max`. Rows not written are
    beside the kinds (`UNWRITTEN`).
    """
    try:
        found = result.metrics().query()
    except (NotImplementedError, AttributeError):
        return {}
    totals: dict[str, dict[str, Any]] = {}
    for metric in (*found['counters'], *found['distributions'], *found.get('string_sets', ())):
        name, value = metric.key.metric, metric.committed
        if name.namespace not in (*WORKER_KINDS, UNWRITTEN) or value is None:
            continue
        held = totals.setdefault(name.namespace, {})
        if isinstance(value, Set):
            value = sorted(value)
        elif not isinstance(value, int):
            value = {field: getattr(value, field) for field in ('count', 'sum', 'min', 'max')}
        held[name.name] = merged(held.get(name.name), value)
    return totals
