"""A game for PettingZoo: agents harvest fields, which grow again at random. It is the env.py of a folder."""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv


class Harvest(ParallelEnv):
    metadata = {"name": "harvest_v0", "render_modes": [], "is_parallelizable": True}
    render_mode = None

    def __init__(self, size=5):
        self.size = size
        self.possible_agents = [f"reaper_{number}" for number in range(3)]
        self.state_space = Box(0, 1, (size,), np.float64)
        self._spaces = {agent: Box(0.0, float(size), (size + 1,), np.float32) for agent in self.possible_agents}
        self._actions = {agent: Discrete(3) for agent in self.possible_agents}
        self._random = np.random.default_rng()

    def observation_space(self, agent):
        return self._spaces[agent]

    def action_space(self, agent):
        return self._actions[agent]

    def reset(self, seed=None, options=None):
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.fields = self._random.random(self.size)
        self.places = {agent: int(self._random.integers(self.size)) for agent in self.agents}
        self.scores = dict.fromkeys(self.agents, 0.0)
        self.clock = 0
        return self._observations(), {agent: {"place": self.places[agent]} for agent in self.agents}

    def step(self, actions):
        self.clock += 1
        rewards = {}
        for agent in list(actions):
            self.places[agent] = (self.places[agent] + actions[agent] - 1) % self.size
            rewards[agent] = float(self.fields[self.places[agent]])
            self.scores[agent] += rewards[agent]
            self.fields[self.places[agent]] = 0.0
        self.fields = np.minimum(1.0, self.fields + 0.1 * self._random.random(self.size))
        acted = list(actions)
        terminations = {agent: self.scores[agent] > 3.0 for agent in acted}
        truncations = dict.fromkeys(acted, self.clock >= 20)
        found = (self._observations(), rewards, terminations, truncations,
                 {agent: {"place": self.places[agent]} for agent in acted})
        self.agents = [agent for agent in self.agents if not (terminations[agent] or truncations[agent])]
        return found

    def _observations(self):
        return {agent: np.append(self.fields, self.places[agent]).astype(np.float32) for agent in self.agents}

    def score(self, agent):
        return self.scores[agent]

    def state(self):
        return self.fields.copy()

    def render(self):
        return None

    def close(self):
        pass


def make_env(size=5):
    return Harvest(size)
