"""Whole private runs: budget, halt, resume, privacy of clients, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fedvlm
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.table import of_run
from fedvlm.config import load
from fedvlm.engines.wire import Task
from fedvlm.errors import ConfigError, DataError, FedVLMError
from fedvlm.privacy import statement
from fedvlm.privacy.accountant import Spend, epsilon
from fedvlm.privacy.chance import Seeded
from fedvlm.privacy.plan import Plan
from fedvlm.rounds.noisymean import NoisyMean
from fedvlm.rounds.prepare import prepare, weights_of
from fedvlm.rounds.schedule import plan
from fedvlm.store.files import read_lines
from pair import Kept
from test_federate import Stop

pytestmark = pytest.mark.usefixtures("no_pictures")

ROW = {"unit": "row", "epsilon": 4, "delta": 1e-3}


@pytest.fixture
def private(small):
    small["eval"] |= {"every": 0, "max_rows": 2}
    small["train"] |= {"rounds": 3, "local_steps": 1}
    small["data"]["scenes"]["sites"] = 2
    return small | {"algorithm": {"name": "ffa"}, "privacy": dict(ROW)}


def described(results):
    about = json.loads((results.folder / "privacy.json").read_text())
    return about, read_lines(results.folder / "metrics.jsonl")[1:]


def test_epsilon_grows_with_every_round_up_to_the_budget(private):
    about, lines = described(fedvlm.run(private))
    found = [line["epsilon"] for line in lines]
    assert 0 < found[0] < found[1] < found[2] <= 4
    assert found[-1] == pytest.approx(4, rel=1e-3), "the noise is no larger than necessary"
    clients = about["clients"].values()
    again = [
        epsilon([Spend(c["expected_batch"] / c["units"], c["noise"], c["steps"])], about["delta"])
        for c in clients
    ]
    assert found[-1] == pytest.approx(max(again), abs=1e-6), "anyone can compute it from the file"
    assert {c["steps"] for c in clients} == {3}


def test_the_steps_of_the_ending_count_too(private):
    about, lines = described(fedvlm.run(private, "train.finish_steps=2", "train.rounds=2"))
    assert {c["steps"] for c in about["clients"].values()} == {4}
    assert lines[-1]["round"] == 3
    assert lines[-1]["epsilon"] == pytest.approx(4, rel=1e-3)


def test_the_budget_ends_a_run_with_its_models_intact(private):
    results = fedvlm.run(private, "privacy.noise=1.5", "train.rounds=50")
    about, lines = described(results)
    assert 1 < about["rounds"] < 50
    assert lines[-1]["round"] == about["rounds"]
    assert lines[-1]["epsilon"] <= 4
    assert results.adapter("site-0").is_dir()
    assert lines[-1]["evaluation"]["personal"]
    spent = results.table["privacy"]["spent"]
    assert spent == lines[-1]["epsilon"]
    told = statement.guarantee(about, spent)
    for word in ("delta 0.001", "one row of a client", "added or removed", "PLD", "Poisson"):
        assert word in told
    with pytest.raises(ConfigError, match="does not allow a single round"):
        fedvlm.run(private, "privacy.noise=0.3", "output=" + str(results.folder) + "2")


def test_a_resumed_private_run_counts_the_rounds_before(private):
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(private, progress=Stop(1))
    _, lines = described(fedvlm.resume(private["output"]))
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert lines[0]["epsilon"] < lines[1]["epsilon"] < lines[2]["epsilon"] <= 4


def test_every_client_counts_the_same_and_no_number_of_rows_is_used(private):
    config = load(private)
    engine, partition, _ = prepare(config, store=Kept(private["output"]))
    assert weights_of(config, partition) == {"site-0": 1.0, "site-1": 1.0}
    visit = Visit("site-0", 1.0, round=1)
    down = engine.algorithm.send(engine.algorithm.init(engine.adapter), visit)
    (reply,) = engine.train([Task(visit, down)])
    assert reply.weight == 1.0


# -- groups of rows


def test_the_rows_of_a_unit_are_all_trained_or_all_held_out(private):
    from fedvlm.rounds.prepare import divide

    private["privacy"] |= {"unit": "question"}
    private["data"]["scenes"]["rows"] = 60
    rows, partition = divide(load(private))
    questions = np.array(rows["question"], dtype=object)
    for split in partition.splits.values():
        parts = [set(questions[own]) for own in (split.train, split.val, split.test)]
        assert not parts[0] & parts[2]
        assert not parts[0] & parts[1]
    from fedvlm.privacy.units import units_of

    own = partition.splits["site-0"].train
    units = units_of(rows, own, "question")
    assert sorted(np.concatenate(units)) == sorted(own)
    assert len(units) == len(set(questions[own])) < len(own)


def test_a_unit_that_is_no_column_is_refused(private):
    with pytest.raises(DataError, match=r"privacy.unit 'patient' is not a column .* site"):
        fedvlm.run(private, "privacy.unit=patient")


# -- whole clients

CLIENT = Plan(units=10, batch=4, noise=0.0, clip=1.0, delta=1e-3, budget=3.0)


def test_the_noisy_mean_clips_each_change_and_divides_by_the_expected_number():
    down = {"x": torch.tensor([1.0, 1.0])}
    mean = NoisyMean(down, CLIENT, Seeded(0))
    mean.add({"x": torch.tensor([4.0, 5.0])}, weight=100)  # a change of norm 5, shrunk to 1
    mean.add({"x": torch.tensor([1.0, 1.5])}, weight=1)
    assert mean.tree()["x"].tolist() == pytest.approx([1 + 0.6 / 4, 1 + (0.8 + 0.5) / 4])
    with pytest.raises(FedVLMError, match="differ in 1, 'y' first"):
        mean.add({"x": down["x"], "y": down["x"]}, weight=1)


def test_a_round_without_clients_still_has_noise():
    down = {"x": torch.zeros(20_000)}
    noisy = NoisyMean(down, Plan(10, 4, 2.0, 0.5, 1e-3, 3.0), Seeded(0))
    assert noisy.total
    assert float(noisy.tree()["x"].std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.02)


def test_cohorts_are_poisson_samples_with_privacy_of_clients():
    given = {"unit": "client", "epsilon": 3, "delta": 1e-3}
    tree = {"privacy": given, "train": {"rounds": 400, "clients_per_round": 5}}
    config = load(tree, "algorithm.name=plora")
    names = [f"client-{n}" for n in range(50)]
    sizes = [len(r.cohort) for r in plan(config, of_run(config), names) if not r.final]
    assert np.mean(sizes) == pytest.approx(5, abs=0.4)
    assert np.var(sizes) == pytest.approx(4.5, rel=0.3)


def test_a_run_with_privacy_of_clients_moves_by_noise_and_says_so(private):
    private["privacy"] = {"unit": "client", "epsilon": 20, "delta": 1e-2}
    private["data"]["scenes"]["sites"] = 4
    results = fedvlm.run(private, "algorithm.name=plora", "train.clients_per_round=1")
    about, lines = described(results)
    assert about["unit"] == "client"
    assert about["clients"][""]["units"] == 4
    assert lines[-1]["epsilon"] == pytest.approx(20, rel=1e-3)
    assert any("Personal models have no noise" in line for line in statement.not_covered(about))
    assert "all rows of one client" in statement.guarantee(about)


# -- refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.name=auto"], "algorithm.name=auto cannot run with privacy.unit=row: its "
         "clients choose by the scores of validation rows, which have no noise"),
        (["algorithm.name=scaffold", "train.optimizer=sgd"],
         "its controls leave the client, and they have no accounting"),
        (["train.local_steps=null", "train.local_epochs=1"],
         "train.local_epochs makes the number of steps depend on the number of rows"),
        (["privacy.unit=client", "algorithm.name=fedmosaic"],
         "its server uses more of the uploads than their mean"),
        (["privacy.unit=client", "algorithm.name=centralized"], "which pools"),
        (["privacy.unit=client", "aggregate.kind=trimmed"], "leave out aggregate.kind=trimmed"),
        (["privacy.delta=0.5"], "must be below 1 / number of units"),
        (["privacy.epsilon=null"], "unit=row needs epsilon"),
    ],
)  # fmt: skip
def test_what_has_no_accounting_is_refused_by_name(private, overrides, message):
    with pytest.raises(ConfigError) as error:
        fedvlm.run(private, *overrides)
    assert message in str(error.value)


def test_a_private_run_without_a_name_takes_the_default_for_privacy():
    given = ["privacy.unit=row", "privacy.epsilon=3", "privacy.delta=1e-5"]
    assert load(None, *given).algorithm.name == "plora"
    assert load(None).algorithm.name == "auto"


def test_an_object_that_reads_validation_rows_is_refused_before_round_1(private):
    from fedvlm import Algorithm, Averaged, Score, Sent, Train

    def work(local):
        yield Score([local.begin])
        trained = yield Train(local.begin)
        return Sent(trained.end)

    reads = Algorithm(
        init=lambda initial: initial,
        send=lambda state, visit: state,
        model=lambda initial, down, mine: {**initial, **down, **mine},
        work=work,
        server=Averaged(lambda state, mean, round: mean),
    )
    del private["algorithm"]
    with pytest.raises(ConfigError, match="no noise"):
        fedvlm.run(private, algorithm=reads)
    assert not Path(private["output"]).exists()


def documented():
    """The settings and messages in the table of docs/privacy.md."""
    text = (Path(__file__).parents[1] / "docs" / "privacy.md").read_text(encoding="utf-8")
    table = text.split("| settings with `privacy.unit=row` | message |")[1].split("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    return [(words.strip("`").split(), message) for words, message in lines]


@pytest.mark.parametrize(("words", "message"), documented(), ids=lambda found: str(found)[:40])
def test_every_refusal_in_the_docs_is_the_message(words, message):
    given = ("privacy.unit=row", "privacy.epsilon=3", "privacy.delta=1e-5", *words)
    with pytest.raises(ConfigError) as refused:
        load({}, *given)
    assert message in str(refused.value)
