"""Files in ROCK_HOME by which clients of the same account find their server, and prove that they are its owner."""

from __future__ import annotations

NOTE = "server.json"  # where the server listens: pid, host, port
OWNER_KEY = "owner.key"  # a key that a server without a key of its own makes at each start; mode 0600
