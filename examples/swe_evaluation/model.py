"""A scripted model as an upstream of the gateway: OpenAI chat completions on a loopback port.

It reads a file, changes it, runs the tests and submits, one shell command for each response. It repairs the intervals
and the slugs, and makes a wrong change of the ledger. The number of tool results in a request selects the command.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-scripted-model"
PROMPT_TOKENS, COMPLETION_TOKENS = 200, 20  # of each response
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"  # the command that ends mini-swe-agent
# By file: pairs of a text of the file and its replacement.
CHANGES = {
    "intervals.py": [("< merged", "<= merged"), ("in intervals:", "in sorted(intervals):")],
    "slugs.py": [
        ("import re", "import re\nimport unicodedata"),
        ("text.lower()", 'unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()'),
    ],
    "ledger.py": [("total // parts for", "round(total / parts) for")],
}


def commands(problem: str) -> list[str]:
    """The commands for a problem, which names its module in code quotes."""
    name = next((name for name in CHANGES if f"`{name.removesuffix('.py')}." in problem), None)
    if name is None:
        return [SUBMIT]
    edit = f"name, changes = {name!r}, {CHANGES[name]!r}\n" \
           "text = open(name).read()\n" \
           "for old, new in changes:\n    text = text.replace(old, new)\n" \
           "open(name, 'w').write(text)\n"  # fmt: skip
    return [f"cat {name}", f"python3 - <<'END'\n{edit}END", "python3 -m unittest 2>&1 | tail -3", SUBMIT]


def response(request: dict[str, Any]) -> dict[str, Any]:
    """The chat completion for a request."""
    messages = request["messages"]
    problem = next(str(message["content"]) for message in messages if message["role"] == "user")
    script = commands(problem)
    place = sum(message["role"] == "tool" for message in messages)
    arguments = json.dumps({"command": script[min(place, len(script) - 1)]})
    call = {"id": f"call_{place}", "type": "function", "function": {"name": "bash", "arguments": arguments}}
    message = {"role": "assistant", "content": f"Step {place + 1}.", "tool_calls": [call]}
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS,
             "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS}  # fmt: skip
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": request.get("model", "scripted"),
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}], "usage": usage}  # fmt: skip


class Model:
    """The server, while the context is open. calls: requests with the right key."""

    def __init__(self) -> None:
        self.calls = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Model:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(model: Model) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            return None

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or b"{}")
            if self.headers.get("authorization") != f"Bearer {KEY}":
                self._send(401, {"error": {"message": "wrong key"}})
            elif not self.path.endswith("/chat/completions") or body.get("stream"):
                self._send(400, {"error": {"message": "this model serves chat completions without streams"}})
            else:
                model.calls += 1
                self._send(200, response(body))

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
