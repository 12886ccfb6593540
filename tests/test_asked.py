"""Many models of a run answer in one pass, as each of them alone."""

import pytest
import torch

from fedvlm.after.asked import Asked
from fedvlm.after.inputs import from_images
from fedvlm.after.opened import open_run
from fedvlm.after.predict import predict_many
from fedvlm.data.images import open_image
from fedvlm.errors import DataError, FedVLMError
from fedvlm.models import generate

QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def asked(finished_run):
    return Asked(open_run(finished_run))


@pytest.fixture(scope="module")
def pictures(new_rows):
    """Pictures of several rows, as bytes."""
    import pandas as pd

    return [image["bytes"] for image in pd.read_parquet(new_rows / "site.parquet")["image"][:5]]


def counted(monkeypatch):
    """The number of rows of each pass."""
    passes = []
    real = generate._generated
    monkeypatch.setattr(
        generate,
        "_generated",
        lambda model, batch, *rest: (
            passes.append(len(batch["input_ids"])) or real(model, batch, *rest)
        ),
    )
    return passes


def test_answers_equal_those_of_predict_in_one_pass_a_picture(
    asked, finished_run, new_rows, pictures, monkeypatch
):
    table = predict_many(finished_run, new_rows / "site.parquet", QUESTION, every=True)
    passes = counted(monkeypatch)
    found = [asked.ask(picture, QUESTION, asked.models) for picture in pictures]
    assert passes == [5] * len(pictures)
    for replies, row in zip(found, table.rows, strict=False):
        assert {r.model: r.answer for r in replies.replies} == {m: row[m] for m in table.models}
        assert replies.seconds > 0
    assert len({r.answer for replies in found for r in replies.replies}) > 1


def one_by_one(run, tree, picture):
    """The answer's confidence, from one forward pass over the prompt for every token."""
    model = run.write(tree)
    collator = run.collator(from_images([picture], QUESTION, run.config.data))
    batch = collator.prompts([0])
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    logs = []
    with torch.no_grad():
        while len(logs) < run.config.eval.max_new_tokens:
            scores = model(**batch).logits[0, -1].float().log_softmax(0)
            token = scores.argmax()
            logs.append(scores[token])
            if int(token) in ends:
                break
            batch["input_ids"] = torch.cat([batch["input_ids"], token.view(1, 1)], 1)
            mask = batch["attention_mask"]
            batch["attention_mask"] = torch.cat([mask, mask.new_ones(1, 1)], 1)
    return torch.stack(logs).mean().exp().item()


def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities(
    asked, finished_run, pictures
):
    run = open_run(finished_run)
    trees = run.chosen(global_=True, untuned=True, every=True)
    for picture in pictures[:3]:
        for reply in asked.ask(picture, QUESTION, asked.models).replies:
            slow = one_by_one(run, trees[reply.model], picture)
            assert reply.confidence == pytest.approx(slow, abs=1e-5), reply


def test_many_models_take_several_passes_with_the_same_answers(
    asked, finished_run, pictures, monkeypatch
):
    narrow = Asked(open_run(finished_run), width=2)
    passes = counted(monkeypatch)
    found = narrow.ask(pictures[0], QUESTION, narrow.models)
    assert passes == [2, 2, 1]
    together = asked.ask(pictures[0], QUESTION, asked.models)
    assert [r.answer for r in found.replies] == [r.answer for r in together.replies]
    for one, other in zip(found.replies, together.replies, strict=True):
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)


def test_models_answer_one_by_one_where_a_stack_cannot_serve_them(
    asked, finished_run, pictures, monkeypatch
):
    from fedvlm.engines import choice

    monkeypatch.setattr(choice, "routed", lambda model: ["layers.0.experts.0.up"])
    alone = Asked(open_run(finished_run))
    assert alone.alone == "1 of its layers with LoRA are experts, such as layers.0.experts.0.up"
    assert not asked.alone
    passes = counted(monkeypatch)
    found = alone.ask(pictures[0], QUESTION, alone.models)
    assert passes == [1] * 5
    together = asked.ask(pictures[0], QUESTION, asked.models)
    assert [r.answer for r in found.replies] == [r.answer for r in together.replies]


def test_the_chosen_models_answer_in_the_chosen_order_and_stay_in_memory(
    asked, pictures, monkeypatch
):
    chosen = ("untuned", "site-2", "global")
    asked.ask(pictures[0], QUESTION, chosen)
    loads = []
    real = asked._stack.load
    monkeypatch.setattr(asked._stack, "load", lambda *a: loads.append(a) or real(*a))
    found = asked.ask(pictures[1], QUESTION, chosen)
    assert tuple(r.model for r in found.replies) == chosen
    assert loads == []
    asked.ask(pictures[1], QUESTION, ("site-2",))
    assert len(loads) == 1


def test_a_bad_picture_is_refused_with_the_reason(asked):
    with pytest.raises(DataError, match=r"^the image does not decode: "):
        asked.ask(b"no picture", QUESTION, ["site-0"])


@pytest.mark.parametrize(
    ("question", "models", "said"),
    [
        (" ", ["site-0"], "the question is empty"),
        (QUESTION, [], "no model is chosen"),
        (QUESTION, ["site-9"], "has no model 'site-9'"),
    ],
)
def test_a_wrong_request_is_refused_with_the_reason(asked, pictures, question, models, said):
    with pytest.raises(FedVLMError, match=said):
        asked.ask(pictures[0], question, models)


def test_a_question_that_is_too_long_is_refused(asked, pictures):
    with pytest.raises(DataError, match="tokens"):
        asked.ask(pictures[0], "why? " * 5000, ["site-0"])


def test_held_out_rows_are_those_that_the_run_scored(asked):
    rows = asked.held_out()
    known = asked.run.results.answers("personal")
    assert known
    for one in known:
        place = [k["row"] for k in known if k["client"] == one["client"]].index(one["row"])
        row = rows.row(one["client"], place + 1)
        assert row.reference == one["reference"]
        assert row.images[0].mode == "RGB"
        (reply,) = asked.ask(row.images[0], row.question, [one["client"]]).replies
        assert reply.answer == one["prediction"]
    with pytest.raises(FedVLMError, match=r"'site-0' has .* rows; got the number 0"):
        rows.row("site-0", 0)


def test_held_out_rows_are_refused_where_they_are_not_those_of_the_run(own_run):
    run = open_run(own_run)
    asked = Asked(run)
    (own_run / "data.json").write_text('{"rows": 1, "columns": {}}\n')
    with pytest.raises(FedVLMError, match="the data are not what they were"):
        asked.held_out()
    (own_run / "partition.json").unlink()
    with pytest.raises(FedVLMError, match="deployed run are at the sites"):
        asked.held_out()


def test_open_image_is_what_the_models_see(asked, pictures):
    replies = [
        asked.ask(image, QUESTION, ["site-1"]).replies
        for image in (pictures[0], open_image({"bytes": pictures[0], "path": None}))
    ]
    assert replies[0] == replies[1]
