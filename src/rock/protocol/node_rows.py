"""Rows of the route table: the node plane, by which an admin commands a worker."""

from __future__ import annotations

from collections.abc import Iterator

from rock.protocol.route import Route, row


def node_rows() -> Iterator[Route]:
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
    for name in ("pause", "resume"):
        yield row(f"node_{name}", "POST", f"/node/v1/sandboxes/{{sandbox_id}}/{name}", "node",
                  f"{name.capitalize()} its processes; idempotent", "", "NodeSandbox")  # fmt: skip
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
    yield row("node_configure", "PUT", "/node/v1/configuration", "node", "Apply a version of the live configuration",
              "NodeConfiguration", "NodeConfiguration")  # fmt: skip
    yield row("node_volumes", "GET", "/node/v1/volumes", "node", "The volumes here", "", "NodeVolumes")
    yield row("node_create_volume", "PUT", "/node/v1/volumes/{volume_id}", "node", "Create a volume here; idempotent",
              "NodeVolume", "NodeVolumes")  # fmt: skip
    yield row("node_delete_volume", "DELETE", "/node/v1/volumes/{volume_id}", "node",
              "Delete a volume that no sandbox here uses; idempotent", "", "NodeVolumes")  # fmt: skip
    yield row("node_pools", "GET", "/node/v1/pools", "node", "The warm pools here", "", "NodePoolStates")
    yield row("node_define_pools", "PUT", "/node/v1/pools", "node", "Set all warm pools here; idempotent", "NodePools",
              "NodePoolStates")  # fmt: skip
    s = "/node/v1/snapshots"
    yield row("node_snapshots", "GET", s, "node", "The snapshots here", "", "NodeSnapshots")
    yield row("node_delete_snapshot", "DELETE", s + "/{snapshot_id}", "node",
              "Delete a snapshot; its layer stays while others use it; idempotent", "", "NodeSnapshots")  # fmt: skip
    yield row("node_export_snapshot", "GET", s + "/{snapshot_id}/export", "node", "A snapshot as a tar", "", "raw")
    yield row("node_import_snapshot", "PUT", s + "/{snapshot_id}/import", "node",
              "Create a snapshot from such a tar; idempotent", "raw ?tenant ?name", "NodeSnapshot")  # fmt: skip
    yield row("node_checkpoint", "POST", "/node/v1/sandboxes/{sandbox_id}/checkpoint", "node",
              "Take a snapshot of a running one; idempotent by its id", "NodeCheckpoint", "NodeSnapshot")  # fmt: skip
    yield row("node_forkable", "GET", "/node/v1/sandboxes/{sandbox_id}/forkable", "node",
              "The level that a checkpoint would have now, and why", "", "NodeForkable")  # fmt: skip
    yield row("node_rollback", "POST", "/node/v1/sandboxes/{sandbox_id}/rollback", "node",
              "Return a running sandbox to a snapshot", "NodeRollback", "NodeSandbox")  # fmt: skip
    yield row("node_status", "GET", "/node/v1/status", "node", "Capacity, isolation, load", "", "NodeStatus")
    yield row(
        "node_events",
        "GET",
        "/node/v1/events",
        "node",
        "Ends of sandboxes since a number; waits for one, unless ?boot= is another run of the rocklet",
        "?after ?wait ?boot",
        "NodeEvents",
    )
    yield row(
        "cancel_call",
        "DELETE",
        "/node/v1/calls/{call}",
        "node",
        "The client of a relayed request has left: what it asked for ends",
    )
