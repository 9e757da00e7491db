"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from dreamllm.server.backend import Backend, Usage

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """The counters of one server; nothing is shared between servers of one process."""

    def __init__(self, backend: Backend) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "dreamllm_requests", "Requests that were answered.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "dreamllm_request_seconds", "From a request to the end of its answer.", ["route"],
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self._queued = Histogram(
            "dreamllm_queue_seconds", "From a request to the start of its work.", buckets=_BUCKETS, registry=registry
        )
        self._tokens = Counter("dreamllm_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self._pictures = Counter("dreamllm_pictures", "Pictures read and drawn.", ["kind"], registry=registry)
        waiting = Gauge("dreamllm_waiting", "Requests in the queue.", registry=registry)
        waiting.set_function(lambda: backend.load().waiting)
        running = Gauge("dreamllm_running", "Requests that are being answered.", registry=registry)
        running.set_function(lambda: backend.load().running)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def began(self, seconds: float) -> None:
        self._queued.observe(seconds)

    def read_pictures(self, count: int) -> None:
        self._pictures.labels("prompt").inc(count)

    def used(self, usage: Usage) -> None:
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)
        self._pictures.labels("completion").inc(usage.pictures)

    def text(self) -> bytes:
        return generate_latest(self.registry)
