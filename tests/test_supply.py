"""The locked packages have hashes and the tested versions, and none has a forbidden licence."""

import importlib.util
import re
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
spec = importlib.util.spec_from_file_location("licences", ROOT / "scripts" / "licences.py")
licences = importlib.util.module_from_spec(spec)
spec.loader.exec_module(licences)


def plain(name):
    return re.sub("[-_.]+", "-", name).lower()


def pinned(text):
    found = re.findall(r"^([\w.-]+)==([^\s\\;]+)", text, re.MULTILINE)
    return {plain(name): version for name, version in found}


def test_every_locked_package_has_hashes_and_the_tested_version():
    known, locked = pinned((ROOT / "constraints.txt").read_text()), pinned(LOCK)
    assert {"torch", "nvflare", "cryptography"} <= locked.keys()
    assert {n: v for n, v in locked.items() if n in known and known[n] != v} == {}
    parts = re.split(r"^(?=[\w.-]+==)", LOCK, flags=re.MULTILINE)[1:]
    assert len(parts) == len(locked)
    assert [part.split()[0] for part in parts if "--hash=sha256:" not in part] == []


def test_no_package_has_a_forbidden_licence_and_each_has_its_line():
    table = {name: licences.licence(name) for name in licences.locked()}
    assert {n: text for n, text in table.items() if licences.forbidden(text)} == {}
    page = (ROOT / "docs" / "licences.md").read_text()
    assert [name for name in table if f"| {name} |" not in page] == []
    known = [name for name, text in table.items() if "not stated" in text]
    installed = {plain(found.name) for found in metadata.distributions()}
    assert [name for name in known if name in installed] == []


@pytest.mark.parametrize(
    ("stated", "wrong"),
    [
        ("GPL-3.0-or-later", "GPL"),
        ("GNU Affero General Public License v3", "AGPL"),
        ("GNU General Public License v2 (GPLv2)", "GPL"),
        ("MIT AND AGPL-3.0-only", "AGPL"),
        ("MIT OR GPL-2.0-only", ""),
        ("GNU Lesser General Public License v3 (LGPLv3)", ""),
        ("Apache-2.0 AND MIT", ""),
    ],
)
def test_a_forbidden_licence_is_found_unless_there_is_a_choice(stated, wrong):
    assert licences.forbidden(stated) == wrong
