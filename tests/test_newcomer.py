"""Mistakes of the first hour: a mistyped path, Ctrl-C too early, a folder that is taken."""

import functools
import signal
import subprocess
import sys
import time

import pytest

from fedvlm import hub
from fedvlm.cli import stops
from fedvlm.errors import DataError
from fedvlm.report import live
from fedvlm.settings.sections import DataConfig
from test_cli import call


@pytest.mark.parametrize(
    "path", ["patients/meier.png", "data/rows.xlsx", "data/rows", "Süd/zeilen", "data/rows.dcm"]
)
def test_a_mistyped_path_is_no_name_on_the_hub(path, tmp_path, monkeypatch, capsys):
    """A name that nobody meant for the hub, such as a patient's, must not be sent there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert not hub.is_name(path)
    monkeypatch.setattr(hub, "asked", lambda *_: pytest.fail("the hub was asked"))
    code, _, errors = call(capsys, monkeypatch, "run", f"data.path={path}", "output=run")
    assert code == 2
    assert "does not exist (looked in" in " ".join(errors.split())
    assert hub.is_name("data/rows@main"), "said with its revision, it is one"


def test_a_missing_picture_is_called_missing(tmp_path, monkeypatch):
    from fedvlm.after.inputs import rows_to_ask

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"there is no picture 'patients/meier\.png'"):
        rows_to_ask(DataConfig(), "patients/meier.png", "What is it?")


def test_ctrl_c_before_the_run_has_begun_promises_no_resume(tmp_path):
    """The process is stopped while it still imports or loads: no run folder is there."""
    command = [sys.executable, "-m", "fedvlm", "run", f"output={tmp_path / 'run'}"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(  # a shell that runs the tests with '&' ignores Ctrl-C for them
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    time.sleep(0.2)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and b"torch" not in _maps(process.pid):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" not in errors
    assert stops.UNBEGUN.split(";")[0] in errors
    assert not (tmp_path / "run" / "config.yaml").exists()


def _maps(number):
    """The libraries that a process has loaded."""
    with open(f"/proc/{number}/maps", "rb") as file:
        return file.read()


def test_a_plan_for_a_taken_folder_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    words = ("run", "--dry-run", f"output={tmp_path}", "data.scenes.rows=16")
    code, out, errors = call(capsys, monkeypatch, *words)
    assert code == 0
    assert "is not empty and holds no run" in " ".join((out + errors).split())


def test_a_page_that_waits_for_a_folder_names_it(tmp_path):
    (text, *_) = live.page(tmp_path / "mien").sections[0].parts
    assert f"There is no folder {tmp_path / 'mien'} yet" in text.text
