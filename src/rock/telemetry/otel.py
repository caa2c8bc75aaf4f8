"""Export to OpenTelemetry, by OTLP over HTTP. The only file that knows its packages: the extra `rock-sandbox[otel]`.

What the standard variables say (OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, ...) its own
packages read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from rock.telemetry.metrics import Distribution, Family, Number
from rock.telemetry.tracing import Kind, Value

_ANSWER_WITHIN = 5.0  # seconds that a receiver has
_LEAVE_WITHIN = 3.0  # seconds for the last spans when a process ends
_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_SCOPE = "rock"
log = logging.getLogger("rock.telemetry")


class OtelSpan:
    """A span of OpenTelemetry as ours."""

    def __init__(self, made: trace.Span) -> None:
        self._made = made
        context = made.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def tell(self, name: str, value: Value) -> None:
        self._made.set_attribute(name, value)

    def end(self, error: str = "") -> None:
        if error:
            self._made.set_status(Status(StatusCode.ERROR, error))
        self._made.end()


def start(
    tracer: trace.Tracer, name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Value]
) -> OtelSpan:
    """A span of any tracer of OpenTelemetry. parent: a traceparent; None for the span that is current there."""
    context = None
    if parent is not None:
        _, trace_id, span_id, flags = parent.split("-")
        of = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
        context = trace.set_span_in_context(NonRecordingSpan(of))
    return OtelSpan(tracer.start_span(name, context, _KINDS[kind], dict(attributes)))


class Export:
    """Spans and metrics of this process on their way to a receiver.

    endpoint: the base URL of a receiver, as http://collector:4318. attributes: what everything is tagged with. service:
    the name under which this process appears. Made with a thread of its own, which `close` ends.
    """

    def __init__(self, endpoint: str, attributes: Mapping[str, str], service: str) -> None:
        base = endpoint.rstrip("/")
        self._resource = Resource.create({"service.name": service, **attributes})
        spans = OTLPSpanExporter(f"{base}/v1/traces", timeout=_ANSWER_WITHIN)
        self._provider = TracerProvider(resource=self._resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(spans))
        self._tracer = self._provider.get_tracer(_SCOPE)
        self._metrics = OTLPMetricExporter(f"{base}/v1/metrics", timeout=_ANSWER_WITHIN)
        self._began = time.time_ns()

    def start(self, name: str, kind: Kind, parent: str | None, attributes: Mapping[str, Value]) -> OtelSpan:
        if parent is None:  # not what is current in OpenTelemetry: that would be another's
            context = trace.set_span_in_context(trace.INVALID_SPAN)
            return OtelSpan(self._tracer.start_span(name, context, _KINDS[kind], dict(attributes)))
        return start(self._tracer, name, kind, parent, attributes)

    def send_metrics(self, families: Iterable[Family[Number] | Family[Distribution]]) -> bool:
        """Bring the metrics to the receiver; False when it did not take them. Blocks."""
        now = time.time_ns()
        metrics = [self._metric(family, now) for family in families if family.series]
        scope = export.ScopeMetrics(InstrumentationScope(_SCOPE), metrics, "")
        data = export.MetricsData([export.ResourceMetrics(self._resource, [scope], "")])
        return self._metrics.export(data) is export.MetricExportResult.SUCCESS

    def _metric(self, family: Family[Number] | Family[Distribution], now: int) -> export.Metric:
        numbers: list[export.NumberDataPoint] = []
        distributions: list[export.HistogramDataPoint] = []
        for values, series in family.all():
            labels = dict(zip(family.labels, values, strict=True))
            if isinstance(series, Number):
                numbers.append(export.NumberDataPoint(labels, self._began, now, series.value))
                continue
            counts = list(series.counts)
            most = series.bounds[-1] if counts[-1] else 0.0
            distributions.append(
                export.HistogramDataPoint(labels, self._began, now, sum(counts), series.total, counts,
                                          list(series.bounds), 0.0, most)
            )  # fmt: skip
        since_start = export.AggregationTemporality.CUMULATIVE
        kinds: dict[str, export.Sum | export.Gauge | export.Histogram] = {
            "counter": export.Sum(numbers, since_start, True),
            "gauge": export.Gauge(numbers),
            "histogram": export.Histogram(distributions, since_start),
        }
        unit = "s" if "_seconds" in family.name else "By" if family.name.endswith("_bytes") else ""
        return export.Metric(family.name, family.text, unit, kinds[family.kind])

    def close(self) -> None:
        """Send what is left, for a few seconds at most."""

        def leave() -> None:
            self._provider.shutdown()
            self._metrics.shutdown()

        leaving = threading.Thread(target=leave, name="rock-otel-close", daemon=True)
        leaving.start()
        leaving.join(_LEAVE_WITHIN)
        if leaving.is_alive():
            log.warning("the receiver of traces did not answer; the last spans are lost")


def current() -> trace.Span | None:
    """The span that the program of this process is in by its own use of OpenTelemetry, if it is in one."""
    found = trace.get_current_span()
    return found if found.get_span_context().is_valid else None


def follow(name: str, attributes: Mapping[str, Value]) -> OtelSpan:
    """A client's span within the current one, by the program's own tracer."""
    return start(trace.get_tracer(_SCOPE), name, "client", None, attributes)
