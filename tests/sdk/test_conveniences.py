"""What ROCK's SDK has beside commands and files, against a real server: scripts, users, deploying, mirrors, lines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMAGE

from rock import errors
from rock.actions.sandbox.request import ChmodRequest, ChownRequest, CreateBashSessionRequest
from rock.sync import Sandbox
from rock.sync.sandbox.runtime_env import (
    NodeRuntimeEnvConfig,
    PythonRuntimeEnvConfig,
    RuntimeEnv,
    RuntimeEnvConfig,
)
from rock.sync.sandbox.speedup import SpeedupType, apt_list, hosts_with, pip_config


@pytest.fixture
def box(server: Any) -> Iterator[Sandbox]:
    with Sandbox(image=IMAGE, memory="1g", cpus=1.0) as made:
        yield made


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("content")
    return folder


def test_a_script(box: Sandbox) -> None:
    seen = box.process.execute_script("echo out; echo err >&2; echo $0; exit 3")
    out, err, path = seen.output.splitlines()
    assert (out, err, seen.exit_code) == ("out", "err", 3)
    assert path.startswith("/tmp/script_") and not box.fs.exists(path)
    kept = box.process.execute_script("rm -- $0; echo ${BASH_VERSION:+bash}", "sub/my.sh", cleanup=True)
    assert (kept.output, kept.exit_code) == ("bash\n", 0)
    box.process.execute_script("true", script_name="kept.sh", cleanup=False)
    assert box.fs.read_text("/tmp/kept.sh") == "true"


def test_a_script_that_is_too_slow_is_left_running(box: Sandbox) -> None:
    seen = box.process.execute_script("echo early; sleep 300", wait_timeout=1.5)
    assert seen.output == "early\n" and seen.timed_out and seen.exit_code is None and "did not complete" in (
        seen.failure_reason
    )
    assert [process.info.running for process in box.processes.list()] == [True]


def test_a_background_command_with_its_output_in_a_file(box: Sandbox) -> None:
    assert box.run_nohup_and_wait("echo out", "/tmp/new/out.txt").success
    assert box.fs.read_text("/tmp/new/out.txt") == "out\n"
    assert box.run_nohup_and_wait("true").success
    failed = box.run_nohup_and_wait("exit 3")
    assert not failed.success and failed.message == "exit code 3"
    late = box.run_nohup_and_wait("sleep 300", wait_timeout=1)
    assert not late.success and "did not complete" in late.message
    box.stop()
    assert not box.run_nohup_and_wait("true").success


def test_lines_of_a_file(box: Sandbox) -> None:
    box.fs.write("/tmp/lines", "1\n2\n3\nlast")
    ranges: list[tuple[int | None, int | None]] = [(None, None), (2, 3), (3, None), (None, 2), (4, 9), (5, 6), (1, 1)]
    seen = [box.read_file_by_line_range("/tmp/lines", *ends).content for ends in ranges]
    assert seen == ["1\n2\n3\nlast", "2\n3\n", "3\nlast", "1\n2\n", "last", "", "1\n"]
    with pytest.raises(errors.InvalidConfig, match="must be positive"):
        box.read_file_by_line_range("/tmp/lines", 0, 2)
    with pytest.raises(errors.InvalidConfig, match="must be greater"):
        box.read_file_by_line_range("/tmp/lines", 3, 2)
    with pytest.raises(errors.NotFound):
        box.read_file_by_line_range("/tmp/none", 1, 2)


def test_lines_of_a_file_of_many_portions(box: Sandbox) -> None:
    lines = [f"{number:08d} {'x' * (number % 97)}\n" for number in range(60_000)]
    text = "".join(lines)
    assert len(text) > 3 << 20
    box.fs.write("/tmp/long", text)
    for first, last in ((1, 60_000), (19_000, 41_000), (59_999, 60_000), (30_000, 30_000)):
        assert box.read_file_by_line_range("/tmp/long", first, last).content == "".join(lines[first - 1 : last])
    box.fs.write("/tmp/one", "y" * (3 << 20))  # a line longer than a portion
    assert len(box.read_file_by_line_range("/tmp/one", 1, 1).content) == 3 << 20


def test_users(box: Sandbox) -> None:
    assert box.remote_user.current_user == "root" and not box.remote_user.is_user_exist("agent")
    if box.info().isolation == "userns":
        assert not box.remote_user.create_remote_user("agent")
        pytest.skip("an ordinary user's sandbox has one user id: there are no other users in it")
    assert box.remote_user.create_remote_user("agent") and box.remote_user.create_remote_user("agent")
    assert box.remote_user.is_user_exist("agent")
    assert not box.remote_user.create_remote_user("no name") and not box.remote_user.create_remote_user("-x")
    box.create_session(CreateBashSessionRequest(session="u", remote_user="agent"))
    assert box.arun("id -un; echo $HOME; touch ~/mine", session="u").output == "agent\n/home/agent\n"
    owners = box.fs.chown(ChownRequest(remote_user="agent", paths=["/tmp"], recursive=True))
    assert owners.success and box.fs.stat("/tmp").uid == box.fs.stat("/home/agent/mine").uid > 0


def test_rights_as_rock_tells_them(box: Sandbox) -> None:
    box.fs.write("/tmp/f", "")
    assert box.fs.chmod(ChmodRequest(paths=["/tmp/f"], mode="640")).success
    missing = box.fs.chmod(ChmodRequest(paths=["/tmp/none"]))
    assert not missing.success and "/tmp/none" in missing.message
    unknown = box.fs.chown(ChownRequest(remote_user="nosuch", paths=["/tmp/f"]))
    assert not unknown.success and "nosuch" in unknown.message
    for call in (lambda: box.fs.chmod(ChmodRequest(paths=[])), lambda: box.fs.chown("/tmp/none", "root")):
        with pytest.raises(errors.ClientError):
            call()


def test_a_folder_takes_the_place_of_another(box: Sandbox, tree: Path) -> None:
    box.fs.write("/srv/a/b/old", "old")
    assert box.fs.upload_dir(tree, "/srv/a/b/", merge=True).exit_code == 0
    assert [info.name for info in box.fs.list("/srv/a/b")] == ["deep", "old"]
    assert box.fs.upload_dir(tree, "/srv/a/b").exit_code == 0
    assert [info.name for info in box.fs.list("/srv/a/b")] == ["deep"]
    assert box.fs.upload_dir(tree, "/srv/a/b/deep/file").exit_code == 0  # of a file too
    assert box.fs.read_text("/srv/a/b/deep/file/deep/file") == "content"
    assert box.fs.upload_dir(tree, "/srv/new/deep/er").exit_code == 0
    assert [info.name for info in box.fs.list("/srv/a")] == ["b"]  # nothing of the way there is left


def test_a_folder_that_cannot_be_uploaded(box: Sandbox, tree: Path) -> None:
    bad = {
        "x": "must be absolute",
        "/": "cannot be replaced",
        "/proc/x": "/proc",
        "/srv/../": "cannot be replaced",
    }
    for target, words in bad.items():
        seen = box.fs.upload_dir(tree, target)
        assert seen.exit_code == 1 and words in seen.failure_reason, target
    assert "not found" in box.fs.upload_dir(tree / "none", "/srv/x").failure_reason
    assert "must be a directory" in box.fs.upload_dir(tree / "deep" / "file", "/srv/x").failure_reason
    with pytest.raises(FileNotFoundError):
        box.fs.upload_dir(tree / "none", "/srv/x", check="raise")
    assert box.upload_by_path(str(tree), "/srv/up").success and box.fs.exists("/srv/up/deep/file")


def test_deploying(box: Sandbox, tree: Path) -> None:
    assert box.deploy.working_dir is None
    assert box.deploy.format("cd ${working_dir}") == "cd ${working_dir}"
    target = box.deploy.deploy_working_dir(str(tree))
    assert target == box.deploy.working_dir and box.fs.read_text(f"{target}/deep/file") == "content"
    assert box.deploy.deploy_working_dir(str(tree), "/srv/work") == "/srv/work"
    texts = {
        "cd ${working_dir} && ${x} <<y>> $x": "cd /srv/work && a ${x} a",
        "${missing} $HOME $$ <<none>> ${x:-1} <<a b>> ${x": "${missing} $HOME $ <<none>> ${x:-1} <<a b>> ${x",
        "": "",
    }
    for text, wanted in texts.items():
        assert box.deploy.format(text, x="a", y="${x}", working_dir="other") == wanted
    with pytest.raises(FileNotFoundError, match="local_path not found"):
        box.deploy.deploy_working_dir(str(tree / "none"))
    with pytest.raises(ValueError, match="must be a directory"):
        box.deploy.deploy_working_dir(str(tree / "deep" / "file"))
    with pytest.raises(errors.InvalidConfig, match="absolute"):
        box.deploy.deploy_working_dir(str(tree), "work")
    assert box.deploy.working_dir == "/srv/work"


def test_mirrors(box: Sandbox) -> None:
    user = box.remote_user.create_remote_user("agent")
    done = box.network.speedup(SpeedupType.PIP, "http://mirror.example:8/x/")
    assert done.exit_code == 0
    configured = box.execute("pip3 config get global.index-url || pip config get global.index-url").stdout
    assert configured == "http://mirror.example:8/x/pypi/simple/\n"
    if user:
        info = box.fs.stat("/home/agent/.pip/pip.conf")
        assert info.uid == box.fs.stat("/home/agent").uid and "trusted-host = mirror.example" in (
            box.fs.read_text("/home/agent/.pip/pip.conf")
        )
    for address in ("10.1.2.3", "10.1.2.4"):
        assert box.network.speedup(SpeedupType.GITHUB, address).exit_code == 0
    assert box.execute("getent hosts github.com || grep github.com /etc/hosts").stdout.split()[0] == "10.1.2.4"
    assert "github.com" not in box.fs.read_text("/etc/hosts.backup")
    box.fs.write("/etc/debian_version", "12\n")
    box.fs.remove("/etc/os-release")
    box.fs.write("/etc/os-release", 'ID=debian\nVERSION_CODENAME="bookworm"\n')
    box.fs.write("/etc/apt/sources.list", "deb http://old x main\n")
    box.fs.write("/etc/apt/sources.list.d/more.list", "deb http://more x main\n")
    assert box.network.speedup("apt", "https://mirror.example").exit_code == 0
    assert box.fs.read_text("/etc/apt/sources.list").startswith("deb https://mirror.example/debian/ bookworm main")
    assert "http://old" in box.fs.read_text("/etc/apt/sources.list.backup")
    assert not box.fs.exists("/etc/apt/sources.list.d")


def test_mirrors_that_cannot_be(box: Sandbox) -> None:
    for kind, value in (("npm", "x"), ("pip", "nonsense"), ("pip", "https://a\nb"), ("github", "not an ip"),
                        ("apt", "ftp://x"), ("apt", "http://x; rm -rf /")):  # fmt: skip
        before = box.execute("cat /etc/hosts; ls -A /root /etc").stdout
        seen = box.network.speedup(kind, value)
        assert seen.exit_code == 1 and seen.failure_reason, (kind, value)
        assert box.execute("cat /etc/hosts; ls -A /root /etc").stdout == before
    box.execute("rm -f /etc/debian_version")
    assert "not a Debian" in box.network.speedup("apt", "http://mirror.example").output


def test_texts_of_mirrors() -> None:
    assert "trusted-host" not in pip_config("https://m.example") and "index-url = https://m.example/pypi/simple/\n" in (
        pip_config("https://m.example/")
    )
    assert "index-url = https://m.example/own/simple/\n" in pip_config("https://m.example/own/simple")
    ubuntu = apt_list("http://m", "NAME=Ubuntu\nID=ubuntu\nVERSION_CODENAME=noble\n")
    assert ubuntu.count("deb http://m/ubuntu/ noble") == 4 and "noble-backports main restricted" in ubuntu
    for release in ("", "ID=debian\n", "ID=alpine\nVERSION_CODENAME=x\n", "ID=debian\nVERSION_CODENAME='a b'\n"):
        with pytest.raises(errors.InvalidConfig):
            apt_list("http://m", release)
    old = "1.1.1.1 github.com gh # ours\n2.2.2.2 github.com\n::1 localhost\n"
    assert hosts_with(old, "::2") == "1.1.1.1 gh # ours\n::1 localhost\n::2 github.com\n"


# ---- runtime environments


def create(box: Sandbox, config: RuntimeEnvConfig) -> RuntimeEnv:
    """A test that needs an index of packages is skipped where there is none."""
    try:
        return RuntimeEnv.create(box, config)
    except (errors.InvalidConfig, errors.Unsupported) as error:
        if "fetch" in str(error):
            pytest.skip(f"no packages can be fetched here: {error}")
        raise


def test_a_python_of_its_own(box: Sandbox, tmp_path: Path) -> None:
    packages = tmp_path / "requirements.txt"
    packages.write_text("# what it needs\ntabulate==0.9.0  # a table\n\n")
    config = PythonRuntimeEnvConfig(pip=str(packages), env={"A": "of its own"}, extra_symlink_dir="/opt/links",
                                    custom_install_cmd="pwd > custom")  # fmt: skip
    env = create(box, config)
    assert env.initialized and box.runtime_envs == {env.runtime_env_id: env}
    seen = env.run("command -v python pip; python -c 'import tabulate as t; print(t.__version__)'; echo $A")
    assert seen.output == f"{env.bin_dir}/python\n{env.bin_dir}/pip\n0.9.0\nof its own\n"
    assert env.run("echo $((6 * 7))", mode="normal").output == "42\n"
    assert box.fs.read_text(f"{env.workdir}/custom") == f"{env.workdir}\n"
    assert box.execute(["/opt/links/python", "-c", "import tabulate"]).exit_code == 0
    assert not box.fs.exists(f"{env.workdir}/wheels")
    with pytest.raises(errors.CommandFailed, match=r"went wrong.*exit code 3") as told:
        env.run("echo why; exit 3", error_msg="it went wrong")
    assert told.value.observation.output == "why\n"
    assert box.execute(env.wrapped_cmd('command -v python3', prepend=False)).stdout != f"{env.bin_dir}/python3\n"


def test_a_python_that_nobody_has(box: Sandbox) -> None:
    if box.execute("command -v python3.12").exit_code == 0:
        pytest.skip("the image has a Python 3.12")
    with pytest.raises(errors.Unsupported, match=r"no Python 3\.12"):
        RuntimeEnv.create(box, PythonRuntimeEnvConfig(version="3.12"))
    with pytest.raises(ValueError, match="Unsupported runtime type"):
        RuntimeEnv.create(box, RuntimeEnvConfig(type="perl"))
    assert box.runtime_envs == {}


def test_an_installation_of_the_users_own(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = "mkdir -p runtime-env/bin && ln -s $(command -v python3) runtime-env/bin/python"
    monkeypatch.setenv("ROCK_RTENV_PYTHON_V31212_INSTALL_CMD", commands)
    env = RuntimeEnv.create(box, PythonRuntimeEnvConfig(version="3.12"))
    assert env.run("command -v python").output == f"{env.bin_dir}/python\n"
    monkeypatch.setenv("ROCK_RTENV_PYTHON_V31212_INSTALL_CMD", "echo no such mirror; exit 4")
    with pytest.raises(errors.CommandFailed, match="no such mirror"):
        RuntimeEnv.create(box, PythonRuntimeEnvConfig(version="3.12"))


@pytest.mark.timeout(400)
def test_node(box: Sandbox) -> None:
    env = create(box, NodeRuntimeEnvConfig(npm_registry="https://registry.example", extra_symlink_dir="/opt/links"))
    seen = env.run("node -p 6*7; npm config get registry; npx --version > /dev/null && echo npx")
    assert seen.output == "42\nhttps://registry.example\nnpx\n"
    assert box.execute(["/opt/links/node", "--version"]).stdout == "v22.18.0\n"


def test_wheels_for_a_target_that_lies() -> None:
    from rock.sdk.wheels import Target

    assert "manylinux2014_x86_64" in Target("3.11", "x86_64", "glibc-2.36").options()
    for lie in (("3.11; x", "x86_64", "glibc-2.36"), ("3.11", "../x", "glibc-2.36"), ("3.11", "x86_64", "glibc-2.999")):
        with pytest.raises(errors.Unsupported):
            Target(*lie).options()


def test_requirements_take_no_options(tmp_path: Path) -> None:
    from rock.sdk.wheels import requirements_of

    file = tmp_path / "r.txt"
    file.write_text(f"a\n--index-url {os.sep}x\n")
    with pytest.raises(errors.InvalidConfig, match="option of pip"):
        requirements_of(file)
