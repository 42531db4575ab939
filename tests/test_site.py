"""The pages build as a site without a warning or a need for the network, and show every name."""

import re
import subprocess
import sys
from pathlib import Path

import posegrad.interop.mtenn
from tests.test_docs import METHODS, PUBLIC, ROOT

FROM_ELSEWHERE = re.compile(r"""<(?:script|link|img)[^>]*(?:src|href)="((?:https?:)?//[^"]+)""")
INDEX_BELOW = re.compile(r"<munderover>\s*<mi>.*?</munderover>", re.DOTALL)
MTENN = [f"posegrad.interop.mtenn.{name}" for name in posegrad.interop.mtenn.__all__]


def test_the_site_builds_loads_nothing_and_its_reference_has_every_public_name(
    tmp_path: Path,
) -> None:
    _build(tmp_path)
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.glob("api/*.html")]
    documented = {name for page in pages for name in re.findall(r'<dt [^>]*id="([^"]+)"', page)}
    missing = [name for name in [*PUBLIC, *METHODS, *MTENN] if name not in documented]
    assert not missing, f"docs/api/ does not show {missing}"
    built = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    fetched = {url for page in built for url in FROM_ELSEWHERE.findall(page)}
    assert not fetched, f"pages load {fetched}"
    below = {found for page in built for found in INDEX_BELOW.findall(page)}
    assert not below, f"indices stand below letters with an accent, as {below}"


def _build(out: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-E"]
    run = subprocess.run(
        [*command, ROOT / "docs", out], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
