"""The client packages of OpenAI, Anthropic and Google parse our responses, streams and errors, and we parse their
requests; the `atif` package validates our ATIF documents. The packages are installed once, in ROCK_TEST_CACHE."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rock.gateway.call import ModelResponse, Text
from rock.gateway.dialects import DIALECTS
from rock.gateway.export import export
from rock.gateway.sse import SSEParser
from tests.gateway.bodies import NAMES, request_body, response_body
from tests.gateway.test_exports import RUN, Recorder, conversation, said, user

HERE = Path(__file__).parent
PINS = HERE / "official-clients.txt"
PATHS = {"openai-chat": "/v1/chat/completions", "openai-responses": "/v1/responses", "anthropic": "/v1/messages",
         "gemini": "/v1beta/models/m:generateContent"}  # fmt: skip


@pytest.fixture(scope="session")
def python() -> str:
    """The Python with the packages. Skips where they cannot be installed."""
    cache = Path(os.environ.get("ROCK_TEST_CACHE") or Path.home() / ".cache" / "rock-tests") / "official-clients"
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    folder = cache / f"{digest}-{sys.implementation.cache_tag}"
    program = folder / "bin" / "python"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / f"{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            pip = [program, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "-r", PINS]
            done = subprocess.run(pip, text=True, capture_output=True)
            if done.returncode != 0:
                pytest.skip(f"the client packages cannot be installed here: {done.stderr.strip()[-300:]}")
            (folder / "ready").touch()
    return str(program)


def answer() -> ModelResponse:
    """A response of another dialect, so that each one is rendered."""
    found = DIALECTS["gemini"].parse_response(response_body("gemini"))
    return ModelResponse(found.id, found.model, found.message, found.finish_reason, found.usage)


def prepared() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    response = answer()
    for name, path in PATHS.items():
        dialect = DIALECTS[name]
        body = {**request_body(name), "stream_options": {"include_usage": True}}
        request = dialect.parse_request(body, "m", None)
        rows[path] = [200, "application/json", json.dumps(dialect.render_response(response, request))]
        renderer = dialect.stream_renderer(request)
        source = DIALECTS["openai-chat"].stream_renderer(DIALECTS["openai-chat"].parse_request({"messages": []}))
        parser = DIALECTS["openai-chat"].stream_parser()
        deltas = [d for event in SSEParser().feed(source.end(response)) for d in parser.feed(event)]
        data = renderer.begin() + b"".join(map(renderer.feed, deltas)) + renderer.end(response)
        rows[path.replace(":generate", ":streamGenerate") + " stream"] = [200, "text/event-stream", data.decode()]
        status, error = dialect.render_error("budget", "the budget of the run is used up")
        rows[f"{path} error"] = [status, "application/json", json.dumps(error)]
    return rows


@pytest.fixture(scope="module")
def found(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("clients") / "prepared.json"
    file.write_text(json.dumps(prepared()))
    done = subprocess.run([python, HERE / "client_script.py", file], text=True, capture_output=True, timeout=120,
                          env={"PATH": os.environ["PATH"], "HOME": str(file.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_openai_chat(found: dict[str, Any]) -> None:
    for key in ("chat", "chat stream"):
        result = found["results"][key]
        choice = result["choices"][0]
        assert choice["message"]["content"] == "Hello" and choice["finish_reason"] == "tool_calls"
        assert [(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
                for call in choice["message"]["tool_calls"]] == [
            ("call_1", "bash", {"cmd": "ls"}), ("call_2", "bash", {"cmd": "pwd"})]  # fmt: skip
        assert result["usage"]["prompt_tokens"] == 20
        assert result["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
    assert "tool_calls.function.arguments.done" in found["results"]["chat events"]
    assert found["results"]["chat error"][0] == 400 and "budget of the run" in found["results"]["chat error"][1]


def test_openai_responses(found: dict[str, Any]) -> None:
    for key in ("responses", "responses stream"):
        result = found["results"][key]
        assert [item["type"] for item in result["output"]] == ["reasoning", "message", "function_call", "function_call"]
        assert result["output"][1]["content"][0]["text"] == "Hello"
        assert json.loads(result["output"][3]["arguments"]) == {"cmd": "pwd"}
        assert result["status"] == "completed" and result["usage"]["input_tokens_details"]["cached_tokens"] == 4
    events = found["results"]["responses events"]
    assert events[0] == "response.created" and events[-1] == "response.completed"
    assert events.count("response.output_item.done") == 4 and "response.function_call_arguments.delta" in events


def test_anthropic(found: dict[str, Any]) -> None:
    for key in ("anthropic", "anthropic stream"):
        result = found["results"][key]
        assert [block["type"] for block in result["content"]] == ["thinking", "text", "tool_use", "tool_use"]
        assert (result["content"][0]["thinking"], result["content"][1]["text"]) == ("Think.", "Hello")
        assert result["content"][3]["input"] == {"cmd": "pwd"} and result["stop_reason"] == "tool_use"
        assert (result["usage"]["input_tokens"], result["usage"]["cache_read_input_tokens"]) == (16, 4)
        assert result["usage"]["output_tokens"] == 7
    assert "".join(found["results"]["anthropic text"]) == "Hello"
    assert found["results"]["anthropic error"][0] == 400


def test_gemini(found: dict[str, Any]) -> None:
    chunks = found["results"]["gemini stream"]
    streamed = [part for chunk in chunks for row in chunk["candidates"] for part in row["content"].get("parts", ())]
    whole = found["results"]["gemini"]["candidates"][0]["content"]["parts"]
    for parts in (whole, [part for part in streamed if part != {"text": ""}]):
        assert next(part.get("text") for part in parts if not part.get("thought")) == "Hello"
        assert [part["function_call"]["args"] for part in parts if "function_call" in part] == [
            {"cmd": "ls"}, {"cmd": "pwd"}]  # fmt: skip
    assert chunks[-1]["candidates"][0]["finish_reason"] == "STOP"
    assert chunks[-1]["usage_metadata"]["prompt_token_count"] == 20
    assert found["results"]["gemini error"][0] == 400


@pytest.mark.parametrize("name", NAMES)
def test_the_requests_of_the_clients_are_parsed(found: dict[str, Any], name: str) -> None:
    path = PATHS[name]
    for key in (path, path.replace(":generate", ":streamGenerate") + " stream"):
        request = DIALECTS[name].parse_request(found["requests"][key], "m", None)
        assert [(message.role, message.parts) for message in request.messages] == [("user", (Text("hi"),))]
        if name != "gemini":
            assert request.stream == key.endswith("stream") and request.tools[0].name == "bash"


def test_atif_documents_are_valid(python: str, tmp_path: Path) -> None:
    branched = Recorder()
    branched.call([user("Go.")], said("A", "c1"))
    unknown = {"role": "tool", "tool_call_id": "nope", "content": "x"}
    branched.call([user("Go."), said("Other", "c1"), unknown], said("B"))
    documents = [export("atif", run.calls, RUN) for run in (conversation(), branched, Recorder())]
    (file := tmp_path / "atif.json").write_text(json.dumps(documents))
    done = subprocess.run([python, HERE / "client_script.py", "--atif", file], text=True, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "valid\n"), done.stderr[-3000:]
    documents[0]["steps"][0]["step_id"] = 7
    file.write_text(json.dumps(documents))
    assert subprocess.run([python, HERE / "client_script.py", "--atif", file], capture_output=True).returncode != 0
