"""Checks of E2B's Python SDK against a server: run by the Python with the SDK, one line of JSON for each check.

Arguments: the names of the checks to run, or none for all. Each check gets a sandbox that all checks share, or makes
its own.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request

import httpx
from e2b_code_interpreter import AsyncSandbox as AsyncInterpreter
from e2b_code_interpreter import Sandbox as Interpreter

from e2b import (
    AsyncSandbox,
    AuthenticationException,
    BuildException,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    SandboxNotRunningException,
    SandboxQuery,
    SandboxState,
    Template,
    TimeoutException,
)

BASE = os.environ["E2B_API_URL"]
ROOT = BASE.removesuffix("/e2b")


def raised(kind, work):
    """The error that `work` raises."""
    try:
        result = work()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised; the result is {result!r}")


# ---- control plane ----


def check_create_info_kill(_):
    sandbox = Sandbox.create(timeout=120, metadata={"job": "7 é&="}, envs={"MODE": "test"})
    info = sandbox.get_info()
    assert info.sandbox_id == sandbox.sandbox_id and info.template_id == "base" and info.metadata == {"job": "7 é&="}
    assert info.state == SandboxState.RUNNING and 110 < (info.end_at - info.started_at).total_seconds() < 121
    assert sandbox.commands.run("echo $MODE").stdout == "test\n" and sandbox.is_running()
    assert sandbox.kill() is True and sandbox.is_running() is False and sandbox.kill() is False
    assert Sandbox.kill("deadbeef") is False
    raised(NotFoundException, lambda: Sandbox.connect("deadbeef"))
    raised(SandboxNotRunningException, lambda: sandbox.commands.run("true"))
    raised(Exception, lambda: sandbox.files.read("/etc/passwd"))


def check_templates(_):
    with Sandbox.create("host", timeout=60) as sandbox:
        assert sandbox.get_info().template_id == "host"
    error = raised(SandboxException, lambda: Sandbox.create("registry.invalid/none:1"))
    assert "registry.invalid" in str(error)


def check_template_builds(_):
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f"{folder}/sub")
        for name in ("a.txt", "sub/b.txt"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(name)
        template = (
            Template(file_context_path=folder)
            .from_template("base")
            .set_envs({"QUOTED": "it's \"$HOME\" `x` \\"})
            .set_workdir("/srv/work")
            .copy("a.txt", "/data/a.txt")
            .copy("sub", "/data/sub")
            .run_cmd("[[ 1 == 1 ]] && echo built > /data/built; pwd > /data/cwd")
            .run_cmd("id -un > /tmp/who", user="daemon")
        )
        lines = []
        built = Template.build(template, alias="checked", cpu_count=1, memory_mb=256,
                               on_build_logs=lambda entry: lines.append(entry.message))
        assert any(line.startswith("COPY") for line in lines)
        assert Template.exists("checked") and not Template.exists("no-such")
        for name in ("checked", built.template_id):
            with Sandbox.create(name, timeout=60) as sandbox:
                shown = sandbox.commands.run("cat /data/a.txt /data/sub/b.txt /data/built /data/cwd /tmp/who; id -un; "
                                             "printf %s \"$QUOTED\"").stdout
                assert shown == "a.txtsub/b.txtbuilt\n/srv/work\ndaemon\nroot\nit's \"$HOME\" `x` \\", shown
                assert sandbox.get_info().memory_mb == 256
        Template.build(template, alias="checked")  # its steps and files are cached
        error = raised(BuildException, lambda: Template.build(Template().from_template("checked").run_cmd("exit 3"),
                                                              alias="failing"))
        assert "status 3" in str(error) and not Template.exists("failing")
        started = Template().from_template("checked").set_start_cmd("sleep 0.3; touch /tmp/up; sleep 86399",
                                                                    "[[ -e /tmp/up ]]")
        Template.build(started, alias="started")
        with Sandbox.create("started", timeout=60) as sandbox:
            assert sandbox.files.exists("/tmp/up")
            assert any("86399" in " ".join(each.args) for each in sandbox.commands.list())


def check_kill_during_calls(_):
    def killed(work):
        sandbox = Interpreter.create(timeout=60)
        killing = threading.Timer(0.7, sandbox.kill)
        killing.start()
        try:
            return raised(SandboxException, lambda: work(sandbox))
        finally:
            killing.join()

    assert isinstance(killed(lambda sandbox: sandbox.commands.run("sleep 50")), SandboxNotRunningException)
    killed(lambda sandbox: sandbox.run_code("import time; time.sleep(50)"))
    killed(lambda sandbox: sandbox.pty.create(size=PtySize(rows=24, cols=80)).wait())
    short = Sandbox.create(timeout=1)
    assert isinstance(raised(SandboxException, lambda: short.commands.run("sleep 50")), SandboxNotRunningException)


def check_list_pages_and_filters(_):
    made = [Sandbox.create(timeout=60, metadata={"list": "a=b&c d/é", "n": str(n)}) for n in range(3)]
    try:
        query = SandboxQuery(metadata={"list": "a=b&c d/é"})
        for order, expected in (("desc", "210"), ("asc", "012")):
            pages = Sandbox.list(query=query, limit=2, order=order)
            first = [found.metadata["n"] for found in pages.next_items()]
            assert pages.has_next and first == list(expected[:2]), first
            assert [found.metadata["n"] for found in pages.next_items()] == [expected[2]] and not pages.has_next
        made[1].pause()
        for state, expected in ((SandboxState.PAUSED, {"1"}), (SandboxState.RUNNING, {"0", "2"})):
            found = Sandbox.list(query=SandboxQuery(metadata={"list": "a=b&c d/é"}, state=[state])).next_items()
            assert {each.metadata["n"] for each in found} == expected
        started = made[2].get_info().started_at
        later = Sandbox.list(query=SandboxQuery(metadata={"list": "a=b&c d/é"}, started_after=started)).next_items()
        assert later == []
        assert Sandbox.list(query=SandboxQuery(template="no-such", metadata={"n": "1"})).next_items() == []
    finally:
        for sandbox in made:
            sandbox.kill()


def check_timeout_is_enforced(_):
    sandbox = Sandbox.create(timeout=60)
    sandbox.set_timeout(1)
    end = time.time() + 60
    while sandbox.is_running():
        assert time.time() < end, "the timeout was not enforced"
        time.sleep(0.1)
    short = Sandbox.create(timeout=1)
    while short.is_running():
        assert time.time() < end, "the timeout of the create was not enforced"
        time.sleep(0.1)
    longer = Sandbox.create(timeout=60)
    longer.connect(timeout=600)
    left = (longer.get_info().end_at.timestamp() - time.time())
    assert 500 < left <= 600, left
    longer.connect(timeout=10)  # never shortens
    assert longer.get_info().end_at.timestamp() - time.time() > 500
    longer.kill()


def check_idempotency_key(_):
    first, again = (Sandbox.create(idempotency_key="one-create", timeout=60) for _ in range(2))
    other = Sandbox.create(idempotency_key="another-create", timeout=60)
    assert first.sandbox_id == again.sandbox_id != other.sandbox_id
    first.kill(), other.kill()
    raised(SandboxException, lambda: Sandbox.create(idempotency_key="one-create"))


def check_refused_options(_):
    refused = {
        "mcp": {"mcp": {"browserbase": {"apiKey": "x"}}},
        "denyOut": {"network": {"deny_out": ["203.0.113.1"]}},
        "maskRequestHost": {"network": {"mask_request_host": "localhost"}},
    }  # fmt: skip
    for name, options in refused.items():
        error = raised(SandboxException, lambda given=options: Sandbox.create(**given))
        assert name in str(error), (name, error)
    assert "reserved" in str(raised(SandboxException, lambda: Sandbox.create(metadata={"rock.e2b.template": "x"})))


def check_no_internet(_):
    with Sandbox.create(allow_internet_access=False, timeout=60) as sandbox:
        assert sandbox.get_info().allow_internet_access is False


def check_pause_and_resume(_):
    sandbox = Sandbox.create(timeout=120)
    handle = sandbox.commands.run("for i in $(seq 20); do echo $i; sleep 0.05; done", background=True)
    assert sandbox.pause() is True and sandbox.pause() is False
    assert sandbox.get_info().state == SandboxState.PAUSED and not sandbox.is_running()
    raised(SandboxNotRunningException, lambda: sandbox.commands.run("true"))
    same = Sandbox.connect(sandbox.sandbox_id, timeout=90)
    assert same.is_running() and 0 < same.get_info().end_at.timestamp() - time.time() < 91
    assert handle.wait().stdout.split() == [str(n) for n in range(1, 21)]
    same.kill()


def check_pause_at_the_timeout(_):
    sandbox = Sandbox.create(timeout=5, lifecycle={"on_timeout": "pause"})
    handle = sandbox.commands.run("i=0; while [ ! -e /tmp/stop ]; do sleep 0.05; done; echo stopped", background=True)
    assert sandbox.get_info().lifecycle["on_timeout"] == "pause"
    end = time.time() + 60
    while sandbox.get_info().state != SandboxState.PAUSED:
        assert time.time() < end, "it was not paused"
        time.sleep(0.1)
    sandbox.connect(timeout=60)
    sandbox.files.write("/tmp/stop", "")
    assert handle.wait().stdout == "stopped\n"
    sandbox.kill()
    woken = Sandbox.create(timeout=30, lifecycle={"on_timeout": "pause", "auto_resume": True})
    assert woken.get_info().lifecycle == {"on_timeout": "pause", "auto_resume": True}
    woken.pause()
    assert woken.get_info().state == SandboxState.PAUSED
    assert woken.commands.run("echo awake").stdout == "awake\n"
    assert woken.get_info().state == SandboxState.RUNNING and woken.get_info().end_at.timestamp() - time.time() < 31
    woken.kill()


def check_snapshot_and_fork(_):
    sandbox = Sandbox.create(timeout=120)
    sandbox.files.write("/tmp/kept.txt", "state")
    snapshot = sandbox.create_snapshot()
    listed = Sandbox.list_snapshots(sandbox_id=sandbox.sandbox_id).next_items()
    assert [each.snapshot_id for each in listed] == [snapshot.snapshot_id]
    with Sandbox.create(snapshot.snapshot_id, timeout=60) as restored:
        assert restored.files.read("/tmp/kept.txt") == "state"
    copies = sandbox.fork(timeout=60, count=2)
    assert len({copy.sandbox_id for copy in copies} | {sandbox.sandbox_id}) == 3
    for number, copy in enumerate(copies):
        copy.files.write("/tmp/kept.txt", str(number))
    assert [copy.files.read("/tmp/kept.txt") for copy in copies] == ["0", "1"]
    assert sandbox.files.read("/tmp/kept.txt") == "state"
    for each in (*copies, sandbox):
        each.kill()
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is True
    assert Sandbox.delete_snapshot(snapshot.snapshot_id) is False


def check_metrics(sandbox):
    found = sandbox.get_metrics()
    assert len(found) == 1 and found[0].cpu_count == 1 and found[0].mem_total == 512 << 20


# ---- commands ----


def check_run(sandbox):
    result = sandbox.commands.run("echo out; echo err >&2; pwd; echo $A", envs={"A": "1"}, cwd="/tmp")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n/tmp\n1\n", "err\n", 0)
    error = raised(CommandExitException, lambda: sandbox.commands.run("echo partial; exit 3"))
    assert error.exit_code == 3 and error.stdout == "partial\n" and error.error == "exit status 3"
    error = raised(CommandExitException, lambda: sandbox.commands.run("kill -9 $$"))
    assert error.exit_code == -1 and "killed" in error.error
    assert sandbox.commands.run("cat", timeout=20).stdout == ""  # no input: end of file at once
    text = "é€😀" * 20000
    assert sandbox.commands.run("printf 'é€😀%.0s' $(seq 20000)").stdout == text
    assert len(sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3_000_000
    raised(InvalidArgumentException, lambda: sandbox.commands.run("true", cwd="/no/such"))


def check_users(sandbox):
    home = sandbox.commands.run("pwd; echo $HOME").stdout.split()
    assert home[0] == home[1]
    assert sandbox.commands.run("whoami", user="user").exit_code == 0
    assert sandbox.commands.run("id -u", user="root").stdout == "0\n"
    raised(AuthenticationException, lambda: sandbox.commands.run("true", user="no-such-user"))
    if sandbox.commands.run("id -u").stdout == "0\n":
        assert sandbox.commands.run("id -un", user="daemon", cwd="/tmp").stdout == "daemon\n"
        sandbox.files.write("/tmp/of-daemon/x", "1", user="daemon")
        assert sandbox.files.get_info("/tmp/of-daemon/x").owner == "daemon"
        assert sandbox.files.get_info("/tmp/of-daemon").owner == "daemon"


def check_streams(sandbox):
    seen = []

    def on_stdout(text):
        seen.append(text)
        if "1" in text:  # the program waits for what is sent on the first output
            sandbox.files.write("/tmp/seen", "")

    handle = sandbox.commands.run("echo 1; while [ ! -e /tmp/seen ]; do sleep 0.05; done; echo 2", background=True)
    handle.wait(on_stdout=on_stdout)
    assert "".join(seen) == "1\n2\n"


def check_background(sandbox):
    handle = sandbox.commands.run("cat; echo done", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "hello\n")
    assert handle.pid in [each.pid for each in sandbox.commands.list()]
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "hello\ndone\n"
    handle = sandbox.commands.run("sleep 100", background=True)
    assert sandbox.commands.kill(handle.pid) is True
    assert "killed" in raised(CommandExitException, handle.wait).error
    assert sandbox.commands.kill(handle.pid) is False and sandbox.commands.kill(4_000_000) is False
    raised(NotFoundException, lambda: sandbox.commands.connect(4_000_000))


def check_command_timeout(sandbox):
    raised(TimeoutException, lambda: sandbox.commands.run("exec sleep 98765", timeout=0.5))
    end = time.time() + 30
    while any("98765" in " ".join(each.args) for each in sandbox.commands.list()):
        assert time.time() < end, "the time limit did not kill the program"
        time.sleep(0.05)


def check_reconnect(sandbox):
    handle = sandbox.commands.run("while [ ! -e /tmp/go ]; do sleep 0.05; done; echo late; exit 4", background=True)
    handle.disconnect()
    connected = sandbox.commands.connect(handle.pid)
    sandbox.files.write("/tmp/go", "")
    error = raised(CommandExitException, connected.wait)
    assert error.exit_code == 4 and error.stdout == "late\n"
    error = raised(CommandExitException, sandbox.commands.connect(handle.pid).wait)  # its end is kept some time
    assert error.exit_code == 4 and error.stdout == ""


def check_pty(sandbox):
    seen = []
    handle = sandbox.pty.create(size=PtySize(rows=30, cols=100), envs={"GIVEN": "it's"})

    def type_in():
        sandbox.pty.send_stdin(handle.pid, b"stty size; echo given=$GIVEN\n")
        while b"given=it's" not in b"".join(seen):
            time.sleep(0.05)
        sandbox.pty.resize(handle.pid, PtySize(rows=40, cols=120))
        sandbox.pty.send_stdin(handle.pid, b"stty size; exit 4\n")

    typing = threading.Thread(target=type_in)
    typing.start()
    error = raised(CommandExitException, lambda: handle.wait(on_pty=seen.append))
    typing.join()
    text = b"".join(seen)
    assert error.exit_code == 4 and b"30 100" in text and b"40 120" in text, text
    handle = sandbox.pty.create(size=PtySize(rows=24, cols=80))
    assert sandbox.pty.kill(handle.pid) is True
    raised(CommandExitException, handle.wait)


# ---- files ----


def check_files(sandbox):
    written = sandbox.files.write("folder/a.txt", "text é")
    assert written.path.endswith("/folder/a.txt") and written.path.startswith("/")
    assert sandbox.files.read("folder/a.txt") == "text é" == sandbox.files.read("~/folder/a.txt")
    assert bytes(sandbox.files.read("folder/a.txt", format="bytes")) == "text é".encode()
    assert b"".join(sandbox.files.read("folder/a.txt", format="stream")) == "text é".encode()
    several = sandbox.files.write_files(
        [{"path": '/tmp/é "x".txt', "data": "1"}, {"path": "folder/b", "data": b"\0\xff"}])
    assert several[0].path == '/tmp/é "x".txt'
    assert bytes(sandbox.files.read("folder/b", format="bytes")) == b"\0\xff"
    info = sandbox.files.get_info("folder/a.txt")
    assert info.size == 7 and info.permissions == "-rw-r--r--" and info.type.value == "file"
    assert sorted(each.name for each in sandbox.files.list("folder")) == ["a.txt", "b"]
    sandbox.files.write("folder/deep/er/c", "")
    assert len(sandbox.files.list("folder", depth=3)) == 5
    assert sandbox.files.exists("folder") and not sandbox.files.exists("folder/none")
    assert sandbox.files.make_dir("new/er") is True and sandbox.files.make_dir("new/er") is False
    assert sandbox.files.rename("folder/b", "moved/b").name == "b"
    raised(NotFoundException, lambda: sandbox.files.rename("folder/b", "x"))
    sandbox.commands.run("ln -sf a.txt folder/link; ln -sf gone folder/broken")
    assert sandbox.files.get_info("folder/link").symlink_target == written.path
    sandbox.files.remove("folder")
    sandbox.files.remove("folder")
    assert not sandbox.files.exists("folder")


def check_file_errors(sandbox):
    raised(FileNotFoundException, lambda: sandbox.files.read("no-such"))
    raised(FileNotFoundException, lambda: sandbox.files.list("/no/such"))
    raised(FileNotFoundException, lambda: sandbox.files.get_info("no-such"))
    raised(InvalidArgumentException, lambda: sandbox.files.read("/tmp"))
    raised(InvalidArgumentException, lambda: sandbox.files.list("/etc/passwd"))
    raised(InvalidArgumentException, lambda: sandbox.files.read("~other/x"))
    raised(InvalidArgumentException, lambda: sandbox.files.make_dir("/etc/passwd/x"))
    raised(SandboxException, lambda: sandbox.files.write("/etc/passwd/x", "1"))


def check_compressed_files(sandbox):
    sandbox.files.write("/tmp/z", "z" * 1_000_000, gzip=True)
    assert sandbox.files.read("/tmp/z", gzip=True) == "z" * 1_000_000


def check_watch(sandbox):
    sandbox.files.make_dir("/tmp/watched/sub")
    sandbox.files.write("/tmp/watched/old", "1")
    watch = sandbox.files.watch_dir("/tmp/watched", recursive=True)
    sandbox.files.write("/tmp/watched/sub/new", "1")
    assert ("sub/new", "create") in [(each.name, each.type.value) for each in watch.get_new_events()]
    sandbox.files.write("/tmp/watched/sub/new", "12")
    sandbox.files.rename("/tmp/watched/old", "/tmp/watched/other")
    found = [(each.name, each.type.value) for each in watch.get_new_events()]
    assert ("sub/new", "write") in found and ("old", "rename") in found and ("other", "create") in found, found
    sandbox.files.remove("/tmp/watched/other")
    assert [(each.name, each.type.value) for each in watch.get_new_events()] == [("other", "remove")]
    watch.stop()
    raised(NotFoundException, lambda: sandbox.files.watch_dir("/no/such"))


def check_signed_urls(sandbox):
    sandbox.files.write("/tmp/signed é", "content")
    url = sandbox.download_url("/tmp/signed é")
    assert urllib.request.urlopen(url).read() == b"content"
    limited = sandbox.download_url("/tmp/signed é", use_signature_expiration=60)
    assert urllib.request.urlopen(limited).read() == b"content"
    over = sandbox.download_url("/tmp/signed é", use_signature_expiration=-5)
    for wrong in (over, url.replace("signed", "other"), url[:-4] + "AAAA"):
        assert raised(urllib.error.HTTPError, lambda url=wrong: urllib.request.urlopen(url)).code == 401
    upload = sandbox.upload_url("/tmp/uploaded")
    assert httpx.post(upload, files={"file": ("uploaded", b"data")}).status_code == 200
    assert sandbox.files.read("/tmp/uploaded") == "data"
    assert httpx.get(upload).status_code == 401  # signed for writing only


# ---- ports ----


def check_ports(_):
    for network in ({}, {"network": {"allow_public_traffic": False}}):
        with Sandbox.create(timeout=60, **network) as sandbox:
            server = "import http.server as s; s.test(s.SimpleHTTPRequestHandler, port=8000)"
            sandbox.commands.run(f"mkdir -p /tmp/w && cd /tmp/w && echo page > x && echo other > 'a b%' && "
                                 f"exec python3 -c '{server}'", background=True)
            headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "8000",
                       "X-Access-Token": sandbox._envd_access_token}
            end = time.time() + 60
            while "port is not open" in (page := httpx.get(f"{BASE}/x", headers=headers)).text:
                assert time.time() < end and page.status_code == 502
                time.sleep(0.1)
            assert page.text == "page\n" and httpx.get(f"{BASE}/a%20b%25", headers=headers).text == "other\n"
            by_host = {"Host": sandbox.get_host(8000)}
            if not network:
                assert httpx.get(f"{ROOT}/x", headers=by_host).text == "page\n"
                assert httpx.get(f"{ROOT}/a%20b%25", headers=by_host).text == "other\n"
                continue
            assert httpx.get(f"{ROOT}/x", headers=by_host).status_code == 403
            token = {"E2B-Traffic-Access-Token": sandbox.traffic_access_token}
            assert httpx.get(f"{ROOT}/x", headers={**by_host, **token}).text == "page\n"


# ---- code interpreter ----


def check_code(_):
    with Interpreter.create(timeout=120) as sandbox:
        execution = sandbox.run_code("x = 1\nprint('hi')\nx + 41")
        assert execution.text == "42" and execution.logs.stdout == ["hi\n"] and execution.error is None
        assert sandbox.run_code("x").text == "1"
        error = sandbox.run_code("1/0").error
        assert error.name == "ZeroDivisionError" and "line 1" in error.traceback
        assert sandbox.run_code("import os; os.environ['A']", envs={"A": "b"}).text == "'b'"
        assert sandbox.run_code("'A' in os.environ").text == "False"
        assert sandbox.run_code("!echo sub").logs.stdout == ["sub\n"]
        seen = []
        sandbox.run_code("import time\nfor i in range(2):\n    print(i); time.sleep(0.3)",
                         on_stdout=lambda message: seen.append(time.time()))
        assert len(seen) == 2
        rich = sandbox.run_code("class A:\n    def _repr_html_(self): return '<b>x</b>'\ndisplay(A())\nA()").results
        assert [result.html for result in rich] == ["<b>x</b>"] * 2 and rich[1].is_main_result
        context = sandbox.create_code_context(cwd="/tmp")
        assert sandbox.run_code("import os; y = 5; os.getcwd()", context=context).text == "'/tmp'"
        assert sandbox.run_code("y").error.name == "NameError"
        assert context.id in [each.id for each in sandbox.list_code_contexts()]
        sandbox.restart_code_context(context)
        assert sandbox.run_code("y", context=context).error.name == "NameError"
        sandbox.remove_code_context(context)
        raised(NotFoundException, lambda: sandbox.run_code("1", context=context))
        raised(TimeoutException, lambda: sandbox.run_code("import time\nwhile True: time.sleep(0.01)", timeout=1))
        assert sandbox.run_code("x").text == "1"  # the loop was interrupted
        assert "ended" in sandbox.run_code("os._exit(3)").error.value
        assert sandbox.run_code("1 + 1").text == "2"
        raised(SandboxException, lambda: sandbox.run_code("1", language="r"))


# ---- asynchronous clients ----


async def check_async(_):
    async with await AsyncSandbox.create(timeout=120) as sandbox:
        assert (await sandbox.commands.run("echo a")).stdout == "a\n"
        found = await asyncio.gather(*(sandbox.commands.run(f"echo {n}") for n in range(20)))
        assert [each.stdout for each in found] == [f"{n}\n" for n in range(20)]
        await sandbox.files.write("/tmp/dir/a", "1")
        assert await sandbox.files.read("/tmp/dir/a") == "1"
        seen = []
        watch = await sandbox.files.watch_dir("/tmp/dir", on_event=lambda event: seen.append(event.name))
        await sandbox.files.write("/tmp/dir/b", "1")
        end = time.time() + 30
        while "b" not in seen:
            assert time.time() < end
            await asyncio.sleep(0.05)
        await watch.stop()
        handle = await sandbox.commands.run("cat", background=True, stdin=True)
        await sandbox.commands.send_stdin(handle.pid, "x")
        await sandbox.commands.close_stdin(handle.pid)
        assert (await handle.wait()).stdout == "x"
        data = []
        terminal = await sandbox.pty.create(size=PtySize(rows=24, cols=80), on_data=data.append)
        await sandbox.pty.send_stdin(terminal.pid, b"echo p$((1+1)); exit\n")
        await terminal.wait()
        assert b"p2" in b"".join(data)
        await sandbox.pause()
        await sandbox.connect()
        assert await sandbox.is_running()
    assert not await sandbox.is_running()


async def check_async_code(_):
    async with await AsyncInterpreter.create(timeout=60) as sandbox:
        assert (await sandbox.run_code("import asyncio\nawait asyncio.sleep(0.01)\n7")).text == "7"


def main(names):
    """Run the checks; "make" and "kill" of the shared sandbox are checks too."""
    known = {name.removeprefix("check_"): work for name, work in globals().items() if name.startswith("check_")}
    shared = Sandbox.create(timeout=600)
    try:
        for name in names or known:
            problem = ""
            try:
                result = known[name](shared)
                if inspect.isawaitable(result):
                    asyncio.run(result)
            except BaseException:
                problem = traceback.format_exc()
            print(json.dumps({"check": name, "problem": problem}), flush=True)
    finally:
        shared.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
