"""A model server for tests, as a program of its own: four dialects, with and without streams, and faults on request.

    python fake_upstream.py          prints its port; ends with its standard input

POST /_plan with a list of objects: each following model request takes one. Fields of an object:
    status, headers, body   respond with this error
    delay                   seconds before the response;  pause: seconds between the events of a stream
    malformed, truncate     invalid JSON; a stream or a body that breaks in the middle
    cut                     number of events at the end of a stream that are left out; the body ends in order
    no_usage                a chat stream without its usage, as from a server that does not know stream_options
    tokens                  token ids and log probabilities, as vLLM sends them
    text                    content of the response;  tool: a tool call [name, arguments] instead
    echo                    the headers of the request in the response
GET /_seen: the model requests so far: {"path", "headers", "body", "at"}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

plans: list[dict[str, Any]] = []
seen: list[dict[str, Any]] = []


def chat(text: str, model: str, plan: dict[str, Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if "tool" in plan:
        name, arguments = plan["tool"]
        call = {"id": f"call_{len(seen)}", "type": "function", "function": {"name": name, "arguments": arguments}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    reason = "tool_calls" if "tool" in plan else "stop"
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
    body: dict[str, Any] = {"id": f"chatcmpl-{len(seen)}", "object": "chat.completion", "created": 1, "model": model,
                            "choices": [choice], "x_unknown": {"kept": [1, 2.50]},
                            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}}  # fmt: skip
    if plan.get("tokens"):
        body["prompt_token_ids"] = [1, 2, 3]
        choice["token_ids"] = [4, 5]
        choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []},
                                          {"token": "b", "logprob": -0.25, "bytes": [98], "top_logprobs": []}]}
    return body


def chat_events(text: str, model: str, plan: dict[str, Any]) -> list[str]:
    whole = chat(text, model, plan)
    base = {"id": whole["id"], "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    message = whole["choices"][0]["message"]
    if message.get("tool_calls"):
        deltas.append({"tool_calls": [{"index": 0, **message["tool_calls"][0]}]})
    else:
        half = max(1, len(text) // 2)
        deltas += [{"content": text[:half]}, {"content": text[half:]}]
    events = []
    for place, delta in enumerate(deltas):
        choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": None}
        event: dict[str, Any] = {**base, "choices": [choice]}
        if plan.get("tokens"):
            if place == 0:
                event["prompt_token_ids"] = [1, 2, 3]
            else:
                choice["token_ids"] = [3 + place]
                choice["logprobs"] = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
        events.append(event)
    last = {"index": 0, "delta": {}, "finish_reason": whole["choices"][0]["finish_reason"]}
    events.append({**base, "choices": [last]})
    events.append({**base, "choices": [], "usage": whole["usage"]})
    return [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]


def anthropic(text: str, model: str, plan: dict[str, Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if "tool" in plan:
        content = [{"type": "tool_use", "id": f"toolu_{len(seen)}", "name": plan["tool"][0],
                    "input": json.loads(plan["tool"][1])}]
    return {"id": f"msg_{len(seen)}", "type": "message", "role": "assistant", "model": model, "content": content,
            "stop_reason": "tool_use" if "tool" in plan else "end_turn", "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 5}}  # fmt: skip


def anthropic_events(text: str, model: str, plan: dict[str, Any]) -> list[str]:
    whole = anthropic(text, model, plan)
    block = whole["content"][0]
    start = {**block, "text": ""} if block["type"] == "text" else {**block, "input": {}}
    delta = {"type": "text_delta", "text": text} if block["type"] == "text" else \
        {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    usage = {"input_tokens": 10, "output_tokens": 1}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": start},
        {"type": "ping"},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
         "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]  # fmt: skip
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]


def responses(text: str, model: str, plan: dict[str, Any]) -> dict[str, Any]:
    content = {"type": "output_text", "text": text, "annotations": []}
    item: dict[str, Any] = {"type": "message", "id": f"item_{len(seen)}", "role": "assistant", "status": "completed",
                            "content": [content]}
    if "tool" in plan:
        item = {"type": "function_call", "id": f"fc_{len(seen)}", "call_id": f"call_{len(seen)}",
                "name": plan["tool"][0], "arguments": plan["tool"][1], "status": "completed"}
    return {"id": f"resp_{len(seen)}", "object": "response", "created_at": 1, "status": "completed", "model": model,
            "output": [item], "parallel_tool_calls": True, "tools": [], "tool_choice": "auto", "error": None,
            "usage": {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 5,
                      "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 15}}  # fmt: skip


def responses_events(text: str, model: str, plan: dict[str, Any]) -> list[str]:
    whole = responses(text, model, plan)
    item = whole["output"][0]
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**whole, "status": "in_progress", "output": [], "usage": None}},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "status": "in_progress"}},
    ]
    if item["type"] == "message":
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        part = item["content"][0]
        events += [
            {"type": "response.content_part.added", **place, "part": {**part, "text": ""}},
            {"type": "response.output_text.delta", **place, "delta": text},
            {"type": "response.output_text.done", **place, "text": text},
            {"type": "response.content_part.done", **place, "part": part},
        ]
    else:
        place = {"item_id": item["id"], "output_index": 0}
        events += [
            {"type": "response.function_call_arguments.delta", **place, "delta": item["arguments"]},
            {"type": "response.function_call_arguments.done", **place, "arguments": item["arguments"]},
        ]
    events += [{"type": "response.output_item.done", "output_index": 0, "item": item},
               {"type": "response.completed", "response": whole}]  # fmt: skip
    rows = [{**event, "sequence_number": number} for number, event in enumerate(events)]
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in rows]


def gemini(text: str, model: str, plan: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = {"text": text}
    if "tool" in plan:
        part = {"functionCall": {"name": plan["tool"][0], "args": json.loads(plan["tool"][1])}}
    return {"candidates": [{"content": {"role": "model", "parts": [part]}, "finishReason": "STOP", "index": 0}],
            "usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15},
            "modelVersion": model, "responseId": f"g{len(seen)}"}  # fmt: skip


def gemini_events(text: str, model: str, plan: dict[str, Any]) -> list[str]:
    whole = gemini(text, model, plan)
    first = json.loads(json.dumps(whole))
    del first["candidates"][0]["finishReason"], first["usageMetadata"]
    last = json.loads(json.dumps(whole))
    last["candidates"][0]["content"]["parts"] = [{"text": ""}]
    return [f"data: {json.dumps(event)}\r\n\r\n" for event in (first, last)]


KINDS = {"/v1/chat/completions": (chat, chat_events), "/v1/messages": (anthropic, anthropic_events),
         "/v1/responses": (responses, responses_events)}  # fmt: skip


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while await one(reader, writer):
            pass
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    _, target, _ = head[0].split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    path = target.partition("?")[0]
    if path == "/_seen":
        send(writer, 200, seen)
        return True
    if path == "/_plan":
        plans[:] = json.loads(body)
        send(writer, 200, {})
        return True
    found = json.loads(body or b"{}")
    seen.append({"path": target, "headers": headers, "body": found, "at": time.time()})
    plan = plans.pop(0) if plans else {}
    if plan.get("delay"):
        await asyncio.sleep(plan["delay"])
    if "status" in plan:
        send(writer, plan["status"], plan.get("body", {"error": {"message": "as planned"}}), plan.get("headers"))
        await writer.drain()
        return True
    text = json.dumps(headers) if plan.get("echo") else plan.get("text", f"reply {len(seen)}")
    model = found.get("model", "fake")
    stream = bool(found.get("stream"))
    if path.startswith("/v1beta/models/"):
        model, _, verb = path.removeprefix("/v1beta/models/").partition(":")
        make, events_of = gemini, gemini_events
        stream = verb == "streamGenerateContent"
    elif path in KINDS:
        make, events_of = KINDS[path]
    else:
        send(writer, 404, {"error": {"message": f"no {path}"}})
        return True
    if not stream:
        data = json.dumps(make(text, model, plan)).encode()
        if plan.get("malformed"):
            data = b'{"choices": [nonsense'
        length = len(data) + (100 if plan.get("truncate") else 0)
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n".encode())
        writer.write(data)
        await writer.drain()
        return not plan.get("truncate")
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    events = events_of(text, model, plan)
    if plan.get("no_usage"):
        del events[-2]
    events = events[: len(events) - plan.get("cut", 0)]
    for place, event in enumerate(events):
        if place and plan.get("pause"):
            await asyncio.sleep(plan["pause"])
        if place == 2 and plan.get("malformed"):
            event = "data: {nonsense\n\n"
        if place == 2 and plan.get("truncate"):
            return False
        chunk = event.encode()
        writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        await writer.drain()
    writer.write(b"0\r\n\r\n")
    await writer.drain()
    return True


def send(writer: asyncio.StreamWriter, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(value).encode()
    more = "".join(f"{name}: {text}\r\n" for name, text in (headers or {}).items())
    writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{more}content-length: {len(data)}\r\n\r\n"
                 .encode() + data)  # fmt: skip


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=64 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
