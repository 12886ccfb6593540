"""The HTML report: its sections, texts that are no syntax, its size, and incomplete folders."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import fedvlm
import hostile
from fedvlm.cli.app import _exit_code
from fedvlm.errors import FedVLMError
from fedvlm.report import charts, examples, privacy, write
from fedvlm.report.folder import Compared, read
from fedvlm.report.page import of
from fedvlm.report.thumbnails import address
from fedvlm.report.write import MOST, after, html, write_report
from fedvlm.rounds import federate
from fedvlm.rounds.comparison import compare
from fedvlm.rounds.results import Results
from pages import Parsed
from sites import Here, config, deployed
from stopping import Stop

VEGA = Path(write.ASSETS) / "vega"
SECTIONS = ["verdicts", "words", "scores", "rounds", "sites", "costs", "privacy", "rows"]
SECTIONS += ["settings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with hostile names, a comparison of the same rows, and the rows."""
    place = tmp_path_factory.mktemp("report")
    settings = hostile.settings(place)
    federate.run(settings)
    short = {**settings, "output": str(place / "compared")}
    compare(["local", "plora"], short, "train.rounds=1", "eval.every=0")
    return place


@pytest.fixture
def run(folder, tmp_path):
    """A copy of the run, to write to."""
    return Path(shutil.copytree(folder / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def page(folder):
    return Parsed(write_report(folder / "run"))


def test_a_report_has_all_sections_and_the_scores_of_the_table(folder, page):
    assert [s for s in page.ids if not s.endswith("-title")] == SECTIONS
    results = Results.read(folder / "run")
    for site, score in results.scores().items():
        low, high = results.table["models"]["personal"]["intervals"][site]["exact_match"]
        assert f"{100 * score:.1f} % ({100 * low:.0f}–{100 * high:.0f})" in page.text
    for word in ("What this run cannot tell", "95 % interval", "fedvlm run config.yaml output=NEW"):
        assert word in page.text, word
    assert "plora: of its adapter, a site sends B each round, and keeps A" in page.text


def test_names_and_questions_appear_as_they_are_written(folder, page):
    for text in (*hostile.SITES, hostile.QUESTION):
        assert text in page.text
    assert "u" not in page.tags
    assert "b" not in page.tags
    sites = {v["site"] for spec in page.json for v in spec["data"]["values"] if "site" in v}
    assert sites == set(hostile.SITES)
    fields = {f["field"] for spec in page.json for f in encodings(spec) if "field" in f}
    known = {"site", "value", "model", "low", "high", "round", "series", "label", "order"}
    assert fields <= known
    references = [a["reference"] for a in Results.read(folder / "run").answers()]
    assert all(r.startswith("<u>") for r in references)
    assert all(r in page.text for r in references)


def encodings(spec):
    for layer in spec.get("layer", [spec]):
        yield from layer["encoding"].values()


def test_a_report_loads_nothing_and_its_policy_allows_no_more(folder, page):
    assert not [a for a in page.addresses if not a.startswith(("#", "data:image/jpeg;base64,"))]
    text = (folder / "run" / "report.html").read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe-eval" not in policy
    assert "sourceMappingURL" not in text
    scripts = re.findall(r"<script>(.+?)</script>", text, re.DOTALL)
    assert len(scripts) == 4
    assert all(write._digest(script) in policy for script in scripts)


def test_the_files_of_vega_are_those_of_the_table():
    table = dict(
        re.findall(r"\| `([\w.-]+)` \|.*`([0-9a-f]{64})`", (VEGA / "README.md").read_text())
    )
    assert set(table) == set(write.SCRIPTS)
    for name, digest in table.items():
        assert hashlib.sha256((VEGA / name).read_bytes()).hexdigest() == digest
        assert "University of Washington" in (VEGA / f"LICENSE-{name[:-7]}").read_text()


def test_rows_have_pictures_and_mark_different_answers(folder, page):
    results = Results.read(folder / "run")
    told = [
        [a["prediction"] for a in results.answers(m)] for m in ("untuned", "global", "personal")
    ]
    differing = sum(len(set(texts)) > 1 for texts in zip(*told, strict=True))
    assert page.text.count("≠ Answers differ") == differing
    pictures = [a for a in page.addresses if a.startswith("data:")]
    assert len(pictures) == len(results.answers())


def test_rows_without_room_are_counted_and_sites_lose_evenly(folder):
    found = read(folder / "run")
    section = examples.of_run(found, room=3_000)
    shown = [len(part.rows) for part in section.parts if part.part == "examples"]
    assert len(set(shown)) == 1
    assert max(shown) < 3
    left = sum(3 - n for n in shown) + 3 * (3 - len(shown))
    assert any(f"{left} rows are left out" in getattr(part, "text", "") for part in section.parts)


def test_a_picture_is_shrunk():
    noise = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    assert len(address([Image.fromarray(noise)])) < 30_000


def test_a_report_of_a_thousand_sites_stays_small(folder):
    found = read(folder / "run")
    names = [f"site {k} " + "x" * 60 for k in range(1000)]
    many = {"clients": dict.fromkeys(names, found.models["personal"]["clients"][hostile.SITES[0]])}
    one = found.models["personal"]["intervals"][hostile.SITES[0]]
    models = {
        m: {**own, **many, "intervals": dict.fromkeys(names, one)}
        for m, own in found.models.items()
    }
    answers = {
        m: [{**a, "client": n} for n in names for a in own[:3]] for m, own in found.answers.items()
    }
    text = html(of(replace(found, models=models, answers=answers), write.ROOM))
    assert len(text.encode()) < MOST
    assert "And 800 more in table.csv" in text
    assert "and 960 are left out" in text


def test_short_names_of_a_chart_stay_distinct():
    names = ["x" * 80 + end for end in "abc"]
    short = charts.labels(names)[names[0]]
    names += [f"{short} (2)", f"{short} (4)"]
    assert len(set(charts.labels(names).values())) == 5
    assert len(charts.labels([str(k) for k in range(99)], series=30)) == 6


# Folders that lack something


def test_a_killed_run_has_a_report_of_its_rounds(folder, tmp_path):
    settings = hostile.settings(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        federate.run(settings, progress=Stop(3))  # the three sites of the first round
    text = Parsed(write_report(tmp_path / "run")).text
    assert "This run is unfinished, after round 1 of 2" in text
    assert "How it ends: the run is unfinished" in text
    results = federate.resume(tmp_path / "run")
    assert results.table["rounds"] == 2
    assert "unfinished" not in Parsed(write_report(tmp_path / "run")).text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("answers/global.jsonl", "answers/global.jsonl' is missing"),
        ("timing.jsonl", "The seconds of the rounds are not known"),
        ("table.csv", "What each site gets"),
    ],
)
def test_a_missing_file_costs_its_part_only(run, name, said):
    (run / name).unlink()
    page = Parsed(write_report(run))
    assert [s for s in page.ids if not s.endswith("-title")] == SECTIONS
    assert said in page.text


def test_changed_data_give_no_pictures(run, folder):
    data = folder / "rows.parquet"
    kept = data.read_bytes()
    try:
        data.unlink()
        page = Parsed(write_report(run))
    finally:
        data.write_bytes(kept)
    assert "Questions and pictures are missing" in page.text
    assert not [a for a in page.addresses if a.startswith("data:")]
    assert "reference" in page.text


def test_damage_and_other_folders_are_named(run, tmp_path, capsys, monkeypatch):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().replace(b"loss", b"lass", 1))
    with pytest.raises(FedVLMError, match=r"metrics\.jsonl' is damaged"):
        write_report(run)
    (tmp_path / "other").mkdir()
    with pytest.raises(FedVLMError, match="holds no run and no comparison"):
        write_report(tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["fedvlm", "report", str(tmp_path / "none")])
    assert _exit_code() == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_run_of_version_0_1_is_refused_by_name(run):
    about = json.loads((run / "environment.json").read_text())
    about["packages"]["fedvlm"] = "0.1.3"
    (run / "environment.json").write_text(json.dumps(about))
    (run / "checkpoint.json").write_text("{}")
    with pytest.raises(FedVLMError, match=r"made by fedvlm 0\.1\.3"):
        write_report(run)


def test_a_report_that_fails_is_a_warning(run, caplog, monkeypatch):
    monkeypatch.setattr(write, "html", lambda page: 1 / 0)
    after(run)
    (record,) = caplog.records
    assert (
        "report.html' was not written (ZeroDivisionError: division by zero)" in record.getMessage()
    )
    assert f"'fedvlm report {run}' makes it again" in record.getMessage()


# Comparisons, private runs, deployed runs


def test_a_comparison_has_the_verdict_and_the_answers_of_all_algorithms(folder):
    page = Parsed(write_report(folder / "compared"))
    assert [s for s in page.ids if not s.endswith("-title")] == SECTIONS
    told = json.loads((folder / "compared" / "comparison.json").read_text())
    assert len(told["verdicts"]) == 3
    for verdict in told["verdicts"]:
        assert f"{verdict['client']} " in page.text
        assert f"On {verdict['n']} held-out rows" in page.text
    assert "training alone" in page.text
    assert "fedvlm run local-seed-0/config.yaml output=NEW/local-seed-0" in page.text
    assert page.text.count("local ✓") + page.text.count("local ✗") == 9


@pytest.fixture(scope="module")
def private(folder, tmp_path_factory):
    settings = hostile.settings(tmp_path_factory.mktemp("private"))
    words = ("privacy.unit=row", "privacy.epsilon=4", "privacy.delta=1e-3", "algorithm.name=ffa")
    return federate.run(settings, *words).folder


def test_a_private_run_states_its_guarantee_and_how_to_compute_it_again(private):
    page = Parsed(write_report(private))
    about = json.loads((private / "privacy.json").read_text())
    spent = Results.read(private).table["privacy"]["spent"]
    for part in (
        f"epsilon {spent:.4g} at delta 0.001",
        "Simulated guarantee",
        "one row of a client",
    ):
        assert part in page.text
    for part in (about["accountant"], about["adjacency"], "no: they have no noise"):
        assert part in page.text
    assert "Every further run on the same rows adds to epsilon" in page.text
    assert "number of training rows" not in page.text


def test_the_code_in_a_report_computes_the_epsilon_of_the_run(private, monkeypatch, capsys):
    found = read(private)
    section = next(s for s in of(found, 0).sections if s.name == "privacy")
    (code,) = (part.text for part in section.parts if part.part == "code")
    monkeypatch.chdir(private)
    exec(code, {})
    spent = found.lines[-1]["epsilon"]
    assert float(capsys.readouterr().out) == pytest.approx(spent, abs=1e-6)


def test_a_comparison_of_private_runs_adds_nothing_up(private):
    run = read(private)
    section = privacy.of_comparison(Compared(private, (), (), {"ffa": [run]}))
    text = " ".join(getattr(part, "text", "") for part in section.parts)
    assert "their epsilons add up. No single number above holds" in text
    (rows,) = (p.rows for p in section.parts if getattr(p, "title", "").startswith("Epsilon of"))
    assert rows == [("ffa", "0", f"{run.lines[-1]['epsilon']:.4g}", "0.001")]


def test_privacy_of_clients_gives_no_epsilon_to_personal_models(
    folder, tmp_path, monkeypatch, capsys
):
    settings = hostile.settings(tmp_path)
    words = ("privacy.unit=client", "privacy.epsilon=8", "privacy.delta=1e-3", "eval.every=0")
    results = federate.run(settings, *words, "algorithm.name=lora", "train.clients_per_round=1")
    found = read(results.folder)
    section = next(s for s in of(found, 0).sections if s.name == "privacy")
    tables = {p.title: dict(r[:2] for r in p.rows) for p in section.parts if p.part == "table"}
    covered = tables["What the guarantee covers"]
    assert covered["global model"] == "yes"
    assert covered["personal models"].startswith("no: they have no noise")
    assert covered["uploads of one site"].startswith("no:")
    (code,) = (part.text for part in section.parts if part.part == "code")
    monkeypatch.chdir(results.folder)
    exec(code, {})
    assert float(capsys.readouterr().out) == pytest.approx(found.lines[-1]["epsilon"], abs=1e-6)


def test_a_deployed_run_has_no_rows_and_no_epsilon(tmp_path):
    rows = fedvlm.scenes(sites=3, rows=12, seed=3)
    rows.to_parquet(tmp_path / "all.parquet")
    table = rows.to_pandas()
    for site in table["site"].unique():
        table[table["site"] == site].to_parquet(tmp_path / f"{site}.parquet", index=False)
    here = Here(tmp_path, tmp_path / "state")
    deployed(here, config(tmp_path), tmp_path / "run")
    page = Parsed(write_report(tmp_path / "run"))
    assert [s for s in page.ids if not s.endswith("-title")] == SECTIONS
    assert "on their own machines" in page.text
    assert "The rows of a deployed run never leave the sites" in page.text
    assert "Handle it like the data" not in page.text
    assert not [a for a in page.addresses if a.startswith("data:")]
    assert "the server sees the upload of each site" in page.text


# The functions


def test_run_and_resume_write_the_report_and_a_failure_is_a_warning(small, caplog, monkeypatch):
    begun = fedvlm.run(small, "train.rounds=1", report=True)
    report = begun.folder / "report.html"
    assert "planned before: 1" not in Parsed(report).text
    assert "unfinished" not in Parsed(report).text
    fedvlm.resume(begun.folder, "train.rounds=2", report=True)
    assert "planned before: 1" in Parsed(report).text
    report.unlink()
    fedvlm.resume(begun.folder, report=False)
    assert not report.exists()

    monkeypatch.setattr(write, "write_report", lambda folder: 1 / 0)
    with caplog.at_level("WARNING"):
        results = fedvlm.resume(begun.folder, report=True)
    assert results.scores()
    assert f"'fedvlm report {begun.folder}' makes it again" in caplog.text


def test_a_comparison_of_objects_writes_its_report_and_those_of_its_runs(small):
    contenders = [("mine", fedvlm.sharing({"language": "B"})), "local"]
    found = fedvlm.compare(contenders, small, "train.rounds=1", "eval.every=0", report=True)
    assert "mine" in Parsed(found.folder / "report.html").text
    runs = sorted(path.parent.name for path in found.folder.glob("*/report.html"))
    assert runs == ["local-seed-0", "mine-seed-0"]


# The commands


def test_the_commands_write_the_report_and_open_it(folder, tmp_path, capsys, monkeypatch):
    text = yaml.safe_dump(hostile.settings(tmp_path))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    code, out, _ = told(capsys, monkeypatch, "run", str(tmp_path / "run.yaml"), "-q")
    report = tmp_path / "run" / "report.html"
    assert code == 0
    assert f"report: {report}" in out
    report.unlink()
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda address: bool(shown.append(address)))
    code, out, errors = told(capsys, monkeypatch, "report", str(tmp_path / "run"), "--open")
    assert (code, out.strip()) == (0, str(report))
    assert shown == [report.as_uri()]
    assert "no browser could be started here" in errors
    assert report.exists()


def test_the_commands_of_a_comparison_write_its_report(folder, capsys, monkeypatch):
    report = folder / "compared" / "report.html"
    report.unlink(missing_ok=True)
    short = hostile.settings(folder) | {"output": str(folder / "compared")}
    (folder / "compare.yaml").write_text(yaml.safe_dump(short), encoding="utf-8")
    words = ("compare", "local,plora", str(folder / "compare.yaml"), "-q")
    words += ("train.rounds=1", "eval.every=0")
    assert told(capsys, monkeypatch, *words)[0] == 0
    assert report.exists()
    runs = sorted(path.parent.name for path in (folder / "compared").glob("*/report.html"))
    assert runs == ["local-seed-0", "plora-seed-0"]


def told(capsys, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["fedvlm", *words])
    code = _exit_code()
    captured = capsys.readouterr()
    return code, captured.out, captured.err
