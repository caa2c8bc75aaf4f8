"""Each test of the suite for each runtime that can be had here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rock.runtime.base import Runtime
from tests.runtime.boxes import Box
from tests.runtime.conformance.subject import Subject, here, subjects


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "subject" in metafunc.fixturenames:
        found = [subjects()[name] for name, reason in here().items() if reason is None]
        metafunc.parametrize("subject", [_short(subject, metafunc) for subject in found],
                             ids=[subject.name for subject in found], scope="session")  # fmt: skip


def _short(subject: Subject, metafunc: pytest.Metafunc) -> Any:
    """The subject, skipped where it is only sampled, and expected to fail where that is known."""
    module, test = metafunc.module.__name__.rpartition(".")[2], metafunc.function.__name__
    if test in subject.known:
        reason = subject.known[test]
        strict = not reason.startswith("at times ")
        return pytest.param(subject, marks=pytest.mark.xfail(reason=reason, strict=strict))
    if subject.sample is None or (module in subject.sample and test != "test_fifty_at_once"):
        return subject
    return pytest.param(subject, marks=pytest.mark.skip(reason=f"{subject.name} is sampled here; all: `make docker`"))


class Bench:
    """The runtime of one test. `runtime()` opens it, any number of times one after the other; `box()` makes a sandbox
    of it as well. After each nothing may be left that was not there before."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject = subject
        self.folder = folder

    @asynccontextmanager
    async def runtime(self) -> AsyncIterator[Runtime]:
        """Open; closed at the end, which ends no sandbox."""
        runtime: Runtime = self.subject.make(self.folder)
        await runtime.open()
        try:
            yield runtime
        finally:
            await runtime.close()

    def boxed(self, runtime: Runtime, handle: Any) -> Box:
        return Box(runtime, handle, self.subject.home(handle), self.subject.python)

    @asynccontextmanager
    async def box(self, **config: Any) -> AsyncIterator[Box]:
        before = self.subject.leftovers(self.folder)
        async with self.runtime() as runtime:
            handle = await runtime.create("box", self.subject.config(**config))
            assert handle.isolation == self.subject.isolation
            box = self.boxed(runtime, handle)
            try:
                yield box
            finally:
                box.close()
                await runtime.destroy(handle)
        assert self.subject.leftovers(self.folder) == before

    def __call__(self, **config: Any) -> AbstractAsyncContextManager[Box]:
        return self.box(**config)


@pytest.fixture
def box(request: pytest.FixtureRequest, subject: Subject, tmp_path: Path) -> Bench:
    """Makes sandboxes: `async with box(pids=64) as b`. Skips what the runtime does not declare."""
    wanted = tuple(need for mark in request.node.iter_markers("needs") for need in mark.args)
    lacking = subject.lacks(wanted, tmp_path / "declared")
    if lacking:
        pytest.skip(f"the runtime {subject.name} does not declare {', '.join(lacking)}")
    return Bench(subject, tmp_path)
