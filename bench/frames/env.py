"""An environment whose observation is a picture as Atari's are."""

import gymnasium
import numpy as np


class Frames(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)

    def __init__(self):
        self.pictures = np.random.default_rng(0).integers(0, 256, (16, 210, 160, 3), np.uint8)
        self.count = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.pictures[0], {}

    def step(self, action):
        self.count += 1
        return self.pictures[self.count % 16], 0.0, False, False, {}


def make_env(**kwargs):
    return Frames(**kwargs)
