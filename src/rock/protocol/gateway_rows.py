"""Rows of the route table: the model gateway. Its management is in the control plane; the endpoint of agents is not in
the table, because its paths and errors are those of the dialects:

    /gateway/v1/chat/completions, /gateway/v1/responses, /gateway/v1/messages, /gateway/v1/messages/count_tokens,
    /gateway/v1/models, /gateway/v1beta/models/MODEL:METHOD

Its only credential is the secret of a run. Messages: runs.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.keys import Access
from rock.protocol.route import SANDBOX, Route, row

ENDPOINT = "/gateway"  # the prefix of the endpoint of agents
NDJSON = "application/x-ndjson"  # content type of a streamed answer of a call
_U = "/v1/gateway/upstreams"
_R = "/v1/runs/{run}"


def gateway_rows() -> Iterator[Route]:
    yield row("put_upstream", "PUT", _U + "/{upstream}", "control",
              "Define an upstream: a model server, its dialect and key", "UpstreamSpec", "UpstreamInfo")
    yield row("list_upstreams", "GET", _U, "control", "List upstreams, without keys", "", "UpstreamList")
    yield row("delete_upstream", "DELETE", _U + "/{upstream}", "control",
              "Delete an upstream; later calls of its runs fail", "?tenant", "UpstreamInfo")
    yield row("create_run", "POST", "/v1/runs", "control",
              "Create a run: an agent on a task, with a secret for the model endpoint", "RunSpec", "RunInfo")
    yield row("list_runs", "GET", "/v1/runs", "control", "List runs, newest first",
              "?state ?sandbox ?upstream ?tag=k=v ?name ?limit ?after", "RunList")
    yield row("get_run", "GET", _R, "control", "A run", "", "RunInfo")
    yield row("update_run", "PATCH", _R, "control", "Change tags or the weight version of an active run", "UpdateRun",
              "RunInfo")
    yield row("list_calls", "GET", _R + "/calls", "control",
              "Recorded calls in order of arrival; ?bodies=1 with requests and responses",
              "?after ?limit ?bodies ?dialect", "CallList")
    yield row("get_call", "GET", _R + "/calls/{number}", "control",
              "A recorded call; ?wait= until it has ended, ?dialect= for its bodies", "?wait ?dialect", "CallInfo")
    yield row("next_call", "GET", _R + "/next", "control",
              "Pull mode: the first unanswered call with a number above ?after; ?wait= for one",
              "?after ?wait ?dialect", "NextCall")
    yield row("answer_call", "POST", _R + "/calls/{number}/answer", "control",
              "Pull mode: answer a call, in any order; ndjson for a stream", "AnswerCall ?dialect", "CallInfo")
    yield row("end_run", "POST", _R + "/end", "control",
              "End a run with an optional reward; cancels running calls, refuses later ones", "EndRun", "RunInfo")
    yield row("get_trajectory", "GET", _R + "/trajectory", "control",
              "The calls of a run as ?format=atif|openai|chains|rock", "?format", "object")
    yield row("delete_run", "DELETE", _R, "control", "Delete a run and its calls; ?force=1 ends it first", "?force",
              "RunInfo")
    # data plane: requests of the gateway to the worker of a sandbox
    port = SANDBOX + "/gateway"
    yield Route("open_gateway_port", "PUT", port, "data", "Open the loopback port to the gateway (server only)",
                "GatewayPort", "GatewayPortInfo", True, access=Access.ADMIN)
    yield Route("close_gateway_port", "DELETE", port, "data", "Close the loopback port to the gateway (server only)",
                "", "GatewayPortInfo", True, access=Access.ADMIN)
