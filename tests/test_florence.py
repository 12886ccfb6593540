"""The encoder-decoder path: a tiny random Florence-2, from a folder that transformers wrote."""

import copy
import dataclasses

import peft
import pytest
import torch
import transformers as hf
from tokenizers.processors import TemplateProcessing
from torch import nn

import fedvlm
from fedvlm.batches.collate import Collator
from fedvlm.batches.objectives import IGNORE, answer_nll, sft_terms
from fedvlm.config import load
from fedvlm.models import lora
from fedvlm.models.generate import greedy
from fedvlm.models.load import ASSETS, load_model
from fedvlm.rounds.prepare import prepare
from fedvlm.settings.sections import LoraConfig, ModelConfig
from test_models import ROWS

VISION = {"depths": (1,) * 4, "embed_dim": (16, 16, 32, 32), "window_size": 4, "projection_dim": 64}
HEADS = {"num_heads": (2,) * 4, "num_groups": (2,) * 4}
SIZES = {"d_model": 64, "max_position_embeddings": 256, "init_std": 0.3}
LAYERS = {"layers": 2, "attention_heads": 4, "ffn_dim": 128}
BART = {f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in LAYERS.items()}
ENDS = {"eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": 1}
IDS = {"pad_token_id": 0, "bos_token_id": 3, **ENDS}

NAMES = {
    "language": ("language_model.encoder", "language_model.decoder"),
    "vision": ("vision_tower",),
    "projector": ("multi_modal_projector",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 0.4 M parameters with its processor, and the bundled tokenizer."""
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(ASSETS / "tiny" / "tokenizer.json"),
        bos_token="<|assistant|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = {"height": 64, "width": 64}
    pictures = hf.CLIPImageProcessorPil(size=side, crop_size=side)
    pictures.image_seq_length = 5  # a 2 x 2 grid of features and their mean
    text = {"model_type": "bart", "vocab_size": len(tokenizer), **SIZES, **BART, **IDS}
    image = {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config = hf.Florence2Config(vision_config=VISION | HEADS, text_config=text, **image, **IDS)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("florence")
    hf.Florence2ForConditionalGeneration(config).save_pretrained(path)
    hf.Florence2Processor(pictures, tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(ModelConfig(name=folder, device="cpu"))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded.model.eval()


@pytest.fixture(scope="module")
def collator(loaded):
    return Collator(ROWS, loaded)


def test_the_labels_are_the_answer_and_its_end_and_the_input_is_the_prompt(collator):
    batch, tokenizer = collator.training([0, 1]), collator.tokenizer
    for row, ids, labels in zip(ROWS, batch["input_ids"], batch["labels"], strict=True):
        answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
        assert labels[labels != IGNORE].tolist() == [*answer, tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["question"]
    prompts = collator.prompts([0, 1])
    assert all((batch[k] == v).all() for k, v in prompts.items())
    assert batch.keys() - prompts.keys() == {"labels"}


def test_a_tokenizer_that_marks_begin_and_end_itself_gets_no_second_end(loaded, collator):
    processor = copy.deepcopy(loaded.processor)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|assistant|> $A <|end|>", special_tokens=[("<|assistant|>", 3), ("<|end|>", 1)]
    )
    marked = Collator(ROWS, dataclasses.replace(loaded, processor=processor)).training([1])
    plain = collator.training([1])
    assert marked["labels"].tolist() == [[3, *plain["labels"][0].tolist()]]
    assert marked["input_ids"].tolist() == plain["input_ids"].tolist()


@torch.no_grad()
def test_the_loss_is_the_models_own_and_padding_changes_nothing(model, collator):
    batch = collator.training([0, 1])
    nll, tokens, _ = answer_nll(model, batch)
    assert sft_terms(model, batch).mean().item() == pytest.approx(
        model(**batch).loss.item(), rel=1e-5
    )
    assert tokens.tolist() == (batch["labels"] != IGNORE).sum(1).tolist()
    alone = [answer_nll(model, collator.training([i]))[0].item() for i in (0, 1)]
    assert nll.tolist() == pytest.approx(alone, rel=1e-4)


def test_decoding_in_a_batch_equals_decoding_alone(model, collator):
    together = greedy(model, collator.prompts([0, 1]), collator.tokenizer, 12)
    alone = [greedy(model, collator.prompts([i]), collator.tokenizer, 12)[0] for i in (0, 1)]
    assert together == alone
    assert all(together)
    assert together[0] != together[1], "the model looks at its input"


@pytest.mark.parametrize("target", lora.PRESETS)
def test_presets_take_all_linear_layers_of_their_parts_and_no_other(model, target):
    prefixes = tuple(f"model.{name}." for p in lora.PRESETS[target] for name in NAMES[p])
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = lora.targets(model, target)
    assert set(found) == {n for n in linear if n.startswith(prefixes)}
    assert all(any(n.startswith(p) for n in found) for p in prefixes)
    assert model.get_output_embeddings() not in [model.get_submodule(n) for n in found]
    adapted = lora.attach(copy.deepcopy(model), LoraConfig(rank=2, target=target), seed=0)
    assert all(p.dim() == 2 for p in lora.handles(adapted).values()), "no convolution"


def test_a_run_ends_with_adapters_that_plain_peft_loads(folder, tmp_path):
    config = {
        "output": str(tmp_path / "run"),
        "model": {"name": folder, "device": "cpu"},
        "data": {"scenes": {"sites": 2, "rows": 16}},
        "partition": {"min_rows": 4},
        "algorithm": {"name": "plora"},
        "lora": {"rank": 2, "target": "all-linear"},
        "train": {"rounds": 1, "local_steps": 1, "lr": 0.01},
        "eval": {"max_rows": 3, "max_new_tokens": 4},
    }
    results = fedvlm.run(config)
    engine, partition, _ = prepare(load(config, f"output={tmp_path / 'again'}"))
    for site, loss in results.scores("personal", "loss").items():
        base = hf.AutoModelForImageTextToText.from_pretrained(folder)
        again = peft.PeftModel.from_pretrained(base, str(results.adapter(site))).eval()
        batch = engine.collator.training(partition.splits[site].test[:3])
        with torch.no_grad():
            assert sft_terms(again, batch).mean().item() == pytest.approx(loss, rel=1e-5)
            with again.disable_adapter():
                untuned = sft_terms(again, batch).mean().item()
        assert untuned == pytest.approx(results.scores("untuned", "loss")[site], rel=1e-5)
        assert untuned != pytest.approx(loss, rel=1e-4)
