"""The backend of deepagents: the standard tests of LangChain for sandboxes, and errors that they leave out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checks import check, raises
from deepagents import create_deep_agent
from deepagents.backends.protocol import ExecuteResponse, FileDownloadResponse, FileUploadResponse
from deepagents.backends.sandbox import BaseSandbox
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests.sandboxes import SandboxIntegrationTests

from rock.errors import InvalidConfig, SandboxError
from rock.integrations.deepagents import LABELS, RockBackend
from rock.sync import Sandbox


class Local(BaseSandbox):  # type: ignore[misc]
    """A backend on this machine: what it does not pass, deepagents itself does not pass."""

    id = "local"

    def execute(self, command: str, *, timeout: int | None = None) -> ExecuteResponse:
        done = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ExecuteResponse(output=done.stdout, exit_code=done.returncode)

    def upload_files(self, files: Any) -> Any:
        for path, data in files:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(data)
        return [FileUploadResponse(path=path) for path, _ in files]

    def download_files(self, paths: Any) -> Any:
        return [FileDownloadResponse(path=path, content=Path(path).read_bytes()) for path in paths]


class TestStandard(SandboxIntegrationTests):  # type: ignore[misc]
    @pytest.fixture(scope="class")
    def sandbox(self) -> Iterator[Any]:
        with RockBackend("host", memory="512m") as backend:
            yield backend

    @pytest.fixture(scope="class")
    def sandbox_backend(self, sandbox: Any) -> Iterator[Any]:
        yield sandbox


class TestLocal(TestStandard):
    @pytest.fixture(scope="class")
    def sandbox(self) -> Iterator[Any]:
        yield Local()


class Report:
    """The outcomes of the tests, by class and name."""

    def __init__(self) -> None:
        self.failed: dict[str, dict[str, str]] = {"TestStandard": {}, "TestLocal": {}}
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        kind, name = report.nodeid.split("::")[-2:]
        if report.failed:
            self.failed[kind][name] = str(report.longrepr)[-400:]
        elif report.when == "call" and kind == "TestStandard":
            self.passed.append(name)


class Scripted(GenericFakeChatModel):  # type: ignore[misc]
    def bind_tools(self, *_: Any, **__: Any) -> Any:
        return self


def running() -> int:
    return len(Sandbox.list(states="running", labels=LABELS))


def main() -> None:
    with check("an agent writes a file and runs a command"), RockBackend("host", memory="512m") as backend:
        calls = [("write_file", {"file_path": "/tmp/f.py", "content": "print(6 * 7)"}),
                 ("execute", {"command": "python3 /tmp/f.py"})]  # fmt: skip
        messages = [AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call-{name}"}])
                    for name, args in calls]  # fmt: skip
        agent = create_deep_agent(Scripted(messages=iter([*messages, AIMessage("42")])), backend=backend)
        found = agent.invoke({"messages": [("user", "Multiply")]})["messages"]
        assert any("42" in str(one.content) for one in found if one.type == "tool"), found
        assert backend.sandbox.files.read("/tmp/f.py") == b"print(6 * 7)"
    with check("a timeout kills the command"), RockBackend("host", memory="512m") as backend:
        done = backend.execute("echo begun; sleep 4321", timeout=1)
        assert done.exit_code == 124 and "begun" in done.output and "1 s" in done.output
    with check("a long output is truncated"), RockBackend("host", memory="512m", max_output_bytes=1000) as backend:
        done = backend.execute("head -c 5000 /dev/zero | tr '\\0' a; echo end >&2")
        assert done.truncated and len(done.output) < 1200 and done.output.endswith("end\n")
    with check("a sandbox that ended raises"):
        backend = RockBackend("host", memory="512m")
        backend.close()
        for call in (lambda: backend.execute("true"), lambda: backend.download_files(["/etc/hostname"]),
                     lambda: backend.upload_files([("/tmp/x", b"")])):  # fmt: skip
            with raises(SandboxError):
                call()
    with check("a sandbox of the caller is not stopped"), Sandbox("host", memory="512m") as sandbox:
        with RockBackend(sandbox=sandbox) as backend:
            assert backend.id == sandbox.sandbox_id
        assert sandbox.exec("true").exit_code == 0
    with check("options are rejected by name"):
        with raises(InvalidConfig, "template"):
            RockBackend("host", template="x")
        with raises(InvalidConfig, "sandbox"):
            RockBackend()
        assert running() == 0


if __name__ == "__main__":
    main()
    # Without the configuration and the fixtures of the tests around this script.
    report = Report()
    pytest.main([__file__, "-q", "-s", "--noconftest", "-c", "/dev/null", "--rootdir", "/tmp", "-p", "no:cacheprovider",
                 "--asyncio-mode=auto", "-W", "ignore"], plugins=[report])  # fmt: skip
    failed, local = report.failed.values()
    for name in (*report.passed, *(name for name in failed if name not in local)):
        print("\n" + json.dumps({"check": f"standard test {name}", "reason": failed.get(name, "")}))
    both = sorted(failed.keys() & local.keys())
    with check(f"{len(both)} standard tests are not passed by deepagents itself: {', '.join(both)}"):
        assert len(both) < 10
