"""A scripted language model as an HTTP server, in all four dialects, with and without streams. Standard library only.

The first request with tools gets one call of the shell tool. A request that contains the result of a tool gets a text
that ends the turn. A request without tools gets a text. `python scripted_model.py COMMAND` prints its port.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-upstream-0123456789abcdef"
PROMPT, COMPLETION = 100, 10  # tokens of each response
FINAL = "The file is written."
SHELLS = ("bash", "exec_command", "shell_command", "shell", "run_shell_command", "terminal", "execute_bash")


class ScriptedModel:
    """The server. `requests`: (path, headers, body) of every request, in order. command: of the shell call."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        model = self

        class Handler(_Handler):
            scripted = model

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedModel:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # ---- decisions ----

    def decide(self, tools: list[tuple[str, dict[str, Any]]], answered: bool) -> tuple[str, dict[str, Any]] | None:
        """The tool call, or None for a text. tools: name and schema of the parameters."""
        if answered:
            return None
        for name, schema in tools:
            if name.lower() in SHELLS:
                return name, self._arguments(schema)
        return None

    def _arguments(self, schema: dict[str, Any]) -> dict[str, Any]:
        properties = schema.get("properties", {})
        found: dict[str, Any] = {}
        for name, kind in properties.items():
            if name in ("command", "cmd"):
                found[name] = ["sh", "-c", self.command] if _type(kind) == "array" else self.command
            elif name in schema.get("required", ()):
                found[name] = kind["enum"][0] if "enum" in kind else {"boolean": False, "integer": 1, "number": 1,
                                                                     "array": []}.get(_type(kind), "writes a file")
        return found


def _type(schema: dict[str, Any]) -> str:
    return str(schema.get("type", "")).lower()


class _Handler(BaseHTTPRequestHandler):
    scripted: ScriptedModel
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._send(200, b"", "text/plain")

    def do_GET(self) -> None:
        if self.headers.get("upgrade"):
            self._send(426, b"{}", "application/json")
        else:
            self._send(200, json.dumps({"object": "list", "data": []}).encode(), "application/json")

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.loads(data or b"{}")
        path = self.path.partition("?")[0]
        self.scripted.requests.append((path, {k.lower(): v for k, v in self.headers.items()}, body))
        key = (self.headers.get("authorization", "").removeprefix("Bearer ") or self.headers.get("x-api-key")
               or self.headers.get("x-goog-api-key"))  # fmt: skip
        if key != KEY:
            self._send(401, json.dumps({"error": {"message": "wrong key"}}).encode(), "application/json")
        elif path.endswith("/count_tokens"):
            self._send(200, json.dumps({"input_tokens": PROMPT}).encode(), "application/json")
        elif path.endswith("/chat/completions"):
            self._answer(*_chat(self.scripted, body), bool(body.get("stream")))
        elif path.endswith("/responses"):
            self._answer(*_responses(self.scripted, body), bool(body.get("stream")))
        elif path.endswith("/messages"):
            self._answer(*_messages(self.scripted, body), bool(body.get("stream")))
        elif ":" in path:
            self._answer(*_gemini(self.scripted, body), path.endswith(":streamGenerateContent"))
        else:
            self._send(404, b"{}", "application/json")

    def _answer(self, whole: dict[str, Any], events: list[tuple[str, Any]], stream: bool) -> None:
        if not stream:
            self._send(200, json.dumps(whole).encode(), "application/json")
            return
        text = ""
        for name, value in events:
            data = value if isinstance(value, str) else json.dumps(value)
            text += (f"event: {name}\n" if name else "") + f"data: {data}\n\n"
        self._send(200, text.encode(), "text/event-stream")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


Reply = tuple[dict[str, Any], list[tuple[str, Any]]]


def _chat(model: ScriptedModel, body: dict[str, Any]) -> Reply:
    tools = [(t["function"]["name"], t["function"].get("parameters", {})) for t in body.get("tools") or ()]
    call = model.decide(tools, any(m["role"] == "tool" for m in body["messages"]))
    usage = {"prompt_tokens": PROMPT, "completion_tokens": COMPLETION, "total_tokens": PROMPT + COMPLETION}
    base = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
    finish = "stop" if call is None else "tool_calls"
    message: dict[str, Any] = {"role": "assistant", "content": FINAL if call is None else None}
    if call is not None:
        message["tool_calls"] = [{"id": "call_1", "type": "function",
                                  "function": {"name": call[0], "arguments": json.dumps(call[1])}}]  # fmt: skip
    whole = {**base, "object": "chat.completion", "usage": usage,
             "choices": [{"index": 0, "message": message, "finish_reason": finish}]}  # fmt: skip
    delta = {**message, "tool_calls": [{**t, "index": i} for i, t in enumerate(message.get("tool_calls", ()))]}
    chunk = {**base, "object": "chat.completion.chunk"}
    first = {"index": 0, "delta": {k: v for k, v in delta.items() if v}, "finish_reason": None}
    events: list[tuple[str, Any]] = [
        ("", {**chunk, "choices": [first]}),
        ("", {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}),
    ]  # fmt: skip
    if (body.get("stream_options") or {}).get("include_usage"):
        events.append(("", {**chunk, "choices": [], "usage": usage}))
    return whole, [*events, ("", "[DONE]")]


def _responses(model: ScriptedModel, body: dict[str, Any]) -> Reply:
    tools = [(t["name"], t.get("parameters", {})) for t in body.get("tools") or () if t.get("type") == "function"]
    given = body["input"] if isinstance(body["input"], list) else []
    call = model.decide(tools, any(item.get("type", "").endswith("_output") for item in given))
    item: dict[str, Any] = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                            "content": [{"type": "output_text", "text": FINAL, "annotations": []}]}  # fmt: skip
    if call is not None:
        item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": call[0],
                "arguments": json.dumps(call[1]), "status": "completed"}  # fmt: skip
    whole = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": body["model"],
             "output": [item], "usage": {"input_tokens": PROMPT, "output_tokens": COMPLETION,
                                         "total_tokens": PROMPT + COMPLETION,
                                         "input_tokens_details": {"cached_tokens": 0},
                                         "output_tokens_details": {"reasoning_tokens": 0}}}  # fmt: skip
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("response.created", {"response": {**whole, "status": "in_progress", "output": [], "usage": None}}),
        ("response.output_item.added", {"output_index": 0, "item": {**item, "status": "in_progress"}}),
        ("response.output_item.done", {"output_index": 0, "item": item}),
        ("response.completed", {"response": whole}),
    ]
    return whole, [(kind, {"type": kind, "sequence_number": n, **data}) for n, (kind, data) in enumerate(kinds)]


def _messages(model: ScriptedModel, body: dict[str, Any]) -> Reply:
    tools = [(t["name"], t.get("input_schema", {})) for t in body.get("tools") or ()]
    blocks = [b for m in body["messages"] if isinstance(m["content"], list) for b in m["content"]]
    call = model.decide(tools, any(block.get("type") == "tool_result" for block in blocks))
    block: dict[str, Any] = {"type": "text", "text": FINAL} if call is None else {
        "type": "tool_use", "id": "toolu_1", "name": call[0], "input": call[1]}  # fmt: skip
    stop = "end_turn" if call is None else "tool_use"
    whole = {"id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": [block],
             "stop_reason": stop, "stop_sequence": None,
             "usage": {"input_tokens": PROMPT, "output_tokens": COMPLETION}}  # fmt: skip
    started = {**block, "text": ""} if call is None else {**block, "input": {}}
    delta = {"type": "text_delta", "text": FINAL} if call is None else {
        "type": "input_json_delta", "partial_json": json.dumps(call[1])}  # fmt: skip
    kinds: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None,
                                              "usage": {"input_tokens": PROMPT, "output_tokens": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": started},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None},
         "usage": {"output_tokens": COMPLETION}},
        {"type": "message_stop"},
    ]  # fmt: skip
    return whole, [(event["type"], event) for event in kinds]


def _gemini(model: ScriptedModel, body: dict[str, Any]) -> Reply:
    declared = [d for tool in body.get("tools") or () for d in tool.get("functionDeclarations", ())]
    tools = [(d["name"], d.get("parametersJsonSchema") or d.get("parameters") or {}) for d in declared]
    parts = [part for content in body["contents"] for part in content.get("parts", ())]
    call = model.decide(tools, any("functionResponse" in part for part in parts))
    part = {"text": FINAL} if call is None else {"functionCall": {"name": call[0], "args": call[1]}}
    whole = {"candidates": [{"index": 0, "content": {"role": "model", "parts": [part]}, "finishReason": "STOP"}],
             "usageMetadata": {"promptTokenCount": PROMPT, "candidatesTokenCount": COMPLETION,
                               "totalTokenCount": PROMPT + COMPLETION}, "modelVersion": "scripted"}  # fmt: skip
    return whole, [("", whole)]


if __name__ == "__main__":
    with ScriptedModel(sys.argv[1]) as running:
        print(running.port, flush=True)
        threading.Event().wait()
