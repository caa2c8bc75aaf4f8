"""A package with GEM's interface whose environments do what GEM's never should, for a host to use."""

from __future__ import annotations

from pathlib import Path

INIT = "from gem.envs.registration import make\n"

REGISTRATION = """
ENV_REGISTRY = {}

def make(env_id, **kwargs):
    return ENV_REGISTRY[env_id](**kwargs)
"""

ENVS = '''
import ctypes, mmap, os, random, signal, socket, subprocess, sys, threading, time
from gem.envs.registration import ENV_REGISTRY


class Echo:
    """Answers what it is told to do."""

    def __init__(self, start=0, fail=False, pause=0.0, **kwargs):
        if fail:
            raise RuntimeError("cannot be made")
        if fail is None:
            os._exit(4)
        time.sleep(pause)
        self.count = start
        self.kwargs = kwargs

    def reset(self, seed=None):
        if seed is not None:
            random.seed(seed)
        return f"{random.random():.12f}", {"kwargs": self.kwargs, "pid": os.getpid()}

    def step(self, action):
        self.count += 1
        result = getattr(self, action.pop("do"))(**action) if isinstance(action, dict) else action
        return result, 1, 0, None, {"count": self.count}

    def draw(self):
        return random.random()

    def where(self):
        return {"pid": os.getpid(), "parent": os.getppid(), "group": os.getpgrp()}

    def hold(self, what, **arguments):
        self.held = getattr(self, "_" + what)(**arguments)
        return "held"

    def release(self):
        self.held = None
        return "released"

    def _thread(self):
        threading.Thread(target=time.sleep, args=(1000,), name="busy", daemon=True).start()

    def _process(self):
        return subprocess.Popen(["sleep", "1000"])

    def _connection(self):
        return socket.socketpair()

    def _memory(self):
        return mmap.mmap(-1, 4096)

    def _library(self):
        sys.modules["torch"] = sys

    def _file(self, path):
        return open(path, "r", buffering=1)

    def line(self):
        return self.held.readline()

    def declare(self):
        self.fork_safe = True
        return "declared"

    def lie(self, how):
        """From now on, break the protocol of forks."""
        forking = sys.modules["rock.guest.environments.forking"]

        def fork(children, failed):
            for child in children:
                for _ in range(50 if how == "flood" else 1):
                    if how != "silence":
                        os.write(child.control, LIES[how])
            return None

        forking.fork = fork
        return "ready to lie"

    def ignore(self):
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        return "ignored"

    def children(self):
        try:
            return os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return "none"

    def limit(self, processes):
        import resource
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        os.setuid(12345)
        return "limited"

    def say(self, text, times=1):
        for _ in range(times):
            print(text)
            os.write(1, text.encode())
            subprocess.run(["cat"], input=text.encode())
        print(text, file=sys.stderr)
        return "said"

    def fail(self):
        raise KeyError("deep inside")

    def leave(self):
        raise SystemExit(7)

    def exit(self, status):
        print("last words", file=sys.stderr, flush=True)
        os._exit(status)

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self):
        ctypes.string_at(0)

    def sleep(self, seconds, size=0):
        time.sleep(seconds)
        return "x" * size

    def grow(self, size):
        return "é" * size

    def start(self):
        return subprocess.Popen(["sleep", "1000"]).pid

    def odd(self):
        return float("nan"), float("inf"), ["\\ud800"], (1, 2), {3: 4}

    def unsendable(self):
        return object()

    def nested(self):
        value = []
        value.append(value)
        return value


class Info(Echo):
    def step(self, action):
        return "ok", 0.5, True, True, {"what": Echo(), "set": {2, 1}, (1, 2): "key", "bytes": b"x"}


LIES = {"parent": b"{}", "junk": b"\\0\\xff", "list": b"[]", "large": b"[" * 60_000, "flood": b"[1]",
        "deep": b"[" * 9000, "kind": b'{"kind": {"a": 1}, "message": 3}', "unknown": b'{"kind": "unknown", "near": 7}'}


class Seeded(Echo):
    """With generators of its own, and one that Python does not know."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = {"own": random.Random(1), "deep": [random.Random(2)]}
        self.other = 7

    def reseed(self, seed):
        self.other = seed

    def draw(self):
        return [random.random(), self.parts["own"].random(), self.parts["deep"][0].random(), self.other]


ENV_REGISTRY["small:Seeded-v0"] = Seeded
ENV_REGISTRY["small:Echo-v0"] = Echo
ENV_REGISTRY["small:Info-v0"] = Info
'''


def write(folder: Path) -> Path:
    """Write it below `folder` as a host expects its packages; answers that folder."""
    package = folder / "site" / "gem"
    (package / "envs").mkdir(parents=True)
    (package / "__init__.py").write_text(INIT)
    (package / "envs/__init__.py").write_text(ENVS)
    (package / "envs/registration.py").write_text(REGISTRATION)
    return folder
