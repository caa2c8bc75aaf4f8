"""Files in ROCK_HOME by which clients of the same account find their server, and prove that they are its owner."""

from __future__ import annotations

NOTE = "server.json"  # where the server listens: pid, host, port
STORE_NOTE = "store.json"  # in the run folder: the identity of the store that the sandboxes belong to
RESTORED = "restored"  # in its place, of a store that a backup was put in
OWNER_KEY = "owner.key"  # a key that a server without a key of its own makes at each start; mode 0600
