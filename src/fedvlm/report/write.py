"""Writes ``report.html``: one file, which loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from fedvlm.errors import FedVLMError
from fedvlm.report import page
from fedvlm.report.folder import read
from fedvlm.report.parts import Page
from fedvlm.store.files import write_text
from fedvlm.store.run import DONE, REPORT

ASSETS = Path(__file__).parents[1] / "assets"
SCRIPTS = ("vega.min.js", "vega-lite.min.js", "vega-embed.min.js")
MOST = 3_000_000  # bytes of the page
ROOM = 1_600_000  # of them for the held-out rows
MAP = "\n//# sourceMappingURL="

logger = logging.getLogger("fedvlm")


def write_report(folder: str | Path) -> Path:
    """Writes the report of a run or of a comparison into its folder, and returns its path.

    Args:
        folder: the folder of a run, finished or not, or of a comparison.

    Raises:
        FedVLMError: the folder holds neither, or a file of it is damaged.
    """
    path = Path(folder)
    found = read(path)
    text = html(page.of(found, ROOM))
    if len(text.encode()) > MOST:  # very many sites: without their rows
        text = html(page.of(found, 0))
    write_text(path / REPORT, text)
    return path / REPORT


def after(folder: str | Path, done: Callable[[Path], object] = lambda path: None) -> None:
    """Writes the report at the end of a run. A failure is a warning: the run is complete.

    Args:
        folder: the folder of the run or of the comparison.
        done: called with the path of the report.
    """
    try:
        done(write_report(folder))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        again = f"'fedvlm report {folder}' makes it again"
        logger.warning("'%s' was not written (%.300s); %s", Path(folder) / REPORT, reason, again)


def after_comparison(folder: Path, done: Callable[[Path], object] = lambda path: None) -> None:
    """As :func:`after`, for a comparison and those of its runs that have no report yet."""
    after(folder, done)
    after_runs([table.parent for table in sorted(folder.glob(f"*/{DONE}"))])


def after_runs(folders: Sequence[Path]) -> None:
    """As :func:`after`, for those finished runs of a comparison that have no report yet."""
    for folder in folders:
        if not (folder / REPORT).exists():
            after(folder)


def html(shown: Page) -> str:
    """The page as HTML. Its policy allows the scripts by their digests, and no connection."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(ASSETS / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    charts = any(part.part == "chart" for s in shown.sections for part in s.parts)
    scripts = _scripts() if charts else ()
    digests = " ".join(f"'sha256-{_digest(text)}'" for text in scripts)
    return environment.get_template("page.html").render(
        page=shown,
        style=_asset("report/style.css"),
        scripts=scripts,
        digests=digests or "'none'",
    )


@cache
def _scripts() -> tuple[str, ...]:
    """Vega, and the lines that draw the charts."""
    vega = (_asset(f"vega/{name}").split(MAP)[0] for name in SCRIPTS)
    return (*vega, _asset("report/charts.js"))


def _asset(name: str) -> str:
    try:
        return (ASSETS / name).read_text(encoding="utf-8")
    except OSError as error:
        raise FedVLMError(f"the installation of fedvlm lacks '{ASSETS / name}': {error}") from error


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
