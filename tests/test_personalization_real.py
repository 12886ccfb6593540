"""Real cells of the personalization benchmark: any data, any model, and finished comparisons."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from test_personalization import fake  # noqa: F401 - a fixture

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import personalization
from _personalization import cells, plan, real, record, taken
from fedvlm.config import load
from fedvlm.data.scenes import scenes
from fedvlm.errors import FedVLMError
from fedvlm.rounds import comparison
from fedvlm.store import files

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "clinics.parquet"
    scenes(sites=3, rows=80, style="mixed", strength=1.0, seed=0).to_parquet(path)
    return path


def own(parquet: Path, *words: str) -> real.Real | None:
    parsed = personalization._parser().parse_args([*of(parquet), "--rate", "0.003", *words])
    return real.asked(parsed)


def of(parquet: Path) -> list[str]:
    """The options of a real cell without its rate."""
    return ["--data", str(parquet), "--by", "site", "--model", "tiny"]


def test_a_real_cell_has_rows_of_each_kind_and_the_same_steps_for_all(parquet, tmp_path):
    found = own(parquet, "--rows", "20", "--rounds", "8", "--target", r"text_model\.layers\.2.*")
    assert found.cell.name == "clinics-site-tiny-20"
    jobs = {job.algorithm: job for job in real.jobs(found, cells.MAIN["algorithms"], [3], tmp_path)}
    for job in jobs.values():
        data, train = job.config.data, job.config.train
        assert data.max_rows == 3 * (20 + cells.VALIDATION + real.TEST)
        assert round(data.test_fraction * data.max_rows) == 3 * real.TEST
        assert train.rounds * train.local_steps + train.tuning == 40
        assert (job.config.metric, job.config.seed, train.lr) == ("token_f1", 3, 0.003)
        assert job.config.lora.target == r"text_model\.layers\.2.*"
    assert jobs["lora+ft"].config.train.tuning == 10
    assert own(parquet).cell.rows == 80 - cells.VALIDATION - real.TEST, "all rows"
    more = own(parquet, "--set", "model.dtype=bfloat16", "--set", "eval.max_new_tokens=4")
    (job,) = real.jobs(more, ["auto"], [0], tmp_path)
    assert (job.config.model.dtype, job.config.eval.max_new_tokens) == ("bfloat16", 4)


def test_impossible_real_cells_are_refused(parquet):
    with pytest.raises(FedVLMError, match=r"28 to train. --rows has to be 8 to 28 \(got 29\)"):
        own(parquet, "--rows", "29")
    with pytest.raises(FedVLMError, match=r"--rounds has to be at least 2 \(got 1\)"):
        own(parquet, "--rounds", "1")
    with pytest.raises(FedVLMError, match="no column 'ward'"):
        own(parquet, "--by", "ward")
    for words, text in (
        (["--rows", "20"], "--rows: no meaning without --data"),
        (["--data", str(parquet), "--by", "site"], "--data needs --model, --rate as well"),
    ):
        with pytest.raises(FedVLMError, match=text):
            real.asked(personalization._parser().parse_args(words))
    assert real.asked(personalization._parser().parse_args([])) is None


def test_real_cells_are_resumed_published_and_kept_apart(request, parquet, tmp_path):
    ran = request.getfixturevalue("fake")
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "all.jsonl"
    words = [*of(parquet), "--rate", "0.003", "--jobs", "1", "--output", str(here)]
    words += ["--algorithms", "lora,lora+ft"]
    assert personalization.main([*words, "--seeds", "0"]) == 0
    assert personalization.main([*words, "--seeds", "0,1"]) == 0
    assert len(ran) == 4, "seed 0 is not run again"
    rows = real.rows(here)
    assert {(r["algorithm"], r["seed"]) for r in rows} == {
        (a, s) for a in ("lora", "lora+ft") for s in (0, 1)
    }
    assert {(r["metric"], r["rows"]) for r in rows} == {("token_f1", 48)}
    assert str(parquet.parent) not in (here / "real/clinics-site-tiny-28/cell.json").read_text()
    with pytest.raises(FedVLMError, match=r"train\.rounds is 8 there, and 4 was asked"):
        personalization.main([*words, "--rounds", "4"])
    assert "clinics.parquet" in real.stated(here)
    assert "## Real cells" in personalization.written(rows, "", {}, ".", real.stated(here))
    record.pack(here, file)
    assert record.unpack(file, there) == 4
    assert real.rows(there) == rows


def test_validation_chooses_a_rate_for_each_algorithm_of_a_real_cell(request, parquet, tmp_path):
    ran = request.getfixturevalue("fake")
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "all.jsonl"
    words = [*of(parquet), "--jobs", "1", "--output", str(here)]
    words += ["--algorithms", "lora,local", "--seeds", "0"]
    assert personalization.main([*words, "--rate", "0.003"]) == 0
    assert personalization.main([*words, "--rate", "0.003,0.001"]) == 0
    tuned = [name for name in ran if "(tuning)" in name]
    assert len(tuned) == 4
    assert len({name for name in tuned if "seed 0" in name}) == 4, "two rates an algorithm"
    told = json.loads((here / "real/clinics-site-tiny-28/cell.json").read_text())
    best = {}
    for name in ("local", "lora"):
        tried = {
            rate: json.loads(
                (
                    here / f"real/clinics-site-tiny-28/tuning/{name}-{rate:g}/measured.json"
                ).read_text()
            )
            for rate in (0.001, 0.003)
        }
        merits = {rate: plan.merit(one) for rate, one in tried.items()}
        best[name] = max(merits, key=merits.__getitem__)
    assert told["rates"] == best
    rows = real.rows(here)
    assert {r["algorithm"] for r in rows} == {"local", "lora"}
    assert len(rows) == 2 * 5, "a run at another rate is in no table"
    assert f"from 0.001, 0.003: `local` {best['local']:g}" in real.stated(here)
    count = len(ran)
    assert personalization.main([*words, "--rate", "0.003,0.001"]) == 0
    assert len(ran) == count, "nothing is run again"
    with pytest.raises(FedVLMError, match=r"train\.lr is"):
        personalization.main([*words, "--rate", "0.002,0.004"])
    record.pack(here, file)
    record.unpack(file, there)
    assert real.rows(there) == rows


def test_finished_runs_of_a_comparison_become_a_real_cell(request, parquet, tmp_path):
    ran = request.getfixturevalue("fake")
    there, output = tmp_path / "compared", tmp_path / "output"
    tree = {"data": {"path": str(parquet)}, "partition": {"kind": "column", "column": "site"}}
    for name, more in (("auto", {}), ("lora", {}), ("lora", {"rounds": 16, "finish_steps": 20})):
        folder = there / f"{name}-{len(more)}-seed-0"
        one = tree | {"train": {"lr": 0.01} | more, "algorithm": {"name": name}}
        comparison.run_one(name, load(one | {"output": str(folder)}), lambda event: None)
        clients = [{"client": c, "train": list(range(30))} for c in "ab"]
        files.write_text(folder / "partition.json", json.dumps({"clients": clients}))
        environment = {"packages": {"fedvlm": "0.2.0"}}
        files.write_text(folder / "environment.json", json.dumps(environment))
    assert taken.take(there, output) == 3
    assert taken.take(there, output) == 0
    assert len(ran) == 3
    rows = [r for r in real.rows(output) if r["when"] == "after" and r["model"] == "personal"]
    assert [r["algorithm"] for r in rows] == ["auto", "lora", "lora+ft"]
    assert "3 runs, measured on" in real.stated(output)
    assert "of a run of fedvlm 0.2.0" in real.stated(output)
    assert {(r["regime"], r["rows_per_client"]) for r in rows} == {("clinics-site-tiny", 30)}
    with pytest.raises(FedVLMError, match="no finished run"):
        taken.take(tmp_path / "nowhere", output)
    for more, text in (
        ({"batch_size": 2}, r"train\.batch_size is 8 there, and 2"),
        ({"rounds": 16, "finish_steps": 20}, "train.finish_steps is None there, and 20"),
    ):
        odd = load(tree | {"train": more | {"lr": 0.01}, "output": str(there / str(len(more)))})
        comparison.run_one("odd", odd, lambda event: None)
        one = there / str(len(more)) / "partition.json"
        files.write_text(one, json.dumps({"clients": clients}))
        with pytest.raises(FedVLMError, match=text):
            taken.take(there, output)
        shutil.rmtree(one.parent)


def test_the_example_on_radiology_gives_all_algorithms_the_same_steps():
    config = load(ROOT / "examples" / "vqarad.yaml")
    strong = load(ROOT / "examples" / "vqarad.yaml", "train.rounds=20", "train.finish_steps=20")
    steps = [c.train.rounds * c.train.local_steps + c.train.tuning for c in (config, strong)]
    assert steps == [120, 120]
    assert config.metric == real.METRIC
