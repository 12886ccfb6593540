"""``fedvlm run --dry-run``: the plan matches the run, without loading weights or writing files."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml

import fedvlm
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.table import TABLE, adapter_of, of_run
from fedvlm.batches.draw import batches
from fedvlm.config import load
from fedvlm.engines import memory
from fedvlm.models import load as loading
from fedvlm.models import lora
from fedvlm.planning import footprint
from fedvlm.planning.forecast import Spread, examples, forecast
from fedvlm.rounds import prepare as preparing
from fedvlm.settings.sections import Config, ModelConfig
from test_cli import SMALL, call

PAPER = Path(__file__).parents[1] / "examples" / "fedvlm-paper.yaml"
TOLD = ("plora", "lora")
HUB = ("data.path=some-org/some-data", "model.name=some-org/some-model")


@pytest.fixture
def no_weights(monkeypatch):
    """Makes every loading of weights fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(loading, "load_model", refuse)
    monkeypatch.setattr(hf.PreTrainedModel, "from_pretrained", refuse)


def told(folder, way):
    """The bytes of each message in a run's metrics, by round and client, in order."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [size for line in lines[1:] for size in line[way].values()]


def sent(plan, way):
    return plan.sent[way], plan.all_sent[way]


def test_the_bytes_of_a_plan_are_those_that_the_run_reports(finished_run):
    plan = forecast(load(finished_run / "config.yaml"))
    for way in ("up", "down"):
        real = told(finished_run, f"bytes_{way}")
        assert sent(plan, way) == (Spread.of(real), sum(real))
    partition = json.loads((finished_run / "partition.json").read_text())
    assert plan.clients == plan.cohort == len(partition["clients"])
    assert plan.rows["train"] == Spread.of(len(c["train"]) for c in partition["clients"])
    assert (plan.all_steps, plan.examples) == (2 * 3 * 3, 2 * 3 * 3 * 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": {"name": "lora"}, "train": {"finish_steps": 1}},
        {"algorithm": {"name": "scaffold"}, "train": {"optimizer": "sgd", "lr": 0.1}},
        {"algorithm": {"name": "fedalt"}},
        {"algorithm": {"name": "plora"}, "lora": {"ranks": {"site-1": 1}}},
    ],
    ids=lambda s: s["algorithm"]["name"] + "-ranks" * ("lora" in s),
)
def test_planned_bytes_are_right_where_messages_differ_by_round_or_client(small, settings):
    config = {**small, **{k: {**small.get(k, {}), **v} for k, v in settings.items()}}
    config["eval"] = {"every": 0, "max_rows": 1, "max_new_tokens": 1}
    config["train"] |= {"local_steps": 1, "clients_per_round": 2}
    config["train"].setdefault("finish_steps", 0)
    plan = forecast(load(config))
    results = fedvlm.run(config)
    for way in ("up", "down"):
        real = told(results.folder, f"bytes_{way}")
        assert sent(plan, way) == (Spread.of(real), sum(real))


@pytest.mark.parametrize("name", TABLE)
def test_every_algorithm_says_what_it_sends_from_shapes_alone(name):
    sgd = ["train.optimizer=sgd"] if name == "scaffold" else []
    share = ["algorithm.share={q_proj: A}"] if name == "share" else []
    config = load(None, f"algorithm.name={name}", "lora.rank=4", *sgd, *share)
    rank = 4 + (adapter_of(config).spare or 0)
    key = "base_model.model.model.text_model.layers.0.self_attn.q_proj.lora_{}.weight"
    real = {key.format("A"): torch.ones(rank, 6), key.format("B"): torch.ones(5, rank)}
    shapes = {n: t.to("meta") for n, t in real.items()}
    algorithm = of_run(config)
    bare, whole = (footprint.Exchanges(config, algorithm, tree) for tree in (shapes, real))
    for visit in (Visit("client-0", 1.0, round=1), Visit("client-0", 1.0, round=2)):
        one, other = bare.of(visit, 5), whole.of(visit, 5)
        assert (one.up, one.down) == (other.up, other.down)


@pytest.mark.parametrize(("rows", "size", "steps"), [(10, 4, 7), (3, 8, 5), (8, 4, 3), (9, 4, 1)])
def test_examples_are_the_rows_of_the_batches_that_are_drawn(rows, size, steps):
    drawn = batches(torch.arange(rows).numpy(), size, steps, seed=0)
    assert examples(rows, size, steps) == sum(map(len, drawn))


def test_a_plan_counts_the_model_and_the_adapter_as_they_are(small):
    config = load({**small, "model": {"device": "cpu"}}, "algorithm.name=ffa")
    size = forecast(config).size
    model = loading.load_model(ModelConfig(device="cpu")).model
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.weights == 4 * size.parameters
    adapter = lora.read(lora.handles(lora.attach(model, config.lora, 0)))
    assert size.trained == sum(t.numel() for n, t in adapter.items() if ".lora_B." in n)
    assert size.each == memory.COPIES * sum(4 * t.numel() for t in adapter.values())


def test_spare_ranks_are_held_and_not_trained(small):
    plain = forecast(load(small, "algorithm.name=lora")).size
    exact = forecast(load(small, "algorithm.name=fedex", "lora.spare=6")).size
    assert exact.trained == plain.trained
    assert exact.each == plain.each * (2 + 6) // 2


def test_quantized_linear_layers_take_half_a_byte_a_weight(small, monkeypatch):
    monkeypatch.setattr(loading, "quantization", lambda kind, device: {})
    words = "model.name=tiny", "model.quantization=4bit", "model.device=cpu"
    size = forecast(load(small, *words)).size
    model = loading.load_shapes(ModelConfig(device="cpu"))
    linear = sum(model.get_submodule(n).weight.numel() for n in lora.targets(model, "all-linear"))
    assert size.weights == linear // 2 + 4 * (size.parameters - linear)


def test_one_client_trains_at_a_time_in_the_reference_engine(small):
    size = forecast(load(small, "engine.name=reference")).size
    assert (size.engine, size.most) == ("reference", 1)


def test_centralized_takes_the_steps_of_all_clients_in_one_place(small):
    plan = forecast(load(small, "algorithm.name=centralized"))
    assert plan.cohort == 1
    assert plan.all_steps == forecast(load(small, "algorithm.name=lora")).all_steps


def test_local_epochs_follow_from_the_real_partition(small):
    del small["train"]["local_steps"]
    config = load(small, "train.local_epochs=2")
    splits = preparing.divide(config)[1].splits.values()
    plan = forecast(config)
    assert plan.examples == 2 * 2 * sum(len(s.train) for s in splits)
    assert plan.all_steps == 2 * sum(2 * -(-len(s.train) // 4) for s in splits)


def test_a_dry_run_prints_the_plan_writes_nothing_and_loads_no_weights(
    tmp_path, capsys, monkeypatch, no_weights
):
    monkeypatch.chdir(tmp_path)
    words = ("run", "--dry-run", f"output={tmp_path / 'run'}", *SMALL)
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    plan = forecast(load(None, *words[2:]))
    assert f"{plan.all_sent['up']:,} " in text
    assert f"{plan.size.trained:,} parameters per client" in text
    assert "nothing was trained or written" in text
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_configuration_are_told_at_once(tmp_path, capsys, monkeypatch):
    words = ("run", "--dry-run", f"output={tmp_path / 'run'}", "train.round=3", "train.lr=fast")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, text) == (2, "")
    assert errors.startswith("error: the configuration has 2 problems:")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("lora.rank=999", "lora.rank: 999"),
        ("lora.target=nowhere", "matches none"),
        ("data.path=/not/here.parquet", "does not exist"),
        ("partition.min_rows=1000", "partition.min_rows"),
        ("model.name=microsoft/Florence-2-base", "florence-community/Florence-2-base"),
    ],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(word, said, capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, "run", "--dry-run", *SMALL, word)
    assert code == 2
    assert said in errors


def test_a_dry_run_says_where_a_client_does_not_fit(capsys, monkeypatch):
    monkeypatch.setattr(memory, "budget", lambda *_: -1)  # the weights are larger than the GPU
    code, output, _ = call(capsys, monkeypatch, "run", "--dry-run", *SMALL)
    assert code == 0
    assert "A pass of one client may not fit" in " ".join(output.replace("│", " ").split())


def test_resume_has_no_dry_run(capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, "run", "--resume", "x", "--dry-run")
    assert code == 2
    assert "leave out --resume" in errors


def test_without_the_hub_a_plan_says_what_is_not_known_and_why(capsys, monkeypatch):
    words = ("run", "--dry-run", *HUB, "partition.clients=7", "train.rounds=3")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    plan = forecast(load(None, *words[2:]))
    every = 3 * 5  # and no step in the last round, which averages
    assert (plan.clients, plan.cohort, plan.all_steps) == (7, 7, 7 * every)
    assert (plan.size, plan.rows, plan.examples, plan.all_sent) == (None, {}, None, {})
    assert "not known: rows: data.path 'some-org/some-data'" in text
    assert "model.name 'some-org/some-model'" in text.replace("\n", " ")


def test_a_dry_run_names_the_sites_as_text_and_at_most_twelve(capsys, monkeypatch, tmp_path):
    rows = fedvlm.scenes(sites=1, rows=140).to_pandas()
    names = ["[red]Nord[/]", *(f"ward {number}" for number in range(13))]
    rows["site"] = [names[number % 14] for number in range(140)]
    path = tmp_path / "rows.parquet"
    rows.to_parquet(path)
    words = (f"data.path={path}", "partition.kind=column", "partition.column=site")
    code, text, errors = call(capsys, monkeypatch, "run", "--dry-run", *words)
    assert (code, errors) == (0, "")
    line = " ".join(text.replace("│", " ").split())
    assert "14: [red]Nord[/], ward 0, ward 1, ward 2, " in line
    assert " and 2 more" in line


def test_without_the_data_messages_are_known_where_the_model_is():
    plan = forecast(load(None, HUB[0], "partition.kind=column", "partition.column=site"))
    assert (plan.clients, plan.all_sent, plan.all_steps) == (None, {}, None)
    assert plan.sent["up"] == forecast(Config()).sent["up"]
    assert plan.steps == Spread(0, 5, 5), "no step in the last round, which averages"


def test_the_configuration_of_the_paper_loads_and_is_planned_offline(capsys, monkeypatch):
    code, text, errors = call(capsys, monkeypatch, "run", str(PAPER), "--dry-run")
    assert (code, errors) == (0, "")
    config = load(PAPER)
    assert config.algorithm.name == "plora"
    assert f"{config.partition.clients}" in text


def test_the_bytes_told_beside_the_papers_claims_are_those_of_the_plan():
    text = (PAPER.parents[1] / "docs" / "paper.md").read_text()
    sizes = {n: forecast(load(None, f"algorithm.name={n}")).sent["up"].most for n in TOLD}
    assert all(f"`{name}` {size:,}" in text for name, size in sizes.items())
    assert f"{100 * sizes['plora'] / sizes['lora']:.1f} %" in text


def test_every_setting_of_the_papers_configuration_says_whose_it_is():
    lines = PAPER.read_text().splitlines()
    settings = [n for n, line in enumerate(lines) if ": " in line.split("#")[0]]
    marked = ("# ours", "# paper")
    unmarked = [lines[n] for n in settings if not any(m in lines[n] for m in marked)]
    assert [line.split(":")[0].strip() for line in unmarked] == ["output", "name"]
    assert "# ours" in PAPER.read_text().split("name: florence-community")[0].split("model:")[1]
    assert yaml.safe_load(PAPER.read_text()).keys() <= Config.model_fields.keys()
