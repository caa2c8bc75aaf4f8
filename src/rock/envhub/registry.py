"""Which environments there are, and what is needed to host one.

Families of GEM (gem-llm 0.1.0, 172 ids):

    game:   37  puzzles and word games; "-easy", "-hard" and "-random"
    rg:    104  reasoning-gym, one question and one answer
    math: code: logic: qa: eval:   31  questions of data sets that a sandbox without a network cannot fetch
"""

from __future__ import annotations

import difflib

from rock.envhub import datasets
from rock.envhub.gem_ids import DATASETS, GAMES, REASONING
from rock.envhub.packages import GEM, GEM_PANDAS, GYM, SETS, image_of, with_packages
from rock.envhub.spec import EnvSpec
from rock.errors import InvalidConfig, NotFound
from rock.protocol.env import OpenEnv

_WORD_GAMES = ("Wordle", "Hangman", "WordSearch")

IDS = (
    *(f"game:{game}-v0-{level}" for game, levels in GAMES.items() for level in levels),
    *(f"rg:{name}" for name in REASONING),
    *DATASETS,
)  # fmt: skip

# Names of older releases of GEM, and of the READMEs written for them, which had one level
ALIASES = {f"game:{game}-v0": f"game:{game}-v0-easy" for game in GAMES}


def find(env_id: str) -> EnvSpec:
    """The environment of that id or alias. NotFound, in GEM's words and with the nearest names."""
    name = ALIASES.get(env_id, env_id)
    if name not in IDS:
        near = difflib.get_close_matches(env_id, (*IDS, *ALIASES), 3, 0.6)
        raise NotFound(f"Environment {env_id} not found in registry.",
                       hint=f"did you mean {', '.join(near)}?" if near else "`rock env list` shows what there is")
    packages = GEM_PANDAS if name.startswith("game:Crosswords-") else GEM
    return EnvSpec(id=name, image=image_of(packages), requirements=SETS[packages], note=_note(name))


def image_for(wish: OpenEnv) -> str:
    """The image of the sandbox that hosts what is wished for. NotFound, InvalidConfig."""
    if wish.protocol == "task":
        if wish.packages:
            raise InvalidConfig("a training set has its own packages", hint="leave packages out")
        return datasets.image_of(datasets.find(wish.env_id))
    if wish.protocol == "gem":
        return find(wish.env_id).image if not wish.packages else image_of(with_packages(GEM, wish.packages))
    return image_of(with_packages(GYM, wish.packages))


def _note(name: str) -> str:
    if name in DATASETS:
        return "needs the package datasets and a data set from the network, which a sandbox does not have by default"
    if any(name.startswith(f"game:{game}-") for game in _WORD_GAMES):
        return "plays with NLTK's words where they could be fetched, else with this machine's dictionary"
    return ""
