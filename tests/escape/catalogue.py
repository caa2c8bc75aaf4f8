"""Every attempt, in the order of the table."""

from __future__ import annotations

from tests.escape import files, identity, kernel_calls, neighbours, network, protocol, resources, state
from tests.escape.attempt import Attempt

ATTEMPTS: list[Attempt] = [
    *kernel_calls.ATTEMPTS, *identity.ATTEMPTS, *files.ATTEMPTS, *network.ATTEMPTS, *resources.ATTEMPTS,
    *protocol.ATTEMPTS, *neighbours.ATTEMPTS, *state.ATTEMPTS,
]
BY_KEY = {attempt.key: attempt for attempt in ATTEMPTS}
assert len(BY_KEY) == len(ATTEMPTS), "two attempts of one name"
