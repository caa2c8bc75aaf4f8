"""An environment over a server that is killed and comes back: no step is lost, and none is done twice."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from tests.conftest import hosting

from rock.gym import SandboxEnv


@pytest.mark.parametrize("way", ["pipes", "http"])
def test_an_episode_goes_on(tmp_path: Path, env_images: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setenv("ROCK_ENV_PIPES", str(int(way == "pipes")))
    with hosting(tmp_path, env_images) as server:
        port = int(server.url.rpartition(":")[2])
        env, same = (SandboxEnv("CartPole-v1", base_url=server.url) for _ in range(2))

        def restart() -> None:
            server.kill()
            time.sleep(2.0)
            server.start(port)

        thread = threading.Thread(target=restart)
        seen: list[list[object]] = [[], []]
        for number, played in enumerate((same, env)):
            played.reset(seed=3)
            for step in range(9):
                if number == 1 and step == 4:
                    thread.start()
                    time.sleep(0.3)
                seen[number].append([float(x) for x in played.step(step % 2)[0]])
        thread.join(60)
        assert seen[0] == seen[1]
        env.close()
        same.close()
