"""What a running server tells Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from edgepress.pipeline.serve.engine import Done, Engine, Event, Failed, Job, Piece
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters of one engine."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("edgepress_requests", "Requests that were begun, by how they ended", ["end"], registry=registry)
        self._tokens = Counter("edgepress_tokens", "Tokens, of prompts read or cached and of answers", ["kind"], registry=registry)
        self._first = Histogram("edgepress_first_token_seconds", "Wait for the first text", buckets=_SECONDS, registry=registry)
        self._all = Histogram("edgepress_answer_seconds", "Wait for a whole answer", buckets=_SECONDS, registry=registry)
        Gauge("edgepress_running", "Requests that take turns", registry=registry).set_function(lambda: engine.running)
        Gauge("edgepress_waiting", "Requests in line", registry=registry).set_function(lambda: len(engine.waiting))
        Gauge("edgepress_cache_bytes", "Memory of key-value caches", registry=registry).set_function(lambda: engine.cache_bytes)

    def text(self) -> tuple[bytes, str]:
        """All of it, and its media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    async def followed(self, job: Job, events: asyncio.Queue[Event]) -> AsyncIterator[list[Event]]:
        """The events of a job, as many as are there at a time, counted as they pass."""
        begun, first, end = time.monotonic(), True, "cancelled"
        try:
            while True:
                several = [await events.get()]
                while not events.empty():
                    several.append(events.get_nowait())
                event = several[-1]
                if first and isinstance(several[0], Piece):
                    self._first.observe(time.monotonic() - begun)
                    first = False
                if isinstance(event, Failed):
                    end = "failed"
                elif isinstance(event, Done):
                    end = event.reason
                    self._all.observe(time.monotonic() - begun)
                    for kind, count in (
                        ("read", event.prompt - event.cached), ("cached", event.cached), ("new", event.new),
                    ):  # fmt: skip
                        self._tokens.labels(kind).inc(count)
                yield several
                if end != "cancelled":
                    return
        finally:
            self._requests.labels(end).inc()
