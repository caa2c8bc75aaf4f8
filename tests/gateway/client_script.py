"""Runs the official client packages against prepared responses; not a test. Python of the clients' environment.

    python client_script.py PREPARED     JSON: {"METHOD-PATH [stream]": [status, content type, body]}

Prints JSON: {"requests": {KEY: body}, "results": {NAME: what the client made of the response}}. With --atif, validates
the ATIF documents of a JSON list.
"""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

prepared: dict[str, Any] = {}
requests: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        stream = body.get("stream") or "streamGenerateContent" in self.path
        failed = "fail" in json.dumps(body)
        path = self.path.partition("?")[0].replace("/v1/models", "/v1beta/models")
        key = path + (" error" if failed else " stream" if stream else "")
        requests[key] = body
        status, kind, data = prepared[key]
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data.encode())))
        self.end_headers()
        self.wfile.write(data.encode())

    def log_message(self, *_: Any) -> None: ...


def calls_of_openai(url: str) -> dict[str, Any]:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0)
    schema = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"],
              "additionalProperties": False}  # fmt: skip
    function = {"name": "bash", "description": "Run", "strict": True, "parameters": schema}
    tools: Any = [{"type": "function", "function": function}]
    given: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    found: dict[str, Any] = {"chat": client.chat.completions.create(**given).model_dump()}
    with client.chat.completions.stream(**given, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        found["chat stream"] = stream.get_final_completion().model_dump(mode="json", warnings=False)
    found["chat events"] = kinds
    flat: Any = {"model": "m", "input": "hi", "tools": [{"type": "function", **tools[0]["function"]}]}
    found["responses"] = client.responses.create(**flat).model_dump(mode="json")
    with client.responses.stream(**flat) as stream:
        found["responses events"] = [event.type for event in stream]
        found["responses stream"] = stream.get_final_response().model_dump(mode="json", warnings=False)
    try:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": "fail"}])
    except openai.BadRequestError as error:
        found["chat error"] = [error.status_code, str(error)]
    return found


def calls_of_anthropic(url: str) -> dict[str, Any]:
    import anthropic

    client = anthropic.Anthropic(base_url=url, api_key="k", max_retries=0)
    tools: Any = [{"name": "bash", "description": "Run", "input_schema": {"type": "object"}}]
    given: Any = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    found: dict[str, Any] = {"anthropic": client.messages.create(**given).model_dump(mode="json")}
    with client.messages.stream(**given) as stream:
        found["anthropic text"] = list(stream.text_stream)
        found["anthropic stream"] = stream.get_final_message().model_dump(mode="json", warnings=False)
    try:
        client.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "fail"}])
    except anthropic.BadRequestError as error:
        found["anthropic error"] = [error.status_code, str(error)]
    return found


def calls_of_gemini(url: str) -> dict[str, Any]:
    from google import genai
    from google.genai import errors

    client = genai.Client(api_key="k", http_options={"base_url": url})
    found: dict[str, Any] = {
        "gemini": client.models.generate_content(model="m", contents="hi").model_dump(mode="json", exclude_none=True),
        "gemini stream": [chunk.model_dump(mode="json", exclude_none=True)
                          for chunk in client.models.generate_content_stream(model="m", contents="hi")],
    }  # fmt: skip
    try:
        client.models.generate_content(model="m", contents="fail")
    except errors.ClientError as error:
        found["gemini error"] = [error.code, str(error)]
    return found


def main() -> None:
    if sys.argv[1] == "--atif":
        from atif import Trajectory

        for document in json.loads(Path(sys.argv[2]).read_text()):
            Trajectory.model_validate(document)
        sys.stdout.write("valid\n")
        return
    prepared.update(json.loads(Path(sys.argv[1]).read_text()))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    results = {**calls_of_openai(url), **calls_of_anthropic(url), **calls_of_gemini(url)}
    server.shutdown()
    json.dump({"requests": requests, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
