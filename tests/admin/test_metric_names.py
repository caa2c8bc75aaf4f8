"""The guide's table of metrics has each that a server tells, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from rock.cli.serve import observing, serve
from rock.http import middleware
from rock.images.registry import transfers
from rock.rocklet.api import sandboxes
from rock.runtime.namespace import pools
from rock.telemetry.metrics import REGISTRY

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "observability.md"
DECLARING = (serve, sandboxes, middleware, observing, pools, transfers)


def test_the_guide_tells_of_every_metric() -> None:
    told = set(re.findall(r"`(rock_[a-z_]+)`", GUIDE.read_text()))
    made = {name for module in DECLARING if module.__file__
            for name in re.findall(r'gauge_of\(\s*"(rock_[a-z_]+)"', Path(module.__file__).read_text())}  # fmt: skip
    assert told == {name for name in REGISTRY.families if name.startswith("rock_")} | made
