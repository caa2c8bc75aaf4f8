"""A Responses body whose message content is text instead of a list of parts, rendered as a stream."""

from __future__ import annotations

from rock.gateway.dialects import DIALECTS
from rock.gateway.sse import SSEEvent


def test_message_content_as_text() -> None:
    dialect = DIALECTS["openai-responses"]
    item = {"type": "message", "id": "y", "role": "assistant", "status": "completed", "content": "hello"}
    response = dialect.parse_response({"id": "r", "object": "response", "status": "completed", "model": "m",
                                       "output": [item], "usage": {"input_tokens": 1, "output_tokens": 1}})  # fmt: skip
    renderer = dialect.stream_renderer(dialect.parse_request({"model": "m", "input": "hi", "stream": True}))
    data = renderer.begin() + renderer.end(response)
    parser = dialect.stream_parser()
    for block in data.decode().strip().split("\n\n"):
        lines = [line.partition(": ")[2] for line in block.split("\n")]
        parser.feed(SSEEvent(lines[0], lines[1]))
    assert parser.finish().message == response.message
