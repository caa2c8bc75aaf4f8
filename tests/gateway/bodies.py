"""Requests and responses of the four dialects with the same content, as the client programs write them."""

from __future__ import annotations

import copy
from typing import Any

from rock.gateway.call import Delta, ModelResponse
from rock.gateway.dialects import DIALECTS
from rock.gateway.sse import SSEParser

NAMES = ["openai-chat", "openai-responses", "anthropic", "gemini"]
SCHEMA = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
IMAGE = "iVBORw0KGgo="
DATA_URL = f"data:image/png;base64,{IMAGE}"

_REQUESTS: dict[str, dict[str, Any]] = {
    "openai-chat": {
        "model": "m", "temperature": 0.5, "max_tokens": 100, "x_unknown": {"kept": True},
        "tools": [{"type": "function", "function": {"name": "bash", "description": "Run", "parameters": SCHEMA}}],
        "tool_choice": "auto",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Look."},
                                         {"type": "image_url", "image_url": {"url": DATA_URL}}]},
            {"role": "assistant", "content": "Two calls.", "reasoning_content": "Think.", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": '{"cmd":"ls"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "bash", "arguments": '{"cmd":"pwd"}'}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "a b"},
            {"role": "tool", "tool_call_id": "call_2", "content": "/"},
            {"role": "user", "content": "Go on."},
        ],
    },
    "openai-responses": {
        "model": "m", "temperature": 0.5, "max_output_tokens": 100, "x_unknown": {"kept": True},
        "instructions": "Be brief.", "tool_choice": "auto",
        "tools": [{"type": "function", "name": "bash", "description": "Run", "parameters": SCHEMA},
                  {"type": "web_search", "external_web_access": False}],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Look."},
                                                            {"type": "input_image", "image_url": DATA_URL}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Think."}], "encrypted_content": None},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Two calls."}]},
            {"type": "function_call", "call_id": "call_1", "name": "bash", "arguments": '{"cmd":"ls"}'},
            {"type": "function_call", "call_id": "call_2", "name": "bash", "arguments": '{"cmd":"pwd"}'},
            {"type": "function_call_output", "call_id": "call_1", "output": "a b"},
            {"type": "function_call_output", "call_id": "call_2", "output": "/"},
            {"role": "user", "content": "Go on."},
        ],
    },
    "anthropic": {
        "model": "m", "temperature": 0.5, "max_tokens": 100, "x_unknown": {"kept": True},
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=7f;"},
                   {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "tools": [{"name": "bash", "description": "Run", "input_schema": SCHEMA}], "tool_choice": {"type": "auto"},
        "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Look."},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": IMAGE}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Think.", "signature": ""}, {"type": "text", "text": "Two calls."},
                {"type": "tool_use", "id": "call_1", "name": "bash", "input": {"cmd": "ls"}},
                {"type": "tool_use", "id": "call_2", "name": "bash", "input": {"cmd": "pwd"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "call_1", "content": "a b"},
                {"type": "tool_result", "tool_use_id": "call_2", "content": [{"type": "text", "text": "/"}]},
                {"type": "text", "text": "Go on."}]},
        ],
    },
    "gemini": {
        "generationConfig": {"temperature": 0.5, "maxOutputTokens": 100}, "x_unknown": {"kept": True},
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "tools": [{"functionDeclarations": [{"name": "bash", "description": "Run", "parameters": {
            "type": "OBJECT", "properties": {"cmd": {"type": "STRING"}}, "required": ["cmd"]}}]}],
        "toolConfig": {"functionCallingConfig": {"mode": "AUTO"}},
        "contents": [
            {"role": "user", "parts": [{"text": "Look."}, {"inlineData": {"mimeType": "image/png", "data": IMAGE}}]},
            {"role": "model", "parts": [
                {"text": "Think.", "thought": True}, {"text": "Two calls."},
                {"functionCall": {"id": "call_1", "name": "bash", "args": {"cmd": "ls"}}},
                {"functionCall": {"id": "call_2", "name": "bash", "args": {"cmd": "pwd"}}}]},
            {"role": "user", "parts": [
                {"functionResponse": {"id": "call_1", "name": "bash", "response": {"output": "a b"}}},
                {"functionResponse": {"id": "call_2", "name": "bash", "response": {"output": "/"}}},
                {"text": "Go on."}]},
        ],
    },
}  # fmt: skip

_RESPONSES: dict[str, dict[str, Any]] = {
    "openai-chat": {
        "id": "r1", "object": "chat.completion", "created": 1, "model": "m", "x_unknown": 1,
        "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": "Hello", "reasoning_content": "Think.", "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": '{"cmd":"ls"}'}},
                {"id": "call_2", "type": "function", "function": {"name": "bash", "arguments": '{"cmd":"pwd"}'}}]}}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 7, "total_tokens": 27,
                  "prompt_tokens_details": {"cached_tokens": 4}},
    },
    "openai-responses": {
        "id": "r1", "object": "response", "created_at": 1, "model": "m", "status": "completed", "error": None,
        "incomplete_details": None, "output": [
            {"type": "reasoning", "id": "rs_0", "summary": [{"type": "summary_text", "text": "Think."}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
             "content": [{"type": "output_text", "text": "Hello", "annotations": []}]},
            {"type": "function_call", "id": "fc_2", "call_id": "call_1", "name": "bash", "arguments": '{"cmd":"ls"}'},
            {"type": "function_call", "id": "fc_3", "call_id": "call_2", "name": "bash", "arguments": '{"cmd":"pwd"}'},
        ],
        "usage": {"input_tokens": 20, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 7,
                  "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 27},
    },
    "anthropic": {
        "id": "r1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "tool_use",
        "stop_sequence": None, "content": [
            {"type": "thinking", "thinking": "Think.", "signature": ""}, {"type": "text", "text": "Hello"},
            {"type": "tool_use", "id": "call_1", "name": "bash", "input": {"cmd": "ls"}},
            {"type": "tool_use", "id": "call_2", "name": "bash", "input": {"cmd": "pwd"}}],
        "usage": {"input_tokens": 10, "cache_creation_input_tokens": 6, "cache_read_input_tokens": 4,
                  "output_tokens": 7},
    },
    "gemini": {
        "responseId": "r1", "modelVersion": "m", "candidates": [{"index": 0, "finishReason": "STOP", "content": {
            "role": "model", "parts": [
                {"text": "Think.", "thought": True}, {"text": "Hello"},
                {"functionCall": {"id": "call_1", "name": "bash", "args": {"cmd": "ls"}}},
                {"functionCall": {"id": "call_2", "name": "bash", "args": {"cmd": "pwd"}}}]}}],
        "usageMetadata": {"promptTokenCount": 20, "cachedContentTokenCount": 4, "candidatesTokenCount": 7,
                          "totalTokenCount": 27},
    },
}  # fmt: skip


def request_body(name: str) -> dict[str, Any]:
    return copy.deepcopy(_REQUESTS[name])


def response_body(name: str) -> dict[str, Any]:
    return copy.deepcopy(_RESPONSES[name])


def parsed_stream(name: str, data: bytes, portion: int = 7) -> tuple[list[Delta], ModelResponse]:
    """The deltas and the response of a stream that arrives in small portions."""
    sse, parser = SSEParser(), DIALECTS[name].stream_parser()
    deltas: list[Delta] = []
    for start in range(0, len(data), portion):
        for event in sse.feed(data[start : start + portion]):
            deltas += parser.feed(event)
    assert not sse.rest
    return deltas, parser.finish()
