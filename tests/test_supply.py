"""Locked packages have hashes, the tested versions and allowed licences; the audit of them."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import licences
import vulnerabilities

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()


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


# The audit, with a database on the loopback address and a file in the place of pip-audit


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch, pages):
    """Runs the audit; returns its exit code and what it prints."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def asked(page, answer, *words, error=""):
        tool = tmp_path / "pip-audit"
        written = json.dumps({"dependencies": answer, "fixes": []}) if answer else ""
        tool.write_text(
            f"#!{sys.executable}\nimport sys\nopen({str(tmp_path / 'asked')!r}, 'w').close()\n"
            f"print({written!r})\nsys.exit({error!r} or 1)\n"  # as pip-audit: 1 for everything
        )
        tool.chmod(0o700)
        code = vulnerabilities.main([f"--tool={tool}", f"--known={pages}{page}", *words])
        return code, capsys.readouterr().out

    return asked


@pytest.fixture(scope="module")
def pages():
    """The address of a database, which knows a vulnerability, and of other pages beside it."""
    texts = {"/known": '{"vulnerabilities": [{"id": "PYSEC-1"}]}', "/mirror": '{"info": {}}'}
    texts |= {"/bare": '{"vulnerabilities": []}', "/login": "<html>Please log in</html>"}

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in texts else 404)
            self.end_headers()
            self.wfile.write(texts.get(self.path, "").encode())

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
BAD = {"id": "PYSEC-7", "aliases": ["CVE-9"], "fix_versions": ["2.1"], "description": ""}


def test_an_audit_passes_clean_packages_and_fails_vulnerable_and_unknown_ones(ask):
    assert ask("/known", [CLEAN]) == (0, "audit: no known vulnerability in 1 packages\n")
    vulnerable = {"name": "pillow", "version": "2.0", "vulns": [BAD]}
    code, told = ask("/known", [CLEAN, vulnerable], "--optional")
    assert (code, told) == (1, "pillow 2.0: PYSEC-7, CVE-9; fixed in 2.1\n")
    code, told = ask("/known", [{"name": "ours", "skip_reason": "not found"}], "--optional")
    assert (code, told) == (1, "ours: not looked up: not found\n")


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("/gone", "answered 404: no database"),
        ("/mirror", "names no vulnerability"),
        ("/bare", "names no vulnerability"),
        ("/login", "names no vulnerability"),
    ],
)
def test_an_audit_without_a_database_is_skipped_with_the_reason(page, reason, ask, tmp_path):
    code, told = ask(page, [CLEAN], "--optional")
    assert code == 0
    assert told.startswith("audit skipped: ")
    assert reason in told
    assert ask(page, [CLEAN])[0] == 2
    assert not (tmp_path / "asked").exists(), "pip-audit is not started"


def test_an_audit_without_a_network_is_skipped_with_the_reason(ask):
    code, told = ask("/known", [CLEAN], "--optional", "--known=http://127.0.0.1:9/")
    assert code == 0
    assert "audit skipped: http://127.0.0.1:9/ was not reached (ConnectionError" in told


def test_a_database_lost_during_the_audit_is_no_failure_and_other_errors_are_one(ask):
    code, told = ask("/known", None, "--optional", error="torch: no hash")
    assert (code, told) == (1, "the audit failed: torch: no hash\n")
    code, told = ask("/known", None, "--optional", error="requests.exceptions.ReadTimeout: 15 s")
    assert code == 0
    assert "skipped: the database was lost during the audit (requests.exceptions.Read" in told


def test_a_tool_that_cannot_be_installed_skips_the_audit(ask, tmp_path):
    words = ("--optional", f"--tool={tmp_path / 'none'}")
    code, told = ask("/known", [CLEAN], *words, "--install=sh -c 'echo no index >&2; exit 1'")
    assert (code, told) == (0, "audit skipped: pip-audit could not be installed (no index)\n")
