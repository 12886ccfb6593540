"""Conversations become rows: one for every answer, with the turns before it as the question."""

import base64
import io
import json
import logging

import datasets
import pytest
from PIL import Image

from fedvlm.data.partition import SPLITS, make_partition
from fedvlm.data.sources import load_rows, open_image
from fedvlm.errors import DataError
from fedvlm.settings.sections import Columns, Config, DataConfig

LLAVA = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Brown."},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is this?<image>"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Brown."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(colour="red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "PNG")
    return stream.getvalue()


def written(tmp_path, records, name="talks.json"):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture("blue"))
    lines = name.endswith("jsonl")
    text = "\n".join(map(json.dumps, records)) + "\n" if lines else json.dumps(records)
    (tmp_path / name).write_text(text)
    return tmp_path / name


def load(path, **fields):
    return load_rows(DataConfig(path=str(path), **fields), seed=0)


@pytest.mark.parametrize("name", ["talks.json", "talks.jsonl"])
def test_a_llava_conversation_gives_a_row_for_every_answer(tmp_path, name):
    records = [
        {"id": "1", "image": "a.png", "conversations": LLAVA},
        {"id": "2", "image": "b.png", "conversations": LLAVA[:2]},
    ]
    rows = load(written(tmp_path, records, name))
    assert rows["answer"][:] == ["A dog.", "Brown.", "A dog."]
    assert rows["question"][:] == [
        "What is this?",
        "User: What is this?\nAssistant: A dog.\nUser: Which colour?",
        "What is this?",
    ]
    assert rows["row"][:] == [0, 0, 1]
    assert rows["id"][:] == ["1", "1", "2"]
    assert rows["conversation_image"][:] == ["a.png", "a.png", "b.png"]
    assert open_image(rows[2]["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_a_system_turn_stands_before_the_first_question(tmp_path):
    rows = load(written(tmp_path, [{"images": ["a.png"], "messages": CHAT}]))
    assert rows["question"][:] == [
        "Be brief.\nWhat is this?",
        "Be brief.\nUser: What is this?\nAssistant: A dog.\nUser: Which colour?",
    ]


def test_the_parts_of_a_chat_turn_are_joined_without_the_image(tmp_path):
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    said = [{"type": "text", "text": "A dog."}]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    rows = load(written(tmp_path, [{"image": "a.png", "messages": talk}]))
    assert (rows[0]["question"], rows[0]["answer"]) == ("What is this?", "A dog.")


def test_a_question_that_nobody_answers_is_left_out(tmp_path):
    rows = load(written(tmp_path, [{"image": "a.png", "conversations": LLAVA[:3]}]))
    assert rows["answer"][:] == ["A dog."]


@pytest.mark.parametrize("column", ["image", "images"])
def test_parquet_with_embedded_images_and_conversations_is_read(tmp_path, column):
    shown = [{"bytes": picture(), "path": None}, {"bytes": picture("blue"), "path": None}]
    images = shown if column == "image" else [[each] for each in shown]
    made = datasets.Dataset.from_dict({column: images, "messages": [CHAT, CHAT]})
    kind = datasets.Image() if column == "image" else datasets.List(datasets.Image())
    made.cast_column(column, kind).to_parquet(tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet")
    assert [open_image(row["image"]).getpixel((0, 0))[2] for row in rows] == [0, 0, 255, 255]
    assert rows["conversation_image"][:] == ["conversation 0"] * 2 + ["conversation 1"] * 2


def test_columns_of_questions_and_answers_win_over_a_conversation(tmp_path):
    record = {"image": "a.png", "question": "Why?", "chosen": "So.", "conversations": LLAVA}
    rows = load(written(tmp_path, [record]))
    assert rows["answer"][:] == ["So."]


def test_the_mapped_names_are_free_for_other_uses(tmp_path):
    record = {"photo": "a.png", "messages": CHAT, "question": "of another kind"}
    columns = Columns(image="photo", question="asked", answer="said")
    rows = load(written(tmp_path, [record]), columns=columns)
    assert rows["answer"][:] == ["A dog.", "Brown."]
    assert rows["source_question"][:] == ["of another kind"] * 2


def test_a_conversation_stays_in_one_split(tmp_path):
    shown = [{"bytes": picture((i, 0, 0)), "path": None} for i in range(12)]
    made = datasets.Dataset.from_dict({"image": shown, "messages": [CHAT] * 12})
    made.to_parquet(tmp_path / "a.parquet")
    partition = {"kind": "iid", "clients": 2, "min_rows": 2}
    path = str(tmp_path / "a.parquet")
    config = Config.model_validate({"data": {"path": path}, "partition": partition})
    rows = load_rows(config.data)
    number = rows["row"][:]
    for split in make_partition(rows, config).splits.values():
        talks = [{number[at] for at in getattr(split, name)} for name in SPLITS]
        assert sum(map(len, talks)) == len(set().union(*talks))


@pytest.mark.parametrize(
    ("images", "talk", "said"),
    [
        (["a.png", "b.png"], CHAT, "has 2 images, but only one can be used"),
        ([], CHAT, "has no image"),
        (["a.png"], [], "has no answer"),
        (["a.png"], CHAT[:2], "has no answer"),
        (["a.png"], CHAT[2:], "turn 0 of the conversation is an answer without a question"),
        (["a.png"], [{"role": "tool", "content": "?"}], "turn 0 .* role 'tool'; the roles are"),
        (["a.png"], [{**CHAT[1], "content": "<image>"}, CHAT[2]], "the question is empty"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_or_left_out(tmp_path, images, talk, said, caplog):
    records = [{"images": ["a.png"], "messages": CHAT}, {"images": images, "messages": talk}]
    path = written(tmp_path, records)
    with pytest.raises(DataError, match=rf"1 of 3 rows.*row 1: .*{said}.*data.on_error=skip"):
        load(path)
    with caplog.at_level(logging.WARNING, logger="fedvlm"):
        rows = load(path, on_error="skip")
    assert rows["row"][:] == [0, 0]
    assert "row 1: " in caplog.text


def test_text_without_images_at_all_is_refused_by_its_columns(tmp_path):
    with pytest.raises(DataError, match=r"no column 'image'.*its columns are messages"):
        load(written(tmp_path, [{"messages": CHAT}]))


def test_records_with_an_image_stand_beside_records_without(tmp_path):
    records = [{"image": "a.png", "conversations": LLAVA}, {"conversations": LLAVA}]
    rows = load(written(tmp_path, records), on_error="skip")
    assert rows["row"][:] == [0, 0]


def test_text_and_parts_and_paths_and_lists_may_be_mixed(tmp_path):
    asked = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A dog."}]
    records = [{"image": "a.png", "messages": talk}, {"image": ["b.png"], "messages": CHAT}]
    rows = load(written(tmp_path, records))
    assert rows["question"][:2] == ["What is this?", "Be brief.\nWhat is this?"]
    assert open_image(rows[1]["image"]).getpixel((0, 0)) == (0, 0, 255)
    records[0]["image"] = 3
    with pytest.raises(DataError, match=r"row 0: the conversation's image is 3, not bytes or a"):
        load(written(tmp_path, records, "other.json"))


@pytest.mark.parametrize("form", ["base64", "numbers", "structure"])
def test_embedded_pictures_of_json_conversations_are_read(tmp_path, form):
    text = base64.b64encode(picture("blue")).decode()
    shown = {"base64": text, "numbers": list(picture("blue")), "structure": {"bytes": text}}[form]
    rows = load(written(tmp_path, [{"image": shown, "messages": CHAT, "_record": "own"}]))
    assert open_image(rows[1]["image"]).getpixel((0, 0)) == (0, 0, 255)
    assert rows["conversation_image"][:] == ["conversation 0"] * 2
    assert rows["_record"][:] == ["own"] * 2


def test_conversations_on_one_picture_stay_in_one_split_of_a_client(tmp_path):
    spellings = [f"{where}{i}.png" for i in range(8) for where in ("", "./", "../x/")]
    (tmp_path / "x").mkdir()
    for i in range(8):
        (tmp_path / "x" / f"{i}.png").write_bytes(picture((i, 0, 0)))
    talks = [{"image": name, "conversations": LLAVA} for name in spellings]
    path = tmp_path / "x" / "talks.json"
    path.write_text(json.dumps(talks))
    partition = {"kind": "iid", "clients": 2, "min_rows": 2}
    config = Config.model_validate({"data": {"path": str(path)}, "partition": partition})
    rows = load_rows(config.data)
    for split in make_partition(rows, config).splits.values():
        seen = [{rows["image_hash"][at] for at in getattr(split, name)} for name in SPLITS]
        assert sum(map(len, seen)) == len(set().union(*seen))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "b.png"},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "image", "path": "b.png"},
        {"type": "image", "image": base64.b64encode(picture("blue")).decode()},
        {"type": "image", "image": {"bytes": base64.b64encode(picture("blue")).decode()}},
    ],
)
def test_a_picture_may_be_a_part_of_a_message(tmp_path, part):
    asked = {"role": "User", "content": [part, {"type": "text", "text": "What is this?"}]}
    path = written(tmp_path, [{"messages": [asked, {"role": "Assistant", "content": "Sky."}]}])
    (row,) = load(path)
    assert (row["question"], row["answer"]) == ("What is this?", "Sky.")
    assert open_image(row["image"]).getpixel((0, 0)) == (0, 0, 255)


def test_pictures_in_the_parts_of_parquet_stay_encoded(tmp_path):
    shown = {"bytes": picture("blue"), "path": None}
    asked = {
        "role": "user",
        "content": [
            {"type": "image", "image": shown, "text": None},
            {"type": "text", "image": None, "text": "What?"},
        ],
    }
    said = {"role": "assistant", "content": [{"type": "text", "image": None, "text": "Sky."}]}
    part = {
        "type": datasets.Value("string"),
        "image": datasets.Image(),
        "text": datasets.Value("string"),
    }
    turns = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    made = datasets.Dataset.from_dict(
        {"messages": [[asked, said]]}, features=datasets.Features({"messages": turns})
    )
    made.to_parquet(tmp_path / "a.parquet")
    (row,) = load(tmp_path / "a.parquet")
    assert (row["question"], row["answer"]) == ("What?", "Sky.")
    assert open_image(row["image"]).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(("answer", "text"), [(0, "0"), (False, "false"), (True, "true")])
def test_numbers_and_flags_are_answers(tmp_path, answer, text):
    talk = [{"from": "Human", "value": "How many?"}, {"from": "GPT", "value": answer}]
    assert load(written(tmp_path, [{"image": "a.png", "conversations": talk}]))["answer"][:] == [
        text
    ]


def test_one_rejected_answer_is_not_enough_for_several_answers(tmp_path):
    path = written(tmp_path, [{"image": "a.png", "conversations": LLAVA, "rejected": "No."}])
    with pytest.raises(DataError, match=r"row 0: the conversation has several answers, but a rej"):
        load_rows(DataConfig(path=str(path)), pairs=True)
    assert len(load(path)) == 2


def test_equal_answers_of_a_pair_are_counted(tmp_path, caplog):
    made = [
        {"image": "a.png", "question": "What?", "chosen": "A dog.", "rejected": said}
        for said in ("A dog. ", "A cat.")
    ]
    rows = load_rows(DataConfig(path=str(written(tmp_path, made))), pairs=True)
    assert len(rows) == 2
    assert "1 of 2 rows have a rejected answer that equals the answer, such as row 0" in caplog.text
