"""The spending ledger of a site: differential privacy over all runs on the same rows."""

import json
import subprocess
from pathlib import Path

import datasets
import numpy as np
import pytest

from fedvlm.config import load
from fedvlm.deploy.account import Account
from fedvlm.deploy.auditlog import verify
from fedvlm.deploy.limits import Refused
from fedvlm.deploy.policy import Policy
from fedvlm.deploy.spending import Spending, spent
from fedvlm.errors import FedVLMError
from fedvlm.privacy import accountant
from fedvlm.privacy.accountant import Spend
from fedvlm.privacy.plan import planned

ROUNDS, STEPS = 4, 5
EPSILON = 2.0


def rows(first, last, patients=None):
    """Rows whose pictures have the numbers from ``first`` to ``last``."""
    numbers = range(first, last)
    table = {"image_hash": [f"picture{n:04}" * 3 for n in numbers]}
    return datasets.Dataset.from_dict(table | ({"patient": patients} if patients else {}))


def opened(state, run="run1", data=None, unit="row", policy=None, units=100, **settings):
    """The account of a run that has opened at a site."""
    data = rows(0, 100) if data is None else data
    tree = {"unit": unit, "epsilon": EPSILON, "delta": 1e-4, **settings}
    privacy = load({"privacy": tree}).privacy
    plan = planned(privacy, units, 20, ROUNDS * STEPS)
    steps = dict.fromkeys(range(1, ROUNDS + 1), STEPS)
    account = Account(state, run, plan, steps, policy or Policy())
    account.open(privacy, data, np.arange(len(data)))
    return account


def limited(epsilon):
    return Policy(epsilon_max=epsilon, delta_max=1e-4)


def charges(state):
    spending = Spending(state)
    with spending.locked():
        return spending.charges()


def lines(state):
    return (state / "spending" / "ledger.jsonl").read_text().splitlines()


def test_a_round_is_on_the_disk_when_the_call_returns(tmp_path):
    account = opened(tmp_path)
    assert charges(tmp_path) == [], "an open run has spent nothing"
    account.spend(1, "download")
    (line,) = [json.loads(text) for text in lines(tmp_path) if '"spend"' in text]
    assert (line["run"], line["round"], line["down"]) == ("run1", 1, "download")
    (charge,) = charges(tmp_path)
    assert charge.spend == account.plan.spend(STEPS), "rate and noise to the last bit"


def test_a_line_is_synced_and_its_folder_too(tmp_path, monkeypatch):
    import os

    account, synced = opened(tmp_path), []
    plain = os.fsync

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    account.spend(1, "d")
    folder = tmp_path / "spending"
    at = synced.index(str(folder / "ledger.jsonl"))
    assert synced[at + 1] == str(folder)
    assert str(tmp_path) in synced[:at], "the folder that holds it, too"


def test_every_training_of_a_round_is_spent_even_the_same_again(tmp_path):
    account = opened(tmp_path)
    account.spend(1, "download")
    account.spend(1, "download")  # the process was killed before the reply was kept
    account.spend(1, "another download")
    assert [c.round for c in charges(tmp_path)] == [1, 1, 1]


def test_a_run_that_repeats_rounds_ends_before_its_budget(tmp_path):
    account = opened(tmp_path)
    for round_ in range(1, ROUNDS):
        account.spend(round_, "d")
    account.spend(1, "another")
    with pytest.raises(
        Refused,
        match=r"round 4 would make the epsilon of this run 2\.3 at delta 0\.0001, and its "
        r"budget is 2 \(privacy\.epsilon\)",
    ):
        account.spend(ROUNDS, "d")
    assert len(charges(tmp_path)) == ROUNDS, "a refused round spends nothing"
    assert spent(charges(tmp_path), 1e-4) <= EPSILON


def test_a_whole_run_without_repetition_keeps_its_budget(tmp_path):
    account = opened(tmp_path)
    for round_ in range(1, ROUNDS + 1):
        account.spend(round_, "d")
    assert EPSILON * 0.999 < spent(charges(tmp_path), 1e-4) <= EPSILON


def test_a_run_that_was_erased_and_begins_anew_gets_nothing_back(tmp_path):
    for _ in range(2):
        account = opened(tmp_path)
        for round_ in (1, 2):
            account.spend(round_, "d")
    with pytest.raises(Refused, match=r"the epsilon of this run"):
        opened(tmp_path).spend(1, "d")
    assert [json.loads(text)["event"] for text in lines(tmp_path)].count("run") == 1


def test_a_run_over_the_sites_limit_is_refused_before_its_first_round(tmp_path):
    account = opened(tmp_path, "run1", policy=limited(3))
    for round_ in range(1, ROUNDS + 1):
        account.spend(round_, "d")
    with pytest.raises(Refused) as error:
        opened(tmp_path, "run2", policy=limited(2.5))
    assert str(error.value) == (
        "the site's policy refuses this run: its rows have spent epsilon 2, this run would spend "
        "2, together 2.9 at delta 0.0001, and the limit is 2.5 (epsilon_max)"
    )
    assert len(charges(tmp_path)) == ROUNDS
    opened(tmp_path, "run2", policy=limited(3)).spend(1, "d")


def test_runs_on_other_rows_do_not_add_up(tmp_path):
    for run, first in (("run1", 0), ("run2", 100), ("run3", 200)):
        account = opened(tmp_path, run, rows(first, first + 100), policy=limited(2.5))
        for round_ in range(1, ROUNDS + 1):
            account.spend(round_, "d")
    assert len(charges(tmp_path)) == 3 * ROUNDS


def test_one_common_row_is_enough_for_runs_to_add_up(tmp_path):
    spend_all(opened(tmp_path, "run1", rows(0, 100), policy=limited(2.5)))
    with pytest.raises(Refused, match=r"\(epsilon_max\)"):
        opened(tmp_path, "run2", rows(99, 199), policy=limited(2.5))


def spend_all(account):
    for round_ in range(1, ROUNDS + 1):
        account.spend(round_, "d")


def test_runs_on_other_rows_of_the_same_patient_add_up(tmp_path):
    names = [f"p{n}" for n in range(100)]
    asked = {"unit": "patient", "policy": limited(2.5)}
    spend_all(opened(tmp_path, "run1", rows(0, 100, names), **asked))
    with pytest.raises(Refused, match=r"\(epsilon_max\)"):
        opened(tmp_path, "run2", rows(100, 200, ["p7", *(f"q{n}" for n in range(99))]), **asked)
    opened(tmp_path, "run3", rows(100, 200, [f"q{n}" for n in range(100)]), **asked)


def test_a_row_without_a_patient_is_known_by_its_picture(tmp_path):
    names = ["", *(f"p{n}" for n in range(99))]
    asked = {"unit": "patient", "policy": limited(2.5)}
    spend_all(opened(tmp_path, "run1", rows(0, 100, names), **asked))
    opened(tmp_path, "run2", rows(200, 300, ["", *(f"q{n}" for n in range(99))]), **asked)
    with pytest.raises(Refused, match=r"\(epsilon_max\)"):
        opened(tmp_path, "run3", rows(0, 100, ["", *(f"q{n}" for n in range(99))]), **asked)


def test_epsilons_of_different_units_are_not_added_up(tmp_path, caplog):
    spend_all(opened(tmp_path, "run1", policy=limited(9)))
    names = [f"p{n}" for n in range(100)]
    with pytest.raises(Refused, match="spent by another unit") as error:
        opened(tmp_path, "run2", rows(0, 100, names), "patient", limited(9))
    assert "patient" not in str(error.value), "the name of a column stays at the site"
    assert "'patient'" in caplog.text
    with pytest.raises(Refused, match="spent by another unit"):
        opened(tmp_path, "run1", rows(0, 100, names), "patient")


def test_a_run_that_began_beside_another_stops_at_the_sites_limit(tmp_path):
    one = opened(tmp_path, "run1", policy=limited(2.5))
    two = opened(tmp_path, "run2", policy=limited(2.5))
    spend_all(one)
    with pytest.raises(Refused, match=r"refuses round 3: .* 2\.7 at .* limit is 2\.5 \(epsilon_m"):
        spend_all(two)
    assert spent(charges(tmp_path), 1e-4) <= 2.5


def test_a_noise_that_is_too_small_for_one_round_is_refused_before_it(tmp_path):
    with pytest.raises(Refused, match=r"the first round alone would spend epsilon .* raise priv"):
        opened(tmp_path, noise=0.8)
    assert charges(tmp_path) == []
    account = opened(tmp_path, noise=1.8, policy=limited(2))  # enough for some rounds
    with pytest.raises(Refused, match=r"\(privacy\.epsilon\)"):
        spend_all(account)


def test_epsilons_add_up_at_the_delta_of_the_site_whatever_the_delta_of_a_run(tmp_path):
    account = opened(tmp_path, delta=1e-6, policy=limited(1.6))
    spend_all(account)
    assert spent(charges(tmp_path), 1e-4) < 1.6 < spent(charges(tmp_path), 1e-6)


def test_a_torn_line_counts_as_a_round(tmp_path):
    account = opened(tmp_path)
    account.spend(1, "d")
    path = tmp_path / "spending" / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"n":3,"time":"2026')
    assert [c.round for c in charges(tmp_path)] == [1, 0]
    assert charges(tmp_path)[1].spend == account.plan.spend(STEPS)
    account.spend(2, "d")
    assert [c.round for c in charges(tmp_path)] == [1, 0, 2], "also after it is closed"
    account.spend(3, "d")
    with pytest.raises(Refused, match=r"\(privacy\.epsilon\)"):
        account.spend(4, "d")


def test_a_line_that_lost_its_end_is_not_forgotten(tmp_path):
    account = opened(tmp_path)
    for round_ in (1, 2):
        account.spend(round_, "d")
    path = tmp_path / "spending" / "ledger.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FedVLMError, match="lines at its end are missing"):
        account.spend(3, "d")


DAMAGE = {
    "is damaged: lines at its end are missing": lambda f: cut_last(f / "ledger.jsonl"),
    "is damaged: it is missing, and runs were noted": lambda f: (f / "ledger.jsonl").unlink(),
    "line 3: it was changed": lambda f: changed(f / "ledger.jsonl", b'"steps":5', b'"steps":1', 2),
    "line 3: lines before it are missing": lambda f: drop(f / "ledger.jsonl", 2),
    "secret' is missing": lambda f: (f / "secret").unlink(),
    "it is not the key of this ledger": lambda f: (f / "secret").write_bytes(bytes(32)),
    "head.json' is damaged": lambda f: changed(f / "head.json", b'"last": "', b'"last": "0', 0),
    "is damaged: it is not what": lambda f: next((f / "rows").iterdir()).write_bytes(bytes(16)),
    "' is missing": lambda f: next((f / "rows").iterdir()).unlink(),
}


def cut_last(path):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def drop(path, at):
    text = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(text[:at] + text[at + 1 :]))


def changed(path, old, new, at):
    text = path.read_bytes().splitlines(keepends=True)
    whole = b"".join(text[:at]), b"".join(text[at:])
    assert old in whole[1]
    path.write_bytes(whole[0] + whole[1].replace(old, new, 1))


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_ledger_is_named_and_no_run_opens(said, tmp_path):
    spend_all(opened(tmp_path, "run1"))
    DAMAGE[said](tmp_path / "spending")
    with pytest.raises(FedVLMError, match=said):
        opened(tmp_path, "run2", rows(50, 150))


def test_the_ledger_is_verified_by_the_command_for_audit_logs(tmp_path):
    spend_all(opened(tmp_path))
    assert verify(tmp_path / "spending" / "ledger.jsonl").lines == 2 + ROUNDS


def test_the_ledger_holds_no_content_and_no_digest_that_others_can_compute(tmp_path):
    import hashlib

    names = [f"patient-{n}" for n in range(100)]
    data = rows(0, 100, names)
    spend_all(opened(tmp_path / "a", data=data, unit="patient"))
    spend_all(opened(tmp_path / "b", data=data, unit="patient"))
    whole = b"".join(p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file())
    guesses = [*names, *data["image_hash"]]
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in guesses]
    assert not [text for text in guesses if text.encode() in whole]
    assert not [digest for digest in digests if digest in whole]
    (one,), (other,) = ((tmp_path / s / "spending" / "rows").iterdir() for s in "ab")
    assert one.stat().st_size == 200 * 16
    assert not marks(one) & marks(other), "the marks of two sites cannot be compared"


def marks(path):
    content = path.read_bytes()
    return {content[at : at + 16] for at in range(0, len(content), 16)}


def test_a_ledger_that_cannot_be_written_stops_the_round(tmp_path, monkeypatch):
    from fedvlm.deploy import auditlog

    account = opened(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(auditlog, "_append", full)
    with pytest.raises(FedVLMError, match=r"ledger of differential privacy .* cannot be written"):
        account.spend(1, "d")


def test_a_message_for_the_server_has_two_digits_and_the_sites_log_has_all(tmp_path, caplog):
    with pytest.raises(Refused, match=r"would spend epsilon 4\.7 at delta"):
        opened(tmp_path, noise=0.8)
    exact = accountant.epsilon([Spend(0.2, 0.8, STEPS)], 1e-4)
    assert f"would spend epsilon {exact:.6g} at delta" in caplog.text


def test_a_process_that_is_killed_at_any_moment_leaves_every_reply_charged(warm, tmp_path):
    """20 times kill -9 at a random moment; see ``killed.py``."""
    script = Path(__file__).with_name("killed.py")
    ended = subprocess.run(
        [warm.python, script, tmp_path / "state", "20"],
        env=warm.env,
        capture_output=True,
        text=True,
    )
    found = json.loads(ended.stdout)
    assert len(found["rounds"]) == 20
    assert sum(found["arrived"].values()) >= 15, found
    short = {n: count for n, count in found["arrived"].items() if found["charged"][n] < count}
    assert not short, "a reply left that the ledger does not have"
    assert set(found["arrived"].values()) == {1}, "a round that is asked again has one reply"
