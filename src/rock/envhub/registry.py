"""The environments that ROCK provides, and the image that hosts each of them: specifications, ids and lookup.

Families of GEM (gem-llm 0.1.0, 172 ids):

    game:   37  puzzles and word games; "-easy", "-hard" and "-random"
    rg:    104  reasoning-gym, one question and one answer
    math: code: logic: qa: eval:   31  questions of data sets that a sandbox without a network cannot fetch
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rock.envhub import datasets
from rock.envhub.packages import GEM, GEM_CROSSWORDS, GEM_GAMES, GYM, SETS, image_of, with_packages
from rock.errors import InvalidConfig, NotFound
from rock.protocol.env import OpenEnv

# ---- environment specification ----

@dataclass(frozen=True)
class EnvSpec:
    """The specification of an environment.

    id: in its own package. protocol: its interface inside the sandbox. image: of the sandbox that hosts it.
    requirements: pip installs them. kwargs: its constructor's arguments.
    note: information for users, for example requirements that a sandbox without a network does not meet.
    """

    id: str
    image: str
    requirements: tuple[str, ...]
    protocol: Literal["gem"] = "gem"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


# ---- the 172 environment ids of gem-llm 0.1.0 ----

_LEVELS = ("easy", "hard", "random")
GAMES = {
    "GuessTheNumber": _LEVELS, "Mastermind": _LEVELS, "Minesweeper": _LEVELS, "Wordle": _LEVELS,
    "FifteenPuzzle": _LEVELS, "Hangman": _LEVELS, "Sudoku": _LEVELS, "TowerofHanoi": _LEVELS,
    "Game2048": (*_LEVELS, "extreme-hard"), "Sokoban": _LEVELS, "Crosswords": _LEVELS, "WordSearch": _LEVELS,
}  # fmt: skip
DATASETS = (
    "math:ASDiv2K", "math:GSM8K", "math:Math12K", "math:Math8K-3to5", "math:Orz57K", "math:DeepScaleR40K",
    "math:Geometry3K", "code:CodeContest", "code:Taco8k", "code:PrimeIntellect15k", "logic:RuleTaker-d0",
    "logic:RuleTaker-d1", "logic:RuleTaker-d2", "logic:RuleTaker-d3", "logic:RuleTaker-d5", "qa:NaturalQuestions",
    "qa:HotpotQA", "eval:MATH500", "eval:AMC", "eval:OlympiadBench", "eval:Minerva", "eval:AIME24",
    "eval:CodeContest", "eval:QaOpen", "eval:2Wiki", "eval:PopQA", "eval:TriviaQA", "eval:HotpotQA",
    "eval:Bamboogle", "eval:NaturalQuestions", "eval:Musique",
)  # fmt: skip
REASONING = (
    "ab", "acre", "advanced_geometry", "aiw", "arc_1d", "arc_agi", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "boxnet", "caesar_cipher", "calendar_arithmetic",
    "chain_sum", "circuit_logic", "codeio", "color_cube_rotation", "complex_arithmetic", "composite", "count_bits",
    "count_primes", "countdown", "course_schedule", "cryptarithm", "decimal_arithmetic", "decimal_chain_sum", "dice",
    "emoji_mystery", "family_relationships", "figlet_font", "fraction_simplification", "futoshiki", "game_of_life",
    "game_of_life_halting", "gcd", "graph_color", "group_anagrams", "gsm_symbolic", "intermediate_integration",
    "isomorphic_strings", "jugs", "kakurasu", "knight_swap", "knights_knaves", "largest_island", "lcm", "leg_counting",
    "letter_counting", "letter_jumble", "list_functions", "mahjong_puzzle", "manipulate_matrix", "maze", "mini_sudoku",
    "modulo_grid", "n_queens", "needle_haystack", "number_filtering", "number_format", "number_sequence",
    "number_sorting", "palindrome_generation", "palindrome_partitioning", "polynomial_equations",
    "polynomial_multiplication", "pool_matrix", "power_function", "prime_factorization", "products",
    "propositional_logic", "puzzle24", "quantum_lock", "ransom_note", "rearc", "rectangle_count", "rotate_matrix",
    "rotten_oranges", "rubiks_cube", "rush_hour", "self_reference", "sentence_reordering", "shortest_path",
    "simple_equations", "simple_geometry", "simple_integration", "sokoban", "spell_backward", "spiral_matrix",
    "string_insertion", "string_manipulation", "string_splitting", "string_synthesis", "sudoku", "survo", "syllogism",
    "time_intervals", "tower_of_hanoi", "tsumego", "word_ladder", "word_sequence_reversal", "word_sorting",
    "zebra_puzzles",
)  # fmt: skip


# ---- lookup ----


_WORD_GAMES = ("Wordle", "Hangman", "WordSearch")

IDS = (
    *(f"game:{game}-v0-{level}" for game, levels in GAMES.items() for level in levels),
    *(f"rg:{name}" for name in REASONING),
    *DATASETS,
)  # fmt: skip

# Names of older releases of GEM, and of their READMEs, which had one level
ALIASES = {f"game:{game}-v0": f"game:{game}-v0-easy" for game in GAMES}


def find(env_id: str) -> EnvSpec:
    """The environment of that id or alias. NotFound, with GEM's message and similar names."""
    name = ALIASES.get(env_id, env_id)
    if name not in IDS:
        near = difflib.get_close_matches(env_id, (*IDS, *ALIASES), 3, 0.6)
        raise NotFound(f"Environment {env_id} not found in registry.",
                       hint=f"did you mean {', '.join(near)}?" if near else "`rock env list` shows what there is")
    packages = _packages(name)
    return EnvSpec(id=name, image=image_of(packages), requirements=SETS[packages], note=_note(name))


def _packages(name: str) -> str:
    """The package set of an id of GEM."""
    if name.startswith("game:Crosswords-"):
        return GEM_CROSSWORDS
    return GEM_GAMES if name.startswith("game:") else GEM


def image_for(spec: OpenEnv) -> str:
    """The image of the sandbox that hosts the requested environment. NotFound, InvalidConfig."""
    if spec.image is not None:
        if spec.packages or spec.protocol != "gym":
            raise InvalidConfig("nothing is installed in an image, and it hosts environments of Gymnasium alone",
                                hint="put the packages into the image, or leave the image out")  # fmt: skip
        return spec.image
    if spec.protocol == "task":
        if spec.packages:
            raise InvalidConfig("a training set has its own packages", hint="leave packages out")
        return datasets.image_of(datasets.find(spec.env_id))
    if spec.protocol == "gem":
        return find(spec.env_id).image if not spec.packages else image_of(with_packages(GEM, spec.packages))
    return image_of(with_packages(GYM, spec.packages))


def _note(name: str) -> str:
    if name in DATASETS:
        return "needs the package datasets and a data set from the network, which a sandbox does not have by default"
    if any(name.startswith(f"game:{game}-") for game in _WORD_GAMES):
        return "plays with NLTK's words where they could be fetched, else with this machine's dictionary"
    return ""
