"""The run's folder: atomic, resumable, and clear about what it refuses."""

import json
import unicodedata
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedvlm
from fedvlm.errors import FedVLMError
from fedvlm.store import files
from fedvlm.store import run as stores
from fedvlm.store.files import slugs
from fedvlm.store.made import check_version
from fedvlm.store.run import Store


def tree(value):
    return {"x": torch.full((3,), float(value))}


def line(round_):
    return {"round": round_, "evaluation": None}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "run")
    with store.locked():
        store.create({"config.yaml": "{}\n"})
        yield store


def test_a_round_counts_once_it_is_committed(store):
    assert store.finished() is None
    store.commit(0, tree(0), line(0), line(0))
    store.keep(1, 0, {"c": tree(1)})
    store.commit(1, tree(1), line(1), line(1))
    assert store.finished() == 1
    assert store.server()["x"].tolist() == [1, 1, 1]
    mine, nothing = store.personal(["c", "a/b"])
    assert mine["x"].tolist() == [1, 1, 1]
    assert nothing == {}
    assert [entry["round"] for entry in store.lines()] == [0, 1]


def test_what_an_unfinished_round_left_is_removed(store):
    store.commit(0, tree(0), line(0), line(0))
    store.keep(1, 0, {"c": tree(1)})
    store.commit(1, tree(1), line(1), line(1))
    store.keep(2, 0, {"c": tree(2), "a-b": tree(2)})
    files.save_tree(store.folder / "server" / "00002.safetensors", tree(2))
    files.append_line(store.folder / "metrics.jsonl", line(2))
    (store.folder / "personal" / "00002-00002.safetensors.tmp").write_bytes(b"half")
    (store.folder / "personal" / ".tmpQx3f").write_bytes(b"half of safetensors' own")
    with open(store.folder / "metrics.jsonl", "a") as f:
        f.write('{"round": 2, "eva')
    store.rewind()
    mine, nothing = store.personal(["c", "a-b"])
    assert mine["x"].tolist() == [1, 1, 1]
    assert nothing == {}
    assert [entry["round"] for entry in store.lines()] == [0, 1]
    assert not [p for p in store.folder.rglob("*") if ".tmp" in p.name]


def test_a_second_process_is_kept_off(store):
    other = Store(store.folder)
    with pytest.raises(FedVLMError, match="another process"), other.locked():
        pass


def test_who_waits_gets_the_folder_once_it_is_free(tmp_path):
    (tmp_path / "shared").mkdir()
    held = files.only_one(tmp_path / "shared", "taken")
    held.__enter__()
    order = []

    def other():
        with files.only_one(tmp_path / "shared", "taken", patience=60.0):
            order.append("the other has it")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other)
        assert not wait([waiting], 0.3).done, "it neither gets the folder nor gives up"
        order.append("free")
        held.__exit__(None, None, None)
        waiting.result()
    assert order == ["free", "the other has it"]


def test_an_output_folder_may_hold_a_lock_file(tmp_path):
    with files.only_one(tmp_path, "taken"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        stores.check_fresh(tmp_path)
    stores.check_fresh(tmp_path)


def test_client_folders_are_distinct_and_safe():
    names = slugs(["a/b", "a-b", "a b", "../..", "", "größe", "x" * 300])
    assert len(set(names.values())) == 7
    assert all("/" not in n and n not in ("", ".", "..") and len(n) < 100 for n in names.values())
    assert list(slugs(["a", "a-2", "a ", "a  "]).values()) == ["a", "a-2", "a-3", "a-4"]
    assert list(slugs(["Site", "site", "SITE-2"]).values()) == ["Site", "site-2", "SITE-2-2"]
    three = "只" * 80
    assert slugs([three]) == {three: three}, "240 bytes fit"


NAMES = st.text(st.characters(), max_size=120) | st.sampled_from("𠮷𠮟aAßé").map(lambda c: c * 90)


@given(st.lists(NAMES, unique=True, max_size=12))
@settings(max_examples=40, deadline=None)
def test_any_names_give_distinct_folders_that_the_disk_takes(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    found = slugs(names)
    assert list(found) == names
    same = {unicodedata.normalize("NFC", name).casefold() for name in found.values()}
    assert len(same) == len(names)
    for name in found.values():
        for whole in (
            f"client-{name}",
            f"{name}-merged",
            f".client-{name}.tmp",
            f".{name}-merged.tmp",
        ):
            (folder / whole).mkdir()


def test_a_folder_that_holds_a_run_says_how_to_go_on(store):
    with pytest.raises(FedVLMError, match="fedvlm run --resume"):
        stores.check_fresh(store.folder)
    (store.folder / "table.json").write_text("{}")
    with pytest.raises(FedVLMError, match="a finished run"):
        stores.check_fresh(store.folder)


def test_a_folder_with_other_files_is_refused_and_an_empty_one_is_not(tmp_path):
    stores.check_fresh(tmp_path / "new")
    stores.check_fresh(tmp_path)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FedVLMError, match="not empty"):
        stores.check_fresh(tmp_path)
    with pytest.raises(FedVLMError, match="is a file"):
        stores.check_fresh(tmp_path / "thesis.tex")


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FedVLMError, match="MB free"):
        files.check_room(tmp_path / "not" / "yet", 1 << 60)
    files.check_room(tmp_path, 1)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(FedVLMError, match="cannot be written"),
        Store(tmp_path / "file" / "run").locked(),
    ):
        pass


def test_a_full_disk_is_a_clear_error_and_loses_nothing(store):
    store.commit(0, tree(0), line(0), line(0))
    with pytest.raises(FedVLMError, match="is full"), files.writable(store.folder):
        raise OSError(28, "No space left on device")
    assert store.finished() == 0


def test_a_run_of_the_first_version_is_refused_by_its_version(tmp_path):
    about = tmp_path / "environment.json"
    about.write_text(json.dumps({"packages": {"fedvlm": "0.2.0"}}))
    check_version(tmp_path)
    about.write_text(json.dumps({"packages": {"fedvlm": "0.1.0"}}))
    (tmp_path / "config.yaml").write_text("algorithm: {name: plora, ft_steps: 20}\n")
    (tmp_path / "table.json").write_text("{}")
    for opens in (check_version, fedvlm.resume, fedvlm.open_run):
        with pytest.raises(FedVLMError, match=r"made by fedvlm 0\.1\.0, .* 'fedvlm<0\.2'"):
            opens(tmp_path)
