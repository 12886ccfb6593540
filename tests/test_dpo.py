"""Direct preference optimization: the loss of TRL on the same pairs, and a run that learns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F

import fedvlm
from fedvlm.batches import objectives
from fedvlm.batches.collate import Collator
from fedvlm.errors import ConfigError
from fedvlm.models import lora
from fedvlm.models.load import load_model
from fedvlm.settings.sections import LoraConfig, ModelConfig, ObjectiveConfig

BETA = 0.3


@pytest.fixture(scope="module")
def tuned():
    """The bundled model with an adapter that is not zero, its rows and their batch of pairs."""
    loaded = load_model(ModelConfig(device="cpu"))
    model = lora.attach(loaded.model, LoraConfig(rank=4, target="language"), seed=0)
    torch.manual_seed(0)
    for p in lora.handles(model).values():
        torch.nn.init.normal_(p, std=0.05)
    source = fedvlm.scenes(sites=2, rows=6, strength=1.0)
    rows = [{**row, "answer": row["chosen"]} for row in source]
    return loaded, model.eval(), rows, Collator(rows, loaded, pairs=True)


def ours(tuned, indices, **settings):
    _, model, _, collator = tuned
    objective = objectives.build(ObjectiveConfig(name="dpo", beta=BETA, **settings))
    with torch.no_grad():
        return objective.terms(model, collator.training(indices))


def trls(tuned, indices, tmp_path, loss_type, swap=False):
    """One evaluation step of TRL's trainer on the same pictures, questions and answers."""
    trl = pytest.importorskip("trl")
    import datasets

    loaded, model, rows, _ = tuned
    roles = ("rejected", "chosen") if swap else ("chosen", "rejected")
    data = datasets.Dataset.from_list(
        [
            {
                "images": [rows[i]["image"]],
                "prompt": [{"role": "user", "content": rows[i]["question"]}],
                "chosen": [{"role": "assistant", "content": rows[i][roles[0]]}],
                "rejected": [{"role": "assistant", "content": rows[i][roles[1]]}],
            }
            for i in indices
        ]
    )
    settings = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        loss_type=loss_type,
        per_device_train_batch_size=len(indices),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
    )
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        args=settings,
        train_dataset=data,
        processing_class=loaded.processor,
    )
    # TRL uses a given adapter as the reference; without this copy, it uses the base model.
    trainer.model.delete_adapter("ref")
    batch = trainer.data_collator([dict(row) for row in data])
    with torch.no_grad():
        return trainer.compute_loss(trainer.model.eval(), batch).item()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_loss_is_trls(tuned, tmp_path, loss):
    indices = list(range(6))
    mine = ours(tuned, indices, loss=loss).mean().item()
    assert mine == pytest.approx(trls(tuned, indices, tmp_path, loss), abs=1e-4)
    assert abs(mine - (math.log(2) if loss == "sigmoid" else (1 / (2 * BETA)) ** 2)) > 1e-3


def test_label_smoothing_mixes_in_the_loss_of_the_swapped_pairs(tuned, tmp_path):
    indices = list(range(6))
    straight, swapped = (trls(tuned, indices, tmp_path, "sigmoid", swap) for swap in (False, True))
    mine = ours(tuned, indices, label_smoothing=0.2).mean().item()
    assert mine == pytest.approx(0.8 * straight + 0.2 * swapped, abs=1e-4)


def test_rewards_are_log_ratios_to_the_model_with_its_adapter_off(tuned):
    _, model, _, collator = tuned
    batch = collator.training([0, 3, 5])
    with torch.no_grad():
        policy, *_ = objectives.answer_nll(model, batch)
        with model.disable_adapter():
            reference, *_ = objectives.answer_nll(model, batch)
    rewards = BETA * (reference - policy)
    terms = ours(tuned, [0, 3, 5])
    margin = rewards[:3] - rewards[3:]
    assert terms.metrics["reward_margin"].tolist() == pytest.approx(margin.tolist(), abs=1e-5)
    assert terms.metrics["reward_accuracy"].tolist() == [float(m > 0) for m in margin]
    assert terms.doubt.tolist() == pytest.approx(torch.sigmoid(-margin).tolist())
    assert terms.loss.tolist() == pytest.approx((-F.logsigmoid(margin)).tolist(), abs=1e-5)
    assert margin.abs().min() > 1e-3


def test_the_reference_gets_no_gradient_and_the_adapter_does(tuned):
    _, model, _, collator = tuned
    objective = objectives.build(ObjectiveConfig(name="dpo"))
    objective.terms(model.train(), collator.training([0, 1])).mean().backward()
    grads = [p.grad for p in lora.handles(model).values()]
    assert all(g is not None and g.abs().max() > 0 for g in grads)
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)
    model.zero_grad()
    model.eval()


def test_a_federated_run_learns_the_preferences(small):
    small["objective"] = {"name": "dpo", "beta": 0.5}
    small["train"] |= {"rounds": 2, "local_steps": 6, "lr": 0.01}
    small["data"]["scenes"] |= {"rows": 24}
    small["eval"] |= {"every": 0, "max_rows": 4}
    results = fedvlm.run(small)
    assert results.metric == "reward_accuracy"
    assert results.metrics[0] == "reward_accuracy"
    assert results.summary("untuned")["mean"] == 0.5, "the reference itself: all pairs tie"
    assert results.summary("personal")["mean"] >= 0.75
    margins = results.scores("personal", "reward_margin")
    assert all(m > 0.1 for m in margins.values())
    assert results.summary("personal", "loss")["mean"] < math.log(2)


def test_settings_without_a_meaning_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        fedvlm.load_config({"objective": {"name": "dpo", "loss": "ipo", "label_smoothing": 0.1}})
    assert "label_smoothing=0.1 has no meaning for loss=ipo" in str(caught.value)
    with pytest.raises(ConfigError, match=r"it needs objective\.name=dpo"):
        fedvlm.load_config({"eval": {"metric": "reward_accuracy"}})
