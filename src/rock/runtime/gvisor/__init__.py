"""Runtime "gvisor": sandboxes under gVisor's `runsc`, without a container engine."""
