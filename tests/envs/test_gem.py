"""GEM in a sandbox plays as GEM does in a process of its own: whole five-tuples, several seeds."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rock.envhub.packages import without_dependencies
from rock.envhub.registry import ALIASES, IDS, REASONING, find
from rock.errors import ActionError, NotFound
from rock.rocklet.environments.host import EnvHost

Run = Callable[..., Any]
Case = tuple[str, list[int], list[str]]  # id, seeds of episodes one after the other, actions
SEEDS = [0, 42, 2**31]

LOCAL = """
import json, os, sys
told = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # environments print
sys.path.insert(0, sys.argv[1])
import gem
out = []
for env_id, seeds, actions in json.load(sys.stdin):
    env = gem.make(env_id)
    results = []
    for seed in seeds:
        results.append(env.reset(seed=seed))
        for action in actions:
            results.append(env.step(action))
            if results[-1][2] or results[-1][3]:
                break
    out.append(results)
json.dump(out, told)
"""

MOVES = {
    "game:Sokoban-v0-easy": ["\\boxed{up}", "\\boxed{left}", "no move at all"],
    "game:GuessTheNumber-v0-easy": ["\\boxed{5}", "\\boxed{7}", "\\boxed{2}", "\\boxed{9}"],
    "game:GuessTheNumber-v0-random": ["\\boxed{5}", "\\boxed{7}"],
    "game:Mastermind-v0-easy": ["\\boxed{1 2}", "\\boxed{3 4}", "\\boxed{1 1}"],
    "game:Minesweeper-v0-easy": ["\\boxed{reveal 0 0}", "\\boxed{reveal 2 3}", "\\boxed{flag 1 1}"],
    "game:FifteenPuzzle-v0-easy": ["\\boxed{up}", "\\boxed{left}", "\\boxed{down}"],
    "game:Sudoku-v0-easy": ["\\boxed{1 1 1}", "\\boxed{2 2 3}"],
    "game:TowerofHanoi-v0-easy": ["\\boxed{A C}", "\\boxed{A B}", "\\boxed{C B}"],
    "game:Game2048-v0-easy": ["\\boxed{up}", "\\boxed{right}", "\\boxed{down}", "\\boxed{left}"] * 3,
    "rg:sokoban": ["LRUD"],
    "rg:chain_sum": ["\\boxed{12}"],
    "rg:letter_counting": ["3"],
    "rg:arc_1d": ["\\boxed{1 2 3}"],
    "rg:mini_sudoku": ["nothing"],
}


def local(folder: Path, cases: list[Case]) -> list[Any]:
    run = subprocess.run([sys.executable, "-c", LOCAL, str(folder / "site")], input=json.dumps(cases), text=True,
                         capture_output=True, env={"PYTHONHASHSEED": "0", "NLTK_DATA": str(folder / "nltk_data")})
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)  # type: ignore[no-any-return]


async def remote(host: EnvHost, case: Case) -> list[Any]:
    env_id, seeds, actions = case
    number = await host.make(env_id)
    results: list[Any] = []
    for seed in seeds:
        results.append(await host.reset(number, seed))
        for action in actions:
            results.append(await host.step(number, action))
            if results[-1][2] or results[-1][3]:
                break
    await host.close_env(number)
    return json.loads(json.dumps(results))  # type: ignore[no-any-return]


def compare(gem_folder: Path, hosted: Run, cases: list[Case], folder: Path | None = None) -> None:
    """folder: the packages of the host, when they are others than those at home."""
    async def body(host: EnvHost, *_: Any) -> list[Any]:
        slots = asyncio.Semaphore(4)

        async def play(case: Case) -> list[Any]:
            async with slots:
                return await remote(host, case)

        return await asyncio.gather(*(play(case) for case in cases))

    for case, here, there in zip(cases, local(gem_folder, cases), hosted(folder or gem_folder, body), strict=True):
        assert there == here, case


def test_the_same_as_at_home(gem_folder: Path, hosted: Run) -> None:
    compare(gem_folder, hosted, [(env_id, SEEDS, moves) for env_id, moves in MOVES.items()])


def test_every_game_is_the_same_as_at_home(gem_folder: Path, hosted: Run) -> None:
    """All but those that need words or pandas, the larger Sokobans, which are slow, and one that GEM cannot make."""
    left_out = ("Wordle", "Hangman", "WordSearch", "Crosswords", "Sokoban-v0-hard", "Sokoban-v0-random",
                "FifteenPuzzle-v0-random")  # fmt: skip
    games = [i for i in IDS if i.startswith("game:") and not i.removeprefix("game:").startswith(left_out)]
    assert len(games) == 22
    compare(gem_folder, hosted, [(game, SEEDS, ["\\boxed{1}", "what?"]) for game in games])


def test_every_game_is_the_same_with_the_packages_of_games_alone(
    gem_folder: Path, games_folder: Path, hosted: Run
) -> None:
    """The larger set of GEM is three times that size."""
    installed = {path.name for path in (games_folder / "site").iterdir()}
    assert "gem" in installed and not installed & {"reasoning_gym", "sympy", "matplotlib", "fontTools"}
    left_out = ("Wordle", "Hangman", "WordSearch", "Crosswords", "Sokoban-v0-hard", "Sokoban-v0-random",
                "FifteenPuzzle-v0-random")  # fmt: skip
    games = [i for i in IDS if i.startswith("game:") and not i.removeprefix("game:").startswith(left_out)]
    compare(gem_folder, hosted, [(game, [0], ["\\boxed{1}", "what?"]) for game in games], games_folder)


def test_word_games_with_the_packages_of_games_alone(
    gem_folder: Path, games_folder: Path, word_list: Path, tmp_path: Path, hosted: Run
) -> None:
    folders = []
    for name, packages in (("home", gem_folder), ("games", games_folder)):
        words = tmp_path / name / "nltk_data/corpora/words"
        words.mkdir(parents=True)
        (tmp_path / name / "site").symlink_to(packages / "site")
        plain = [word for word in word_list.read_text().split() if word.isascii() and word.isalpha()]
        for file in ("en", "en-basic"):
            (words / file).write_text("\n".join(plain))
        folders.append(tmp_path / name)
    games = [f"game:{game}-v0-easy" for game in ("Wordle", "Hangman", "WordSearch")]
    compare(folders[0], hosted, [(game, [0], ["\\boxed{crane}", "\\boxed{e}", "what?"]) for game in games], folders[1])


def test_crosswords_have_all_their_packages() -> None:
    """Their set names every distribution: pip installs no others."""
    needed = set(find("game:Crosswords-v0-easy").requirements)
    assert needed > set(find("game:Sokoban-v0-easy").requirements)
    assert without_dependencies(find("game:Crosswords-v0-easy").image)
    assert not without_dependencies(find("rg:sokoban").image)


@pytest.mark.parametrize("third", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
@pytest.mark.timeout(600)
def test_every_question_is_the_same_as_at_home(gem_folder: Path, hosted: Run, third: int) -> None:
    """All of reasoning-gym but two that GEM itself cannot make with their defaults."""
    names = [name for name in REASONING if name not in ("composite", "boxnet")]
    assert len(names) == 102
    compare(gem_folder, hosted, [(f"rg:{name}", SEEDS, ["\\boxed{1}"]) for name in names[third::3]])


def test_many_at_once_do_not_disturb_each_other(gem_folder: Path, hosted: Run) -> None:
    moves = MOVES["game:Sokoban-v0-easy"]
    compare(gem_folder, hosted, [("game:Sokoban-v0-easy", [seed], moves) for seed in range(12)])


def test_what_gem_cannot_make_is_told(gem_folder: Path, hosted: Run) -> None:
    async def body(host: EnvHost, *_: Any) -> None:
        with pytest.raises(NotFound, match="game:Sokoban-v0 not found in registry") as caught:
            await host.make("game:Sokoban-v0")
        assert "game:Sokoban-v0-easy" in str(caught.value)
        for env_id in ("rg:composite", "math:GSM8K", "game:Crosswords-v0-easy"):
            with pytest.raises(ActionError):
                await host.make(env_id)

    hosted(gem_folder, body)


@pytest.mark.parametrize("levels", [["easy"], pytest.param(["hard", "random"], marks=pytest.mark.long)])
@pytest.mark.timeout(600)
def test_word_games_are_the_same_as_at_home(
    gem_folder: Path, word_list: Path, tmp_path: Path, hosted: Run, levels: list[str]
) -> None:
    folder = tmp_path / "packages"
    words = folder / "nltk_data/corpora/words"
    words.mkdir(parents=True)
    (folder / "site").symlink_to(gem_folder / "site")
    plain = [word for word in word_list.read_text().split() if word.isascii() and word.isalpha()]
    for name in ("en", "en-basic"):
        (words / name).write_text("\n".join(plain))
    games = [f"game:{game}-v0-{level}" for game in ("Wordle", "Hangman", "WordSearch")
             for level in levels]  # fmt: skip
    compare(folder, hosted, [(game, SEEDS, ["\\boxed{crane}", "\\boxed{e}", "what?"]) for game in games])


def test_the_registry_knows_what_gem_knows(gem_folder: Path) -> None:
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import gem.envs;"
            "from gem.envs.registration import ENV_REGISTRY as r; print(json.dumps(list(r)))")
    run = subprocess.run([sys.executable, "-I", "-c", code, str(gem_folder / "site")], capture_output=True, check=True)
    assert sorted(IDS) == sorted(json.loads(run.stdout))
    assert len(set(IDS)) == 172


def test_names() -> None:
    assert find("game:Sokoban-v0").id == "game:Sokoban-v0-easy"
    assert all(find(alias).id == name for alias, name in ALIASES.items())
    assert find("rg:sokoban").image == find("math:GSM8K").image == "rock.local/env/gem"
    assert find("game:Sokoban-v0-easy").image == "rock.local/env/gem-games"
    assert "pandas" in find("game:Crosswords-v0-easy").requirements
    assert "network" in find("math:GSM8K").note
    with pytest.raises(NotFound, match=r"Environment game:Sokobn-v0 not found in registry\.") as caught:
        find("game:Sokobn-v0")
    assert "game:Sokoban-v0" in (caught.value.hint or "")
    with pytest.raises(NotFound, match="rock env list"):
        find("chess")
