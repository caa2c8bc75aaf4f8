"""`rock dataset ls|show|upload|download`: data sets of jobs, in a folder or a bucket."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rock import settings
from rock.cli.output import as_json, busy, table
from rock.cli.parsing import Group, json_option
from rock.jobs.tasks import local_tasks
from rock.store.datasets import Datasets

_root = click.option("--root", metavar="FOLDER|s3://BUCKET/PREFIX",
                     help="Where the data sets are; by default `datasets` below ROCK_HOME.")  # fmt: skip
_split = click.option("--split", default="test", show_default=True, help="Split of the data set.")


@click.group(cls=Group)
def dataset() -> None:
    """List, show, upload and download data sets.

    A data set is ORG/NAME with splits; a task is a folder or a file of a split. A bucket uses ROCK_S3_ENDPOINT,
    ROCK_S3_REGION, ROCK_S3_KEY and ROCK_S3_SECRET of this shell.
    """


def _at(root: str | None) -> Datasets:
    place = root or str(settings.home() / "datasets")
    names = ("endpoint", "region", "key", "secret")
    given = {name: settings.variable(f"ROCK_S3_{name.upper()}") or "" for name in names}
    return Datasets.at(place, **given)


@dataset.command("ls", example="rock dataset ls --root s3://evals/datasets")
@_root
@json_option
def list_datasets(root: str | None, json_: bool) -> None:
    """List data sets and their splits."""
    found = asyncio.run(_at(root).all())
    if json_:
        as_json([{"id": name, "split": split} for name, split in found])
        return
    table(["DATASET", "SPLIT"], [[*row] for row in found], "no data sets; upload one with: rock dataset upload")


@dataset.command(example="rock dataset show acme/repairs --split test\nrock dataset show tasks/")
@click.argument("name", metavar="DATASET|PATH")
@_split
@_root
@json_option
def show(name: str, split: str, root: str | None, json_: bool) -> None:
    """List the tasks of a data set, or of a local folder or file."""
    if Path(name).exists():
        found = [{"id": task.name, "kind": task.spec["kind"]} for task in local_tasks(name)]
        if json_:
            as_json(found)
        else:
            table(["TASK", "KIND"], [[one["id"], one["kind"]] for one in found])
        return
    spec = asyncio.run(_at(root).show(name, split))
    if json_:
        as_json(asdict(spec))
        return
    for task in spec.task_ids:
        print(task)


@dataset.command(example="rock dataset upload tasks/ acme/repairs --split test")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("name", metavar="DATASET")
@_split
@_root
@click.option("--overwrite", is_flag=True, help="Replace the files of existing tasks.")
@json_option
def upload(folder: Path, name: str, split: str, root: str | None, overwrite: bool, json_: bool) -> None:
    """Upload the tasks of a local folder.

    Existing tasks are skipped, unless --overwrite is set.
    """
    with busy(f"uploading {folder}"):
        done = asyncio.run(_at(root).upload(folder, name, split, overwrite))
    _done(asdict(done), f"{done.uploaded} tasks uploaded, {done.skipped} skipped", json_)


@dataset.command(example="rock dataset download acme/repairs tasks/ --split test")
@click.argument("name", metavar="DATASET")
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
@_split
@_root
@click.option("--task", "tasks", multiple=True, help="Only this task. Repeatable.")
@json_option
def download(name: str, target: Path, split: str, root: str | None, tasks: tuple[str, ...], json_: bool) -> None:
    """Download a data set into a new folder, which `rock job run` accepts."""
    with busy(f"downloading {name}"):
        found = asyncio.run(_at(root).download(name, split, target, list(tasks) or None))
    _done({"tasks": found}, f"{len(found)} tasks downloaded", json_)


def _done(fields: dict[str, Any], text: str, json_: bool) -> None:
    if json_:
        as_json(fields)
    else:
        print(text)
