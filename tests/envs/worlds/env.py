"""Environments for the tests: spaces of every kind, and one that misbehaves as it is told to."""

import errno
import fcntl
import mmap
import os
import struct
import sys
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces

PICTURE = spaces.Box(0, 255, (210, 160, 3), np.uint8)
KINDS = {
    "picture": PICTURE,
    "discrete": spaces.Discrete(5, start=-2),
    "binary": spaces.MultiBinary([2, 3]),
    "many": spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[1, 0], [-2, 7]])),
    "text": spaces.Text(12, min_length=2, charset="abcé"),
    "dict": spaces.Dict({"z": spaces.Box(-np.inf, 1.0, (3,), np.float64), "a": spaces.Dict({"x": spaces.Discrete(3)})}),
    "tuple": spaces.Tuple((spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(4))),
    "sequence": spaces.Sequence(spaces.Box(0, 1, (2,), np.float32)),
    "stacked": spaces.Sequence(spaces.Box(0, 1, (2,), np.float32), stack=True),
    "graph": spaces.Graph(spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(3)),
    "one_of": spaces.OneOf((spaces.Discrete(3), spaces.Box(0, 1, (2,), np.float32))),
}

LARGE = spaces.Dict({"near": spaces.Box(0, 255, (100, 100, 3), np.uint8), "far": spaces.Box(0, 1, (64, 64), np.float32),
                     "few": spaces.Discrete(3)})  # fmt: skip


class World(gym.Env):
    """Observations and actions are of the space `kind`; an episode has `length` steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 7}

    def __init__(self, kind="picture", length=3, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = LARGE if kind == "large" else KINDS[kind]
        self.action_space = self.observation_space if kind not in ("picture", "large") else spaces.Discrete(4)
        self.length = length
        self.count = 0
        self.last = None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {"options": options, "seed": seed}

    def step(self, action):
        self.count += 1
        self.last = action
        info = {"count": np.int16(self.count), "half": np.float32(0.5), "square": np.eye(2), "pair": (1, "x")}
        return self.observation_space.sample(), float(self.count), self.count >= self.length, False, info

    def render(self):
        return np.full((4, 5, 3), self.count, np.uint8)

    def same(self, action):
        return repr(self.last) == repr(action)

    def add(self, left, right=1):
        return left + right


def _lie(length):
    """Answers, in the memory, of so many bytes, to whatever was asked; one for each id that may have been."""
    for id in range(1, 6):
        frame = struct.pack(">IBBIQq", 8, 16, 2, 1, id, -1) + length.to_bytes(8, "big")
        for fd in range(160, 188):
            try:
                os.write(fd, frame)
            except OSError:
                pass


class Bad(gym.Env):
    """Does what the action says."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Text(100)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        found, info = np.array([np.nan, -0.0], np.float32), {}
        if action == "raise":
            raise OddError("on purpose")
        if action == "die":
            print("these are my last words", file=sys.stderr, flush=True)
            os._exit(7)
        if action == "hang":
            time.sleep(1000)
        if action.startswith("memory "):
            _lie(int(action.partition(" ")[2]))
        if action.startswith("length "):
            worker = sys.modules["rock.guest.environments.worker"].EnvironmentWorker
            worker._put = lambda *_: int(action.partition(" ")[2]).to_bytes(8, "big")
            found = np.ones(50_000, np.float32)
        if action == "cut":
            os.ftruncate(197, 0)
        if action in ("garbage", "every descriptor"):
            for fd in (1, 2):
                os.write(fd, b"\x00\xff{}[" * 5000)
            for fd in range(3, 300):
                try:
                    os.write(fd, b"garbage") if action == "every descriptor" else None
                except OSError:
                    pass
        if action == "odd":
            info = {"file": sys.stderr, "fine": 1, 3: "three", "nan": float("nan"), "set": {1}, "bytes": b"\xff"}
        if action == "object":
            found = object()
        return found, float("nan"), False, False, info


class Large(gym.Env):
    """Observes as many bytes as the action says, or does what it says to the memory that those come by."""

    observation_space = spaces.Box(0, 255, (1,), np.uint8)
    action_space = spaces.Discrete(1 << 30)
    storming = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.uint8), {}

    def step(self, action):
        if action == "no bytes":
            os._exit(3)
        if isinstance(action, str):
            own = [fd for fd in range(160, 188) if os.path.exists(f"/proc/self/fd/{fd}")]
            while action == "answers to something else":
                time.sleep(0.1)
                os.write(own[0], struct.pack(">IBBIQq", 0, 16, 0, 1, 99, -1))
            frame = struct.pack(">IBBIQq", 8 if action == "half a head" else 60_000, 16, 2, 1, 2, -1) + bytes(100)
            os.write(own[0], frame[:10] if action == "half a head" else frame)
            while action == "a byte now and then":
                time.sleep(0.1)
                os.write(own[0], b"x")
            os._exit(3)
        return np.arange(action, dtype=np.uint8), 0.0, False, False, {}

    def storm(self):
        """From now on another process writes to what the client reads, all the time."""
        if os.fork() == 0:
            memory = mmap.mmap(197, 512 << 20)
            parts = range(0, 512 << 20, 16 << 20)
            while True:
                for byte in (0, 0xFF, 0x5B):
                    for part in parts:
                        memory[part : part + 200] = bytes([byte]) * 200

    def resized(self):
        """What comes of each way to change its size, or to make it the size of another's."""
        ways = (lambda: os.ftruncate(197, 0), lambda: os.ftruncate(197, 1 << 30), lambda: fcntl.fcntl(197, 1033, 8),
                lambda: os.posix_fallocate(197, 512 << 20, 1))  # fmt: skip
        told = []
        for way in ways:
            try:
                way()
                told.append("done")
            except OSError as error:
                told.append(errno.errorcode[error.errno])
        return told

    def blocks(self):
        """Bytes that the memory takes."""
        return os.fstat(197).st_blocks * 512


class OddError(Exception):
    pass


def make_env(world="World", **kwargs):
    return {"World": World, "Bad": Bad, "Large": Large}[world](**kwargs)
