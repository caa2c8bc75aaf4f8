"""Tasks of jobs, read from local files: folders of Harbor, files of SWE-bench instances, and scripts."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rock.errors import InvalidConfig, NotFound
from rock.jobs import swebench
from rock.jobs.config import DatasetConfig, HarborJobConfig
from rock.jobs.harbor_file import read_task_file
from rock.protocol.jobs import JobTask

TRAINING_SETS = ("humaneval", "bfcl", "appworld", "webshop", "textworld", "reasoning-gym")  # docs/guides/training.md
_LARGEST_FOLDER = 4 << 30  # bytes


def folder_digest(folder: Path) -> str:
    """A digest of names, modes and contents of a folder. Symbolic links are not followed. InvalidConfig: too large."""
    digest, total = hashlib.sha256(), 0
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted([*files, *(one for one in folders if os.path.islink(os.path.join(root, one)))]):
            path = Path(root, name)
            found = path.lstat()
            digest.update(f"{path.relative_to(folder)}\0{found.st_mode & 0o111:o}\0".encode("utf-8", "surrogateescape"))
            if stat.S_ISLNK(found.st_mode):
                digest.update(os.fsencode(os.readlink(path)))
            elif stat.S_ISREG(found.st_mode):
                total += found.st_size
                if total > _LARGEST_FOLDER:
                    raise InvalidConfig(f"{folder} has more than {_LARGEST_FOLDER} bytes", hint="remove large files")
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def harbor_folders(path: str | os.PathLike[str]) -> list[Path]:
    """The task folders at a path: itself, its sub-folders, or those two levels down (org/name). InvalidConfig."""
    root = Path(path)
    if (root / "task.toml").is_file():
        return [root]
    found = sorted(one.parent for pattern in ("*/task.toml", "*/*/task.toml") for one in root.glob(pattern))
    if not found:
        raise InvalidConfig(f"there is no task in {root}", hint="a task is a folder with a task.toml")
    return found


def harbor_task(folder: Path, source: str | None = None) -> JobTask:
    """The task of a folder. InvalidConfig; Unsupported for settings that ROCK does not provide."""
    if not (folder / "task.toml").is_file():
        raise InvalidConfig(f"{folder} is not a task of Harbor", hint="a task is a folder with a task.toml")
    read_task_file(folder)
    place = folder.absolute()
    return JobTask(name=folder.name, spec={"kind": "harbor", "folder": str(place), "digest": folder_digest(place),
                                           "source": source})  # fmt: skip


def swe_tasks(path: str | os.PathLike[str]) -> list[JobTask]:
    """The instances of a JSON or JSONL file, in its order. InvalidConfig."""
    place = Path(path).absolute()
    found = []
    for name, data in swebench.load(place).items():
        swebench.Instance.parse(data, place.parent)
        found.append(JobTask(name=name, spec={"kind": "swe", "file": str(place), "id": name,
                                              "digest": swebench.digest(data), "source": place.stem}))  # fmt: skip
    return found


def training_task(name: str, task_id: str, params: dict[str, Any] | None = None) -> JobTask:
    return JobTask(name=f"{name}/{task_id}", spec={"kind": "training", "set": name, "id": task_id,
                                                   "params": params or {}})  # fmt: skip


def bash_task(name: str, script: str, env: dict[str, str], reward_file: str | None = None) -> JobTask:
    return JobTask(name=name, spec={"kind": "bash", "script": script, "env": env, "reward_file": reward_file})


def local_tasks(path: str | os.PathLike[str]) -> list[JobTask]:
    """The tasks of a local data set: a file of SWE instances, or a folder of Harbor tasks. InvalidConfig, NotFound."""
    place = Path(path)
    if place.is_file():
        return swe_tasks(place)
    if not place.is_dir():
        raise NotFound(f"there is no data set {place}", hint="pass a folder of tasks, or a file of instances")
    files = [place / name for name in ("instances.jsonl", "instances.json") if (place / name).is_file()]
    return swe_tasks(files[0]) if files else [harbor_task(one, place.name) for one in harbor_folders(place)]


def selected(tasks: Sequence[JobTask], names: Iterable[str] | None, excluded: Iterable[str] | None,
             limit: int | None) -> list[JobTask]:
    """Tasks whose names match a pattern of `names` and none of `excluded`; the first `limit`. NotFound: a name that
    matches nothing."""
    wanted = None if names is None else list(names)
    for pattern in wanted or ():
        if not any(fnmatch.fnmatchcase(task.name, pattern) for task in tasks):
            known = ", ".join(task.name for task in tasks[:20])
            raise NotFound(f"there is no task {pattern!r}", hint=f"there are: {known}")
    kept = [task for task in tasks
            if (wanted is None or any(fnmatch.fnmatchcase(task.name, pattern) for pattern in wanted))
            and not any(fnmatch.fnmatchcase(task.name, pattern) for pattern in excluded or ())]  # fmt: skip
    return kept if limit is None else kept[:limit]


def harbor_tasks(config: HarborJobConfig, base: Path | None = None) -> list[JobTask]:
    """The tasks of a Harbor job. base: folder of relative paths. InvalidConfig, NotFound."""
    base = base or Path()
    found = [harbor_task(base / str(task.path), task.source) for task in config.tasks]
    for dataset in config.datasets:
        found += selected(local_tasks(base / dataset_path(dataset)), dataset.task_names, dataset.exclude_task_names,
                          dataset.n_tasks)  # fmt: skip
    return unique(found)


def dataset_path(dataset: DatasetConfig) -> Path:
    """The local path of a data set. Unsupported and InvalidConfig name the field."""
    if dataset.path is not None:
        return Path(dataset.path)
    registry = dataset.registry
    if registry is not None and registry.path is not None and dataset.name is not None:
        return Path(registry.path, *dataset.name.split("/"), *([registry.split] if registry.split else []))
    raise InvalidConfig(f"data set {dataset.name!r} is not local",
                        hint="download it with `rock dataset download`, and set datasets.path")  # fmt: skip


def unique(tasks: Sequence[JobTask]) -> list[JobTask]:
    """Tasks with unique names: a repeated name gets the number of its occurrence."""
    seen: dict[str, int] = {}
    made = []
    for task in tasks:
        seen[task.name] = seen.get(task.name, 0) + 1
        number = seen[task.name]
        made.append(task if number == 1 else task.model_copy(update={"name": f"{task.name}#{number}"}))
    return made
