"""Every metric name stands here once. A process has one registry; gauges are read from its status when scraped."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from isthmus.v1 import admin_pb2

_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What every process measures. Any thread may count. Label values come from fixed sets, never from clients."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def watch_status(self, status: Callable[[], admin_pb2.GetStatusResponse]) -> None:
        """Adds the gauges; `status` is called at each scrape."""
        self.registry.register(_StatusCollector(status))

    def counters(self) -> dict[str, int]:
        """Every counter's value by its name, with labels as in `isthmus_tokens_total{kind="prompt"}`."""
        counters = [collector for collector in vars(self).values() if isinstance(collector, Counter)]
        samples = [sample for counter in counters for family in counter.collect() for sample in family.samples]
        return {_shown(sample): int(sample.value) for sample in samples if sample.name.endswith("_total")}

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class RequestMetrics(Metrics):
    """Those of a router, which alone sees requests from their beginning to their end."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = Counter(
            "isthmus_requests", "Requests ended, by finish or refusal reason", ["outcome"], registry=self.registry
        )
        self.tokens = Counter("isthmus_tokens", "Tokens: prompt, cached or generated", ["kind"], registry=self.registry)
        self.ttft_s = Histogram(
            "isthmus_ttft_seconds", "Receipt to first token sent", buckets=_LONG_S, registry=self.registry
        )
        self.itl_s = Histogram(
            "isthmus_itl_seconds", "Between consecutive tokens", buckets=_SHORT_S, registry=self.registry
        )


def _shown(sample: Sample) -> str:
    labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name


class _StatusCollector(Collector):
    """Gauges and event counts, made anew from the status at each scrape."""

    def __init__(self, status: Callable[[], admin_pb2.GetStatusResponse]):
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        yield GaugeMetricFamily("isthmus_serving", "1 while the process serves", value=float(status.serving))
        yield GaugeMetricFamily("isthmus_streams", "Requests in flight", value=status.num_streams)
        yield GaugeMetricFamily("isthmus_queued", "Requests that wait", value=status.num_queued)
        blocks = GaugeMetricFamily(
            "isthmus_blocks", "Cache blocks by state; cached ones are free too", labels=["state"]
        )
        for state in ("total", "free", "cached", "referenced", "draining"):
            blocks.add_metric([state], getattr(status.blocks, state))
        yield blocks
        events = CounterMetricFamily("isthmus_events", "Refusals, alarms and the like, by name", labels=["event"])
        for name, count in status.counters.items():
            if not name.startswith("isthmus_"):
                events.add_metric([name], count)
        yield events
