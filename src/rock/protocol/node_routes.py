"""Rows of the node plane: what an admin asks of a rocklet."""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.route import Route, row


def rows() -> Iterator[Route]:
    yield row(
        "node_create",
        "PUT",
        "/node/v1/sandboxes/{sandbox_id}",
        "node",
        "Make it here",
        "SandboxConfig ?check",
        "NodeSandbox",
    )
    yield row(
        "node_create_many",
        "PUT",
        "/node/v1/sandboxes",
        "node",
        "Make them here: a RESULT frame for each as it is done, or an ERROR frame that has its sandbox_id beside it",
        "NodeCreates",
        "frames (NodeSandbox)",
    )
    yield row("node_list", "GET", "/node/v1/sandboxes", "node", "What is here, with activity", "", "NodeInventory")
    yield row(
        "node_get",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}",
        "node",
        "One of them; ?usage=1 measures",
        "?usage",
        "NodeSandbox",
    )
    yield row("node_destroy", "DELETE", "/node/v1/sandboxes/{sandbox_id}", "node", "Destroy", "?grace", "NodeSandbox")
    yield row(
        "node_connections",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}/connections",
        "node",
        "What one connected to, whether it lives or not",
        "",
        "ConnectionList",
    )
    yield row(
        "node_rest",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/rest",
        "node",
        "End it and keep its files",
        "?grace",
        "NodeSandbox",
    )
    yield row(
        "node_wake",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/wake",
        "node",
        "Make it again over its kept files",
        "SandboxConfig",
        "NodeSandbox",
    )
    yield row(
        "node_pack",
        "GET",
        "/node/v1/sandboxes/{sandbox_id}/files",
        "node",
        "The files of one at rest, as a layer",
        "?limit",
        "frames",
    )
    yield row(
        "node_unpack",
        "PUT",
        "/node/v1/sandboxes/{sandbox_id}/files",
        "node",
        "Take in the files of an archived one, to be woken",
        "frames",
        "NodeSandbox",
    )
    yield row(
        "node_commit",
        "POST",
        "/node/v1/sandboxes/{sandbox_id}/commit",
        "node",
        "Make an image of it here, and push that; answers when it is done",
        "NodeCommit",
        "NodeImage",
    )
    yield row(
        "node_image",
        "POST",
        "/node/v1/images",
        "node",
        "An image; may build or pull it",
        "WorkerImage",
        "ImageState",
    )
    yield row("node_status", "GET", "/node/v1/status", "node", "Capacity, isolation, load", "", "NodeStatus")
    yield row(
        "node_events",
        "GET",
        "/node/v1/events",
        "node",
        "Ends of sandboxes since a number; waits for one",
        "?after ?wait",
        "NodeEvents",
    )
    yield row(
        "cancel_call",
        "DELETE",
        "/node/v1/calls/{call}",
        "node",
        "The client of a relayed request has left: what it asked for ends",
    )
