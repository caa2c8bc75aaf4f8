"""Findings about the OCI runtimes of a real engine: each has started a container, or the finding has the reason."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rock.runtime.docker.engine import Engine
from rock.runtime.docker.oci import runtime_findings
from rock.runtime.namespace.probe import Finding
from tests.runtime.docker import engines
from tests.runtime.docker.engines import TestEngine


@pytest.fixture(scope="module")
def engine() -> Iterator[TestEngine]:
    made = TestEngine(Path(tempfile.mkdtemp(prefix="rock-engine-")))
    try:
        runsc = {"path": f"{engines.programs()}/usr/bin/runsc", "runtimeArgs": ["--platform=ptrace", "--network=none"]}
        made.settings = {"runtimes": {"runsc": runsc, "gone": {"path": "/nonexistent/kata-runtime"},
                                      "broken": {"path": "/bin/false"}}}  # fmt: skip
        made.start()
    except engines.CannotBeHad as error:
        made.remove()
        pytest.skip(str(error))
    yield made
    made.remove()


def findings(engine: TestEngine) -> dict[str, Finding]:
    async def work() -> list[Finding]:
        client = Engine(engine.host)
        return await runtime_findings(client, await client.facts())

    return {one.name.removeprefix("OCI runtime "): one for one in asyncio.run(work())}


def test_each_runtime_has_a_finding(engine: TestEngine) -> None:
    before = engine.json("/images/json?all=1")
    found = findings(engine)
    assert found["runc"].ok is True and "a container ran in" in found["runc"].detail, found
    assert found["runsc"].ok is True and found["runsc"].detail.startswith("runsc: "), found
    gone, broken = found["gone"], found["broken"]
    assert gone.ok is False and gone.detail == "its program /nonexistent/kata-runtime does not exist", gone
    assert broken.ok is False and "it starts no container: " in broken.detail and broken.hint, broken
    assert engine.containers(rock__doctor="1") == [] and engine.json("/images/json?all=1") == before, "nothing is left"


def test_a_kind_that_is_not_registered(engine: TestEngine) -> None:
    async def work() -> list[Finding]:
        client = Engine(engine.host)
        facts = await client.facts()
        del facts.runtimes["gone"]  # whose program is named kata-runtime
        return await runtime_findings(client, facts)

    kata = next(one for one in asyncio.run(work()) if one.name == "OCI runtime kata")
    assert kata.ok is None and "oci_runtime=kata is refused" in kata.detail and kata.hint == "install kata"
