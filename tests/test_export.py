"""Exports load without fedvlm, and answer like the models of the run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import fedvlm
from fedvlm.after import card, export
from fedvlm.after.opened import Opened, open_run
from fedvlm.data.sources import load_rows
from fedvlm.errors import FedVLMError
from fedvlm.models.load import BUNDLED
from fedvlm.store.files import load_tree
from test_cli import call
from test_federate import bytes_of
from test_florence import folder as florence  # noqa: F401 - a fixture

QUESTION = "What is in the picture?"
LOGITS = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, picture, out = sys.argv[1:4]
base = folder
if sys.argv[4] == "adapter":
    base = json.load(open(folder + "/adapter_config.json"))["base_model_name_or_path"]
model = AutoModelForImageTextToText.from_pretrained(base)
if sys.argv[4] == "adapter":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, folder)
processor = AutoProcessor.from_pretrained(base)
image = Image.open(picture).convert("RGB")
inputs = processor(text=["<image>What is it?"], images=[[image]], return_tensors="pt")
with torch.no_grad():
    torch.save(model.eval()(**inputs).logits, out)
print(type(model).__name__)
"""
EACH = """
import contextlib, io, json, sys
said = []
for code, *words in json.load(sys.stdin):
    sys.argv = ["-c", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"__name__": "__main__"})
    said.append(out.getvalue().strip())
assert not [name for name in sys.modules if name.startswith("fedvlm")]
print(json.dumps(said))
"""


def alone(*pieces):
    """Runs pieces of code, each with its words, in one process without our package.

    Returns:
        What each of them prints.
    """
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        input=json.dumps([[str(word) for word in piece] for piece in pieces]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def code_on_card(folder):
    """The code that a model card shows."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def our_logits(run, client, picture):
    """The logits of the run's own model for the same picture and text."""
    opened = open_run(run)
    tree = load_tree(opened.adapter_folder(client) / "adapter_model.safetensors")
    model, processor = opened.write(tree).cpu(), opened.base.processor
    image = Image.open(picture).convert("RGB")
    inputs = processor(text=["<image>What is it?"], images=[[image]], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def exports(finished_run, tmp_path_factory):
    """An adapter and a merged model of one client."""
    to = tmp_path_factory.mktemp("exports")
    return {
        "adapter": fedvlm.export(finished_run, client="site-1", to=to / "adapter"),
        "merged": fedvlm.export(finished_run, client="site-1", merge=True, to=to / "merged"),
    }


@pytest.fixture(scope="module")
def theirs(exports, new_rows, tmp_path_factory):
    """Kind -> the class, the logits and the answer that others get from an export."""
    to, picture = tmp_path_factory.mktemp("theirs"), new_rows / "picture.png"
    outs = {kind: to / f"{kind}.pt" for kind in exports}
    said = alone(
        *((code_on_card(folder), folder, picture, QUESTION) for folder in exports.values()),
        *((LOGITS, folder, picture, outs[kind], kind) for kind, folder in exports.items()),
    )
    answers, names = said[: len(outs)], said[len(outs) :]
    found = zip(outs, names, map(torch.load, outs.values()), answers, strict=True)
    return {kind: more for kind, *more in found}


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_others_load_it_without_fedvlm_and_get_our_outputs(kind, theirs, finished_run, new_rows):
    name, logits, _ = theirs[kind]
    assert name == ("PeftModel" if kind == "adapter" else "Idefics3ForConditionalGeneration")
    picture = new_rows / "picture.png"
    ours = our_logits(finished_run, "site-1", picture)
    assert (logits - ours).abs().max() <= (1e-5 if kind == "adapter" else 1e-4)
    other = our_logits(finished_run, None, picture)
    assert (logits - other).abs().max() > 1e-2, "the global model is another one"


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_code_on_the_card_runs_as_written_and_answers_as_predict_does(
    kind, theirs, finished_run, new_rows
):
    picture = new_rows / "picture.png"
    *_, answer = theirs[kind]
    assert answer == fedvlm.predict(finished_run, picture, QUESTION, client="site-1")


def test_an_adapter_folder_is_what_servers_take(exports):
    folder = exports["adapter"]
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    assert isinstance(config["lora_alpha"], int)
    assert isinstance(config["target_modules"], list)
    base = Path(config["base_model_name_or_path"])
    assert base.is_absolute()
    assert base == BUNDLED["tiny"].resolve()


def test_transformers_loads_base_and_adapter_at_once(exports):
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_pretrained(exports["adapter"])
    saved = load_tree(exports["adapter"] / export.WEIGHTS)
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    assert len(names) == len(saved)


def test_a_merged_model_keeps_its_tied_weights_and_its_processor(exports):
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_pretrained(exports["merged"])
    tied = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert model.generation_config.eos_token_id is not None
    assert hf.AutoProcessor.from_pretrained(exports["merged"]).chat_template


@pytest.mark.slow
def test_an_encoder_decoder_in_a_folder_exports_and_merges(florence, new_rows, tmp_path):  # noqa: F811
    words = ("data.scenes.sites=2", "data.scenes.rows=12", "partition.min_rows=4", "lora.rank=2")
    steps = ("train.rounds=1", "train.local_steps=2", "eval.max_rows=2", "eval.max_new_tokens=3")
    run = tmp_path / "run"
    fedvlm.run({"model": {"name": florence}}, f"output={run}", *words, *steps)
    adapter = fedvlm.export(run, client="site-0")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == florence
    merged = fedvlm.export(run, client="site-0", merge=True)
    picture = new_rows / "picture.png"
    one, other = alone(*((code_on_card(f), f, picture, QUESTION) for f in (adapter, merged)))
    assert one == other


# The card


def test_the_card_is_what_the_hub_reads(exports):
    data = ModelCard.load(exports["adapter"] / "README.md").data
    assert data.base_model == str(BUNDLED["tiny"].resolve())
    assert data.library_name == "peft"
    assert {"lora", "federated-learning"} <= set(data.tags)
    assert data.license is None, "the license is left to the publisher"
    assert ModelCard.load(exports["merged"] / "README.md").data.library_name == "transformers"


@pytest.mark.parametrize(
    "base",
    [
        "org/name",
        "/a folder/größe",
        "no",
        "1e3",
        "a: b # c",
        "- x\n---\nlicense: mit\n",
        "!!set {}",
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_the_name_of_the_base_model_is_text_in_the_card_and_never_syntax(base, merged):
    head = ModelCard(card.front_matter(base, merged=merged)).data.to_dict()
    tags = ["lora", "federated-learning", "vision-language", "fedvlm"]
    assert head == {
        "base_model": base,
        "base_model_relation": "finetune" if merged else "adapter",
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": tags if merged else [f"base_model:adapter:{base}", *tags],
    }


def test_the_card_tells_the_runs_own_numbers(exports, finished_run):
    text = (exports["adapter"] / "README.md").read_text()
    models = fedvlm.Results.read(finished_run).table["models"]
    personal, untuned = (models[m]["clients"]["site-1"]["loss"] for m in ("personal", "untuned"))
    others = [models["personal"]["clients"][c]["loss"] for c in ("site-0", "site-2")]
    for name, loss in (
        ("**personal**", personal),
        ("before training", untuned),
        ("**personal**", sum(others) / 2),
    ):
        assert re.search(rf"^\| {re.escape(name)} \|.* {loss:.3f}( \(.*\))? \|$", text, re.M), name
    for said in (
        "`plora`",
        "| rounds | 2 |",
        "rank 2, alpha 8",
        "all-linear",
        "stayed with the client: A. ",
    ):
        assert said in text
    split = open_run(finished_run).partition.splits["site-1"]
    assert f"{len(split.train)} train" in text


def test_the_card_holds_no_row_of_anyones_data(exports, finished_run):
    text = (exports["adapter"] / "README.md").read_text()
    config = open_run(finished_run).config
    rows = load_rows(config.data, config.seed)
    for column in ("question", "image_path"):
        assert not [v for v in rows[column] if v and v in text]
    assert not [a for a in rows["answer"] if len(a) > 6 and a in text]


def test_the_card_of_the_global_model_has_the_mean_of_all(own_run):
    text = (fedvlm.export(own_run) / "README.md").read_text()
    summary = fedvlm.Results.read(own_run).summary("global", "loss")
    for mean in (summary["mean"], summary["mean_rows"]):
        assert re.search(rf"^\| the global model \|.* {mean:.3f} \(.*\) \|$", text, re.M)
    assert "**Few rows: 3 of 3 clients have fewer than 20 scored rows. These" in text
    assert "site-1" not in text


def test_the_card_of_an_algorithm_without_uploads_says_so(finished_run):
    run = open_run(finished_run)
    run.results.table["bytes"]["bytes_up"]["per_client_round"] = 0
    assert card.what_left(run, "site-1")[0] == "Nothing. Every client trained alone."
    pooled = run.config.algorithm.model_copy(update={"name": "centralized"})
    run.config = run.config.model_copy(update={"algorithm": pooled})
    assert card.what_left(run, "site-1")[0].startswith("All rows.")


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolVLM-256M-Instruct", "some-model"])
def test_a_hub_name_stays_as_it_was_given(name):
    assert export.base_name(name) == name


def test_a_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert export.base_name("model") == str(tmp_path / "model")


# Whole or not at all


def test_the_global_model_of_a_deployed_run_is_exported_without_rows_here(own_run, monkeypatch):
    monkeypatch.setattr(Opened, "deployed", True)
    monkeypatch.setattr(Opened, "partition", None)  # the rows and their partition are at the sites
    text = (fedvlm.export(own_run) / "README.md").read_text()
    assert "| data | at the sites |" in text
    assert "The clients were sites" in text


def test_all_exports_every_client_and_the_global_model(own_run, capsys, monkeypatch):
    before = bytes_of(own_run)
    code, text, errors = call(capsys, monkeypatch, "export", str(own_run), "--all")
    assert (code, errors) == (0, "")
    names = ["site-0", "site-1", "site-2", "global"]
    assert text.split() == [str(own_run / "export" / n) for n in names]
    assert len({(own_run / "export" / n / export.WEIGHTS).read_bytes() for n in names}) == 4
    after = bytes_of(own_run)
    assert {k: after[k] for k in before} == before, "the files of the run do not change"
    code, _, errors = call(capsys, monkeypatch, "export", str(own_run), "--global")
    assert code == 2
    assert "is not empty" in errors


def test_several_exports_go_into_one_folder(own_run, tmp_path):
    made = export.export_many(own_run, clients=("site-0",), global_=True, to=tmp_path / "out")
    assert made == [tmp_path / "out" / "site-0", tmp_path / "out" / "global"]


def test_what_fails_half_way_leaves_nothing(own_run, tmp_path, monkeypatch):
    monkeypatch.setattr(card, "of_run", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fedvlm.export(own_run, client="site-0", to=tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_merge_that_changes_the_answers_is_refused(own_run, monkeypatch):
    monkeypatch.setitem(export.TOLERANCE, "float32", -1.0)
    with pytest.raises(FedVLMError, match=r"logits of the merged .* differ from the adapter's"):
        fedvlm.export(own_run, client="site-0", merge=True)
    assert list((own_run / "export").iterdir()) == []


def test_an_export_without_a_choice_says_what_there_is(own_run, capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, "export", str(own_run))
    assert code == 2
    assert "--client NAME (site-0, site-1, site-2)" in errors
