"""Writes docs/licences.md: the licence of every package that fedvlm brings along.

    python scripts/licences.py

The packages are those of requirements.lock, and the licences those that the installed packages
state. A licence of ``FORBIDDEN`` is an error: it would bind whoever passes fedvlm on.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
PAGE = ROOT / "docs" / "licences.md"
FORBIDDEN = ("AGPL", "GPL", "SSPL", "BUSL", "Commons-Clause", "CC-BY-NC", "CC-BY-ND")
"""Beginnings of names. LGPL and MPL are allowed: they bind changes of the package itself only."""
WORDS = {
    "affero general public license": "AGPL",
    "lesser general public license": "LGPL",
    "general public license": "GPL",
    "server side public license": "SSPL",
    "business source license": "BUSL",
}
NVIDIA = "NVIDIA's own licence"
ABSENT = "not stated: the package is not installed here"
HEAD = """# Licences

fedvlm itself has the licence Apache-2.0. An installation with `deploy`, `privacy`, `dicom` and
`clusters` brings these packages along. `python scripts/licences.py` writes this page from what the
packages state. It fails for one of: {forbidden}.

The packages of NVIDIA come with the build of PyTorch for CUDA only. Most of them are not free
software: read their licences before you pass them on. Models and data have licences of their own.

| package | licence |
| --- | --- |
"""


def locked() -> list[str]:
    """The names in requirements.lock."""
    return re.findall(r"^([\w.-]+)==", LOCK.read_text(), re.MULTILINE)


def licence(name: str) -> str:
    """What a package states: an SPDX expression, a classifier, or the first line of its field."""
    try:
        about = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return NVIDIA if name.startswith(("nvidia-", "cuda-")) else ABSENT
    classifiers = [
        text.split(" :: ")[-1]
        for text in about.get_all("Classifier") or []
        if text.startswith("License :: ")
    ]
    stated = (about.get("License") or "").strip()
    short = stated if stated and "\n" not in stated and len(stated) < 80 else ""
    named = [text for text in classifiers if text != "OSI Approved"]
    return about.get("License-Expression") or short or ", ".join(named) or "not stated"


def forbidden(text: str) -> str:
    """The forbidden licence that a package cannot be used without; empty if there is none."""
    plain = text
    for words, short in WORDS.items():
        plain = re.sub(words, short, plain, flags=re.IGNORECASE)
    found = []
    for choice in re.split(r"\bOR\b", plain):
        names = re.split(r"[\s(),;/]+", choice.upper())
        found.append([f for f in FORBIDDEN for n in names if n.startswith(f.upper())])
    return found[0][0] if all(found) else ""


def main() -> None:
    table = {name: licence(name) for name in locked()}
    wrong = [f"{name}: {text}" for name, text in table.items() if forbidden(text)]
    if wrong:
        sys.exit("forbidden licences:\n" + "\n".join(wrong))
    lines = [f"| {name} | {text} |" for name, text in sorted(table.items())]
    PAGE.write_text(HEAD.format(forbidden=", ".join(FORBIDDEN)) + "\n".join(lines) + "\n")
    print(f"{PAGE}: {len(table)} packages, none with a forbidden licence")


if __name__ == "__main__":
    main()
