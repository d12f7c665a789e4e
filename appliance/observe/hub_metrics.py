"""The hub's Prometheus metrics. No device's name is a label: a fleet has thousands of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from appliance.observe.metrics import PREFIX

HUB_PREFIX = f"{PREFIX}hub_"


class HubMetrics:
    """Owns every metric of the hub's process.

    Attributes:
        registry: Where a further part may register its own.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._received = self.counter("messages", "Messages of devices", "kind")
        self._refused = self.counter("refused_messages", "Messages of devices that nobody read", "reason")
        self._devices = self.gauge("devices", "Devices", "status")
        self._http_requests = self.counter("http_requests", "HTTP requests answered", "route", "status")
        self._http_running = self.gauge("http_requests_in_progress", "HTTP requests being answered")

    def counter(self, stem: str, meaning: str, *labels: str) -> Counter:
        """Make a counter of the hub's."""
        return Counter(HUB_PREFIX + stem, meaning, labels, registry=self.registry)

    def gauge(self, stem: str, meaning: str, *labels: str) -> Gauge:
        """Make a gauge of the hub's."""
        return Gauge(HUB_PREFIX + stem, meaning, labels, registry=self.registry)

    def show(self, stem: str, meaning: str, value: Callable[[], float]) -> None:
        """Make a gauge that shows a value whenever it is read."""
        self.gauge(stem, meaning).set_function(value)

    def received(self, kind: str) -> None:
        """Count a message of a kind of topic."""
        self._received.labels(kind).inc()

    def refused(self, reason: str) -> None:
        """Count a message that nobody read; the reason is one of a few slugs."""
        self._refused.labels(reason).inc()

    def show_devices(self, counts: Mapping[str, int]) -> None:
        """Set how many devices there are by status."""
        for status, count in counts.items():
            self._devices.labels(status).set(count)

    def http_started(self) -> None:
        """Count a request that came in."""
        self._http_running.inc()

    def http_finished(self, route: str, status: int) -> None:
        """Count a request that was answered; the route is a template, never the path that a client sent."""
        self._http_running.dec()
        self._http_requests.labels(route, str(status)).inc()

    def render(self) -> bytes:
        """Return every series in Prometheus' text format."""
        return generate_latest(self.registry)
