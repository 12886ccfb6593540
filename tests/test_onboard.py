"""A site joins after training: what is trained, what is compared, what stays unchanged."""

import sys

import pandas as pd
import peft
import pytest
import torch

import fedvlm
import smallest
from fedvlm.after.onboard import _personal, _steps, _tuning
from fedvlm.after.opened import open_run
from fedvlm.algorithms.base import Local, Trained, Validation, Visit, step
from fedvlm.algorithms.table import TABLE, build, spare_ranks
from fedvlm.errors import FedVLMError
from fedvlm.models import lora
from fedvlm.models.load import load_model
from fedvlm.settings.sections import LoraConfig
from fedvlm.store import sealed
from fedvlm.store.files import load_tree
from fedvlm.store.run import Store
from fedvlm.tree import digest, factor
from test_cli import call
from test_export import code_on_card
from test_federate import bytes_of


@pytest.fixture(scope="module")
def joined(finished_run, new_rows, tmp_path_factory):
    """A copy of the run that a new site has joined, the site, and the copy's digests before."""
    import shutil

    folder = tmp_path_factory.mktemp("joined") / "run"
    shutil.copytree(finished_run, folder)
    before = bytes_of(folder)
    site = fedvlm.onboard(folder, new_rows / "site.parquet", name="new site")
    return folder, site, before


def adapter(folder):
    return load_tree(folder / "adapter_model.safetensors")


def test_only_what_is_personal_is_trained(joined):
    folder, site, _ = joined
    shared = Store(folder).server()
    tree = adapter(site.folder)
    assert {factor(n) for n in shared} == {"B"}
    assert digest({n: tree[n] for n in shared}) == digest(shared), "B comes from the server"
    start = {n: t for n, t in open_run(folder).initial.items() if factor(n) == "A"}
    moved = {n for n, t in start.items() if not torch.equal(t, tree[n])}
    assert moved == set(start)
    kept = load_tree(site.folder / "personal.safetensors")
    assert digest(kept) == digest({n: tree[n] for n in start})


def test_the_personal_model_is_compared_with_the_alternatives(joined, new_rows):
    _, site, _ = joined
    assert list(site.scores) == ["untuned", "shared", "alone", "personal"]
    losses = {m: s["loss"] for m, s in site.scores.items()}
    assert len(set(losses.values())) == 4
    assert losses["personal"] < losses["shared"], "tuning helps on this site"
    told = sealed.read(site.folder / "scores.json")
    assert set(told.pop("files")) >= {"adapter_model.safetensors", "adapter_config.json"}
    assert told == site.table
    assert site.table["steps"] == 6, "as many as a client of the run: 2 rounds of 3"
    rows = pd.read_parquet(new_rows / "site.parquet")
    assert sum(site.table["rows"].values()) == len(rows)


def test_the_scores_are_those_of_the_saved_adapter(joined, new_rows):
    folder, site, _ = joined
    run = open_run(folder)
    assert site.scores["untuned"]["examples"] <= run.config.eval.max_rows
    found = fedvlm.evaluate(folder, new_rows / "site.parquet", clients=["new site"])
    assert set(found.scores) == {"new site", "untuned"}
    assert found.scores["new site"]["loss"] < found.scores["untuned"]["loss"]


def test_the_runs_own_files_stay_as_they_were(joined):
    folder, site, before = joined
    after = bytes_of(folder)
    assert {k: after[k] for k in before} == before
    new = {k for k in after if k not in before}
    assert all(k.startswith("onboarded/new-site/") for k in new)
    assert site.folder == folder / "onboarded" / "new-site"


def test_the_same_site_gets_the_same_adapter_again(joined, own_run, new_rows):
    _, site, _ = joined
    again = fedvlm.onboard(own_run, new_rows / "site.parquet", name="new site")
    assert digest(adapter(again.folder)) == digest(adapter(site.folder))
    assert again.table == site.table


def test_its_name_works_as_a_clients_from_then_on(joined, new_rows, tmp_path):
    folder, site, _ = joined
    picture = new_rows / "picture.png"
    assert isinstance(fedvlm.predict(folder, picture, "What?", client="new site"), str)
    exported = fedvlm.export(folder, client="new site", to=tmp_path / "out")
    assert digest(adapter(exported)) == digest(adapter(site.folder))
    text = (exported / "README.md").read_text()
    assert f"{site.scores['personal']['loss']:.3f}" in text
    assert "site-0" not in text


def test_tuning_that_harms_is_not_used():
    def tree(number):
        return {f"m.lora_{f}.weight": torch.full((2, 2), float(number)) for f in "AB"}

    tuning = _tuning(tree(0), {"m.lora_A.weight"}, 7)
    for lowest, expected in ((0, 0.0), (2, 2.0), (7, 5.0)):
        program = tuning.work(Local(Visit("new", 1.0, round=9), tree(0), {}, {}, 5))
        stretches, ask = [], step(program)
        for value in (1, 5, 0, 0, 0):
            stretches.append(ask)
            ask = step(program, Trained(tree(value), {"A": 1.0, "B": 1.0}))
        assert [stretch.steps for stretch in stretches] == [2, 2, 1, 1, 1]
        assert [n for n in tree(0) if stretches[0].trains(n)] == ["m.lora_A.weight"]
        tried = [t["m.lora_A.weight"][0, 0].item() for t in ask.trees]
        assert tried == [0, 0.5, 2, 1.5, pytest.approx(1.2), 1, 1, 5, 0, 0, 0], "means and points"
        scores = tuple(Validation(1.0 if k == lowest else 3.0, 0.5) for k in range(11))
        sent = step(program, scores)
        mine = sent.keep
        assert not sent.up
        assert {n: t.unique().item() for n, t in mine.items()} == {"m.lora_A.weight": expected}
        model = tuning.model(tree(9), {}, mine)
        assert model["m.lora_B.weight"].unique().item() == 0, "B comes from the server"
        assert model["m.lora_A.weight"].unique().item() == expected


def test_what_a_killed_process_left_is_no_site(joined, tmp_path):
    folder, site, _ = joined
    left = site.folder.with_name(".other.tmp")
    left.mkdir()
    (left / "scores.json").write_text('{"site": "other"}')
    assert list(open_run(folder).onboarded) == ["new site"]
    (left / "scores.json").unlink()
    left.rmdir()


def test_peft_loads_its_folder(joined):
    folder, site, _ = joined
    base = load_model(open_run(folder).config.model).model
    loaded = peft.PeftModel.from_pretrained(base, str(site.folder))
    assert digest(lora.read(lora.handles(loaded))) == digest(adapter(site.folder))


@pytest.mark.parametrize("name", [n for n in TABLE if n != "share"])
def test_what_is_personal_is_what_the_algorithm_keeps(name):
    """An algorithm without a personal part, or with local tuning at the end, keeps all factors."""
    expected = {"auto": "B", "plora": "A", "fedalora": "A", "fedsa": "B", "iat": "B"}
    ranks = 8 + spare_ranks(name, LoraConfig(rank=8))
    shapes = {"A": (ranks, 5), "B": (4, ranks)}
    tree = {f"m.{i}.lora_{f}.weight": torch.zeros(shapes[f]) for i in (0, 1) for f in "AB"}
    algorithm = build(TABLE[name].settings(name=name), LoraConfig(rank=8))
    visit = Visit("new", 1.0, round=9, final=algorithm.final)
    down = algorithm.send(algorithm.init(tree), visit)
    _, found = _personal(algorithm, tree, visit, down)
    assert "".join(sorted({factor(n) for n in found})) == expected.get(name, "AB")
    assert len(found) == 2 * len(expected.get(name, "AB"))


def test_the_steps_are_a_clients_own_and_never_more_than_a_hundred():
    settings = fedvlm.load_config(None, "train.rounds=7", "train.local_steps=4")
    assert _steps(settings, 30) == 28
    assert _steps(fedvlm.load_config(None, "train.rounds=1000"), 30) == 100
    passes = fedvlm.load_config(None, "train.rounds=3", "train.local_epochs=1")
    assert _steps(passes, 30) == 3 * 4


def test_the_command_prints_the_comparison_and_refuses_names_that_are_taken(
    own_run, new_rows, capsys, monkeypatch
):
    words = ("onboard", str(own_run), "--data", str(new_rows / "site.parquet"))
    code, text, errors = call(capsys, monkeypatch, *words, "--steps", "2", "--lr", "0.01")
    assert (code, errors) == (0, "")
    assert "site site" in text, "the site has the name of the file"
    for said in ("before training", "shared model", "trained alone", "personal", "2 steps on"):
        assert said in text
    for name, said in (("site-1", "is a client of the run"), ("site", "has been onboarded")):
        code, _, errors = call(capsys, monkeypatch, *words, "--name", name)
        assert code == 2
        assert said in errors
    code, _, errors = call(capsys, monkeypatch, *words, "--name", "b", "--steps", "0")
    assert code == 2
    assert "--steps 0" in errors


def test_the_rows_need_no_column_that_the_run_was_partitioned_by(own_run, new_rows, tmp_path):
    config = own_run / "config.yaml"
    text = config.read_text().replace("kind: auto", "kind: column")
    config.write_text(text.replace("column: null", "column: site"))
    checkpoint = sealed.read(own_run / "checkpoint.json")
    checkpoint["files"] |= sealed.digests(own_run, ["config.yaml"])
    sealed.write(own_run / "checkpoint.json", checkpoint)
    frame = pd.read_parquet(new_rows / "site.parquet").drop(columns=["site"])
    frame.to_parquet(tmp_path / "bare.parquet", index=False)
    site = fedvlm.onboard(own_run, tmp_path / "bare.parquet", steps=1)
    assert site.table["site"] == "bare"


def test_a_site_that_diverges_leaves_nothing(own_run, new_rows):
    words = ("train.optimizer=sgd", "train.max_grad_norm=null")
    with pytest.raises(FedVLMError, match="diverged"):
        fedvlm.onboard(own_run, new_rows / "site.parquet", *words, name="wild", lr=1e30)
    assert not (own_run / "onboarded").exists()


@pytest.mark.slow
def test_on_sentences_that_people_wrote(shared_data, tmp_path, monkeypatch, capsys):
    """From a run to an export that answers by the code on its card, and to a new site."""
    from fedvlm.data.images import open_image

    frame = pd.read_parquet(shared_data / "statements.parquet")
    frame.iloc[:90].to_parquet(tmp_path / "run.parquet", index=False)
    frame.iloc[600:640].to_parquet(tmp_path / "new.parquet", index=False)
    run = tmp_path / "run"
    words = ("partition.clients=3", "train.rounds=2", "train.local_steps=4", "lora.rank=4")
    words += ("train.finish_steps=4",)
    scored = ("eval.every=0", "eval.max_rows=8", "eval.max_new_tokens=4", "engine.threads=1")
    words += (
        f"model.name={smallest.model()}",
    )  # its tokenizer and its template write a begin token
    fedvlm.run(None, f"data.path={tmp_path / 'run.parquet'}", f"output={run}", *words, *scored)
    adapter = fedvlm.export(run, client="client-1")
    image = tmp_path / "one.png"
    open_image(frame["image"].iloc[700]).save(image)
    question = frame["question"].iloc[700]
    monkeypatch.setattr(sys, "argv", ["-c", str(adapter), str(image), question])
    capsys.readouterr()
    exec(code_on_card(adapter), {"__name__": "__main__"})
    answer = capsys.readouterr().out.strip()
    assert answer == fedvlm.predict(run, image, question, client="client-1")
    site = fedvlm.onboard(run, tmp_path / "new.parquet", steps=8)
    assert site.scores["personal"]["loss"] < site.scores["untuned"]["loss"]
    found = fedvlm.evaluate(run, tmp_path / "new.parquet", clients=["new"])
    assert set(found.scores) == {"new", "untuned"}
