"""``fedvlm site check``: what a run would find at a site, without a connection."""

import shutil
import socket

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import fedvlm
from fedvlm.cli.app import app
from fedvlm.deploy.nvflare import processes
from fedvlm.deploy.sitecheck import check
from fedvlm.errors import FedVLMError
from fedvlm.models.load import BUNDLED
from fedvlm.models.pin import pin


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The rows of a site, 60 of them."""
    path = tmp_path_factory.mktemp("check") / "rows.parquet"
    fedvlm.scenes(sites=1, rows=60).to_pandas().to_parquet(path, index=False)
    return path


@pytest.fixture
def broken(good, tmp_path):
    """The same rows, two of which cannot be used."""
    table = pd.read_parquet(good)
    table.at[7, "image"] = {"bytes": b"no picture", "path": None}
    table.at[31, "chosen"] = " "
    table.to_parquet(tmp_path / "broken.parquet", index=False)
    return tmp_path / "broken.parquet"


@pytest.fixture(autouse=True)
def no_connection(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a connection is opened: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def policy(tmp_path, **settings):
    path = tmp_path / "policy.yml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_a_check_says_what_a_run_would_find(good, tmp_path):
    report = check(
        str(good), policy(tmp_path, approval=True), state=str(tmp_path / "new" / "state")
    )
    text = "\n".join(report.found)
    assert not report.problems
    assert "columns: picture 'image', question 'question', answer 'chosen'; others: " in text
    assert "rows: 60, of which train 39, val 6, test 15" in text
    table = pd.read_parquet(good)
    often = table["chosen"].value_counts()
    assert f"answers: {len(often)} different; most frequent: '{often.index[0]}' 12 %" in text
    assert "model 'tiny': the bundled model" in text
    assert " GB free" in text
    assert not (tmp_path / "new").exists(), "nothing is written"


def test_a_check_uses_the_sites_own_columns_and_splits(good, tmp_path):
    own = {"data.columns.answer": "site", "data.test_fraction": 0.5}
    text = "\n".join(check(str(good), policy(tmp_path, set=own)).found)
    assert "answer 'site'" in text
    assert "test 30" in text
    assert "answers: 1 different; most frequent: 'site-0' 100 %" in text


def test_a_row_that_stops_a_run_is_named_with_its_reason(broken):
    (problem,) = check(str(broken), None).problems
    assert "a run would stop: left out 2 of 60 rows" in problem
    assert "row 7: " in problem
    assert "row 31: the answer is empty" in problem
    assert "data.on_error: skip" in problem


def test_rows_that_a_run_would_leave_out_are_named_and_no_problem(broken, tmp_path):
    report = check(str(broken), policy(tmp_path, set={"data.on_error": "skip"}))
    text = "\n".join(report.found)
    assert not report.problems
    assert "warning: left out 2 of 60 rows" in text
    assert "row 31: the answer is empty" in text
    assert "rows: 58, of which" in text


def test_all_problems_are_found_at_once(broken, tmp_path):
    wrong = policy(
        tmp_path,
        models={"a": {"path": str(tmp_path / "none"), "sha256": "0" * 64}, "b": "/nowhere"},
        set={"data.columns.answer": "diagnosis"},
    )
    problems = "\n".join(check(str(broken), wrong, model="c").problems)
    assert "model 'c' is not in the policy; it allows 'a', 'b'" in problems
    assert "no column 'diagnosis' for the answer" in problems
    both = "\n".join(check(str(broken), wrong).problems)
    assert "model 'a'" in both
    assert "model 'b': '/nowhere' is no folder" in both
    assert "no column 'diagnosis'" in both
    bad = policy(tmp_path, rounds=0, algorithms=["nope"], set={"train.lr": 1})
    problems = check(str(tmp_path / "gone.parquet"), bad).problems
    assert any("rounds" in p for p in problems)
    assert any("gone.parquet': there is no such file" in p for p in problems)


def test_a_models_digest_is_compared_with_the_policy(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED["tiny"], folder)
    right = pin(folder).digest
    models = {"m": {"path": str(folder), "sha256": right}}
    text = "\n".join(check(str(good), policy(tmp_path, models=models)).found)
    assert f"model 'm': SHA-256 {right}, as the policy wants" in text
    models = {"m": {"path": str(folder), "sha256": "0" * 64}}
    (problem,) = check(str(good), policy(tmp_path, models=models)).problems
    assert f"its SHA-256 is {right}, but the policy allows {'0' * 64}" in problem
    models = {"m": {"path": str(folder)}, "hub/model": {"path": "hub/model"}}
    report = check(str(good), policy(tmp_path, models=models))
    assert not report.problems
    assert "not pinned in the policy" in "\n".join(report.found)
    assert "'hub/model' on the hub; not looked at" in "\n".join(report.found)


def test_a_named_model_checks_every_row(good, tmp_path):
    table = pd.read_parquet(good)
    table.at[3, "question"] = "why " * 9000
    table.to_parquet(tmp_path / "long.parquet", index=False)
    (problem,) = check(str(tmp_path / "long.parquet"), None, model="tiny").problems
    assert "row 3: " in problem
    own = policy(tmp_path, set={"data.on_error": "skip"})
    text = "\n".join(check(str(tmp_path / "long.parquet"), own, model="tiny").found)
    assert "rows that 'tiny' can take: train " in text
    assert "left out 1 of 60 rows" in text


def test_the_command_prints_what_it_found_and_ends_with_all_problems(broken):
    done = CliRunner().invoke(app, ["site", "check", str(broken)])
    assert "columns: picture 'image'" in done.output
    assert isinstance(done.exception, FedVLMError), "the program exits with code 2 for these"
    assert "the check found a problem:\n  - a run would stop" in str(done.exception)


def test_a_site_starts_only_if_its_check_finds_no_problem(broken, tmp_path, monkeypatch):
    monkeypatch.setattr(processes.joining, "joined", lambda state: None)
    monkeypatch.setattr(processes.joining, "equip", lambda state, workspace: "north")
    monkeypatch.setattr(processes, "check_certificate", lambda path, how: "")
    monkeypatch.setattr(processes, "_keep", lambda *args, **options: pytest.fail("it started"))
    said = []
    with pytest.raises(FedVLMError, match=r"(?s)^the check found a problem:.*row 31: the answer"):
        processes.start_site(str(broken), tmp_path / "state", None, said.append)
    assert any(line.startswith("columns: ") for line in said)


def spent_by_a_run(good, state):
    """Lets a run charge two rounds on the rows of a site, and returns their epsilon."""
    import numpy as np

    from fedvlm.config import load
    from fedvlm.data.sources import load_rows
    from fedvlm.deploy.account import Account
    from fedvlm.deploy.policy import Policy
    from fedvlm.privacy.plan import planned

    asked = {"unit": "row", "epsilon": 2, "delta": 0.001, "noise": 2}
    settings = load({"data": {"path": str(good)}, "privacy": asked})
    account = Account(state, "run-1", planned(settings.privacy, 39, 4, 10), {1: 5, 2: 5}, Policy())
    account.open(settings.privacy, load_rows(settings.data, 0), np.arange(60))
    for round_ in (1, 2):
        account.spend(round_, "download")
    return account.plan.epsilon(10)


def test_a_check_says_what_is_left_of_the_rows_privacy(good, tmp_path):
    epsilon = spent_by_a_run(good, tmp_path / "state")
    limit = policy(tmp_path, epsilon_max=2, delta_max=0.001)
    text = "\n".join(check(str(good), limit, state=str(tmp_path / "state")).found)
    assert "differential privacy: at most epsilon 2 at delta 0.001 over all runs" in text
    assert "protected units to train on: 39 ('row')" in text
    left = f"epsilon {epsilon:.4g} at delta 0.001, and {2 - epsilon:.4g} is left"
    assert f"spent on these rows so far: {left}" in text
    clean = "\n".join(check(str(good), limit, state=str(tmp_path)).found)
    assert "spent on these rows so far: nothing" in clean
    assert not (tmp_path / "spending").exists(), "nothing is written"


def test_a_check_names_a_unit_that_is_no_column_and_a_delta_that_is_too_large(good, tmp_path):
    (problem,) = check(str(good), policy(tmp_path, dp_unit="patient")).problems
    assert problem == "dp_unit: the rows have no column 'patient'"
    found = check(str(good), policy(tmp_path, epsilon_max=1, delta_max=0.1)).found
    assert any("delta_max=0.1 is not below 1 / number of units: 0.003 or less" in t for t in found)


def test_budget_lists_the_sets_of_rows_and_erase_warns_of_its_loss(good, tmp_path):
    epsilon = spent_by_a_run(good, tmp_path / "state")
    words = ["--state", str(tmp_path / "state")]
    shown = CliRunner().invoke(app, ["site", "budget", *words]).output
    assert shown.splitlines() == [
        "differential privacy: not required",
        "rows of run run-1: unit 'row', 2 rounds",
        f"  epsilon {epsilon:.4g} at delta 0.001",
    ]
    asked = CliRunner().invoke(app, ["site", "erase", *words], input="n\n").output
    assert "this removes the ledger of differential privacy" in asked
    assert CliRunner().invoke(app, ["site", "budget", *words]).output == shown
    none = CliRunner().invoke(app, ["site", "budget", "--state", str(good.parent)]).output
    assert "no run under differential privacy has begun at this site" in none
