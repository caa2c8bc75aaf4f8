"""What a server tells of itself: logs, metrics and traces. Nothing here knows anything of what is above.

    context.py   what is being done now, and for whom: the request id, the sandbox, the tenant, the trace
    logs.py      lines with those in them, as text or as JSON
    metrics.py   counters, gauges and histograms, and their text for Prometheus
    tracing.py   spans, with a tracer; otel.py exports them, and the metrics, by OTLP
"""

from rock.telemetry.logs import set_log_level, set_up_logs

__all__ = ["set_log_level", "set_up_logs"]
