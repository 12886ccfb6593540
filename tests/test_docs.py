"""The pages: all in the navigation, no link into nothing, and examples that run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from test_readme import Block, execute, parse

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"),
     *ROOT.glob("examples/*/*.md"))
)  # fmt: skip
MADE = ("settings.md", "api.md")  # by scripts/manual.py, when the site is built
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]+))?\)")
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT / "src" / "fedvlm").with_suffix("").parts)
    for path in sorted((ROOT / "src").rglob("*.py"))
    if re.search(r"^ *>>> ", path.read_text(encoding="utf-8"), re.MULTILINE)
]


def prose(page: Path) -> str:
    """A page without its fenced blocks and its code in lines."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]+`", "code", text)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found, seen = set(), Counter[str]()
    for head in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", head)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def named(nav: object) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in named(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    wrong = []
    for path, anchor in LINK.findall(prose(page)):
        target = page.parent / path if path else page
        if target.parent == ROOT / "docs" and target.name in MADE:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}" if anchor else path)
    assert wrong == []


def test_every_page_is_in_the_navigation_once():
    nav = named(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    here = {page.name for page in ROOT.glob("docs/*.md")}
    assert {page for page in nav if "/" not in page and (ROOT / "docs" / page).exists()} == here
    others = set(nav) - here - set(MADE)
    assert [page for page in others if not (ROOT / page).exists()] == []
    assert len(nav) == len(set(nav))


def test_the_tutorial_reads_its_own_rows(tmp_path, warm):
    blocks = parse((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    run = [b for b in blocks if b.not_run is None and b.language in ("python", "bash")]
    assert [b.language for b in run] == ["python", "bash"]
    (settings,) = (b for b in blocks if b.file == "mine.yaml")
    (tmp_path / "mine.yaml").write_text(settings.text, encoding="utf-8")
    execute(run[0], tmp_path, warm)
    execute(Block("bash", run[1].text.replace("\n", " | tee plan.txt\n"), 1), tmp_path, warm)
    plan = (tmp_path / "plan.txt").read_text(encoding="utf-8")
    assert re.search(r"clients\s*│\s*3: ", plan)
    assert "not known" not in plan


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings_give_what_they_show(name):
    found = doctest.testmod(importlib.import_module(f"fedvlm.{name}"))
    assert found.attempted
    assert not found.failed


needs_mkdocs = pytest.mark.skipif(
    not importlib.util.find_spec("material"), reason="needs the extra docs: pip install '.[docs]'"
)


@needs_mkdocs
def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path / "site"],
        cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*")
    assert {tag for page in pages for tag in loads.findall(page.read_text())} == set()
    settings = (tmp_path / "site" / "settings.html").read_text()
    assert "train.local_steps" in settings
    assert "write_report" in (tmp_path / "site" / "api.html").read_text()
