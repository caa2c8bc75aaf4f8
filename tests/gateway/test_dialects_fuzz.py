"""Arbitrary and damaged bodies, events and conversions: the only exception is DialectError, and nothing hangs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from rock.gateway.call import Delta, Message, ModelRequest, ModelResponse, Reasoning, Text, ToolCall
from rock.gateway.dialects import DIALECTS, DialectError
from rock.gateway.sse import SSEError, SSEEvent, SSEParser
from rock.gateway.tree import Prefixes, message_key, prefix_keys
from tests.gateway.bodies import NAMES, request_body, response_body

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
NASTY = st.one_of(JSON, st.sampled_from([[], {}, "", 0, -1, 1.5, True, None, [None], [[]], ["x"], [{}], {"type": 5},
                                         [{"type": "text"}], "data:image/png;base64,", 1 << 63]))  # fmt: skip
FUZZ = settings(
    max_examples=40, deadline=None, database=None, phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values within a JSON value."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


def damaged(draw: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    """The body with one to three values replaced or removed."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(body) or [("x",)]))
        holder: Any = body
        for key in path[:-1]:
            holder = holder[key]
        if draw(st.booleans()) or isinstance(holder, list):
            holder[path[-1]] = copy.deepcopy(draw(NASTY))  # a shared value must not change between examples
        else:
            holder.pop(path[-1], None)
    return body


def used(request: ModelRequest) -> None:
    """Everything that is done with a request."""
    Prefixes().add(1, request)
    for name in NAMES:
        DIALECTS[request.dialect].count_tokens(request)
        try:
            orjson.dumps(DIALECTS[name].render_request(request, stream=True, token_fields=True))
        except DialectError:
            assert name != request.dialect, "the dialect of a request can express it"


def used_response(response: ModelResponse) -> None:
    message_key(response.message)
    for name in NAMES:
        request = DIALECTS[name].parse_request(request_body(name), "m", True)
        for render in (
            lambda name=name, request=request: orjson.dumps(DIALECTS[name].render_response(response, request)),
            lambda name=name, request=request: DIALECTS[name].stream_renderer(request).end(response),
        ):
            try:
                render()
            except DialectError:
                assert name != response.dialect


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_damaged_requests(name: str, data: st.DataObject) -> None:
    try:
        request = DIALECTS[name].parse_request(damaged(data.draw, request_body(name)), "m", None)
    except DialectError:
        return
    used(request)


LONE = st.sampled_from(["\ud800", "a\udfffb", '{"x": "\\ud83d"}', '{"x": "\ud83d"}', "\udce4" * 3])


def with_lone_surrogates(draw: Callable[..., Any], body: dict[str, Any]) -> dict[str, Any]:
    """The body with one or more texts that have lone surrogates, or JSON text with the escape of one."""
    body = copy.deepcopy(body)
    texts = [path for path in places(body) if isinstance(_at(body, path), str)]
    for path in draw(st.lists(st.sampled_from(texts), min_size=1, max_size=4)):
        _at(body, path[:-1])[path[-1]] = draw(LONE)
    return body


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_lone_surrogates(name: str, data: st.DataObject) -> None:
    """No UnicodeEncodeError and no TypeError for what UTF-8 cannot express, in requests, responses and their keys."""
    try:
        request = DIALECTS[name].parse_request(with_lone_surrogates(data.draw, request_body(name)), "m", None)
        prefix_keys(request)
        DIALECTS[name].count_tokens(request)
        for other in NAMES:
            with contextlib.suppress(DialectError):
                DIALECTS[other].render_request(request, stream=True, token_fields=True)
    except DialectError:
        pass
    try:
        response = DIALECTS[name].parse_response(with_lone_surrogates(data.draw, response_body(name)))
        message_key(response.message)
        for other in NAMES:
            given_request = DIALECTS[other].parse_request(request_body(other), "m", True)
            with contextlib.suppress(DialectError):
                DIALECTS[other].render_response(response, given_request)
            with contextlib.suppress(DialectError):
                DIALECTS[other].stream_renderer(given_request).end(response)
    except DialectError:
        pass


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_damaged_responses(name: str, data: st.DataObject) -> None:
    body = damaged(data.draw, response_body(name))
    DIALECTS[name].strip_token_fields(body)
    try:
        response = DIALECTS[name].parse_response(body)
    except DialectError:
        return
    used_response(response)


def events_of(name: str) -> list[dict[str, Any]]:
    response = ModelResponse("r1", "m", DIALECTS[name].parse_response(response_body(name)).message, "tool_calls")
    data = DIALECTS[name].stream_renderer(DIALECTS[name].parse_request(request_body(name), "m", True)).end(response)
    return [orjson.loads(event.data) for event in SSEParser().feed(data) if event.data != "[DONE]"]


EVENTS = {name: events_of(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_damaged_streams(name: str, data: st.DataObject) -> None:
    events = data.draw(st.permutations(EVENTS[name])) if data.draw(st.booleans()) else list(EVENTS[name])
    at = data.draw(st.integers(0, len(events) - 1))
    events[at] = damaged(data.draw, events[at])
    parser = DIALECTS[name].stream_parser()
    renderers = [DIALECTS[other].stream_renderer(DIALECTS[other].parse_request(request_body(other), "m", True))
                 for other in NAMES]  # fmt: skip
    try:
        for row in events:
            for delta in parser.feed(SSEEvent("", orjson.dumps(row).decode())):
                for renderer in renderers:
                    renderer.feed(delta)
        response = parser.finish()
    except DialectError:
        return
    used_response(response)


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(text=st.text(max_size=60) | JSON.map(lambda value: orjson.dumps(value).decode()))
def test_arbitrary_events(name: str, text: str) -> None:
    parser = DIALECTS[name].stream_parser()
    try:
        parser.feed(SSEEvent("", text))
        parser.finish()
    except DialectError:
        pass


DELTAS = st.builds(
    Delta, st.sampled_from(["start", "text", "reasoning", "signature", "refusal", "tool", "arguments"]),
    st.integers(0, 4), st.text(max_size=5), st.text(max_size=3), st.text(max_size=3),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(deltas=st.lists(DELTAS, max_size=12))
def test_deltas_in_any_order_give_a_stream_that_is_complete(name: str, deltas: list[Delta]) -> None:
    renderer = DIALECTS[name].stream_renderer(DIALECTS[name].parse_request(request_body(name), "m", True))
    message = Message("assistant", (Reasoning("t", "s"), Text("x"), ToolCall("c", "f", "{")))
    response = ModelResponse("r", "m", message, "tool_calls")
    data = renderer.begin() + b"".join(map(renderer.feed, deltas)) + renderer.end(response)
    parser = DIALECTS[name].stream_parser()
    try:
        for event in SSEParser().feed(data):
            parser.feed(event)
    except DialectError as error:
        assert "name" in str(error) or "id" in str(error)  # a tool call without a name or an id
        return
    parser.finish()


@FUZZ
@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_portions_of_a_stream_do_not_change_its_events(data: bytes, cuts: list[int]) -> None:
    whole = SSEParser().feed(data)
    parser, found, start = SSEParser(), list[SSEEvent](), 0
    try:
        for cut in [*sorted(cuts), len(data)]:
            found += parser.feed(data[start:cut])
            start = max(start, cut)
    except SSEError:
        raise AssertionError("the limit is not reached") from None
    assert found == whole
