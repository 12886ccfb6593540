"""A damaged file of a run is an error that names it, or changes nothing."""

import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedvlm
from fedvlm.after.opened import open_run
from fedvlm.errors import FedVLMError
from fedvlm.rounds.results import Results
from fedvlm.store import sealed
from fedvlm.store.files import disk_errors, load_tree, writable
from fedvlm.store.run import Store, belongs, check_whole

CLIENTS = ["a", "b", "größe"]


def tree(value):
    return {"x": torch.full((3,), float(value)), "h": torch.full((2,), float(value)).bfloat16()}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run after round 2: three clients in two packs."""
    store = Store(tmp_path_factory.mktemp("sealed") / "run")
    with store.locked():
        store.create({"config.yaml": "seed: 0\n", "partition.json": "{}", "data.json": "{}"})
        for round_ in range(3):
            if round_:
                store.keep(round_, 0, {c: tree(round_ + n) for n, c in enumerate(CLIENTS[round_:])})
                store.keep(round_, 2, {CLIENTS[0]: tree(9)})
            line = {"round": round_, "evaluation": None}
            store.commit(round_, tree(round_), line, {"round": round_, "seconds": 1.0})
    return store.folder


def content(folder):
    """What a resumed run reads."""
    check_whole(folder)
    store = Store(folder)
    store.rewind()
    states = [*store.personal(CLIENTS), store.server()]
    numbers = [{n: t.tolist() for n, t in sorted(state.items())} for state in states]
    described = [(folder / n).read_bytes() for n in ("config.yaml", "partition.json", "data.json")]
    return numbers, store.lines(), store.finished(), described


def results(folder):
    """What the commands on a finished run read."""
    run = open_run(folder)
    assert set(run.partition.clients) == set(run.clients)
    models = {
        c: load_tree(run.adapter_folder(c) / "adapter_model.safetensors") for c in run.clients
    }
    models[""] = load_tree(run.adapter_folder(None) / "adapter_model.safetensors")
    told = [(run.adapter_folder(c) / "adapter_config.json").read_bytes() for c in run.clients]
    numbers = {c: {n: t.tolist() for n, t in tree.items()} for c, tree in models.items()}
    answers = [run.results.answers(m) for m in ("untuned", "global", "personal")]
    return numbers, told, answers, run.results.table, run.config


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def damage(path, kind, draw):
    """Changes a file in one way."""
    whole = bytearray(path.read_bytes())
    at = draw.randrange(len(whole)) if whole else 0
    if kind == "flip" and whole:
        whole[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del whole[at:]
    elif kind == "empty":
        whole.clear()
    elif kind == "nested":
        whole = bytearray(b"[" * 200_000)
    elif kind == "binary":
        whole = bytearray(draw.randbytes(64))
    path.unlink() if kind == "gone" else path.write_bytes(whole)


KINDS = ("flip", "flip", "flip", "flip", "cut", "empty", "gone", "nested", "binary")


def damaged_copy(source, scratch, reads, seed):
    """Damages one file of a copy, and reads the copy.

    Returns:
        The file, the kind of damage, what was read (None: an error), and the error's message.
    """
    draw = random.Random(seed)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    path, kind = draw.choice(files_of(scratch)), draw.choice(KINDS)
    damage(path, kind, draw)
    try:
        return path, kind, reads(scratch), ""
    except FedVLMError as error:
        return path, kind, None, str(error)


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_damaged_file_of_an_unfinished_run_is_named_or_changes_nothing(
    unfinished, tmp_path_factory, seed
):
    scratch = tmp_path_factory.getbasetemp() / "damaged"
    path, kind, found, said = damaged_copy(unfinished, scratch, content, seed)
    if found is None:
        assert path.name in said, (kind, said)
        assert len(said) < 2000
        assert path.name != "timing.jsonl", "this file is not needed"
    else:
        assert found == content(unfinished), (path, kind)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_a_damaged_file_of_a_finished_run_is_named_or_changes_nothing(
    finished_run, tmp_path_factory, seed
):
    scratch = tmp_path_factory.getbasetemp() / "finished-damaged"
    path, kind, found, said = damaged_copy(finished_run, scratch, results, seed)
    if (path.name, kind) == ("table.json", "gone"):
        assert "unfinished run" in said
    elif found is None:
        assert path.name in said, (kind, said)
        assert len(said) < 2000
    else:
        assert found == results(finished_run), (path, kind)


@pytest.mark.parametrize("first", [0, 1])
def test_a_pack_of_the_same_name_with_other_states_is_refused(unfinished, tmp_path, first):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    packs = sorted((folder / "personal").iterdir())
    shutil.copy(packs[first], packs[1 - first])
    with pytest.raises(FedVLMError, match=packs[1 - first].name):
        content(folder)


def test_files_of_other_names_in_the_folders_are_left_alone(unfinished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unfinished, folder)
    packs = sorted((folder / "personal").iterdir())
    copies = [
        packs[0].with_name("00001-00000 (copy).safetensors"),
        folder / "server" / "a.safetensors",
    ]
    for copy in copies:
        shutil.copy(packs[0], copy)
    shutil.copy(packs[0], packs[0].with_name("00001-00007.safetensors"))
    assert content(folder) == content(unfinished)
    assert all(copy.exists() for copy in copies)


@given(st.dictionaries(st.text(), st.integers() | st.floats(allow_nan=False) | st.text()))
@settings(max_examples=15, deadline=None)
def test_sealed_json_comes_back(tmp_path_factory, content):
    content.pop(sealed.SEAL, None)
    path = tmp_path_factory.getbasetemp() / "any.json"
    sealed.write(path, content)
    assert sealed.read(path) == content


def test_results_hold_the_digests_apart_from_the_table(finished_run):
    found = Results.read(finished_run)
    assert "adapters/global/adapter_model.safetensors" in found.files
    assert not {"files", "seal"} & set(found.table)
    assert {"files", "seal"} <= set(json.loads((finished_run / "table.json").read_text()))


# What could not be written


FULL = """
import resource, sys, torch
from fedvlm.errors import FedVLMError
from fedvlm.store.run import Store

store = Store(sys.argv[1])
with store.locked():
    store.create({"config.yaml": "{}"})
    store.commit(0, {"x": torch.zeros(3)}, {"round": 0}, {"round": 0})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    with store.locked():
        if sys.argv[2] == "pack":
            store.keep(1, 0, {"c": {"x": torch.ones(100_000)}})
        else:
            store.commit(1, {"x": torch.ones(100_000)}, {"round": 1}, {"round": 1})
except FedVLMError as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["pack", "server"])
def test_a_file_that_the_disk_does_not_take_loses_no_finished_round(tmp_path, what):
    command = [sys.executable, "-c", FULL, str(tmp_path / "run"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the finished rounds are safe" in done.stdout
    assert f"fedvlm run --resume {tmp_path / 'run'}" in done.stdout
    store = Store(tmp_path / "run")
    store.rewind()
    assert store.finished() == 0
    assert store.server()["x"].tolist() == [0, 0, 0]
    assert store.personal(["c"]) == [{}]


@pytest.mark.parametrize(
    ("number", "said"),
    [(28, "is full"), (122, "quota"), (27, "no larger file"), (5, "reports an error")],
)
def test_every_error_of_a_disk_is_a_clear_message(tmp_path, number, said):
    from safetensors import SafetensorError

    told = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    with pytest.raises(FedVLMError, match=said), writable(tmp_path), disk_errors():
        raise SafetensorError(told)
    with pytest.raises(FedVLMError, match=said), writable(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_path_belongs_to_a_run_through_links_and_in_other_case(unfinished, tmp_path):
    (tmp_path / "link").symlink_to(unfinished)
    assert belongs(unfinished / "table.json") == unfinished.resolve()
    assert belongs(tmp_path / "link" / "Config.YAML") == unfinished.resolve()
    assert belongs(unfinished / "adapters" / "new" / "a.json") == unfinished.resolve()
    assert belongs(unfinished / "export" / "a") is None
    assert belongs(unfinished / "scores.json") is None
    assert belongs(tmp_path / "a.json") is None
    (tmp_path / "config.yaml").touch()  # a person's own settings, beside the folders of runs
    assert belongs(tmp_path / "adapters") is None


# The end of a run


def test_a_picture_or_an_adapter_that_fails_is_a_warning_and_made_later(
    small, monkeypatch, caplog, pictures
):
    from fedvlm.figures import plots, skewplot
    from fedvlm.models import lora

    def fails(*args, **options):
        raise ValueError("no font\n" + "x" * 5000)

    small["train"]["rounds"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(plots, "plot_run", fails)
        patch.setattr(skewplot, "plot_partition", fails)
        patch.setattr(lora, "save_adapter", fails)
        found = fedvlm.run(small)
    warned = [r.getMessage() for r in caplog.records if r.name == "fedvlm"]
    assert len([w for w in warned if "was not written (ValueError: no font" in w]) == 4
    assert all(len(w) < 2000 for w in warned)
    run = open_run(found.folder)
    client = run.clients[0]
    made = run.adapter_folder(client)
    assert load_tree(made / "adapter_model.safetensors").keys() == run.initial.keys()
    assert open_run(found.folder).adapter_folder(client) == made
    path = made / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(FedVLMError, match=r"adapter_model\.safetensors' is damaged"):
        open_run(found.folder).adapter_folder(client)
    assert run.adapter_folder(None).name == "global"
    with pictures():
        from fedvlm.rounds.pictures import redraw

        assert [p.name for p in redraw(found.folder)] == ["partition.png", "curves.png"]
    assert (found.folder / "curves.png").stat().st_size > 0
