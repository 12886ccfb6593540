"""Looks for known vulnerabilities of the packages in requirements.lock, by pip-audit.

    python scripts/vulnerabilities.py [--optional]

pip-audit ends with 1 after a vulnerability, and also where it reaches no database. So PyPI is asked
first about a release that has known vulnerabilities. An answer without them comes from no database,
such as a mirror of the packages alone. pip-audit's list as JSON then counts: it exists only where
all packages have been looked up.

Exit codes: 0 no known vulnerability; 1 vulnerabilities, or an audit that failed; 2 no audit. With
--optional, no audit is 0 as well, and the reason is printed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
TOOL = ROOT / ".venv" / "tools" / "bin" / "pip-audit"
KNOWN = "https://pypi.org/pypi/jinja2/2.11.2/json"
"""Where pip-audit would ask about a release with known vulnerabilities (CVE-2020-28493)."""
LIMIT = 10.0  # seconds for an answer
LOST = (
    "requests.exceptions.",
    "urllib3.exceptions.",
    "pip_audit._service.interface.",
    "ERROR:pip_audit._cli:Tip: your network may be blocking this service",
)
"""How the last line of pip-audit begins after a network or a database that failed."""
FOUND, UNASKED = 1, 2


def unreached(address: str = KNOWN) -> str:
    """The reason why the database cannot be asked; empty where it can."""
    try:
        answer = requests.get(address, timeout=LIMIT)
    except requests.RequestException as error:
        return f"{address} was not reached ({type(error).__name__}: {error!s:.200})"
    if not answer.ok:
        return f"{address} answered {answer.status_code}: no database of vulnerabilities is there"
    try:
        known = answer.json()["vulnerabilities"]
    except (ValueError, KeyError, TypeError):
        known = None
    if not known:
        return f"{address} names no vulnerability, although that release has some"
    return ""


def installed(tool: Path, command: str) -> str:
    """Installs pip-audit where it is missing. The reason why it cannot be used; empty if it can."""
    if not tool.exists():
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, cwd=ROOT)
        if done.returncode or not tool.exists():
            return f"pip-audit could not be installed ({last_line(done.stderr)})"
    return ""


def audited(tool: Path, lock: Path) -> tuple[list[dict[str, Any]], str]:
    """The packages that pip-audit has looked up, or why it has not looked them up."""
    options = "--disable-pip --require-hashes --format=json --progress-spinner=off -r"
    done = subprocess.run([tool, *options.split(), lock], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"], last_line(done.stderr)
    except (ValueError, KeyError, TypeError):
        return [], last_line(done.stderr)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1][:300]


def problems(packages: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every vulnerability, and for every package that the database does not know."""
    lines = []
    for package in packages:
        name = f"{package['name']} {package.get('version', '')}".strip()
        if "skip_reason" in package:
            lines.append(f"{name}: not looked up: {package['skip_reason']}")
        for found in package.get("vulns", ()):
            names = ", ".join([found["id"], *found.get("aliases", ())])
            fixed = ", ".join(found["fix_versions"]) or "no release"
            lines.append(f"{name}: {names}; fixed in {fixed}")
    return lines


def unasked(reason: str, optional: bool) -> int:
    print(f"audit skipped: {reason}" if optional else f"no audit: {reason}")
    return 0 if optional else UNASKED


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optional", action="store_true", help="without a database, print the reason and exit 0")
    add("--tool", type=Path, default=TOOL, help="pip-audit (default: that of .venv/tools)")
    add("--install", default="make .venv/tools/.stamp", help="the command that installs the tool")
    add("--lock", type=Path, default=LOCK, help="the packages (default: requirements.lock)")
    add("--known", default=KNOWN, help="the address of a release with known vulnerabilities")
    asked = parser.parse_args(words)
    if reason := unreached(asked.known) or installed(asked.tool, asked.install):
        return unasked(reason, asked.optional)
    packages, failure = audited(asked.tool, asked.lock)
    if not packages:
        if failure.startswith(LOST):
            return unasked(f"the database was lost during the audit ({failure})", asked.optional)
        print(f"the audit failed: {failure}")
        return FOUND
    if lines := problems(packages):
        print("\n".join(lines))
        return FOUND
    print(f"audit: no known vulnerability in {len(packages)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
