"""Requests that the OpenAPI page allows, and some that it does not, made by schemathesis: none is an internal error,
none hangs. (A session whose shell cannot start is a typed 500.) `make test` makes a few of each; ROCK_TEST_FUZZ=N makes
N (`make fuzz`)."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from tests.admin.conftest import OWNER as KEY
from tests.conftest import IMAGE, RunningServer

from rock.sync import Client, Sandbox, SandboxConfig

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install -e .[dev]")
requests = pytest.importorskip("requests")

EXAMPLES = int(os.environ.get("ROCK_TEST_FUZZ", "4"))
# They pull, install and build, from networks that the tests may not have; the first two are tried with what does not.
# What joins gets sandboxes that others wait for.
_NOT = {"build_env_v1_envs_build_post", "open_env", "commit_sandbox", "create_sandbox", "join_worker_v1_workers_post"}
_SECONDS = 60  # without an answer it hangs


@pytest.fixture(scope="module")
def operations(guarded: RunningServer) -> dict[str, Any]:
    reply = requests.get(f"{guarded.url}/openapi.json", headers={"authorization": f"Bearer {KEY}"}, timeout=30)
    schema = schemathesis.openapi.from_dict(reply.json())
    found = [result.ok() for result in schema.get_all_operations()]
    assert len(found) > 50
    return {f"{operation.method} {operation.path}": operation for operation in found}


@pytest.mark.timeout(0 if EXAMPLES > 10 else 300)
@pytest.mark.parametrize("share", range(4))
def test_no_request_is_an_internal_error(guarded: RunningServer, operations: dict[str, Any], share: int) -> None:
    session = requests.Session()
    session.trust_env = False
    config = SandboxConfig(base_url=guarded.url, api_key=KEY, image=IMAGE, memory="128m", cpus=0.5)
    statuses: Counter[int] = Counter()
    with session, Sandbox(config) as sandbox:
        for number, (name, operation) in enumerate(operations.items()):
            if number % 4 == share and operation.definition.raw.get("operationId") not in _NOT:
                _try(session, guarded, sandbox, name, operation, statuses)
        sandbox.resume()  # a request may have paused it
        assert sandbox.execute("echo here").stdout == "here\n"
        with Client(guarded.url, KEY) as client:
            assert client.server_info().pid == guarded.pid
    print(f"\n{dict(statuses)}")
    assert sum(statuses.values()) > EXAMPLES * 5


def _try(session: Any, server: RunningServer, sandbox: Sandbox, name: str, operation: Any,
         statuses: Counter[int]) -> None:  # fmt: skip
    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck),
              phases=[Phase.generate])  # fmt: skip
    @given(case=operation.as_strategy())
    def ask(case: Any) -> None:
        ends = operation.method == "delete" or name.endswith("/stop")
        if "sandbox_id" in (case.path_parameters or {}) and len(str(case.path_parameters)) % 4 and not ends:
            case.path_parameters["sandbox_id"] = sandbox.sandbox_id
        if isinstance(case.query, dict):
            case.query.pop("wait", None)  # waiting as long as was asked for is no hang
        try:
            reply = case.call(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, session=session,
                              timeout=_SECONDS)  # fmt: skip
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            return  # requests does not send it
        statuses[reply.status_code] += 1
        told = reply.content[:2000].decode("utf-8", "replace")  # a stream has frames
        assert reply.status_code != 500 or '"code":"internal"' not in told.replace(" ", ""), f"{name}: {told}"
        if reply.status_code >= 400 and reply.headers.get("content-type") == "application/json" and reply.content:
            error = json.loads(reply.content)["error"]
            assert error["code"] and error["message"], f"{name}: {told}"

    ask()
