"""The resources server of NeMo Gym for environments: sessions, steps, verification."""

from __future__ import annotations

from typing import Any

from checks import check
from fastapi.testclient import TestClient
from nemo_gym.server_utils import ServerClient

from rock.integrations.nemo_gym_server import EnvironmentConfig, EnvironmentResourcesServer

ENV = "game:GuessTheNumber-v0-easy"
VERIFY: dict[str, Any] = {
    "responses_create_params": {"input": "x"},
    "response": {"id": "r", "created_at": 0.0, "model": "m", "object": "response", "output": [],
                 "parallel_tool_calls": False, "tool_choice": "auto", "tools": []},
}  # fmt: skip


def served(**fields: Any) -> Any:
    config = EnvironmentConfig(name="rock_env", host="127.0.0.1", port=1, entrypoint="app.py", domain="games", **fields)
    return EnvironmentResourcesServer(config=config, server_client=ServerClient.model_construct()).setup_webserver()


app = served(env_id=ENV, most_sessions=2)
with check("an episode: the session is a cookie"), TestClient(app) as client:
    begun = client.post("/seed_session", json={"seed": 3})
    assert begun.status_code == 200 and begun.json()["observation"], begun.text
    low, high, total, steps = 1, 20, 0.0, 0
    while steps < 20:
        guess, steps = (low + high) // 2, steps + 1
        step = client.post("/act", json={"action": f"\\boxed{{{guess}}}"}).json()
        total += step["reward"]
        if step["terminated"] or step["truncated"]:
            break
        low, high = (guess + 1, high) if "higher" in step["observation"] else (low, guess - 1)
    assert total > 0, step
    late = client.post("/act", json={"action": "x"})
    assert late.status_code == 422, late.text
    first, second = client.post("/verify", json=VERIFY), client.post("/verify", json=VERIFY)
    assert first.json()["reward"] == second.json()["reward"] == total, first.text
    gone = client.post("/act", json={"action": "x"})
    assert gone.status_code == 404, gone.text
with check("the same seed is the same episode, in another session"):
    with TestClient(app) as one, TestClient(app) as other:
        texts = [client.post("/seed_session", json={"seed": 3}).text for client in (one, other)]
        assert texts[0] == texts[1] and "observation" in texts[0], texts
        with check("too many sessions"), TestClient(app) as third:
            refused = third.post("/seed_session", json={})
            assert refused.status_code == 429 and "most_sessions" in refused.text, refused.text
        for client in (one, other):
            client.post("/verify", json=VERIFY)
with check("errors have statuses"), TestClient(app) as client:
    assert client.post("/verify", json=VERIFY).status_code == 404
    unknown = client.post("/seed_session", json={"env_id": "game:NoSuchGame-v0"})
    assert unknown.status_code == 404, unknown.text
    assert client.post("/act", json={}).status_code == 422
with check("without an env_id, and an unreachable server"):
    with TestClient(served()) as client:
        empty = client.post("/seed_session", json={})
        assert empty.status_code == 422, empty.text
