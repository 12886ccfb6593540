"""The units for systemd: systemd accepts them with any path, and gives them few rights."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedvlm.deploy import units
from fedvlm.errors import FedVLMError
from test_cli import call

WORST = 2.5  # of 10, the most exposed; systemd calls the units "OK"
ODD = "a b%n $HOME \"q\" 'x' \\d é"
needed = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (apt install systemd)"
)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A folder with every character that systemd treats specially, and a Python inside."""
    folder = tmp_path / ODD
    folder.mkdir()
    program = tmp_path / "a b%n $HOME é" / "python"  # systemd allows no quotes here
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(program))
    return folder


def made(odd: Path) -> dict[str, str]:
    return {
        "fedvlm-site": units.site_unit(
            odd / "rows", odd / "state", odd / "p.yml", user="fedvlm", credential="/etc/c/s.cred"
        ),
        "fedvlm-server": units.server_unit(odd / "federation", user="fedvlm"),
        "fedvlm-plain": units.site_unit("/srv/rows", "/var/lib/fedvlm/site", user="fedvlm"),
    }


def analyzed(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needed
def test_systemd_accepts_the_units_whatever_the_paths_are(odd, tmp_path):
    paths = [tmp_path / f"{name}.service" for name in made(odd)]
    for path, text in zip(paths, made(odd).values(), strict=True):
        path.write_text(text)
    done = analyzed("verify", *map(str, paths))
    assert (done.returncode, done.stderr) == (0, "")
    broken = tmp_path / "fedvlm-broken.service"
    broken.write_text(paths[0].read_text().replace("%%", "%"))
    assert analyzed("verify", str(broken)).stderr, "another folder has another name"


@needed
def test_systemd_finds_little_that_the_units_may_do(odd, tmp_path):
    for name, text in made(odd).items():
        path = tmp_path / f"{name}.service"
        path.write_text(text)
        done = analyzed("security", "--offline=true", "--no-pager", str(path))
        (score,) = re.findall(r"exposure level for \S+: ([\d.]+)", done.stdout)
        assert float(score) <= WORST, done.stdout


def test_a_unit_names_the_command_in_words_of_systemd(odd):
    found = re.search("^ExecStart=(.*)$", made(odd)["fedvlm-site"], re.M)[1]
    words = re.findall(r'"((?:\\.|[^"\\])*)"|(\S+)', found)
    read = [re.sub(r"\\(.)", r"\1", a or b).replace("%%", "%") for a, b in words]
    command = [read[0], *(word.replace("$$", "$") for word in read[1:])]
    assert command[:5] == [sys.executable, "-m", "fedvlm", "site", "start"]
    assert command[5:] == [
        *("--data", str(odd / "rows"), "--state", str(odd / "state")),
        *("--policy", str(odd / "p.yml")),
    ]


def test_a_unit_may_write_to_its_own_folders_only_and_sees_no_other_key(odd):
    found = made(odd)
    assert "StateDirectory=fedvlm/site\nStateDirectoryMode=0700" in found["fedvlm-plain"]
    assert "ReadWritePaths" not in found["fedvlm-plain"]
    (hidden,) = re.findall("^InaccessiblePaths=(.*)$", found["fedvlm-server"], re.M)
    assert hidden.count("/ca") == hidden.count("/admin") == 1
    assert "LoadCredentialEncrypted=site.key:/etc/c/s.cred" in found["fedvlm-site"]
    for text in found.values():
        assert "User=fedvlm\n" in text
        assert "NoNewPrivileges=yes\n" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("python", "/a'b/python"), "systemd starts no program"),
        (("--data", "a\nb"), "cannot stand in a unit"),
        (("--user", "root; rm"), "is no user's name"),
        (("--credential", "a b"), "use a path of letters"),
    ],
)
def test_what_cannot_stand_in_a_unit_is_refused(words, said, capsys, monkeypatch):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    if words[0] == "python":
        monkeypatch.setattr(sys, "executable", words[1])
        words = ("--data", "d")
    given = {"--data": "d", "--state": "s", words[0]: words[1]}
    options = [word for pair in given.items() for word in pair]
    code, text, errors = call(capsys, monkeypatch, "site", "start", "--systemd", *options)
    assert (code, text) == (2, "")
    assert said in errors


def test_a_key_can_be_a_credential_of_the_service_manager(tmp_path, monkeypatch):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    from fedvlm.deploy.nvflare import keys

    key = tmp_path / "kit" / "server.key"
    key.parent.mkdir()
    with pytest.raises(FedVLMError, match=r"LoadCredentialEncrypted=server\.key"):
        keys.place_secret(key)
    for folder in ("one", "two"):  # each start of a service has a folder of its own
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "server.key").write_text(folder)
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / folder))
        keys.place_secret(key)
        assert key.read_text() == folder
    key.unlink()
    key.write_text("the file")
    keys.place_secret(key)
    assert key.read_text() == "the file", "a key on the disk is never replaced"
