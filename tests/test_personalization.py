"""The personalization benchmark: its plan, its measurements of a run, and resuming it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import personalization
from _personalization import cells, record, runs
from _personalization import plan as plans
from _personalization.cells import Cell
from _personalization.runs import Job
from fedvlm.config import dump
from fedvlm.errors import FedVLMError
from fedvlm.rounds import comparison
from fedvlm.store import files, marks, sealed
from fedvlm.store import run as store

MIXED = Cell("mixed", 1.0, 24)


# The plan


def test_the_benchmark_has_the_cells_and_algorithms_that_it_promises():
    found = cells.full()
    assert len({cell.name for cell in found}) == len(found)
    for regime in ("label", "covariate", "concept", "quantity", "mixed"):
        assert {c.strength for c in found if c.regime == regime} == {0.5, 1.0}
        assert {c.rows for c in found if c.regime == regime} == {24, 80, 240}
    assert {"iid", "photos", "partial", "joined-mixed"} <= {c.regime for c in found}
    assert {"local", "lora", "plora", "scaffold", "centralized"} <= set(cells.ALGORITHMS)


@pytest.mark.parametrize("cell", cells.full(), ids=lambda c: c.name)
def test_every_cell_gives_settings_that_a_run_takes(cell, tmp_path):
    config = cells.run_config(cell, "scaffold", 0.1, 3, tmp_path, {})
    assert config.train.optimizer == "sgd"
    assert config.train.lr == 0.1
    test = cells.FEW_TEST if cell.regime == "partial" else cells.TEST
    total = cell.rows + cells.VALIDATION + test
    assert round(config.data.test_fraction * total) == test
    assert round(config.data.val_fraction * total) == cells.VALIDATION
    assert Job(cell, "scaffold", 0.1, 3, tmp_path, {}).steps >= 240


def test_rates_are_tuned_with_the_same_budget_on_validation_rows(tmp_path):
    form = plans.small()
    jobs = list(plans.tuning(form, tmp_path))
    assert len(jobs) == 2 * 3 * len(form.algorithms), "two kinds of regime, three rates, one seed"
    assert all(job.config.eval.split == "val" and job.config.eval.every == 0 for job in jobs)
    assert len({job.folder for job in jobs}) == len(jobs)
    assert {job.seed for job in jobs} == {0}


def test_the_small_form_is_a_part_of_the_whole(tmp_path):
    rates = {("alike", a): 0.003 for a in cells.ALGORITHMS}
    rates |= {("differ", a): 0.01 for a in cells.ALGORITHMS}
    rates |= {("photos", a): 0.01 for a in cells.ALGORITHMS}
    every = {job.folder: job for job in plans.runs(plans.whole(), rates, tmp_path)}
    for form, count in ((plans.small(), 2 * 4 * 2), (plans.main(), 8 * 6 * 5)):
        some = {job.folder: job.config for job in plans.runs(form, rates, tmp_path)}
        assert len(some) == count
        assert all(every[folder].config == config for folder, config in some.items())


def test_time_is_estimated_from_runs_of_the_same_cell_else_from_all(tmp_path):
    def job(cell: Cell) -> Job:
        return Job(cell, "lora", 0.01, 0, tmp_path, {})

    known, other = job(Cell("iid", 0.0, 80)), job(Cell("partial", 1.0, 24))
    assert plans.seconds([known, known], [(known, 30.0)]) == 60.0
    expected = 30.0 * other.steps / known.steps
    assert plans.seconds([other], [(known, 30.0)]) == pytest.approx(expected)
    assert plans.seconds([known], []) == plans.SECONDS_A_STEP * known.steps


def test_the_estimate_counts_a_run_that_has_to_be_trained_for_clients_to_join_it(tmp_path):
    base = Job(Cell("mixed", 1.0, 80), "lora", 0.01, 0, tmp_path / "run", {})
    joins = dataclasses.replace(base, cell=Cell("joined-mixed", 1.0, 80))
    alone = personalization._time([joins], [(base, 120.0)], 1)
    assert alone == "about 2 minutes with 1 at a time, and 1 times clients that join"
    assert personalization._time([base, joins], [(base, 120.0)], 1) == alone, "counted once"
    files.write_text(base.folder / store.CONFIG, dump(base.config))
    assert personalization._time([joins], [], 1).startswith("about 0 minutes")


# Fake runs: they write the files of a run, and cost nothing.


@pytest.fixture
def fake(monkeypatch):
    """Makes runs end at once, with scores that rise with the learning rate. Lists their names."""
    ran: list[str] = []

    def run_one(name, config, tell):
        ran.append(name)
        folder = Path(config.output)
        store.check_fresh(folder)
        files.write_text(folder / store.CONFIG, dump(config))
        good = 0.2 + 10 * config.train.lr
        clients = {"a": scored(good), "b": scored(0.1)}
        models = dict.fromkeys(MODELS, clients)
        for round_ in (0, 2, 4):
            files.append_line(
                folder / "metrics.jsonl", {"round": round_, "evaluation": models, "bytes_up": {}}
            )
        share = {"mean": good, "worst10": 0.1}
        summary = {"exact_match": share, "token_f1": share, "loss": {"mean": 1.0}}
        table = {
            "metric": "exact_match",
            "models": {
                key: {"summary": summary, "clients": clients} for key in ("untuned", *MODELS)
            },
            "bytes": {"bytes_up": {"total": 1234}},
            "steps": 240,
            "passes": 960,
        }
        (folder / "personal").mkdir()
        sealed.write(folder / store.CHECKPOINT, {"round": 4, "files": {}})
        digests = {store.CHECKPOINT: marks.mark(folder)}
        sealed.write(folder / store.DONE, table | {"files": digests})

    monkeypatch.setattr(comparison, "run_one", run_one)
    return ran


MODELS = tuple(runs.MODELS)


def scored(value: float) -> dict[str, float]:
    return {"exact_match": value, "token_f1": value, "examples": 24}


def small_form(**changes) -> plans.Form:
    return plans.Form((MIXED,), ("lora", "plora"), (0, 1), **changes)


def everything(form: plans.Form, output: Path) -> list[Job]:
    runs.do(plans.tuning(form, output), 1)
    jobs = list(plans.runs(form, plans.chosen(form, output), output))
    assert runs.do(jobs, 1) == []
    return jobs


def test_what_is_measured_is_not_run_again(fake, tmp_path):
    form = small_form()
    jobs = everything(form, tmp_path)
    assert len(fake) == 2 * 3 + 2 * 2
    assert not (jobs[0].folder / "personal").exists(), "files without further use are removed"
    rows = plans.rows(jobs)
    assert len(rows) == 2 * 2 * 5
    everything(form, tmp_path)
    assert len(fake) == 10
    wider = plans.Form((MIXED,), ("lora", "plora", "local"), (0, 1))
    everything(wider, tmp_path)
    assert len(fake) == 10 + 3 + 2, "a new algorithm adds only its own runs"


def test_a_run_that_was_killed_before_it_was_measured_is_measured_and_not_run_again(fake, tmp_path):
    jobs = everything(small_form(), tmp_path)
    rows = plans.rows(jobs)
    jobs[0].record.unlink()
    assert len(plans.rows(jobs)) == len(rows) - 5
    runs.do(jobs, 1)
    assert len(fake) == 10
    again = plans.rows(jobs)
    assert {row["seconds"] for row in again[10:15]} == {None}, "its time is not known"
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]


def test_a_run_that_fails_is_named_and_tried_again(fake, tmp_path, monkeypatch):
    works = comparison.run_one

    def breaks(name, config, tell):
        if config.algorithm.name == "plora":
            raise FedVLMError("no luck")
        works(name, config, tell)

    jobs = list(plans.runs(small_form(rate=0.01), {("differ", "lora"): 0.01}, tmp_path))
    jobs += list(plans.runs(small_form(), {("differ", "plora"): 0.01}, tmp_path))
    monkeypatch.setattr(comparison, "run_one", breaks)
    failed = runs.do(jobs, 1)
    assert [line.split(" seed")[0] for line in failed] == ["mixed-1-24 plora 0.01"] * 2
    assert "no luck" in (jobs[-1].folder / runs.FAILED).read_text()
    assert len(fake) == 2, "the other runs are done"
    monkeypatch.setattr(comparison, "run_one", works)
    assert runs.do(jobs, 1) == []
    assert not (jobs[-1].folder / runs.FAILED).exists()


def test_results_of_other_settings_are_refused(fake, tmp_path):
    everything(small_form(), tmp_path)
    with pytest.raises(FedVLMError, match="measured with other settings"):
        everything(small_form(extra={"train": {"rounds": 3}}), tmp_path)


def test_the_rate_of_the_best_validation_score_is_taken(fake, tmp_path):
    everything(small_form(), tmp_path)
    assert plans.chosen(small_form(), tmp_path) == {
        ("differ", "lora"): 0.01,
        ("differ", "plora"): 0.01,
    }


def test_published_results_are_extended_and_not_run_again(fake, tmp_path):
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "all.jsonl"
    form = small_form()
    rows = plans.rows(everything(form, here))
    record.keep_rates(here, plans.chosen(form, here))
    record.pack(here, file)
    ran = len(fake)
    assert record.unpack(file, there) == 4
    assert plans.rows(everything(form, there)) == rows
    assert len(fake) == ran, "nothing is run again, not even for learning rates"
    everything(plans.Form((MIXED,), ("lora", "plora", "local"), (0,)), there)
    assert len(fake) == ran + 3 + 1
    record.pack(there, file)
    assert len(file.read_text().splitlines()) == 1 + 4 + 1
    assert record.unpack(file, there) == 0
    again = plans.rows(everything(form, there))
    assert [r["scores"] for r in again] == [r["scores"] for r in rows], "clients survive"
    assert {a for _, a in record.read_rates(there)} == {"lora", "plora"}, "published rates are kept"
    file = there / record.RATES
    written = file.stat().st_ino
    record.keep_rates(there, record.read_rates(there))
    assert file.stat().st_ino == written, "without news, the file is not rewritten"


def test_published_runs_without_scores_of_clients_are_refused(tmp_path):
    file = tmp_path / "old.jsonl"
    files.write_text(file, json.dumps({"path": "runs/a/b/measured.json", "rows": []}) + "\n")
    with pytest.raises(FedVLMError, match="leave out --add"):
        record.unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_clients_join_a_run_of_which_only_the_numbers_are_left(fake, tmp_path, monkeypatch):
    (job,) = everything(plans.Form((MIXED,), ("lora",), (0,)), tmp_path / "here")
    record.pack(tmp_path / "here", tmp_path / "all.jsonl")
    record.unpack(tmp_path / "all.jsonl", tmp_path / "there")
    folder = tmp_path / "there" / job.folder.relative_to(tmp_path / "here")
    assert not store.is_run(folder)
    monkeypatch.setattr(runs, "_new_sites", lambda config: {})
    ran = len(fake)
    runs.join("x", job.config.model_copy(update={"output": str(folder)}), lambda event: None)
    assert len(fake) == ran + 1
    assert store.is_run(folder)


def test_the_raw_results_have_exactly_the_promised_columns(fake, tmp_path):
    rows = plans.rows(everything(small_form(), tmp_path))
    lines = personalization.as_csv(rows).splitlines()
    assert lines[0] == (
        "regime,strength,rows_per_client,algorithm,seed,model,when,mean,worst10,steps,passes,"
        "bytes_up,rounds_to_90,seconds,clients,rows"
    )
    assert lines[1].startswith("mixed,1,24,plora,0,untuned,start,0.3,0.1,240,960,1234,,")
    assert lines[1].endswith(",2,48")
    assert len(lines) == 1 + len(rows)


def test_a_part_of_the_benchmark_says_that_it_is_one(fake, tmp_path):
    form = small_form()
    everything(form, tmp_path)
    done, todo = personalization.split(form, tmp_path)
    assert "All that there is: 4 of 4" in personalization.stated(done, todo)
    done, todo = personalization.split(plans.whole(), tmp_path)
    joining = [c for c in cells.full() if c.regime.startswith(cells.JOINED)]
    federated = len(cells.ALGORITHMS) - len(cells.REFERENCES)
    joined = len(joining) * federated * cells.SEEDS
    assert (len(done), len(done) + len(todo)) == (
        4 + 6,
        sum(plans.number_of_runs(plans.whole())) + joined,
    )
    state, total = personalization.stated(done, todo), len([j for j in todo if not j.tunes]) + 4
    assert "A part of all that there is" in state
    assert f"4 of {total} results, 6 runs for learning rates" in state
    assert "Cells: mixed-1-24. Algorithms: plora, lora. Seeds: 0, 1." in state


def test_the_page_keeps_what_people_wrote():
    first, last = personalization.MARKS
    page = f"# Head\n\n{first}\nold\n{last}\n\ntail\n"
    assert personalization.placed(page, "new") == f"# Head\n\n{first}\n\nnew\n\n{last}\n\ntail\n"
    with pytest.raises(FedVLMError, match="restore them"):
        personalization.placed("# Head\n", "new")


def test_unknown_names_are_refused_and_known_ones_chosen(capsys):
    def form(*words: str) -> plans.Form:
        return personalization.filtered(plans.whole(), personalization._parser().parse_args(words))

    with pytest.raises(FedVLMError, match=r"--cells: unknown nowhere; there are iid-0-24"):
        form("--cells", "nowhere,iid")
    with pytest.raises(FedVLMError, match=r"--algorithms: unknown share"):
        form("--algorithms", "share")
    found = form("--cells", "iid,mixed-0.5-80", "--seeds", "1,4", "--algorithms", "lora")
    assert [c.name for c in found.cells] == ["iid-0-24", "iid-0-80", "iid-0-240", "mixed-0.5-80"]
    assert (found.seeds, found.algorithms) == ((1, 4), ("lora",))


# Real runs


def test_real_runs_are_measured_drawn_and_joined(tmp_path):
    joined = Cell("joined-mixed", 1.0, 24)
    form = plans.Form((MIXED, joined), ("plora",), (0,), plans.quick().extra, rate=0.01)
    jobs = everything(form, tmp_path)
    rows = plans.rows(jobs)
    found = {(r["regime"], r["model"], r["when"]): r for r in rows}
    assert len(found) == 5 + 3
    assert found["mixed", "personal", "after"]["bytes_up"] > 0
    assert found["joined-mixed", "personal", "after"]["bytes_up"] == 0
    assert all(0 <= r["worst10"] <= r["mean"] <= 1 for r in rows)
    assert not list(jobs[0].folder.glob("adapters/client-*"))
    for path in personalization.figures.draw(rows, tmp_path, "two cells"):
        assert path.stat().st_size > 10_000
    assert runs.do(jobs, 1) == []


def test_todays_settings_are_those_of_the_published_runs(tmp_path):
    record.unpack(personalization.RESULTS / record.NAME, tmp_path)
    form = dataclasses.replace(plans.main(), seeds=(0,))
    rates = record.read_rates(tmp_path)
    jobs = plans.runs(form, rates, tmp_path)
    here = [job for job in jobs if job.cell.regime != "photos"]  # their path differs by machine
    found = [runs.read(job) for job in here if job.record.exists()]
    assert len(found) >= 6, "the last one would be refused, had a new setting changed its digest"
