"""Backups: a run goes on elsewhere to the same bytes, and nothing that was spent is forgotten."""

import io
import json
import os
import shutil
import stat
import tarfile

import pytest

pytest.importorskip("cryptography", reason="needs fedvlm[privacy]")

from fedvlm import tree
from fedvlm.deploy import archive, backup
from fedvlm.deploy.auditlog import verify
from fedvlm.errors import FedVLMError
from fedvlm.store import files
from fedvlm.store.run import Store
from keptfiles import Stopped, go_on
from test_cli import call
from test_spending import charges, opened, rows
from toysites import FIVE, config

SETTINGS = "wire.secure=false", "algorithm.name=plora", "train.rounds=4"


def run(sites, folder, resume=False, last=None):
    go_on(sites, config(*SETTINGS, f"output={folder}"), last, resume)


def states(sites):
    newest = (max((sites / s / "runs/run-1/rounds").iterdir()) for s in FIVE)
    return [tree.digest(files.load_tree(folder / "mine.safetensors")) for folder in newest]


def never(question):
    raise AssertionError(question)


def test_a_run_that_is_restored_elsewhere_goes_on_to_the_same_bytes(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    run(tmp_path / "whole", tmp_path / "whole" / "run")
    with pytest.raises(Stopped):
        run(here, here / "run", last=2)
    for name in ("project.yml", "admitted.json", "ca/secret.key", "admin/startup/client.key"):
        files.write_text(here / "federation" / name, "sites: [a]")
    kept = tmp_path / "kept"
    kept.mkdir()
    for site in FIVE:
        (here / site / "cache").mkdir()
        (here / site / "cache" / "rows").write_text("a row")
        backup.back_up_site(here / site, kept / f"{site}.tar", keys=True)
    backup.back_up_federation(here / "federation", [here / "run"], kept / "server.tar")
    assert {stat.S_IMODE(p.stat().st_mode) for p in kept.iterdir()} == {0o600}
    written = b"".join(path.read_bytes() for path in kept.iterdir())
    assert b"identity.key" in written
    assert not [word for word in (b"a row", b"client.key", b"secret.key") if word in written]
    shutil.rmtree(here)
    for site in FIVE:
        backup.restore_site(kept / f"{site}.tar", there / site, never)
        modes = {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (there / site).rglob("*")}
        assert modes == {0}
    backup.restore_federation(kept / "server.tar", there / "federation", there)
    found = sorted(p.name for p in (there / "federation").iterdir())
    assert found == ["admitted.json", "project.yml"]
    run(there, there / "run", resume=True)
    assert states(there) == states(tmp_path / "whole")
    whole, again = (Store(f / "run") for f in (tmp_path / "whole", there))
    assert tree.digest(again.server()) == tree.digest(whole.server())
    assert again.lines() == whole.lines()


def test_a_backup_waits_for_no_run_and_a_restore_replaces_nothing(tmp_path):
    state, target = tmp_path / "state", tmp_path / "b.tar"
    (state / "runs" / "r1").mkdir(parents=True)
    (state / "runs" / "r1" / "file").write_text("x")
    with Store(state / "runs" / "r1").locked(), pytest.raises(FedVLMError, match="is at work"):
        backup.back_up_site(state, target)
    assert not list(tmp_path.glob("b.tar*"))
    backup.back_up_site(state, target)
    with pytest.raises(FedVLMError, match="exists"):
        backup.back_up_site(state, target)
    with pytest.raises(FedVLMError, match="holds 'runs'"):
        backup.restore_site(target, state, never)


def damaged(text):
    return text.replace(b"content of a file", b"CONTENT of a file")


def cut(text):
    return text[: text.index(archive.ABOUT.encode())]


def hostile(text):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        evil = tarfile.TarInfo("../evil")
        evil.size = 1
        tar.addfile(evil, io.BytesIO(b"x"))
    return out.getvalue()


def linked(text):
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as tar:
        link = tarfile.TarInfo("runs")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    return out.getvalue()


@pytest.mark.parametrize("change", [damaged, cut, hostile, linked])
def test_a_backup_that_is_not_whole_is_refused_as_a_whole(change, tmp_path):
    state, target = tmp_path / "state", tmp_path / "b.tar"
    (state / "runs" / "r1").mkdir(parents=True)
    (state / "runs" / "r1" / "file").write_text("content of a file")
    backup.back_up_site(state, target)
    target.write_bytes(change(target.read_bytes()))
    with pytest.raises(FedVLMError, match="is no whole backup of fedvlm"):
        backup.restore_site(target, tmp_path / "new" / "site", never)
    assert not list((tmp_path / "new").rglob("*"))
    assert not (tmp_path / "evil").exists()


@pytest.fixture
def spent(tmp_path):
    """A site that was backed up after one round under differential privacy, and did another."""
    state, target = tmp_path / "state", tmp_path / "b.tar"
    account = opened(state, data=rows(0, 100))
    (state / "runs").mkdir()
    account.spend(1, "a" * 8)
    backup.back_up_site(state, target)
    account.spend(2, "b" * 8)
    return state, target


def test_a_newer_ledger_is_kept_and_an_older_one_replaced(spent, tmp_path):
    state, target = spent
    survived = tmp_path / "survived"
    shutil.copytree(state / "spending", survived / "spending")
    backup.restore_site(target, survived, never)
    assert len(charges(survived)) == 2, "the round after the backup is not forgotten"
    assert verify(survived / "audit.jsonl").lines == 2
    backup.back_up_site(state, tmp_path / "newer.tar")
    older = tmp_path / "older"
    backup.restore_site(target, older, lambda question: True)
    shutil.rmtree(older / "runs", ignore_errors=True)
    (older / "audit.jsonl").unlink()
    for left in older.iterdir():
        if left.name not in ("spending", ".lock"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    backup.restore_site(tmp_path / "newer.tar", older, never)
    assert len(charges(older)) == 2


def test_an_old_ledger_alone_needs_a_persons_word_and_another_one_is_refused(
    spent, tmp_path, capsys, monkeypatch
):
    _, target = spent
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    words = ("site", "restore", str(target), "--state", str(tmp_path / "new"))
    code, _, errors = call(capsys, monkeypatch, *words)
    assert code == 2
    assert "every epsilon is too small" in " ".join(errors.split())
    assert not (tmp_path / "new" / "spending").exists()
    code, out, _ = call(capsys, monkeypatch, *words, "--yes")
    assert code == 0
    assert "as it was at" in out
    assert len(charges(tmp_path / "new")) == 1
    lines = (tmp_path / "new" / "audit.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "restored"
    other = tmp_path / "other"
    opened(other).spend(1, "c" * 8)
    before = (other / "spending" / "ledger.jsonl").read_bytes()
    with pytest.raises(FedVLMError, match="neither has all lines of the other"):
        backup.restore_site(target, other, never)
    assert (other / "spending" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize(("older", "newer"), [(3, 5), (5, 3)])
def test_rounds_of_secure_sums_stay_over_after_a_restore(tmp_path, older, newer):
    from fedvlm.deploy.blindsite import Journal
    from fedvlm.deploy.limits import Refused

    state, new, target = tmp_path / "state", tmp_path / "new", tmp_path / "site.tar"
    (state / "runs").mkdir(parents=True)
    Journal(state, "run-1").note(older, 1, "masked")
    backup.back_up_site(state, target)
    with pytest.raises(FedVLMError, match="the rounds in the backup may be too old"):
        backup.restore_site(target, new, lambda question: False)
    Journal(new, "run-1").note(newer, 1, "masked")
    Journal(new, "run-2").note(1, 1, "masked")
    backup.restore_site(target, new, never)
    Journal(new, "run-1").check(6)
    for run, over in (("run-1", 5), ("run-2", 1)):
        with pytest.raises(Refused, match=f"round {over} is over here"):
            Journal(new, run).check(over)


def test_private_keys_are_copied_only_when_asked_for_and_both_are_said(
    tmp_path, capsys, monkeypatch
):
    state = tmp_path / "state"
    (state / "runs").mkdir(parents=True)
    files.write_text(state / "keys" / "k" / "site.key", "SECRET KEY")
    for words, said, found in (((), "are not in it", False), (("--keys",), "it also holds", True)):
        target = tmp_path / f"{found}.tar"
        words = ("site", "backup", str(target), "--state", str(state), *words)
        code, out, _ = call(capsys, monkeypatch, *words)
        assert code == 0
        assert "not encrypted" in out
        assert said in out
        assert (b"SECRET KEY" in target.read_bytes()) is found
    assert archive.ABOUT.encode() in target.read_bytes()
