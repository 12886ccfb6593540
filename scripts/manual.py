"""The parts of the documentation site that are made at build time: a hook of mkdocs.yml.

- The pages settings.md and api.md come from the settings and from the public names.
- Files outside docs that a page links to join the site, at their path in the repository. Links are
  written as they work on GitHub, so they are changed for the site.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import fedvlm
from fedvlm.cli.settings import rows_of
from fedvlm.settings.sections import Config

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s#]+)")  # the path of a relative link
WHOLE = re.compile(r"(?<!!)\[([^\]]+)\]\((?![a-z]+:|#|/)([^)\s#]+)\)")
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):<code>[~.]?")  # of Sphinx, in docstrings
MADE = {"docs/settings.md": "settings", "docs/api.md": "api"}


def settings() -> Iterator[str]:
    """The page of all settings, a table a section."""
    yield "# Settings\n"
    yield "The same list as `fedvlm config`. `fedvlm config train` prints a section, and"
    yield "`fedvlm config --schema` the JSON schema of a file, for editors. An algorithm may have"
    yield "settings of its own: `fedvlm algorithms NAME` lists them.\n"
    sections: dict[str, list[str]] = {}
    for name, kind, default, about in rows_of(Config, ""):
        top, dot, _ = name.partition(".")
        cells = (f"`{name}`", _text(kind), f"`{default}`" if default else "", _text(about))
        sections.setdefault(top if dot else "The run", []).append(f"| {' | '.join(cells)} |")
    for section, rows in sections.items():
        yield f"\n## {section}\n\n<div class='settings' markdown>\n"
        yield "| setting | type | default | meaning |\n| --- | --- | --- | --- |"
        yield from rows
        yield "\n</div>"


def api() -> Iterator[str]:
    """The page of the public names; mkdocstrings takes the text from the docstrings."""
    yield "# Python\n"
    yield "The public names of `fedvlm`. Every error that a person can cause is a `FedVLMError`."
    yield "Its message gives the reason, the value, and what to do.\n"
    names = sorted(fedvlm.__all__, key=lambda name: (name[0].isupper(), name.lower()))
    for name in names:
        yield f"\n::: fedvlm.{name}\n"


def _text(text: str) -> str:
    """A text as it is written, in a cell of Markdown."""
    return re.sub(r"([|*_<>`\[\]\\])", r"\\\1", " ".join(text.split()))


def on_config(config):
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files, config):
    from mkdocs.structure.files import File

    for page, make in MADE.items():
        text = "\n".join(globals()[make]())
        files.append(File.generated(config, page.removeprefix("docs/"), content=text))
    listed = [path for path in _named(config.nav) if not files.get_file_from_path(path)]
    found = [file.src_uri for file in files if file.src_uri.endswith(".md")] + listed
    while found:  # a page that joins may link to further files
        here = found.pop()
        file = files.get_file_from_path(here)
        if file is None:
            file = File.generated(config, here, content=(ROOT / here).read_bytes())
            files.append(file)
        if here.endswith(".md"):
            for target in _outside(here, file.content_string):
                if files.get_file_from_path(target) is None:
                    found.append(target)
    return files


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    if _is_made(here):
        return markdown

    def changed(match: re.Match[str]) -> str:
        target = _on_site(_in_repository(here, match[2]))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".")

    def without_folder(match: re.Match[str]) -> str:
        return match[1] if (ROOT / _in_repository(here, match[2])).is_dir() else match[0]

    return LINK.sub(changed, WHOLE.sub(without_folder, markdown))


def on_page_content(html, page, config, files):
    return ROLE.sub("<code>", html) if page.file.src_uri == "api.md" else html


def _is_made(page: str) -> bool:
    return f"docs/{page}" in MADE


def _in_repository(page: str, link: str) -> str:
    """The path in the repository of what a page of the site links to."""
    home = page if (ROOT / page).exists() else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def _on_site(path: str) -> str:
    return path.removeprefix("docs/")


def _outside(page: str, text: str) -> Iterator[str]:
    """The files outside docs that a page links to; of a folder, its README."""
    if _is_made(page):
        return
    for _, link in LINK.findall(text):
        path = _in_repository(page, link)
        if not path.startswith("docs/") and (ROOT / path).is_file():
            yield path


def _named(nav) -> Iterator[str]:
    """The pages that the navigation names."""
    for item in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        if isinstance(item, str):
            yield item
        else:
            yield from _named(item)
