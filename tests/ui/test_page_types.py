"""The types of the page's JavaScript, which its comments declare, checked by TypeScript. types/ describes the vendored
libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.ui.browser import Missing, typescript

from rock.ui.assets import FOLDER

pytestmark = pytest.mark.skipif(not os.environ.get("ROCK_TEST_UI"), reason="fetches TypeScript with npm: `make ui`")
OPTIONS = ["--allowJs", "--checkJs", "--noEmit", "--strict", "--target", "es2023", "--module", "es2022",
           "--moduleResolution", "bundler", "--lib", "es2023,dom,dom.iterable"]  # fmt: skip


def _check(compiler: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the modules of the page in a folder where types stand for the vendored libraries."""
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("vendor"))
    shutil.copytree(Path(__file__).parent / "types", folder / "vendor")
    files = ["main.js", *(f"screens/{file.name}" for file in sorted((folder / "screens").glob("*.js")))]
    return subprocess.run([*compiler, *OPTIONS, *files], cwd=folder, capture_output=True, text=True, timeout=300)


def test_types_of_the_page(tmp_path: Path) -> None:
    try:
        compiler = typescript()
    except Missing as reason:
        pytest.skip(str(reason))
    done = _check(compiler, tmp_path / "page")
    assert done.returncode == 0, done.stdout
    (tmp_path / "page" / "screens" / "wrong.js").write_text(
        'import { api } from "../lib.js";\nimport { bytes } from "../pure.js";\nbytes("5");\napi(5, "/v1/server");\n')
    wrong = subprocess.run([*compiler, *OPTIONS, "screens/wrong.js"], cwd=tmp_path / "page", capture_output=True,
                           text=True, timeout=300)  # fmt: skip
    assert "wrong.js(3,7)" in wrong.stdout and "wrong.js(4,5)" in wrong.stdout, wrong.stdout
