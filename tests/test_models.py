"""The frozen model: loading, layers with LoRA, losses on the answer alone, decoding."""

import copy

import peft
import pytest
import torch
from PIL import Image

from fedvlm.batches.collate import Collator
from fedvlm.batches.objectives import IGNORE, answer_nll, sft_terms
from fedvlm.errors import FedVLMError
from fedvlm.models import lora
from fedvlm.models.generate import greedy
from fedvlm.models.load import load_model
from fedvlm.settings.sections import LoraConfig, ModelConfig
from fedvlm.tree import digest, factor

ROWS = [
    {"image": Image.new("RGB", (64, 64), "red"), "question": "What colour is it?", "answer": "red"},
    {
        "image": Image.new("RGB", (40, 90), "blue"),
        "question": "Say: a rather long sentence, with größe and 日本.",
        "answer": "a rather long sentence, with größe and 日本.",
    },
]


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelConfig())


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded.model)


@pytest.fixture(scope="module")
def collator(loaded):
    return Collator(ROWS, loaded)


def test_the_labels_cover_the_answer_and_its_end_and_nothing_else(collator):
    batch = collator.training([0, 1])
    tokenizer = collator.tokenizer
    for row, labels in zip(ROWS, batch["labels"], strict=True):
        scored = labels[labels != IGNORE]
        assert scored[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(scored[:-1]).strip() == row["answer"]
    same = batch["labels"] != IGNORE
    assert (batch["input_ids"][same] == batch["labels"][same]).all()


def test_the_training_text_is_the_chat_templates_own(loaded, collator):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    prompt = collator.prompter.prompt_text("What?")
    whole = loaded.processor.apply_chat_template(turns)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].startswith("red")


def test_the_loss_is_the_models_own(loaded, collator):
    loaded.model.eval()
    batch = collator.training([0, 1])
    with torch.no_grad():
        theirs = loaded.model(**batch).loss
        ours = sft_terms(loaded.model, batch).mean()
        nll, tokens, doubt = answer_nll(loaded.model, batch)
        alone = [answer_nll(loaded.model, collator.training([i]))[0].item() for i in (0, 1)]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert tokens.tolist() == (batch["labels"] != IGNORE).sum(1).tolist()
    assert nll.tolist() == pytest.approx(alone, rel=1e-4), "padding changes nothing"
    with torch.no_grad():
        logits = loaded.model(**batch).logits[:, :-1].double()
    labels = batch["labels"][:, 1:]
    right = logits.softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(labels != IGNORE, 1 - right, 0.0).sum(1)
    assert doubt.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert 0 < doubt.sum() < tokens.sum()


def test_decoding_in_a_batch_equals_decoding_alone(loaded, collator):
    loaded.model.eval()
    together = greedy(loaded.model, collator.prompts([0, 1]), collator.tokenizer, 12)
    alone = [greedy(loaded.model, collator.prompts([i]), collator.tokenizer, 12)[0] for i in (0, 1)]
    assert together == alone
    assert all(together)


@pytest.mark.parametrize("target", [*lora.PRESETS, "q_proj", r"text_model\.layers\.[01]\."])
def test_presets_and_patterns_adapt_the_parts_they_name(model, target):
    adapted = lora.attach(model, LoraConfig(rank=2, alpha=4, target=target), seed=0)
    parts = {lora.part(n) for n in lora.handles(adapted)}
    expected = lora.PRESETS.get(target, {"vision", "language"} if "q_proj" in target else None)
    assert parts == (expected or {"language"})
    assert all(factor(n) in "AB" for n in lora.handles(adapted))


def test_the_output_embedding_is_never_adapted(model):
    assert not any("lm_head" in n for n in lora.targets(model, "all-linear"))


def test_the_initial_adapter_is_a_function_of_the_seed_and_changes_nothing(model, collator):
    torch.manual_seed(1)
    first = lora.read(lora.handles(lora.attach(copy.deepcopy(model), LoraConfig(), seed=3)))
    torch.manual_seed(2)
    adapted = lora.attach(copy.deepcopy(model), LoraConfig(), seed=3)
    assert digest(first) == digest(lora.read(lora.handles(adapted)))
    assert all((t == 0).all() for n, t in first.items() if factor(n) == "B")
    other = lora.read(lora.handles(lora.attach(copy.deepcopy(model), LoraConfig(), seed=4)))
    assert digest(first) != digest(other)
    batch = collator.training([0, 1])
    with torch.no_grad():
        plain = sft_terms(model.eval(), batch).mean()
        assert sft_terms(adapted.eval(), batch).mean().item() == pytest.approx(
            plain.item(), abs=1e-6
        )


def test_a_saved_adapter_loads_with_peft_alone(model, collator, tmp_path):
    base = copy.deepcopy(model)
    adapted = lora.attach(model, LoraConfig(rank=3, rslora=True), seed=0)
    g = torch.Generator().manual_seed(0)
    tree = {n: torch.randn(p.shape, generator=g) * 0.1 for n, p in lora.handles(adapted).items()}
    lora.write(lora.handles(adapted), tree)
    lora.save_adapter(adapted, tree, tmp_path)
    again = peft.PeftModel.from_pretrained(base, str(tmp_path))
    batch = collator.training([0, 1])
    with torch.no_grad():
        ours = sft_terms(adapted.eval(), batch).mean().item()
        assert sft_terms(again.eval(), batch).mean().item() == pytest.approx(ours, rel=1e-5)
    assert digest(lora.read(lora.handles(again))) == digest(tree)


def test_a_pattern_without_a_match_shows_the_layers_that_exist(model):
    with pytest.raises(FedVLMError, match=r"(?s)'q_projj' matches none.*\*\.self_attn\.q_proj"):
        lora.targets(model, "q_projj")
    with pytest.raises(FedVLMError, match="regular expression"):
        lora.targets(model, "(")


def test_a_rank_larger_than_a_layer_names_the_layer(model):
    with pytest.raises(FedVLMError, match=r"lora\.rank: 4096 is larger than .*->"):
        lora.attach(model, LoraConfig(rank=4096), seed=0)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./no/such/folder", "no model folder"),
        ("someone/some-model", "where there is a connection"),
        ("nothing-of-that-name", "where there is a connection"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_to_do(name, said):
    with pytest.raises(FedVLMError, match=said):
        load_model(ModelConfig(name=name))


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FedVLMError, match="does not load as a vision-language model"):
        load_model(ModelConfig(name=str(tmp_path)))


def test_a_device_that_is_not_there_is_named():
    with pytest.raises(FedVLMError, match="'cuda:99' cannot be used"):
        load_model(ModelConfig(device="cuda:99"))
    with pytest.raises(FedVLMError, match="'gpu' cannot be used"):
        load_model(ModelConfig(device="gpu"))
