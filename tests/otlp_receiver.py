"""A receiver of OTLP over HTTP, which decodes what comes with OpenTelemetry's own messages."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Seen:
    """A span as it came. ids are hexadecimal; `parent` is "" for the first of a trace."""

    name: str
    trace: str
    id: str
    parent: str
    said: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """`url` is what exporters are given. spans, metrics: what has come; metrics are (name, labels, point)."""

    spans: list[Seen] = field(default_factory=list)
    metrics: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list)
    resources: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> Self:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                (receiver.take_spans if self.path.endswith("/v1/traces") else receiver.take_metrics)(body)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take_spans(self, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = plain(group.resource.attributes)
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Seen(span.name, span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(),
                             plain(span.attributes), resource)
                    )  # fmt: skip

    def take_metrics(self, body: bytes) -> None:
        from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

        for group in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            self.resources.append(plain(group.resource.attributes))
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    data = getattr(metric, metric.WhichOneof("data"))
                    for point in data.data_points:
                        self.metrics.append((metric.name, plain(point.attributes), point))

    def named(self, name: str) -> list[Seen]:
        return [span for span in self.spans if span.name == name]

    def until(self, there: Callable[[], Any], seconds: float = 60.0) -> None:
        """Wait until something has come."""
        end = time.monotonic() + seconds
        while not there():
            assert time.monotonic() < end, [span.name for span in self.spans]
            time.sleep(0.05)


def plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
