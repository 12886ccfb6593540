"""scripts/fuzz.py tells its outcomes apart, and a short run of it finds nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import fuzz
import fuzz_damage
import fuzz_kinds
from fedvlm.deploy.frames import Closed
from fedvlm.errors import FedVLMError

SCRIPTS = Path(__file__).parents[1] / "scripts"


def fails_with(error):
    def trial(rng, folder):
        raise error

    return trial


class Long(FedVLMError):
    def __str__(self):
        return "x" * 3000


@pytest.mark.parametrize(
    ("trial", "end"),
    [
        (lambda rng, folder: None, "same"),
        (fails_with(FedVLMError("no")), "clear"),
        (fails_with(Closed("no")), "clear"),
        (fails_with(Long()), "wrong"),
        (fails_with(fuzz_damage.Wrong("other pixels")), "wrong"),
        (fails_with(KeyError("x")), "traceback"),
        (fails_with(MemoryError()), "memory"),
        (lambda rng, folder: time.sleep(5), "hang"),
    ],
)
def test_a_trial_ends_as_one_of_the_outcomes(trial, end, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "LIMIT", 0.2)
    monkeypatch.setitem(fuzz_kinds.KINDS, "mine", trial)
    assert fuzz.outcome("mine", 0, tmp_path)[0] == end


@pytest.mark.slow
def test_a_short_run_ends_with_its_counts_and_without_a_failure():
    command = [sys.executable, SCRIPTS / "fuzz.py", "--seconds", "2", "--kinds", "config,wire"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    last = done.stdout.splitlines()[-1]
    pattern = (
        r"tried (\d+), clear errors \d+, same result \d+, tracebacks 0, accepted wrongly 0, "
        r"hangs 0, out of memory 0"
    )
    found = re.fullmatch(pattern, last)
    assert found, done.stdout + done.stderr
    assert int(found[1]) > 0
    assert done.returncode == 0
