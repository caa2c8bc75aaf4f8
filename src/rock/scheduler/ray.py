"""The driver in a Ray cluster: `python -m rock.scheduler.ray`, a child of the admin (see raylink.py).

    each node of the cluster: one detached actor, which runs a rocklet that joins the admin
    each sandbox: one placement group, by which Ray's scheduler and autoscaler decide where it goes

An actor a sandbox would cost a Python process each. The first line that comes is options: address, namespace, join (the
admin's URL for rocklets), token, runtime, home. Rocklets and placement groups outlive the driver: both are found again
by their names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rock.settings import child_environment

_LOOK = 2.0  # seconds between looks at the cluster's nodes
_WAIT = 5.0
_THREADS = 64  # reservations that wait at once
_NAME = 20  # digits of a node's id that its worker's name has
_PREFIX = "rock-"


class Released(Exception):
    """What was asked for was given back meanwhile."""


def worker_of(node_id: str) -> str:
    return f"ray-{node_id[:_NAME]}"


class RockletHost:
    """On one node: keeps a rocklet running, for as long as this actor lives. It sees that by its standard input."""

    def __init__(self, name: str, options: dict[str, Any], address: str) -> None:
        import subprocess
        from pathlib import Path


        home = Path(options["home"]).expanduser() / name
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        environment = child_environment(
            ROCK_HOME=str(home), ROCK_API_KEY=options["token"], ROCK_RUNTIME=options["runtime"],
            ROCK_JOIN=options["join"], ROCK_WORKER_NAME=name, ROCK_HOST=address, ROCK_PORT="0",
            ROCK_LEASE_LOST="stop", ROCK_WORKERS="", ROCK_STORE="", ROCK_SCHEDULER="",
        )  # fmt: skip
        self._command = [sys.executable, "-m", "rock.cli.hosted"]

        def keep() -> None:
            while True:
                with open(home / "output.log", "ab") as output:
                    process = subprocess.Popen(self._command, env=environment, stdin=subprocess.PIPE, stdout=output,
                                               stderr=output)  # fmt: skip
                self._pid = process.pid
                process.wait()
                time.sleep(_LOOK)

        self._pid = 0
        threading.Thread(target=keep, daemon=True, name="rocklet").start()

    def pid(self) -> int:
        return self._pid


class Driver:
    """Calls of the admin, each in a thread: Ray's client is blocking."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._groups: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._out = threading.Lock()
        self._hosts: dict[str, Any] = {}
        self._wanted: set[str] = set()  # names that were asked for last, not given back

    def heard(self, request: dict[str, Any]) -> None:
        """A call, in the order in which they came."""
        with self._lock:
            if request["call"] == "reserve":
                self._wanted.add(request["name"])
            elif request["call"] == "release":
                self._wanted.discard(request["name"])

    def open(self) -> str:
        """Join the cluster; its address."""
        ray.init(address=self._options["address"] or "auto", namespace=self._options["namespace"],
                 log_to_driver=False, configure_logging=False)  # fmt: skip
        for row in placement_group_table().values():
            if row["name"].startswith(_PREFIX) and row["state"] != "REMOVED":
                self._groups[row["name"]] = get_placement_group(row["name"])
        threading.Thread(target=self._look, daemon=True, name="nodes").start()
        return str(ray.get_runtime_context().gcs_address)

    def _look(self) -> None:
        """See that every node has a rocklet. Ends the driver when the cluster does not answer: the admin tries anew."""
        failed = 0
        while True:
            try:
                for node in ray.nodes():
                    node_id = node["NodeID"]
                    if node["Alive"] and node_id not in self._hosts:
                        self._hosts[node_id] = self._host(node_id, node["NodeManagerAddress"])
                failed = 0
            except Exception as error:
                self.tell({"nodes": repr(error)})
                failed += 1
                if failed > 3:
                    os._exit(3)
            time.sleep(_LOOK)

    def _host(self, node_id: str, address: str) -> Any:
        name = worker_of(node_id)
        kind = ray.remote(num_cpus=0, max_restarts=-1)(RockletHost)
        where = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
        return kind.options(name=f"{_PREFIX}{name}", lifetime="detached", get_if_exists=True,
                            scheduling_strategy=where).remote(name, self._options, address)  # fmt: skip

    def answer(self, request: dict[str, Any]) -> None:
        reply: dict[str, Any] = {"id": request["id"]}
        try:
            reply["answer"] = getattr(self, "do_" + request.pop("call"))(
                **{name: value for name, value in request.items() if name != "id"})
        except Released as error:
            reply |= {"error": str(error), "kind": "Conflict"}
        except ValueError as error:  # what Ray says of a bundle that is none
            reply |= {"error": str(error), "kind": "InvalidConfig"}
        except Exception as error:
            reply |= {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        self.tell(reply)

    def tell(self, value: dict[str, Any]) -> None:
        with self._out:
            sys.stdout.write(json.dumps(value) + "\n")
            sys.stdout.flush()

    def do_reserve(self, name: str, bundle: dict[str, float], worker: str | None) -> str:
        with self._lock:
            known = self._groups.get(name)
        group = known if known is not None else self._reserved(name, bundle, worker)
        while not group.wait(_WAIT):
            with self._lock:
                if self._groups.get(name) is not group:
                    raise Released("it was released")
        return worker_of(next(iter(placement_group_table(group)["bundles_to_node_id"].values())))

    def _reserved(self, name: str, bundle: dict[str, float], worker: str | None) -> Any:
        more: dict[str, Any] = {}
        if worker is not None:  # its files are there
            node = next((one["NodeID"] for one in ray.nodes() if worker_of(one["NodeID"]) == worker), None)
            if node is None:
                raise ValueError(f"node {worker} is not in the cluster any more")
            more["bundle_label_selector"] = [{"ray.io/node-id": node}]
        group: Any = placement_group([bundle], strategy="PACK", name=name, lifetime="detached", **more)
        with self._lock:
            self._groups[name] = group
            wanted = name in self._wanted
        if not wanted:  # it was released before Ray had answered
            self.do_release(name)
            raise Released("it was released")
        return group

    def do_release(self, name: str) -> None:
        with self._lock:
            group = self._groups.pop(name, None)
        if group is not None:
            remove_placement_group(group)

    def do_held(self) -> list[str]:
        with self._lock:
            return list(self._groups)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the admin ends it, by its input
    driver = Driver(json.loads(sys.stdin.readline()))
    driver.tell({"ready": driver.open()})
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ray-call")
    quick = ThreadPoolExecutor(8, thread_name_prefix="ray-quick")
    for line in sys.stdin:
        request = json.loads(line)
        driver.heard(request)
        (pool if request["call"] == "reserve" else quick).submit(driver.answer, request)
    os._exit(0)  # threads may wait for resources


if __name__ == "__main__":
    main()
