"""Runs over a real server, a real upstream and real sockets."""

from __future__ import annotations

import json

from rock.sync import Client, Sandbox, SandboxConfig
from tests.conftest import IMAGE, RunningServer
from tests.gateway.conftest import FakeUpstream, chat, chat_body

AGENT = """
import json, os, sys, urllib.request
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", sys.argv[1].encode(),
                                 {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"]})
print(urllib.request.urlopen(request).read().decode())
"""


def test_an_agent_in_a_sandbox_without_a_network(server: RunningServer, upstream: FakeUpstream) -> None:
    with Client(server.url) as client, Sandbox(
        SandboxConfig(base_url=server.url, image=IMAGE, network="none", memory="256m")
    ) as sandbox:
        client.upstreams.put("fake", upstream.url, key="sk-upstream-secret")
        with sandbox.start_run(upstream="fake", tags={"task": "one"}) as run:
            body = json.dumps(chat_body("hello"))
            done = sandbox.execute(["python3", "-c", AGENT, body], env=run.environ)
            assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "reply 1", done
            (call,) = run.calls()
            assert call.state == "done" and call.request == json.loads(body) and call.usage.prompt == 10
            assert call.response == json.loads(done.stdout)
            look = "cat /proc/[0-9]*/environ; grep -rs sk-upstream /tmp /run /etc /opt/rock /root 2>/dev/null"
            seen_inside = sandbox.execute(["sh", "-c", look], env=run.environ, max_output_bytes=10_000_000).stdout
            assert str(run.api_key) in seen_inside and "sk-upstream" not in seen_inside
            run.end(1.0)
        assert run.refresh().reward == 1.0 and run.info.reward_valid
        (seen,) = upstream.seen()
        assert seen["headers"]["authorization"] == "Bearer sk-upstream-secret"
        late = sandbox.execute(["python3", "-c", AGENT, body], env=run.environ)
        assert "403" in late.stderr
        run.delete()
        client.upstreams.delete("fake")


def test_a_stream_and_its_parent(server: RunningServer, upstream: FakeUpstream) -> None:
    with Client(server.url) as client:
        client.upstreams.put("fake", upstream.url)
        with client.runs.create(upstream="fake") as run:
            made = {"base_url": run.base_url, "api_key": run.api_key}
            first = chat(made, chat_body("a"))[1]["choices"][0]["message"]["content"]
            _, text, headers = chat(made, chat_body("a", first, "b", stream=True))
            assert headers["content-type"].startswith("text/event-stream") and text.endswith("data: [DONE]\n\n")
            one, two = run.calls()
            assert two.parent == 1 and two.stream and two.response is not None
            assert two.response["choices"][0]["message"]["content"] == "reply 2"
            assert two.request == chat_body("a", first, "b", stream=True) and one.parent is None
        run.delete()
        client.upstreams.delete("fake")
