"""Volumes and host folders: shared by sandboxes, limited, deleted, isolated between tenants, and no way out of them."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE, RunningServer, give_image
from tests.waiting import until

from rock.errors import Conflict, DiskFull, Forbidden, InvalidConfig, NotFound, RockError, StorageFull, Unsupported
from rock.protocol.keys import CreateKey
from rock.protocol.node import CreateVolume
from rock.protocol.sandbox import Cause, HostMount, SandboxGroupConfig, SandboxInfo, State, VolumeMount
from rock.sdk.sandbox.options import ConnectOptions
from rock.sync import Client, Sandbox, SandboxConfig, SandboxGroup

OWNER = "owner-key"
ROOT = os.geteuid() == 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A listed folder of the host, next to one that is not listed."""
    top = tmp_path_factory.mktemp("host")
    top.chmod(0o755)
    (top / "listed" / "models").mkdir(parents=True)
    (top / "listed" / "models" / "weights").write_text("w")
    (top / "other").mkdir()
    (top / "other" / "secret").write_text("s")
    (top / "listed" / "private").write_text("p")
    (top / "listed" / "private").chmod(0o600)
    return top


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[RunningServer]:
    """A server with a pool, so that a sandbox with mounts cannot be one of it by mistake."""
    home = tmp_path_factory.mktemp("home")
    running = RunningServer(home, ROCK_HOST_MOUNTS=f"{shared / 'listed'}:{home}", ROCK_API_KEY=OWNER,
                            ROCK_POOL_SIZE="2")  # fmt: skip
    give_image(home)
    running.start()
    yield running
    running.stop()
    assert left(running) == []


def left(server: RunningServer) -> list[Path]:
    """What there is of volumes on its disk."""
    return list((server.home / "volumes").glob("*"))


def full(client: Client, sandbox: Sandbox) -> SandboxInfo:
    """The sandbox, once the size of a volume has ended it. On a busy machine a measurement takes a while."""
    found = str(sandbox.sandbox_id)
    until(lambda: client.get_sandbox(found).state is State.STOPPED, 90.0)
    info = client.get_sandbox(found)
    assert info.cause is Cause.DISK_FULL and "volume data" in str(info.reason)
    return info


@pytest.fixture
def client(volumes: RunningServer) -> Iterator[Client]:
    with Client(volumes.url, OWNER) as client:
        yield client
        for info in client.list_sandboxes():
            client.delete_sandbox(info.sandbox_id, force=True)
        for row in client.list_volumes():
            client.delete_volume(row.name, tenant=row.tenant)


def box(server: RunningServer, *volumes: dict[str, Any], key: str = OWNER, **fields: Any) -> Sandbox:
    given = {"base_url": server.url, "api_key": key, "image": IMAGE, "memory": "256m", "cpus": 1.0,
             "auto_clear_seconds": 0, **fields}  # fmt: skip
    return Sandbox(SandboxConfig(**given, volumes=[VolumeMount(**one) for one in volumes] or None))


def out(sandbox: Sandbox, command: str, user: str | None = None) -> str:
    done = sandbox.execute(command, user=user)
    assert done.exit_code == 0, done
    return done.stdout.strip()


# ---- volumes ----


def test_sandboxes_share_a_volume_that_outlives_them(volumes: RunningServer, client: Client) -> None:
    made = client.create_volume("data", "64m")
    assert (made.state, made.size, made.worker) == ("ready", 64 << 20, "local")
    assert client.get_volume("data") == made and client.list_volumes() == [made]
    mount = {"name": "data", "target": "/data"}
    with box(volumes, mount) as one, box(volumes, {**mount, "target": "/a/b", "read_only": True}) as two:
        out(one, "echo first > /data/file && mkdir /data/folder")
        owner = "1000:1000" if ROOT else "0:0"  # an ordinary user's sandbox has one user
        out(one, f"chown {owner} /data/folder")
        out(one, "touch /data/folder/mine", user=owner)
        assert out(two, "cat /a/b/file; stat -c %u:%g /a/b /a/b/file /a/b/folder/mine") == \
            f"first\n0:0\n0:0\n{owner}"  # fmt: skip
        for command in ("touch /a/b/new", "rm /a/b/file", "chmod 777 /a/b/file", "mount -o remount,rw /a/b"):
            assert two.execute(command).exit_code != 0, command
        assert one.fs.read_text("/data/file") == "first\n"
        with box(volumes, mount) as three:
            out(three, "echo second >> /data/file")
        assert out(two, "cat /a/b/file") == "first\nsecond"
    with box(volumes, mount) as again:
        assert out(again, "cat /data/file") == "first\nsecond"


def test_a_volume_has_one_name_in_its_tenant(client: Client) -> None:
    client.create_volume("data")
    with pytest.raises(Conflict, match="a volume data already"):
        client.create_volume("data")
    for bad in ({"name": "../x"}, {"name": ""}, {"name": "x", "size": "1"}, {"name": "x", "size": "much"}):
        with pytest.raises(InvalidConfig):
            client.create_volume(**bad)
    with pytest.raises(NotFound, match="no worker far"):
        client.create_volume("x", worker="far")
    for call in (client.get_volume, client.delete_volume):
        with pytest.raises(NotFound, match="no volume nothing"):
            call("nothing")
    body = CreateVolume(name="again").model_dump()
    first, second = (client.transport.json("POST", "/v1/volumes", body, key="k" * 20) for _ in range(2))
    assert first == second and len(client.list_volumes()) == 2


@pytest.mark.parametrize("fields", [
    {"target": "data"}, {"target": "/"}, {"target": "//"}, {"target": "/proc"}, {"target": "/proc/x"},
    {"target": "/sys/x"}, {"target": "/dev/shm"}, {"target": "/a/../b"}, {"target": "/a/./b"}, {"target": ""},
    {"target": "/x\0y"}, {"target": "/" + "x" * 2000}, {"name": "a/b"},
])  # fmt: skip
def test_a_wrong_target_is_refused(client: Client, fields: dict[str, str]) -> None:
    with pytest.raises(InvalidConfig):
        client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "volumes": [
            {"name": "data", "target": "/data", **fields}]})  # fmt: skip
    if "target" in fields:
        with pytest.raises(InvalidConfig):
            client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "mounts": [{"source": "/srv", **fields}]})


@pytest.mark.parametrize("targets", [["/a", "/a"], ["/a", "/a/b"], ["/a/b", "/a-b", "/a"], ["/a/", "/a"],
                                     [f"/{number}" for number in range(17)]])  # fmt: skip
def test_targets_are_separate_and_few(client: Client, targets: list[str]) -> None:
    mounts = [{"name": "data", "target": target} for target in targets]
    with pytest.raises(InvalidConfig, match=r"separate folders|at most 16"):
        client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "volumes": mounts})
    with pytest.raises(InvalidConfig, match=r"separate folders|at most 16"):
        half = [{"source": "/srv", "target": target} for target in targets[1:]]
        client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "volumes": mounts[:1], "mounts": half})


def test_an_unknown_volume_is_refused_before_the_start(volumes: RunningServer, client: Client) -> None:
    with pytest.raises(NotFound, match="no volume nothing"):
        box(volumes, {"name": "nothing", "target": "/data"}).start()
    assert client.list_sandboxes() == []


@pytest.mark.parametrize("runtime", ["process", "fake", "landlock", "docker", "gvisor"])
def test_other_runtimes_refuse_before_the_start(volumes: RunningServer, client: Client, runtime: str,
                                                shared: Path) -> None:  # fmt: skip
    client.create_volume("data")
    mount = HostMount(source=str(shared / "listed"), target="/host")
    for sandbox in (box(volumes, {"name": "data", "target": "/data"}, runtime=runtime),
                    box(volumes, runtime=runtime, mounts=[mount])):  # fmt: skip
        with pytest.raises(Unsupported, match="cannot mount volumes"):
            sandbox.start()
    assert client.list_sandboxes() == []


def test_a_volume_in_use_is_not_deleted(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data")
    with box(volumes, {"name": "data", "target": "/data", "read_only": True}) as one:
        with pytest.raises(Conflict, match=f"volume data is in use.*{one.sandbox_id}"):
            client.delete_volume("data")
        assert client.get_volume("data").state == "ready"
    client.delete_volume("data")
    assert client.list_volumes() == []


def test_a_restart_mounts_again_and_retains_only_own_files(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data")
    with box(volumes, {"name": "data", "target": "/data"}, auto_delete_seconds=600) as one:
        out(one, "echo v > /data/file; echo own > /own; chmod 0 /data/file")
    upper = list((volumes.home / "run").rglob("upper/own"))
    assert upper and list((upper[0].parent / "data").iterdir()) == []
    one.restart()
    assert out(one, "cat /data/file /own") == "v\nown"
    # a target that the guest replaced while it ran, as far as it can
    out(one, "mv /own /own2; ! rmdir /data 2>/dev/null; ! mv /data /x 2>/dev/null")
    one.stop()
    client.delete_volume("data")
    client.create_volume("data")  # another one of this name is not mounted in its place
    with pytest.raises(NotFound, match="no volume data on this worker"):
        one.restart()


def test_a_setuid_file_is_not_effective_and_devices_are_closed(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data")
    with box(volumes, {"name": "data", "target": "/data"}) as one:
        out(one, "cp /usr/bin/id /data/id && chmod 6755 /data/id && chmod 755 /data")
        if ROOT:
            assert out(one, "/data/id -u", user="1000:1000") == "1000"
        assert one.execute("mknod /data/null c 1 3 && echo x > /data/null").exit_code != 0
        assert "nosuid,nodev" in out(one, "grep ' /data ' /proc/self/mountinfo")
    (data,) = (volumes.home / "volumes").glob("*/data")
    for folder in (data.parent, data.parent.parent):  # other users of the machine cannot reach that file
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_target_is_resolved_inside_the_sandbox(volumes: RunningServer, client: Client, tmp_path: Path) -> None:
    client.create_volume("data")
    script = (
        f"mkdir -p {tmp_path}; ln -s /../../../..{tmp_path} /up; ln -s nowhere /dangling; ln -s /loop /loop; "
        "ln -s /proc/1/root /init; ln -s /dev/shm /memory; touch /file; mkdir -p /real/deep; ln -s /real/deep /short"
    )
    with box(volumes, auto_delete_seconds=600) as base:
        out(base, script)
        commit = client.transport.json("POST", f"/v1/sandboxes/{base.sandbox_id}/commit?wait=60",
                                       {"image_tag": "linked:1"}, timeout=90)  # fmt: skip
        assert commit["phase"] == "SUCCEEDED", commit
    for target in ("/dangling", "/loop/x", "/file", "/file/x", "/init", "/init/tmp", "/memory", "/memory/x"):
        with pytest.raises(RockError, match="volumes and mounts"):
            box(volumes, {"name": "data", "target": target}, image="linked:1").start()
    with box(volumes, {"name": "data", "target": "/up/escaped"}, image="linked:1") as inside:
        out(inside, f"test -d {tmp_path}/escaped && touch /up/escaped/file")  # a path of the sandbox alone
        assert not (tmp_path / "escaped").exists()
    with box(volumes, {"name": "data", "target": "/short/x"}, image="linked:1") as linked:
        out(linked, "test -e /real/deep/x/file")
    assert not any((tmp_path).iterdir())


def test_links_in_a_volume_lead_nowhere_else(volumes: RunningServer, client: Client) -> None:
    """What a volume contains is resolved in the sandbox that reads it, never by the server."""
    client.create_volume("data")
    outside = volumes.home / "marker"
    outside.write_text("secret")
    mount = {"name": "data", "target": "/data"}
    with box(volumes, mount) as one:
        out(one, f"cd /data && ln -s {outside} marker; ln -s / root; ln -s ../../.. up; ln -s /data/loop loop")
        out(one, "cd /data && python3 -c 'import os\nfor n in range(1500): os.mkdir(\"d\"); os.chdir(\"d\")'")
        out(one, "mkdir /data/closed && touch /data/closed/x && chmod 0 /data/closed")
    with box(volumes, mount) as two:
        assert two.execute("cat /data/marker").exit_code != 0
        assert two.execute(f"ls {volumes.home}").exit_code != 0
        assert out(two, "ls /data/root/data/root/etc/hostname")
        with pytest.raises(RockError):
            two.fs.read("/data/marker")
    client.delete_volume("data")  # the removal follows no link either
    assert outside.read_text() == "secret"
    assert left(volumes) == []


def test_writers_of_a_full_volume_end(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data", "8m")
    client.create_volume("spare", "8m")
    mount = {"name": "data", "target": "/data"}
    with box(volumes, mount) as writer, box(volumes, {**mount, "read_only": True}) as reader, \
            box(volumes, {**mount, "name": "spare"}) as other:  # fmt: skip
        out(other, "head -c 6M /dev/zero > /data/ok")
        out(writer, "head -c 24M /dev/zero > /data/big")
        full(client, writer)
        with pytest.raises(DiskFull, match="volume data is over its limit"):
            writer.execute("true")
        assert out(reader, "wc -c < /data/big") == str(24 << 20)
        assert out(other, "wc -c < /data/ok") == str(6 << 20)
        with pytest.raises(StorageFull, match="can only be mounted read-only"):
            box(volumes, mount).start()
        with box(volumes, {**mount, "read_only": True}) as saved:
            assert out(saved, "wc -c < /data/big") == str(24 << 20)


def test_deleted_files_count_for_their_volume_alone(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data", "8m")
    hold = "import os, time; f = open('x', 'wb'); os.unlink('x'); f.write(bytes(24 << 20)); f.flush(); time.sleep(90)"
    with box(volumes, {"name": "data", "target": "/deep/data"}) as one:
        out(one, "mv /deep /renamed")  # the mount moves with it, and its path is another one
        with pytest.raises(DiskFull):
            one.execute(["python3", "-c", hold], cwd="/renamed/data", timeout=90)
        full(client, one)
    end = time.monotonic() + 90
    while time.monotonic() < end:  # the files went with their process: the next measurement opens the volume again
        with contextlib.suppress(StorageFull), box(volumes, {"name": "data", "target": "/data"}) as two:
            assert out(two, "ls -A /data") == ""
            break
        time.sleep(0.2)
    else:
        raise AssertionError("the volume stays closed")


def test_a_group_is_on_the_worker_of_its_volume(volumes: RunningServer, client: Client) -> None:
    client.create_volume("data")
    config = SandboxGroupConfig(base_url=volumes.url, api_key=OWNER, image=IMAGE, memory="128m", cpus=0.5, size=3,
                                volumes=[VolumeMount(name="data", target="/data")])  # fmt: skip
    with SandboxGroup(config) as group:
        for number, one in enumerate(group.sandbox_list):
            out(one, f"touch /data/{number}")
        assert out(group.sandbox_list[0], "ls /data") == "0\n1\n2"


# ---- tenants ----


def test_tenants_do_not_share_volumes(volumes: RunningServer, client: Client) -> None:
    keys = {name: client.create_key(CreateKey(name="x", tenant=name)).key for name in ("left", "right")}
    with Client(volumes.url, keys["left"]) as left, Client(volumes.url, keys["right"]) as right:
        first = left.create_volume("data")
        mount = {"name": "data", "target": "/data"}
        with pytest.raises(NotFound):
            box(volumes, mount, key=keys["right"]).start()
        assert right.list_volumes() == []
        for call in (right.get_volume, right.delete_volume):
            with pytest.raises(NotFound):
                call("data")
            with pytest.raises(NotFound):
                call("data", tenant="left")
        second = right.create_volume("data")
        assert second.volume_id != first.volume_id
        with box(volumes, mount, key=keys["left"]) as one:
            out(one, "echo mine > /data/file")
            # the id of another tenant's volume, which only the server may set
            stolen = {**mount, "volume_id": first.volume_id, "worker": "local"}
            with box(volumes, stolen, key=keys["right"]) as two:
                assert out(two, "ls -A /data") == ""
            with pytest.raises(NotFound):
                box(volumes, {**stolen, "name": "other"}, key=keys["right"]).start()
        assert {row.tenant for row in client.list_volumes()} == {"left", "right"}
        with pytest.raises(NotFound):
            client.get_volume("data")  # the owner has none of this name
        assert client.get_volume("data", tenant="left").volume_id == first.volume_id


# ---- host folders ----


def mounted(server: RunningServer, source: Path | str, **fields: Any) -> Sandbox:
    return box(server, mounts=[HostMount(source=str(source), target="/host")], **fields)


def test_a_listed_folder_is_read_only(volumes: RunningServer, client: Client, shared: Path) -> None:
    with mounted(volumes, shared / "listed" / "models") as one:
        assert out(one, "cat /host/weights") == "w"
        for command in ("touch /host/x", "rm /host/weights", "chmod 777 /host/weights", "mount -o remount,rw /host"):
            assert one.execute(command).exit_code != 0, command
        assert one.execute("ls /host/../../other").exit_code != 0
    with mounted(volumes, shared / "listed") as two:
        assert out(two, "cat /host/models/weights") == "w"
        if ROOT:  # files keep their owners: root inside is not their owner
            assert two.execute("cat /host/private").exit_code != 0
    assert (shared / "listed" / "models" / "weights").read_text() == "w"


def test_options_of_the_sdk(volumes: RunningServer, client: Client, shared: Path) -> None:
    client.create_volume("data", "64m")
    reach: ConnectOptions = {"base_url": volumes.url, "api_key": OWNER}
    host = {"/host": str(shared / "listed" / "models")}
    with Sandbox(IMAGE, memory="256m", volumes={"/data": "data", "/ref": "data:ro"}, mounts=host, **reach) as one:
        assert out(one, "cp /host/weights /data/w; cat /ref/w") == "w"
        assert one.exec("touch /ref/x").exit_code != 0
    for wrong in (["data"], {"/data": 1}, "data"):
        with pytest.raises(InvalidConfig, match="write it like volumes="):
            Sandbox(IMAGE, volumes=wrong, **reach)  # type: ignore[arg-type]


def test_other_folders_are_refused(volumes: RunningServer, client: Client, shared: Path) -> None:
    client.create_volume("data")  # else there is no folder of volumes
    listed = shared / "listed"
    links = {"out": shared / "other", "up": Path(".."), "home": volumes.home, "within": listed / "models",
             "beside": Path("models")}
    for name, target in links.items():
        (listed / name).symlink_to(target)
    try:
        for source in (shared, shared / "other", "/", "/etc", f"{listed}-other", listed / "out", listed / "up",
                       listed / "up" / "other", listed / "within", listed / "beside", listed / "home",
                       volumes.home, volumes.home / "volumes", volumes.home / "images"):  # fmt: skip
            with pytest.raises(Forbidden, match="may not be mounted") as caught:
                mounted(volumes, source).start()
            assert "ROCK_HOST_MOUNTS" in str(caught.value.hint) or "ROCK_HOME" in str(caught.value.hint)
    finally:
        for name in links:
            (listed / name).unlink()
    with pytest.raises(NotFound):
        mounted(volumes, listed / "nothing").start()
    with pytest.raises(InvalidConfig, match="not a folder"):
        mounted(volumes, listed / "private").start()
    for source in ("listed", f"{listed}/../other", f"{listed}/./models"):
        with pytest.raises(InvalidConfig):
            client.transport.json("POST", "/v1/sandboxes", {"image": IMAGE, "mounts": [
                {"source": source, "target": "/host"}]})  # fmt: skip
    assert client.list_sandboxes() == []


def test_a_folder_that_is_exchanged_meanwhile_is_never_another_one(volumes: RunningServer, client: Client,
                                                                   shared: Path) -> None:  # fmt: skip
    listed = shared / "listed"
    flip, folder, link = listed / "flip", listed / "flip-folder", listed / "flip-link"
    folder.mkdir()
    (folder / "right").touch()
    link.symlink_to(shared / "other")
    flip.symlink_to(listed)
    over = threading.Event()

    def exchange() -> None:
        while not over.is_set():
            flip.unlink()
            folder.rename(flip)
            flip.rename(folder)
            link.rename(flip)
            link.symlink_to(shared / "other")

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        for _ in range(15):
            with contextlib.suppress(RockError), mounted(volumes, flip) as one:
                assert out(one, "ls /host") == "right"
    finally:
        over.set()
        thread.join()
        for path in (flip, link):
            path.unlink(missing_ok=True)
        (folder / "right").unlink()
        folder.rmdir()


def test_no_folder_is_listed_by_default(server: RunningServer, tmp_path: Path) -> None:
    sandbox = Sandbox(SandboxConfig(base_url=server.url, image=IMAGE, memory="64m",
                                    mounts=[HostMount(source=str(tmp_path), target="/host")]))  # fmt: skip
    with pytest.raises(Forbidden, match="may not be mounted") as caught:
        sandbox.start()
    assert "ROCK_HOST_MOUNTS" in str(caught.value.hint)


# ---- crashes ----

POINTS = ("volume.create.saved", "node.volume.create", "node.volume.created", "volume.create.made",
          "volume.delete.saved", "node.volume.delete", "node.volume.renamed", "volume.delete.gone")  # fmt: skip


@pytest.fixture(scope="module")
def crashing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    home = tmp_path_factory.mktemp("crashing")
    # of one process: with several, the fault ends the process of the worker, which is started again
    running = RunningServer(home, ROCK_FAULTS=str(home / "faults"), ROCK_RECONNECT_TIMEOUT="0", ROCK_PROCESSES="1")
    give_image(home)
    running.start()
    yield running
    running.stop()


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_between_the_steps_leaves_nothing_behind(crashing: RunningServer, point: str) -> None:
    with Client(crashing.url, reconnect_timeout=0) as client:
        if "delete" in point or "renamed" in point:
            client.create_volume("data")
        (crashing.home / "faults").write_text(f"{point}=kill")
        with pytest.raises(RockError):
            if client.list_volumes():
                client.delete_volume("data")
            else:
                client.create_volume("data")
    assert crashing.process is not None and crashing.process.wait(10) == -9
    (crashing.home / "faults").unlink()
    crashing.start()
    with Client(crashing.url) as client:
        rows = client.list_volumes()
        assert [row.volume_id for row in rows] == [path.name for path in (crashing.home / "volumes").glob("*")]
        assert {row.state for row in rows} <= {"ready"}
        for row in rows:
            with box(crashing, {"name": "data", "target": "/data"}, key="") as one:
                out(one, "touch /data/file")
            client.delete_volume(row.name)
    assert left(crashing) == []


def test_a_volume_is_in_use_after_a_restart_of_the_server(crashing: RunningServer) -> None:
    with Client(crashing.url) as client:
        client.create_volume("data", "8m")
        one = box(crashing, {"name": "data", "target": "/data"}, key="")
        one.start()
        crashing.kill()
        crashing.start()
    with Client(crashing.url) as client:
        with pytest.raises(Conflict, match="in use"):
            client.delete_volume("data")
        # the recovered server still measures it
        client.transport.json("POST", f"/v1/sandboxes/{one.sandbox_id}/execute",
                              {"command": "head -c 24M /dev/zero > /data/big"})  # fmt: skip
        full(client, one)
        client.delete_volume("data")


def test_a_server_with_another_store_does_not_remove_volumes(own_server: Callable[..., RunningServer]) -> None:
    server = own_server(ROCK_PROCESSES="1")  # sandboxes of several processes cannot be adopted
    with Client(server.url) as client:
        made = client.create_volume("data")
    server.stop()
    (server.home / "rock.sqlite").rename(server.home / "before.sqlite")
    with pytest.raises(AssertionError, match="does not start"):
        server.start(seconds=20)
    server.environment["ROCK_STORE_CHANGED"] = "adopt"
    server.start()
    with Client(server.url) as client:
        (found,) = client.list_volumes()
        assert (found.name, found.volume_id, found.size) == (made.name, made.volume_id, made.size)
        client.delete_volume("data")


def test_a_relative_path_is_no_setting(tmp_path: Path) -> None:
    server = RunningServer(tmp_path, ROCK_HOST_MOUNTS="/srv:data")
    with pytest.raises(AssertionError, match="'data' is not an absolute path"):
        server.start(seconds=30)
