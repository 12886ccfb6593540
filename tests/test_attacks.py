"""A malicious server asks a site for what it must not get. Each attack has an honest variant."""

from __future__ import annotations

import math
import shutil
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load, save

import fedvlm
from asking import RUN, At, after, ask, close, moved, plora, rows, sent_to, told  # noqa: F401
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.dry import bare, rehearse
from fedvlm.algorithms.table import TABLE, of_run
from fedvlm.config import load as read
from fedvlm.deploy import limits
from fedvlm.deploy.policy import Policy
from fedvlm.deploy.sitestore import SiteStore
from fedvlm.store import sealed

# -- the personal factors


def test_a_run_cannot_be_opened_again_as_another_algorithm(after):
    site, _ = after
    for other in (
        {"algorithm": {"name": "fedsa"}, "train": {"lr": 1e-30}},
        {"train": {"lr": 1e-30}},
        {"seed": 1},
        {"eval": {"split": "val"}},
    ):
        worker, refused = site.open(**other)
        assert refused["error"] == "refused"
        assert "run 'r' began at this site with other settings" in refused["message"]
        assert worker.site is None


def test_a_run_is_opened_again_with_its_own_settings_wherever_the_server_keeps_it(after):
    site, down = after
    worker, opened = site.open(output="moved/there", data={"path": "moved/rows.parquet"})
    assert "error" not in opened
    assert "loss" in ask(worker, save(down), do="train", round=3)[0]
    again, _ = ask(worker, do="open", fedvlm=fedvlm.__version__, run="r", config=told())
    assert again == opened, "a server that has lost the answer asks the same worker"
    refused, _ = ask(
        worker,
        do="open",
        fedvlm=fedvlm.__version__,
        run="r",
        config=told(algorithm={"name": "fedsa"}),
    )
    assert "other settings" in refused["message"]


def test_what_was_ever_personal_is_not_uploaded_by_another_algorithm_either(after):
    site, _ = after
    mine = SiteStore(site.runs / "r").version(2).trees["mine"]
    assert mine.keys() == SiteStore(site.runs / "r").personal_names()
    evil = {"algorithm": {"name": "fedsa"}, "train": {"lr": 1e-30}}
    about = {"run": "r", "config": limits.digest_of(read(told(**evil)))}
    sealed.write(site.runs / "r" / "run.json", about)  # as if the first defence had failed
    worker, opened = site.open(**evil)
    assert "error" not in opened
    refused, blob = ask(worker, save(sent_to(worker)), do="train", round=3)
    assert refused["error"] == "refused"
    assert "are personal in this run; they never leave the site" in refused["message"]
    assert not blob
    assert worker.site.store.rounds() == [1, 2]


def test_a_folder_with_the_state_of_another_run_is_refused(after):
    site, _ = after
    shutil.copytree(site.runs / "r", site.runs / "copied")
    (site.runs / "linked").symlink_to(site.runs / "r")
    shutil.copytree(site.runs / "r", site.runs / "bare")
    (site.runs / "bare" / "run.json").unlink()
    for run, said in (
        ("copied", "holds the state of another run"),
        ("linked", "is a link to another folder"),
        ("bare", "but not the settings that made it"),
    ):
        _, refused = site.open(run)
        assert said in refused["message"], run
        assert (site.runs / run / "rounds").exists(), "a refusal removes no state"


def test_the_names_of_personal_tensors_cannot_get_lost(after):
    site, _ = after
    (site.runs / "r" / "personal.json").unlink()
    with pytest.raises(fedvlm.FedVLMError, match=r"personal.json' is missing"):
        SiteStore(site.runs / "r").personal_names()


@pytest.mark.parametrize("name", [n for n, entry in TABLE.items() if not entry.pools])
def test_the_uploads_of_every_algorithm_hold_nothing_that_it_kept_to_itself(name):
    more = {"scaffold": ("train.optimizer=sgd",), "share": ("algorithm.share={part:vision: B}",)}
    ends = "train.average=mean", "train.finish_steps=2"
    config = read(None, f"algorithm.name={name}", *ends, *more.get(name, ()))
    algorithm, shapes = of_run(config), {"lora_A.weight": (8, 6), "lora_B.weight": (4, 8)}
    modules = ("vision_model.a", "text_model.b")
    initial = {
        f"base_model.model.{m}.{n}": torch.ones(s) for m in modules for n, s in shapes.items()
    }
    if TABLE[name].spare:
        initial = {
            n: torch.ones([40 if d == 8 else d for d in t.shape]) for n, t in initial.items()
        }
    personal, state = set(), algorithm.init(bare(initial))
    for number in range(1, 7):
        visit = Visit("site-0", 20.0, round=number, final=number == 6)
        sent = rehearse(algorithm, bare(initial), visit, algorithm.send(state, visit), 5).sent
        assert not sent.up.keys() & personal
        personal |= sent.keep.keys() - sent.up.keys()


# -- the rows


def test_a_server_chooses_neither_columns_nor_rows(after, plora, rows):
    site, _ = after
    own = (plora[0].runs / "r" / "data.json").read_text()
    evil = {
        "columns": {"answer": "patient", "question": "patient"},
        "max_rows": 2,
        "val_fraction": 0.0,
        "test_fraction": 0.5,
        "split_seed": 7,
        "max_pixels": 1,
        "formats": ["PNG"],
        "on_error": "skip",
        "max_length": 5,
    }
    evil = {"data": evil, "seed": 5, "eval": {"group_by": "patient"}, "model": {"device": "cuda"}}
    worker, opened = site.open("other", **evil)
    assert opened["rows"] == {"train": 42, "val": 0, "test": 10}, (
        "64 rows, those of the site's share"
    )
    assert (site.runs / "other" / "data.json").read_text() == own, "the same columns, all rows"
    used = worker.site.config
    assert used.data == read({"data": {"path": str(rows), "split_seed": 0}}).data
    assert used.eval.group_by == read().eval.group_by
    first = worker.site.engine.partition.splits["site-0"]
    close(worker)
    worker, _ = site.open()
    again = worker.site.engine.partition.splits["site-0"]
    assert first == again, "another seed of the run holds out the same rows"


def test_a_site_sets_its_own_columns_and_scored_rows(rows, tmp_path):
    own = {"data.columns.answer": "patient", "eval.max_rows": 5, "data.test_fraction": 0.5}
    site = At(rows, tmp_path, scored_rows=5, set=own)
    worker, opened = site.open(eval={"max_rows": 1})
    assert opened["rows"]["test"] == 5
    assert worker.site.engine.collator.rows[0]["answer"].startswith("Alma Turing")


def test_a_site_with_few_rows_takes_no_part_and_gives_no_number(rows, tmp_path):
    site = At(rows, tmp_path, train_rows=43, scored_rows=17)
    _, refused = site.open(train={"batch_size": 9}, eval={"max_rows": None})
    assert refused["error"] == "refused"
    assert "fewer than 43 rows to train on (train_rows)" in refused["message"]
    assert "fewer than 17 rows in 'test' to score (scored_rows)" in refused["message"]
    assert "42" not in refused["message"]
    assert "16" not in refused["message"]
    assert not list(site.runs.glob("r/rounds/*"))


# -- scores


@pytest.fixture(scope="module")
def scored(rows, tmp_path_factory):
    """A site that keeps its number of rows to itself and answers six scorings."""
    site = At(rows, tmp_path_factory.mktemp("scored"), tell_rows=False, scores=6)
    worker, opened = site.open()
    assert opened.keys() == {"adapter"}
    return site, worker


def test_each_model_of_a_round_is_scored_once_and_a_run_has_a_budget(scored):
    site, worker = scored
    down = sent_to(worker)
    first, _ = ask(worker, save(down), do="score", kind="global", round=0)
    assert ask(worker, save(down), do="score", kind="global", round=0)[0] == first
    answers = [
        ask(worker, save(moved(down, 0.01 * k)), do="score", kind=kind, round=number)[0]
        for kind in ("global", "personal")
        for number in range(5)
        for k in (1, 2)
    ]
    found = [a["scores"] for a in answers if "scores" in a]
    why = {a["message"] for a in answers if "error" in a}
    assert len(found) == 5, "one was answered before"
    assert "the global model of round 0 was scored with another download" in str(why)
    assert "the limit is 6 (scores): evaluate less often (eval.every)" in str(why)
    close(worker)
    again, _ = site.open()
    assert ask(again, save(down), do="score", kind="global", round=0)[0] == first
    refused, _ = ask(again, save(down), do="score", kind="personal", round=3)
    assert "the limit is 6" in refused["message"], "another process has the same ledger"
    close(again)


def test_scores_reveal_no_number_of_rows(scored):
    site, _ = scored
    ledger = sealed.read(site.runs / "r" / "asked.json")
    found = [answer["scores"] for answer in ledger["answers"].values() if answer["scores"]]
    assert found
    assert not any("examples" in scores for scores in found)
    for scores in found:
        for name in ("exact_match", "token_f1", "rouge_l", "bleu"):
            assert 10 % Fraction(scores[name]).limit_denominator(2000).denominator == 0
        assert math.isclose(scores["loss"] * 100, round(scores["loss"] * 100))


@pytest.mark.parametrize("rows_", range(10, 200, 10))
def test_a_share_of_any_number_of_rows_is_told_as_one_of_the_fewest(rows_):
    policy = Policy(tell_rows=False)
    told_ = {
        limits.told(policy, {"exact_match": k / rows_})["exact_match"] for k in range(rows_ + 1)
    }
    assert told_ == {k / 10 for k in range(11)}, "so that all numbers of rows give the same scores"
    open_ = limits.told(Policy(), {"exact_match": 1 / 3, "examples": 12, "loss": 2.3456})
    assert open_ == {"exact_match": 0.33, "examples": 12, "loss": 2.35}


def test_no_two_runs_differ_by_a_few_scored_rows():
    import numpy as np

    from fedvlm.data.partition import Split

    split = Split(np.arange(40), np.arange(40, 47), np.arange(50, 93))
    chosen = {}
    for most in (10, 11, 19, 20, 42, 43, 44, None):
        config = read({"eval": {"max_rows": most}})
        kept = limits.admitted(Policy(), config, split)
        chosen[most] = kept.test.tolist()
        assert kept.test.tolist() == split.test[: len(kept.test)].tolist()
        assert not len(kept.val), "seven rows vote on nothing"
    assert [len(rows) for rows in chosen.values()] == [10, 10, 10, 20, 40, 40, 40, 40]


def test_the_scores_that_an_algorithm_uploads_are_rounded_too(after):
    site, _ = after
    site.own["policy"] = None
    worker, _ = site.open("auto", algorithm={"name": "auto"}, train={"rounds": 2})
    engine = worker.site.engine
    split = engine.partition.splits["site-0"]
    engine.partition.splits["site-0"] = type(split)(split.train, split.test, split.test)
    down = sent_to(worker)
    assert "loss" in ask(worker, save(down), do="train", round=1)[0]
    about, up = ask(worker, save(down), do="train", round=2)
    votes = [float(t) for n, t in load(up).items() if n.startswith("doubts/")]
    assert len(votes) == 4
    assert 0 < votes[0] <= 1
    assert all(abs(100 * vote - round(100 * vote)) < 1e-4 for vote in votes)
    assert about["loss"] == round(about["loss"], 2)
