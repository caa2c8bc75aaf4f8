"""The SDK against a real server: both faces, the ways frameworks call it, and what it does when things go wrong."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rock import errors
from rock.actions import (
    Action,
    Command,
    CreateBashSessionRequest,
    Observation,
    ReadFileRequest,
    UploadRequest,
    WriteFileRequest,
)
from rock.sdk.sandbox.client import RunMode, Sandbox, SandboxGroup
from rock.sdk.sandbox.config import SandboxConfig, SandboxGroupConfig
from rock.sync import Client
from rock.sync import Sandbox as Blocking

IMAGE = "host"


@pytest.fixture
def box(server: Any) -> Iterator[Blocking]:
    with Blocking(image=IMAGE, memory="512m", cpus=1.0) as made:
        yield made


def other_face(box: Blocking) -> Sandbox:
    """The same sandbox, asynchronously."""
    sandbox = Sandbox(image=IMAGE)
    sandbox.sandbox_id = box.sandbox_id
    return sandbox


# ---- as frameworks call it


def test_every_call_in_its_own_loop_and_from_many_threads(box: Blocking) -> None:
    sandbox = other_face(box)

    def trajectory(number: int) -> str:
        session = f"s{number}"
        asyncio.run(sandbox.create_session(CreateBashSessionRequest(session=session, env={"N": str(number)})))
        for turn in range(10):
            seen = asyncio.run(sandbox.arun(f"echo $N {turn}", session=session))
            assert (seen.output, seen.exit_code) == (f"{number} {turn}\n", 0)
        asyncio.run(sandbox.close_session(session))
        return session

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(trajectory, range(16)))) == 16
    assert {info.session for info in box.sessions.list()} <= {"default"}


def test_a_sandbox_crosses_loops_and_colours(server: Any) -> None:
    sandbox = Sandbox(SandboxConfig(image=IMAGE, memory="512m"))
    asyncio.run(sandbox.start())
    try:
        seen = asyncio.run(sandbox.arun("echo one; false"))
        assert (seen.output, seen.exit_code) == ("one\n", 1)
        again = Blocking().attach(sandbox.sandbox_id or "")
        assert again.arun("echo $?").output == "1\n"  # one shell, whoever calls
        assert asyncio.run(sandbox.is_alive()) and again.is_alive().is_alive
    finally:
        asyncio.run(sandbox.stop())
    asyncio.run(sandbox.stop())  # a second time is nothing
    assert not asyncio.run(sandbox.is_alive())
    status = asyncio.run(sandbox.get_status(include_all_states=True))
    assert (status.state, status.is_alive) == ("stopped", False) and status.status == {} | (status.status or {})
    with pytest.raises(errors.Expired):
        asyncio.run(sandbox.arun("echo"))
    asyncio.run(sandbox.delete())
    with pytest.raises(errors.NotFound):
        asyncio.run(sandbox.get_status())
    assert asyncio.run(sandbox.close()).success


# ---- sessions


def test_check(box: Blocking) -> None:
    assert box.arun("exit_with() { return 7; }; exit_with").exit_code == 7
    with pytest.raises(errors.CommandFailed, match="exit code 7") as caught:
        box.arun("echo before; exit_with", check="raise")
    seen = caught.value.observation
    assert isinstance(seen, Observation) and seen.output == "before\n" and seen.exit_code == 7
    with pytest.raises(errors.CommandFailed):
        box.run_in_session(Action(session="default", command="false"))
    assert box.run_in_session(Action(command="false", check="silent")).exit_code == 1
    assert box.arun("sleep 20", timeout=0.3).timed_out
    with pytest.raises(errors.CommandTimeout) as slow:
        box.arun("echo partial; sleep 20", timeout=2, check="raise")
    assert slow.value.observation.output == "partial\n"
    with pytest.raises(errors.CommandFailed, match="building: "):
        box.execute(Command(command=["false"], check=True, error_msg="building"))
    assert box.execute("exit 3").exit_code == 3
    assert box.arun("echo usable").output == "usable\n"


def test_sessions_that_are_not_there(box: Blocking) -> None:
    with pytest.raises(errors.NotFound, match="nosuch"):
        box.arun("echo", session="nosuch")
    with pytest.raises(errors.InvalidConfig, match="Unsupported arun mode: later"):
        box.arun("echo", mode="later")
    with pytest.raises(errors.InvalidConfig, match="not started"):
        Blocking(image=IMAGE).arun("echo")
    box.close_session("nosuch")
    box.create_session(session="mine", cwd="/tmp")
    assert box.arun("pwd", session="mine").output == "/tmp\n"
    with pytest.raises(errors.Conflict):
        box.create_session(CreateBashSessionRequest(session="mine"))
    assert "mine" in [info.session for info in box.sessions.list()]


# ---- nohup


def test_nohup(box: Blocking, tmp_path: Path) -> None:
    seen = box.arun("echo out; echo err >&2; exit 5", mode=RunMode.NOHUP)
    assert (seen.exit_code, seen.output, seen.timed_out) == (5, "out\nerr\n", False)
    assert box.arun("if [[ a == a* ]]; then echo bash; fi", mode="nohup").output == "bash\n"
    assert box.arun("echo 'unbalanced", mode="nohup").exit_code == 2
    assert box.arun("nosuchcommand", mode="nohup").exit_code == 127
    assert box.arun("kill -9 $$", mode="nohup").exit_code == 137
    with pytest.raises(errors.CommandFailed):
        box.arun("false", mode="nohup", check="raise")
    assert box.processes.list() == []  # ended ones are forgotten


def test_nohup_output(box: Blocking) -> None:
    seen = box.arun("printf 0123456789", mode="nohup", response_limited_bytes_in_nohup=4)
    assert (seen.output, seen.dropped_bytes) == ("0123", 6)
    name = f"/tmp/rock-test-{os.getpid()}/new folder/out.txt"
    seen = box.arun("echo to file; echo 2 >&2", mode="nohup", output_file=name)
    assert seen.output == "to file\n2\n" and box.fs.read_text(name) == seen.output
    assert (
        box.arun("printf 0123456789", mode="nohup", output_file=name, response_limited_bytes_in_nohup=4).output
        == "0123"
    )
    seen = box.arun("echo hidden; exit 3", mode="nohup", output_file=name, ignore_output=True)
    assert seen.exit_code == 3 and "hidden" not in seen.output
    for line in ("Status: failed", f"Output file: {name}", "File size: 7 bytes", "Detail: exit code 3"):
        assert line in seen.output
    box.fs.remove(name.rsplit("/", 2)[0], recursive=True)


def test_nohup_runs_where_its_session_is(box: Blocking) -> None:
    box.create_session(CreateBashSessionRequest(session="work", env={"A": "1 2"}))
    box.arun("cd /usr; export B='x\ny'", session="work")
    seen = box.arun('printf "%s|" "$PWD" "$A" "$B"', session="work", mode="nohup")
    assert seen.output == "/usr|1 2|x\ny|"
    with pytest.raises(errors.NotFound):
        box.arun("echo", session="nosuch", mode="nohup")


def test_nohup_leaves_a_slow_process_running(box: Blocking) -> None:
    began = time.monotonic()
    seen = box.arun("echo begun; sleep 30", mode="nohup", wait_timeout=2.5)
    assert time.monotonic() - began < 15
    assert (seen.exit_code, seen.timed_out, seen.output) == (None, True, "begun\n")
    (process,) = box.processes.list()
    assert process.info.running and process.id in seen.failure_reason and "2.5s" in seen.failure_reason
    process.kill()
    assert process.wait(5).signal == 9
    process.forget()


# ---- streams and processes


def test_streams(box: Blocking) -> None:
    times: list[float] = []
    with box.stream("echo out; sleep 0.3; echo err >&2; exit 6") as stream:
        chunks = []
        for chunk in stream:
            chunks.append((chunk.kind, chunk.text))
            times.append(time.monotonic())
    assert chunks == [("stdout", "out\n"), ("stderr", "err\n")] and times[1] - times[0] > 0.2
    assert stream.result is not None and stream.result.exit_code == 6
    box.arun("cd /usr")
    in_session = box.stream("pwd", session="default")
    assert b"".join(chunk.data for chunk in in_session) == b"/usr\n"
    assert box.stream(Action(command="exit_not_here")).wait().exit_code == 127
    assert box.stream(["printf", "%s", "a b"]).wait().exit_code == 0
    with pytest.raises(errors.RockError):
        box.stream(["/no/such/program"]).wait()


def test_leaving_a_stream_ends_its_command(box: Blocking) -> None:
    marker = f"/tmp/rock-test-{os.getpid()}-alive"
    with box.stream(f"echo go; sleep 1; touch {marker}") as stream:
        assert next(stream).text == "go\n"
    time.sleep(1.5)
    assert not box.fs.exists(marker)


def test_asynchronous_streams_and_processes(box: Blocking) -> None:
    async def main() -> None:
        sandbox = other_face(box)
        async with sandbox.stream("for i in 1 2 3; do echo $i; done") as stream:
            assert b"".join([chunk.data async for chunk in stream]) == b"1\n2\n3\n"
        process = await sandbox.processes.start("read x; echo got; sleep 0.2; exit 4", stdin="")
        assert [part async for part in process.follow()] == [b"got\n"]
        assert (await process.wait(5)).exit_code == 4 == process.exit_code
        assert (await process.logs(offset=2)).data == b"t\n"
        await process.forget()

    asyncio.run(main())


# ---- files


def test_files_by_requests(box: Blocking, tmp_path: Path) -> None:
    folder = f"/tmp/rock-test-{os.getpid()}-files"
    assert box.write_file(WriteFileRequest(content="ü\n", path=f"{folder}/deep/a")).success
    assert box.read_file(ReadFileRequest(path=f"{folder}/deep/a")).content == "ü\n"
    assert box.read_file(ReadFileRequest(path=f"{folder}/deep/a", encoding="latin-1")).content == "Ã¼\n"
    assert box.write_file_by_path("x", f"{folder}/b").success
    box.fs.write(f"{folder}/binary", b"\xff\xfe")
    with pytest.raises(errors.InvalidConfig, match="as text"):
        box.read_file(f"{folder}/binary")
    with pytest.raises(errors.NotFound):
        box.read_file(ReadFileRequest(path=f"{folder}/nosuch"))
    (tmp_path / "local").write_text("local")
    (tmp_path / "local").chmod(0o754)
    assert (
        box.upload(UploadRequest(source_path=str(tmp_path / "local"), target_path=f"{folder}/up")).file_name == "local"
    )
    assert box.fs.stat(f"{folder}/up").mode & 0o777 == 0o754
    assert box.upload_by_path(str(tmp_path), f"{folder}/tree").success
    assert box.fs.read(f"{folder}/tree/local") == b"local"
    missing = box.upload_by_path("/no/such/file", "/tmp/x")
    assert not missing.success and "File not found" in missing.message
    assert not box.upload_by_path(str(tmp_path / "local"), "/tmp/x", "oss").success
    assert box.fs.chmod(f"{folder}/up", 0o600).success and box.fs.stat(f"{folder}/up").mode & 0o777 == 0o600
    assert sorted(info.name for info in box.fs.list(folder)) == ["b", "binary", "deep", "tree", "up"]
    box.fs.remove(folder, recursive=True)
    assert not box.fs.exists(folder)


def test_large_files_in_both_directions(box: Blocking, tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(8 << 20) * 4)
    inside = f"/tmp/rock-test-{os.getpid()}-large"
    moved: list[int] = []
    box.fs.upload_file(source, inside, progress=moved.append)
    box.fs.download_file(inside, back, progress=moved.append)
    assert sum(moved) == 64 << 20 and back.read_bytes() == source.read_bytes()
    assert box.fs.read(inside, offset=5, length=7) == source.read_bytes()[5:12]

    async def main() -> int:
        sandbox = other_face(box)
        await sandbox.fs.upload_file(source, inside)
        await sandbox.fs.download_file(inside, tmp_path)
        return sum([len(part) async for part in sandbox.fs.chunks(inside)])

    assert asyncio.run(main()) == 32 << 20
    assert (tmp_path / Path(inside).name).read_bytes() == source.read_bytes()
    with pytest.raises(errors.NotFound):
        box.fs.download_file("/no/such/file", tmp_path / "never")
    box.fs.remove(inside)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["source", "back", Path(inside).name])


def test_folders_in_both_directions(box: Blocking, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "f").write_bytes(os.urandom(3 << 20))
    (tree / "link").symlink_to("sub/f")
    inside = f"/tmp/rock-test-{os.getpid()}-tree"
    assert box.fs.upload_dir(tree, inside).exit_code == 0
    box.arun(f"ln -s /etc {inside}/out; mkfifo {inside}/fifo")
    assert sorted(box.fs.download_dir(inside, tmp_path / "back")) in (["out"], ["fifo", "out"])
    assert (tmp_path / "back" / "sub" / "f").read_bytes() == (tree / "sub" / "f").read_bytes()
    assert os.readlink(tmp_path / "back" / "link") == "sub/f"
    box.fs.remove(inside, recursive=True)


# ---- starting


def test_a_cancelled_start_leaves_nothing(server: Any) -> None:
    async def main(delay: float) -> Sandbox:
        sandbox = Sandbox(image=IMAGE, memory="512m")
        task = asyncio.create_task(sandbox.start())
        await asyncio.sleep(delay)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            return sandbox
        await sandbox.stop()  # it was faster
        return sandbox

    for delay in (0, 0.001, 0.002, 0.004, 0.008):
        sandbox = asyncio.run(main(delay))
        with Client() as client:
            alive = client.list_sandboxes("pending,running")
        assert sandbox.sandbox_id not in [info.sandbox_id for info in alive]


def test_a_group(server: Any) -> None:
    async def main() -> None:
        group = SandboxGroup(SandboxGroupConfig(image=IMAGE, memory="256m", size=4, start_concurrency=2))
        async with group:
            assert len({sandbox.sandbox_id for sandbox in group.sandbox_list}) == 4
            for sandbox in group.sandbox_list:
                await sandbox.run_in_session(Action(session="default", command="echo Hello"))
            began = time.monotonic()
            outcomes = await group.arun_all("sleep 2; echo $((6*7))")
            assert [seen.output for seen in outcomes] == ["42\n"] * 4 and time.monotonic() - began < 7
            failed = await group.arun_all("false", check="raise", return_errors=True)
            assert [type(error) for error in failed] == [errors.CommandFailed] * 4
            with pytest.raises(errors.CommandFailed):
                await group.arun_all("false", check="raise")
        assert not any([await sandbox.is_alive() for sandbox in group.sandbox_list])

    asyncio.run(main())


def test_a_group_of_which_one_cannot_start_leaves_none(server: Any) -> None:
    from rock.sync import SandboxGroup as BlockingGroup

    taken = Blocking(image=IMAGE, memory="256m", sandbox_id="taken-1")
    taken.start()
    group = BlockingGroup(image=IMAGE, memory="256m", size=3, start_concurrency=3, sandbox_id="taken")
    with pytest.raises(errors.Conflict):
        group.start()
    with Client() as client:
        names = [info.sandbox_id for info in client.list_sandboxes("pending,running")]
    assert "taken-1" in names and "taken-0" not in names and "taken-2" not in names
    taken.delete()


def test_the_server_is_not_there() -> None:
    sandbox = Sandbox(SandboxConfig(base_url="http://127.0.0.1:9", image=IMAGE))
    with pytest.raises(errors.Unavailable, match="rock admin start"):
        asyncio.run(sandbox.start())


def test_threads_of_the_blocking_face(box: Blocking) -> None:
    seen: list[str] = []
    threads = [
        threading.Thread(target=lambda n=number: seen.append(box.execute(["echo", str(n)]).stdout))
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, seen)) == list(range(20))
