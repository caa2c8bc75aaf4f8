"""`docker build`, `pull` and `images`: images of the server."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rock.cli.commands.image import open_store, receive_context, records
from rock.cli.connection import client, new_sandbox, variables
from rock.cli.docker.containers import duration, timestamp
from rock.cli.docker.flags import Call, Refused
from rock.cli.docker.templates import print_rows
from rock.errors import RockError

NETWORKS = {"none": "none", "default": "nat", "bridge": "nat", "nat": "nat", "host": "host"}
_TAGS = 16  # of one build
COLUMNS = {"REPOSITORY": "Repository", "TAG": "Tag", "IMAGE ID": "ID", "CREATED": "CreatedSince", "SIZE": "Size"}


def build(call: Call) -> int:
    """Build a Dockerfile on the server. The output is on the standard error; with --quiet only the name is printed."""
    tags = call.many("tag") or [f"docker-build/{os.urandom(6).hex()}"]
    if len(tags) > _TAGS:
        raise Refused(f"docker: ROCK does not support {len(tags)} tags of one build", hint=f"use at most {_TAGS}")
    network = call.text("network") or "none"
    if network not in NETWORKS:
        raise Refused(f"docker: ROCK does not support --network {network}", hint=f"use {', '.join(NETWORKS)}")
    fields: dict[str, Any] = {
        "target": call.text("target"), "network": NETWORKS[network], "use_cache": not call.on("no-cache"),
        "build_args": variables(tuple(call.many("build-arg")), "--build-arg", lone=True),
        "labels": variables(tuple(call.many("label")), "--label"), "pull": "always" if call.on("pull") else "missing",
    }  # fmt: skip
    if call.text("memory"):
        fields["memory"] = call.text("memory")
    path, file = call.words[0], call.text("file")
    quiet, server = call.on("quiet"), client()
    with TemporaryDirectory(prefix="rock-context-") as folder:
        if path == "-":
            receive_context(Path(folder))
            path, file = folder, None if file is None else os.path.join(folder, file)
        elif not os.path.isdir(path):
            raise Refused(f'ERROR: unable to prepare context: path "{path}" not found', 1)
        for tag in tags:
            made = server.build_image(path, tag, dockerfile=file, progress=None if quiet else _show, **fields)
            fields["use_cache"] = True  # the same steps under a further name
            if not quiet:
                print(f"naming to {made.name}", file=sys.stderr)
    if quiet:
        print(tags[0])
    elif not call.many("tag"):
        print(f"the image has no tag; its name is {tags[0]}", file=sys.stderr)
    return 0


def _show(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def pull(call: Call) -> int:
    """Pull an image on the server: a sandbox of it starts and ends."""
    image = call.words[0]
    sandbox = new_sandbox(image, pull="always", memory="256m", labels={"rock.docker.pull": image[:200]})
    if not call.on("quiet"):
        print(f"Pulling {image}", file=sys.stderr)
    sandbox.start()
    sandbox.delete()
    print(image if call.on("quiet") else f"Status: Image is up to date for {image}")
    return 0


def images(call: Call) -> int:
    """List the images of this machine's store, newest first."""
    if len(call.words) > 1:
        raise Refused("docker: 'docker images' requires at most 1 argument", 1, usage=True)
    wanted = call.words[0] if call.words else None
    rows = []
    for record in sorted(records(), key=lambda one: one.created, reverse=True):
        repository, tag = _parts(record.name)
        if wanted is None or wanted in (repository, f"{repository}:{tag}", record.name):
            rows.append(_row(asdict(record), repository, tag, call.on("no-trunc")))
    if call.on("quiet"):
        for one in rows:
            print(one["ID"])
    else:
        print_rows(rows, COLUMNS, call.text("format"))
    return 0


def _parts(name: str) -> tuple[str, str]:
    """(repository, tag) of a name; a colon before a slash belongs to a port."""
    repository, colon, tag = name.rpartition(":")
    return (repository, tag) if colon and "/" not in tag else (name, "latest")


def _row(record: dict[str, Any], repository: str, tag: str, whole: bool) -> dict[str, Any]:
    identity = record["id"] or record["digest"]
    created = record["created"]
    return {
        "ID": identity if whole else identity.removeprefix("sha256:")[:12], "Repository": repository, "Tag": tag,
        "Digest": record["digest"], "CreatedSince": f"{duration(time.time() - created)} ago",
        "CreatedAt": timestamp(created), "Size": _size(record["size"]),
    }  # fmt: skip


def _size(count: float) -> str:
    """Bytes in decimal units, as Docker prints them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}TB"


def document_of(name: str) -> dict[str, Any] | None:
    """The document of `docker inspect` of an image of this machine's store; None for an unknown name."""
    try:
        record = open_store().inspect(name)
    except RockError:  # NotFound, or no image can have this name
        return None
    repository, tag = _parts(record.name)
    return {
        "Id": record.id or record.digest, "RepoTags": [f"{repository}:{tag}"],
        "RepoDigests": [f"{repository}@{record.digest}"], "Created": timestamp(record.created), "Size": record.size,
        "Architecture": record.architecture, "Os": "linux",
        "Config": {"Env": [f"{key}={value}" for key, value in record.env.items()], "Cmd": list(record.cmd),
                   "Entrypoint": list(record.entrypoint), "WorkingDir": record.cwd, "User": record.user,
                   "Labels": record.labels},
        "RootFS": {"Type": "layers", "Layers": list(record.layers)},
    }  # fmt: skip
