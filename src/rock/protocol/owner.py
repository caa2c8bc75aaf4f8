"""Files in ROCK_HOME by which clients of the same account find their server, and prove that they are its owner."""

from __future__ import annotations

NOTE = "server.json"  # where the server listens: pid, host, port
STORE_NOTE = "store.json"  # in the run folder: the identity of the store that owns the sandboxes
RESTORED = "restored"  # the identity of a store into which a backup was restored
OWNER_KEY = "owner.key"  # a key that a server without a key of its own makes at each start; mode 0600
