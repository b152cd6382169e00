"""The documentation names only what exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    return request.param  # type: ignore[no-any-return]


def test_every_path_in_backticks_exists(page: Path) -> None:
    folders = "hscr|service|workers|tests|docs|requirements|helm|benchmarks|scripts"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text())
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


def test_every_relative_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^\s*|\$ )make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


def test_every_setting_exists(page: Path) -> None:
    sources = "\n".join(
        path.read_text()
        for folder in ("hscr", "service", "workers")
        for path in (ROOT / folder).rglob("*.py")
    )
    fields = {f"HSCR_{name.upper()}" for name in re.findall(r"^    (\w+): ", sources, re.MULTILINE)}
    direct = set(re.findall(r"\bHSCR_[A-Z_]+\b", sources))
    named = set(re.findall(r"\bHSCR_[A-Z_]+\b", page.read_text()))
    assert named <= fields | direct


def test_every_command_exists(page: Path) -> None:
    named = set(re.findall(r"(?:`|^\$ |/)hscr ([a-z]+)", page.read_text(), re.MULTILINE))
    if not named:
        return
    shown = subprocess.run(
        [sys.executable, "-c", "from hscr.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    commands = set(re.findall(r"^\W*([a-z]+)\s", shown, re.MULTILINE))
    assert named <= commands


def test_the_layout_in_the_architecture_is_the_tree() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    block = re.search(r"```\n(hscr/.*?)```", text, re.DOTALL)
    assert block is not None
    top = ""
    for line in block.group(1).splitlines():
        name = line.split()[0]
        top = name if not line.startswith(" ") else top
        path = ROOT / name if not line.startswith(" ") else ROOT / top / name
        assert path.exists(), line
