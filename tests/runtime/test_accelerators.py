"""GPUs: which a machine has, who gets which, what the engine is asked for, and what is refused. No GPU is needed: what
NVIDIA's driver tells is read from a folder like its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rock.errors import NoCapacity, RockError, Unsupported
from rock.host.resources import Gpus, found
from rock.protocol.sandbox import SandboxConfig
from rock.runtime.docker import spec
from rock.runtime.docker.engine import Facts
from rock.runtime.init.python import GuestPython

NVIDIA = {"runc": {"path": "runc"}, "nvidia": {"path": "nvidia-container-runtime"}, "runsc": {"path": "runsc"}}


@pytest.fixture
def gpus(tmp_path: Path) -> Gpus:
    for number, model in enumerate(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB", "Tesla T4")):
        folder = tmp_path / f"0000:0{number}:00.0"
        folder.mkdir()
        text = f"Model: \t\t {model}\nIRQ:   \t\t 37\nGPU UUID: \t GPU-{number}\nVideo BIOS: \t 92.00\n"
        (folder / "information").write_text(text)
    (tmp_path / "0000:09:00.0").mkdir()  # it tells nothing
    return Gpus(found(tmp_path))


def request(**fields: Any) -> SandboxConfig:
    return SandboxConfig(image="x:1", memory="64m", **fields)


def facts(**runtimes: Any) -> Facts:
    return Facts.of({"Runtimes": runtimes or NVIDIA, "SecurityOptions": ["name=seccomp,profile=default"],
                     "MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True})  # fmt: skip


def test_each_is_one_sandbox_s(gpus: Gpus) -> None:
    assert gpus.kinds() == ["A100", "A100", "T4"]
    assert gpus.take("a", request(num_gpus=1, accelerator_type="T4")) == ("GPU-2",)
    assert gpus.take("b", request(num_gpus=2)) == ("GPU-0", "GPU-1")
    assert gpus.take("c", request()) == () and not gpus.free
    with pytest.raises(NoCapacity):
        gpus.take("d", request(accelerator_type="A100"))
    gpus.give_back("b")
    assert gpus.take("d", request(accelerator_type="A100")) == ("GPU-0",)
    again = Gpus(gpus.all)  # after a restart
    again.taken("a", tuple(gpus.of("a")))
    assert [gpu.uuid for gpu in again.free] == ["GPU-0", "GPU-1"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"num_gpus": 0.5}, "whole"), ({"num_gpus": 4}, "A100, A100, T4"), ({"accelerator_type": "H100"}, "H100"),
     ({"num_gpus": 2, "accelerator_type": "T4"}, "T4"), ({"num_gpus": 1, "oci_runtime": "runsc"}, "runsc")],
)  # fmt: skip
def test_what_is_refused(gpus: Gpus, fields: dict[str, Any], words: str) -> None:
    config = request(network="none", **fields)
    with pytest.raises(Unsupported, match=words) as caught:
        spec.refuse(config, facts(), spec.wanted_runtime(config), gpus)
    assert caught.value.hint


def test_an_engine_without_the_runtime_is_told(gpus: Gpus) -> None:
    with pytest.raises(RockError, match="no nvidia runtime") as caught:
        spec.refuse(request(num_gpus=1), facts(runc={"path": "runc"}), "runc", gpus)
    assert isinstance(caught.value, Unsupported)
    spec.refuse(request(num_gpus=2), facts(), "runc", gpus)
    spec.refuse(request(), facts(runc={"path": "runc"}), "runc", Gpus([]))


def test_what_the_engine_is_asked_for(gpus: Gpus, tmp_path: Path) -> None:
    config = request(num_gpus=2)
    python = GuestPython(tmp_path)
    asked = spec.container(config, "sha256:1", {}, python, None, "runc", {}, gpus.take("a", config))
    assert asked["HostConfig"]["DeviceRequests"] == [
        {"Driver": "nvidia", "DeviceIDs": ["GPU-0", "GPU-1"], "Capabilities": [["gpu"]]}
    ]
    assert "DeviceRequests" not in spec.container(request(), "sha256:1", {}, python, None, "runc", {})["HostConfig"]
