"""The model gateway: runs, recorded calls, upstreams (docs/decisions/0039-model-gateway.md)."""
