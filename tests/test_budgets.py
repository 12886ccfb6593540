"""A malicious server asks for rounds, sizes and paths that a site does not give."""

from __future__ import annotations

import re

import pytest
from safetensors.torch import load, save

from asking import RUN, At, after, ask, close, moved, plora, rows, sent_to, told  # noqa: F401
from fedvlm.config import load as read
from fedvlm.deploy import limits
from fedvlm.deploy.policy import Policy
from fedvlm.deploy.worker import hidden

# -- rounds and budgets


def test_no_round_beyond_the_run_is_trained_or_saved(rows, tmp_path):
    site = At(rows, tmp_path, rounds=2)
    _, refused = site.open("many")
    assert "4 rounds (train.rounds), and the limit is 2 (rounds)" in refused["message"]
    worker, _ = site.open(train={"rounds": 1})
    down = save(sent_to(worker))
    for number in (2, 12, 10**9, 10**30, 0, -5):
        refused, blob = ask(worker, down, do="train", round=number)
        assert refused["error"] == "refused", number
        assert not blob
    assert worker.site.store.rounds() == []
    assert "loss" in ask(worker, down, do="train", round=1)[0]
    for by in (1, 2, 3, 4):
        last, _ = ask(worker, save(moved(load(down), by / 100)), do="train", round=1)
    assert "round 1 was trained with 3 different downloads" in last["message"]
    assert worker.site.store.rounds() == [1]


def test_a_run_beyond_the_budgets_is_refused_before_anything_is_read(tmp_path):
    site = At(tmp_path / "no-such-rows.parquet", tmp_path)
    _, refused = site.open(
        train={"rounds": 2000, "local_steps": 1000, "batch_size": 500},
        eval={"batch_size": 10**6, "max_new_tokens": 9999, "max_rows": 1, "every": 1},
        lora={"rank": 1000},
    )
    assert refused["error"] == "refused"
    for said in (
        "2000 rounds (train.rounds), and the limit is 1000 (rounds)",
        "2000000 optimizer steps (train.rounds x train.local_steps, and finish_steps), and the "
        "limit is 100000 (steps)",
        "500 rows in a batch (train.batch_size), and the limit is 256 (batch)",
        "1000000 rows in a batch (eval.batch_size), and the limit is 256 (batch)",
        "1000 ranks (lora.rank and lora.spare), and the limit is 256 (rank)",
        "9999 new tokens (eval.max_new_tokens), and the limit is 512 (new_tokens)",
        "6002 scorings (train.rounds and eval.every), and the limit is 100 (scores)",
        "1 scored rows (eval.max_rows), and the minimum is 10 (scored_rows)",
    ):
        assert said in refused["message"], said
    assert not site.runs.exists()


def test_a_round_on_one_row_is_refused(tmp_path):
    site = At(tmp_path / "no-such-rows.parquet", tmp_path)
    _, refused = site.open(train={"batch_size": 1, "local_steps": 1})
    assert "1 training rows in a round (train.batch_size x train.local_steps), and" in str(refused)


def test_epochs_count_as_steps(rows, tmp_path):
    epochs = {"local_steps": None, "local_epochs": 100, "rounds": 100}
    _, refused = At(rows, tmp_path).open(train=epochs)
    assert "it asks for more than 100000 optimizer steps (steps)" in refused["message"]


def test_a_site_keeps_so_many_runs_and_so_many_bytes_of_a_run(after, rows, tmp_path):
    site, down = after
    At(rows, tmp_path, runs=1, disk=100_000)
    _, refused = site.open("second")
    assert "the site keeps 1 runs, and the limit is 1 (runs)" in refused["message"]
    assert [path.name for path in site.runs.iterdir()] == ["r"]
    worker, opened = site.open()
    assert "error" not in opened, "a run that is there may continue"
    refused, _ = ask(worker, save(down), do="train", round=3)
    assert "and the limit is 100000 (disk)" in refused["message"]
    assert worker.site.store.rounds() == [1, 2]


@pytest.mark.parametrize(("every", "rounds", "most"), [(0, 4, 6), (1, 4, 14), (3, 7, 14)])
def test_an_honest_run_asks_for_no_more_scorings_than_announced(every, rounds, most):
    train = {"rounds": rounds, "average": "none"}
    assert limits.scorings(read({"eval": {"every": every}, "train": train})) == most


# -- paths


def test_no_message_of_a_site_holds_one_of_its_paths(after, rows, tmp_path):
    site, down = after
    path = site.runs / "r" / "rounds" / "00002" / "mine.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    worker, _ = site.open()
    said = [ask(worker, save(down), do="train", round=3)[0]]
    assert "personal state of round 2 in '(a path of this site)' is damaged" in said[0]["message"]
    bad = tmp_path / "bad model"
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    for policy in ({"models": {"tiny": str(bad)}}, {"models": {"tiny": str(bad / "none")}}):
        said.append(At(rows, tmp_path, **policy).open("new")[1])
    (tmp_path / "policy.yml").write_text("roundz: 3")
    said.append(site.open("new")[1])
    At(rows.parent / "gone.parquet", tmp_path)
    site.own["data"] = str(rows.parent / "gone.parquet")
    said.append(site.open("new")[1])
    for one in said:
        assert one["error"] == "failed"
        assert str(tmp_path) not in one["message"]
        assert str(rows.parent) not in one["message"]


def test_names_of_tensors_and_settings_are_no_paths():
    for text in ("train.lr / 2", "org/model", "ending.average/a.lora_A", "answers and/or rows"):
        assert hidden(text) == text
    for text in ("/etc/x", "'/a b/c'", "~/x", "~me/x", "C:\\rows\\a", '"/srv"', "in:/srv/x"):
        assert "(a path of this site)" in hidden(text), text
    assert hidden("see rows/a.parquet", ["rows/a.parquet"]) == "see (a path of this site)"


# -- one step, one row


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"train": {"batch_size": 1, "local_steps": 20}}, "1 rows in a step .*batch_rows"),
        ({"train": {"weight_decay": 1e3, "lr": 1e-3}}, "a step would undo the steps before it"),
        ({"train": {"lr": 1e4}}, "a learning rate of 10000"),
        ({"train": {"lr_b": 50.0}}, "a learning rate of 50"),
        ({"train": {"finish_steps": 1}}, "4 training rows at the end"),
        ({"algorithm": {"name": "fedprox", "prox_mu": 1e4}}, "a step would undo"),
        ({"algorithm": {"name": "ditto", "prox_mu": 1e4}}, "a step would undo"),
        ({"lora": {"alpha": 1e6}}, "lora.alpha"),
        ({"objective": {"name": "dpo", "beta": 1e6}}, "objective.beta"),
    ],
)
def test_settings_with_which_one_step_decides_an_upload_are_refused(settings, why):
    wrong = limits.exceeded(Policy(), read(told(**settings)))
    assert [text for text in wrong if re.search(why, text)], wrong
    assert not limits.exceeded(Policy(), read(told()))


def test_the_number_of_rows_stays_secret_where_steps_would_tell_it():
    epochs = read(told(train={"local_epochs": 1, "local_steps": None}))
    assert any("tell_rows" in text for text in limits.exceeded(Policy(tell_rows=False), epochs))
    assert not limits.exceeded(Policy(), epochs)
    for count in (10, 20, 40, 60):
        sent = limits.told(Policy(tell_rows=False), {"length": 1 / count, "examples": count})
        assert sent["length"] in (0.0, 0.1)
        assert "examples" not in sent


def test_a_scale_of_the_server_lifts_nothing_above_the_rounding():
    near = [limits.told(Policy(), {"reward_margin": m})["reward_margin"] for m in (2.0e6, 2.0001e6)]
    assert near[0] == near[1]
    assert limits.told(Policy(), {"loss": 2.349})["loss"] == 2.35


def test_the_rows_of_a_vote_are_the_same_in_every_run(rows, tmp_path):
    """They are a multiple of the minimum, whichever split is scored."""
    found = set()
    for split in ("val", "test"):
        site = At(rows, tmp_path / split, scored_rows=3)
        worker, about = site.open(eval={"split": split, "max_rows": 3})
        assert "error" not in about
        found.add(len(next(iter(worker.site.engine.partition.splits.values())).val) % 3)
        close(worker)
    assert found == {0}


def test_a_run_that_never_began_leaves_no_folder(rows, tmp_path):
    site = At(rows, tmp_path, train_rows=1000, batch_rows=1)
    worker, about = site.open(train={"batch_size": 250, "local_steps": 4})
    assert about["error"] == "refused"
    assert not (site.runs / "r").exists()
    close(worker)
