"""The guide's table of metrics has each that a server tells, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import rock.cli.serve
from rock.cli import observing
from rock.rocklet import commandspans
from rock.runtime.image import pull
from rock.runtime.namespace import pool
from rock.telemetry.metrics import REGISTRY
from rock.wire import observed

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "observability.md"
DECLARING = (rock.cli.serve, commandspans, observed, observing, pool, pull)


def test_the_guide_tells_of_every_metric() -> None:
    told = set(re.findall(r"`(rock_[a-z_]+)`", GUIDE.read_text()))
    made = {name for module in DECLARING if module.__file__
            for name in re.findall(r'gauge_of\(\s*"(rock_[a-z_]+)"', Path(module.__file__).read_text())}  # fmt: skip
    assert told == {name for name in REGISTRY.families if name.startswith("rock_")} | made
