"""Every model family, from load to reload, on tiny models of their real classes.

The outcomes are a table: ``make families`` writes it to docs/families.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import tempfile

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from PIL import Image

import families
import fedvlm
from fedvlm.after.asked import Asked
from fedvlm.after.inputs import from_images
from fedvlm.after.opened import open_run
from fedvlm.algorithms.ending import without
from fedvlm.batches.collate import Collator
from fedvlm.batches.objectives import IGNORE, answer_nll, sft_terms
from fedvlm.data.sources import load_rows
from fedvlm.engines.continued import continued, reading
from fedvlm.errors import FedVLMError
from fedvlm.models import lora
from fedvlm.models.frozen import ImageFeatures
from fedvlm.models.generate import greedy
from fedvlm.models.load import load_model
from fedvlm.settings.sections import LoraConfig, ModelConfig
from fedvlm.store.files import load_tree
from fedvlm.store.run import Store
from fedvlm.tree import factor, module

pytestmark = pytest.mark.parametrize("family", families.FAMILIES)

RANDOM = np.random.default_rng(0)


def noise(width, height):
    return Image.fromarray(RANDOM.integers(0, 255, (height, width, 3), dtype=np.uint8))


ROWS = [
    {
        "image": noise(64, 64),
        "question": "What colour is it?",
        "answer": "dark red",
        "rejected": "blue",
    },
    {
        "image": noise(40, 90),
        "question": "Say: a rather long sentence.",
        "answer": "a rather long sentence, with größe.",
        "rejected": "no",
    },
]


@functools.lru_cache(maxsize=2)
def loaded(family):
    return load_model(ModelConfig(name=families.folder(family), device="cpu"))


@functools.lru_cache(maxsize=2)
def collator(family):
    return Collator(ROWS, loaded(family), pairs=True)


@functools.lru_cache(maxsize=2)
def ran(family, objective="sft"):
    """One round of plora with three clients, from the family's folder alone."""
    return fedvlm.run(
        {
            "output": tempfile.mkdtemp(prefix=f"{family}-run-") + "/run",
            "model": {"name": families.folder(family), "device": "cpu"},
            "data": {"scenes": {"sites": 3, "rows": 8}},
            "partition": {"min_rows": 4},
            "algorithm": {"name": "plora"},
            "lora": {"rank": 2, "target": "all-linear"},
            "objective": {"name": objective},
            "train": {"rounds": 1, "local_steps": 2, "batch_size": 2, "lr": 0.01},
            "eval": {"max_rows": 2, "max_new_tokens": 4},
        }
    )


def decoder_only(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def test_load(family):
    """The prompt has the question and the image. The labels are the answer and its end."""
    model, batches = loaded(family).model.eval(), collator(family)
    prompter, tokenizer = batches.prompter, batches.tokenizer
    for index, row in enumerate(ROWS):
        features = batches.features(index)
        assert row["question"] in tokenizer.decode(features.prompt)
        if prompter.image_id is not None:
            assert (features.prompt == prompter.image_id).sum() > 1
        for answer, role in zip(features.answers, ("answer", "rejected"), strict=True):
            assert int(answer[-1]) in prompter.ends
            assert not prompter.ends & set(answer[:-1].tolist())
            assert tokenizer.decode(answer, skip_special_tokens=True).strip() == row[role]
    batch = Collator(ROWS, loaded(family)).training([0, 1])
    labels = [row[row != IGNORE].tolist() for row in batch["labels"]]
    assert labels == [batches.features(i).answers[0].tolist() for i in (0, 1)]
    logits = model(**batch).logits
    assert logits.isfinite().all()
    grey = {**batch, "pixel_values": torch.full_like(batch["pixel_values"], 0.1)}
    assert not torch.allclose(model(**grey).logits, logits, atol=1e-3), "it looks at the image"


@torch.no_grad()
def test_loss(family):
    """The loss is the model's own cross-entropy on the answer. Padding does not change it."""
    model, batches = loaded(family).model.train(), Collator(ROWS, loaded(family))
    batch = batches.training([0, 1])
    noisy, ours = sft_terms(model, batch), sft_terms(model.eval(), batch)
    assert noisy.loss.tolist() == ours.loss.tolist(), "the frozen base has no dropout"
    theirs = model(**batch).loss
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    alone = [answer_nll(model, batches.training([i]))[0].item() for i in (0, 1)]
    assert ours.loss.tolist() == pytest.approx(alone, rel=1e-4)
    swapped = answer_nll(model, batches.training([1, 0]))[0]
    assert swapped.tolist() == pytest.approx(alone[::-1], rel=1e-4)
    # The last token of the answer changes: only its own probability may.
    one = batches.training([1])
    last = int((one["labels"][0] != IGNORE).nonzero()[-1])
    other = {k: v.clone() for k, v in one.items()}
    other["labels"][0, last] = 42
    if not batches.seq2seq:
        other["input_ids"][0, last] = 42
    cut = {k: v.clone() for k, v in other.items()}
    one["labels"][0, last] = cut["labels"][0, last] = IGNORE
    assert answer_nll(model, one)[0].item() == pytest.approx(
        answer_nll(model, cut)[0].item(), rel=1e-5
    )
    assert answer_nll(model, other)[0].item() != pytest.approx(alone[1], rel=1e-4)


ONE = ("blip-2", "blip-2-t5", "florence2", "git")  # families of one picture a question


@torch.no_grad()
def test_several(family, record_property):
    """A model sees all pictures of a row in their order, alone and in a batch; or it refuses."""
    one, three = [noise(64, 64)], [noise(64, 30)] * 3
    two = [*one, noise(40, 90)]
    rows = from_images([one, two, two[::-1], one[0], three], "What changed?")
    batches = Collator(rows.add_column("answer", ["the colour"] * 5), loaded(family))
    if family in ONE:
        record_property("cell", "one only")
        found = batches.check(0, lambda *_: None, lambda *_: None)
        assert list(found) == [1, 2, 4]
        assert found[4].startswith("there are 3 pictures, but the prompt of ")
        assert f"(family '{batches.prompter.family}') has a place for one" in found[4]
        with pytest.raises(FedVLMError, match="row 1: there are 2 pictures"):
            batches.features(1)
        return
    model = loaded(family).model.eval()
    alone = [sft_terms(model, batches.training([row])).loss.item() for row in range(5)]
    assert alone[0] == alone[3], "a list of one picture is the picture"
    assert len({round(loss, 5) for loss in alone}) == 4
    first, both = (batches.picture(row)["pixel_values"].flatten() for row in (0, 1))
    assert torch.equal(first[: 3 * families.SIDE**2], both[: 3 * families.SIDE**2])
    images = ImageFeatures(model, batches.picture, 1 << 28)
    assert images.usable(4)
    for order, kept in (([0, 1, 2, 3, 4], False), ([4, 0, 2, 1], True)):
        with images.given(order) if kept else contextlib.nullcontext():
            found = sft_terms(model, batches.training(order)).loss.tolist()
        assert found == pytest.approx([alone[row] for row in order], rel=1e-5)


@torch.no_grad()
def test_generate(family):
    """A batch decodes as its single rows do. The first token has the largest training logit."""
    model, batches = loaded(family).model.eval(), Collator(ROWS, loaded(family))
    tokenizer = batches.tokenizer
    together = greedy(model, batches.prompts([0, 1]), tokenizer, 8)
    alone = [greedy(model, batches.prompts([i]), tokenizer, 8)[0] for i in (0, 1)]
    assert together == alone
    assert together[0] != together[1]
    if not batches.seq2seq:
        for index in (0, 1):
            batch = batches.training([index])
            start = int((batch["labels"][0] != IGNORE).nonzero()[0]) - batch["labels"].shape[1] - 1
            first = model(**decoder_only(batch)).logits[0, start].argmax()
            ids = model.generate(**batches.prompts([index]), do_sample=False, max_new_tokens=1)
            assert ids[0, -1] == first


SLOW = ("blip-2", "blip-2-t5", "florence2", "git")  # families that write every answer anew


@torch.no_grad()
def test_continued(family, monkeypatch):
    """A model writes on, after the losses, what it would generate; rows that have ended leave."""
    model, batches = loaded(family).model.eval(), Collator(ROWS, loaded(family))
    for part in (model.config.get_text_config(), *model.modules()):
        if getattr(part, "sliding_window", None):
            monkeypatch.setattr(part, "sliding_window", 4096)  # gemma3's ends within the prompt
    most, rows, ends = 8, range(len(ROWS)), batches.prompter.ends
    prompts = batches.prompts(rows)
    out = model.generate(
        **prompts,
        do_sample=False,
        max_new_tokens=most,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generated = out.sequences[:, -len(out.logits) :].tolist()
    for row, agreed in zip(rows, (5, 1), strict=True):  # number of right tokens
        ids = [i for i in generated[row][:agreed] if i not in ends] + [42, batches.prompter.end]
        changed = dataclasses.replace(batches.features(row), answers=(torch.tensor(ids),))
        monkeypatch.setitem(batches._kept, row, changed)
    with reading(model, most) as read:
        leads = sft_terms(model, batches.training(rows)).lead.tolist()
    assert bool(read) == (family not in SLOW)
    if not read:
        return
    steps = []
    hook = model.register_forward_hook(lambda *given: steps.append(given[-1].logits[:, -1]))
    answers = [batches.features(row).answers[0] for row in rows]
    found = continued(model, read[0], answers, leads, rows, most)
    hook.remove()
    for said, right in zip(found, generated, strict=True):
        assert said == right[: len(said)]
        assert len(said) == most or said[-1] in ends
    left = [len(said) - lead - 1 for said, lead in zip(found, leads, strict=True)]
    assert list(map(len, steps)) == [sum(n > step for n in left) for step in range(max(left))]
    for step in range(left[1]):
        assert torch.allclose(steps[step][-1], out.logits[leads[1] + 1 + step][1], atol=1e-4)


@pytest.mark.parametrize("preset", lora.PRESETS)
def test_lora(family, preset):
    """A preset adapts the linear layers of its parts, without the layers that get no gradient."""
    model, batches = copy.deepcopy(loaded(family).model), collator(family)
    batch = Collator(ROWS, loaded(family)).training([0])
    config = LoraConfig(rank=2, target=preset)
    if (family, preset) == ("gemma3", "projector"):  # a bare parameter, not a linear layer
        with pytest.raises(FedVLMError, match="'projector' matches none of the model's"):
            lora.attach(model, config, seed=0)
        return
    adapted = lora.attach(model, config, seed=0)
    wanted = {module(name) for name in lora.handles(adapted)}
    adapted = lora.drop_dead(adapted, config, 0, lambda m: sft_terms(m, batch).mean())
    found = {module(name) for name in lora.handles(adapted)}
    parts = {lora.part(name) for name in found}
    assert parts <= lora.PRESETS[preset]
    assert parts == {lora.part(name) for name in wanted}
    dead = wanted - found
    if family in ("llava", "llava_next") and "vision" in lora.PRESETS[preset]:
        assert dead == {name for name in wanted if "vision_tower" in name and ".layers.2." in name}
    else:
        assert not dead
    sft_terms(adapted.train(), batch).mean().backward()
    after = lora.handles(adapted)
    assert all(p.grad is not None for p in after.values())
    moved = [n for n, p in after.items() if factor(n) == "B" and p.grad.abs().max() > 0]
    assert len(moved) > 0.9 * len(found), "almost every layer learns"
    assert batches.seq2seq == bool(adapted.config.is_encoder_decoder)


def test_sft_round(family):
    """One round of three clients: B is shared, every A is personal."""
    results = ran(family)
    assert len(results.scores()) == 3
    server = load_tree(next((results.folder / "server").glob("*.safetensors")))
    assert {factor(name) for name in server} == {"B"}
    kept = Store(results.folder).personal(list(results.scores()))
    assert len(kept) == 3
    assert all({factor(name) for name in without(mine)} == {"A"} for mine in kept)
    assert any((kept[0][n] != kept[1][n]).any() for n in kept[0])
    untuned, personal = (results.scores(m, "loss") for m in ("untuned", "personal"))
    assert all(personal[c] != untuned[c] for c in untuned)


def test_dpo_round(family):
    """One round on chosen and rejected answers. The untuned model is its own reference."""
    results = ran(family, "dpo")
    assert results.metric == "reward_accuracy"
    assert set(results.scores("untuned", "reward_margin").values()) == {0.0}
    assert results.scores("untuned", "loss").values() == pytest.approx([0.6931472] * 3, abs=1e-6)
    assert any(m != 0.0 for m in results.scores("personal", "reward_margin").values())


def test_reload(family):
    """Plain PEFT on the model from transformers answers like the run."""
    results = ran(family)
    config = fedvlm.load_config(results.folder / "config.yaml")
    base = hf.AutoModelForImageTextToText.from_pretrained(families.folder(family))
    model = peft.PeftModel.from_pretrained(base, str(results.adapter("site-1"))).eval()
    answers = [a for a in results.answers() if a["client"] == "site-1"]
    rows, batches = [a["row"] for a in answers], Collator(load_rows(config.data), loaded(family))
    texts = greedy(model, batches.prompts(rows), batches.tokenizer, 4)
    assert texts == [a["prediction"] for a in answers]
    with torch.no_grad():
        terms = sft_terms(model, batches.training(rows))
    found = (terms.loss / terms.weight).tolist()
    assert found == pytest.approx([a["loss"] for a in answers], rel=1e-4)


def test_export(family):
    """Transformers alone loads the merged model, and it answers as the run did."""
    results = ran(family)
    adapter = fedvlm.export(results.folder, client="site-1")
    assert {p.name for p in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    merged = fedvlm.export(results.folder, client="site-1", merge=True)
    model = hf.AutoModelForImageTextToText.from_pretrained(merged).eval()
    config = fedvlm.load_config(results.folder / "config.yaml")
    answers = [a for a in results.answers() if a["client"] == "site-1"]
    rows = [a["row"] for a in answers]
    batches = Collator(load_rows(config.data), load_model(ModelConfig(name=str(merged))))
    texts = greedy(model.to(batches.device), batches.prompts(rows), batches.tokenizer, 4)
    assert texts == [a["prediction"] for a in answers]


def test_models_that_share_a_pass_answer_as_each_of_them_alone(family):
    run = open_run(ran(family).folder, "eval.max_new_tokens=4")
    asked, question = Asked(run), "What colour is it?"
    for image in (noise(64, 64), noise(40, 90)):
        together = asked.ask(image, question, asked.models).replies
        alone = [asked.ask(image, question, [name]).replies[0] for name in asked.models]
        assert [r.answer for r in together] == [r.answer for r in alone]
        confidences = [r.confidence for r in alone]
        assert [r.confidence for r in together] == pytest.approx(confidences, abs=1e-5)
        models = run.chosen(global_=True, untuned=True, every=True)
        texts = run.answers(from_images([image], question), models)
        assert {r.model: [r.answer] for r in together} == texts
