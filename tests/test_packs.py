"""Personal states in packs: read back, merged, and complete after a kill at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedvlm.store.run import Store

CLIENTS = [f"client-{k}" for k in range(40)]


def tree(value, rank=2):
    return {"a": torch.full((rank, 3), float(value)), "b": torch.full((4,), -float(value))}


def finish(store, round_):
    store.commit(round_, {"x": torch.zeros(1)}, {"round": round_}, {"round": round_})


def packs(store):
    return sorted(p.name for p in (store.folder / "personal").iterdir())


def values(store, clients=CLIENTS):
    """The number that each client's state is made of."""
    trees = store.personal(clients)
    for found in trees:
        assert not found or torch.equal(found["b"], -found["a"][0, 0].expand(4))
    return [found["a"].unique().item() if found else None for found in trees]


def rounds(store, numbers, passes=2, width=4):
    """Does rounds on seeded random cohorts. A client's state is ``round + position / 100``."""
    expected = {}
    for number in numbers:
        cohort = random.Random(number).sample(CLIENTS, passes * width)
        for start in range(0, len(cohort), width):
            group = cohort[start : start + width]
            kept = {c: tree(number + n / 100) for n, c in enumerate(group, start=start)}
            store.keep(number, start, kept)
        expected |= {c: pytest.approx(number + n / 100) for n, c in enumerate(cohort)}
        finish(store, number)
    return expected


def test_the_order_of_names_does_not_change_a_pack(tmp_path):
    found = []
    for order in (1, -1):
        store = Store(tmp_path / str(order))
        store.keep(1, 0, {"c": dict(list(tree(1).items())[::order]), "d": tree(2)})
        found.append((store.folder / "personal" / "00001-00000.safetensors").read_bytes())
        assert values(store, ["c", "d"]) == [1, 2]
    assert found[0] == found[1]


def test_a_pass_is_one_file_of_stacked_states(tmp_path):
    from safetensors.torch import load_file

    store = Store(tmp_path)
    store.keep(1, 0, {"c": tree(1), "d": tree(2)})
    store.keep(1, 2, {"e": tree(3), "nothing": {}})
    finish(store, 1)
    assert packs(store) == ["00001-00000.safetensors", "00001-00002.safetensors"]
    (flat,) = load_file(tmp_path / "personal" / "00001-00000.safetensors").values()
    state = tree(1)
    assert flat.shape == (2, sum(t.numel() for t in state.values()))
    assert torch.equal(flat[0], torch.cat([t.flatten() for t in state.values()]))
    assert values(store, ["e", "c", "nothing", "stranger", "d"]) == [3, 1, None, None, 2]


def test_a_state_comes_back_with_its_names_types_and_shapes(tmp_path):
    state = {
        "b": torch.arange(6.0).view(2, 3),
        "count": torch.tensor(7),
        "half": torch.arange(4).bfloat16().view(1, 4),
        "a": torch.ones(3, 1),
        "none": torch.empty(0, 2),
    }
    store = Store(tmp_path)
    store.keep(1, 0, {"c": {n: t * 2 for n, t in state.items()}, "d": state})
    finish(store, 1)
    (found,) = Store(tmp_path).personal(["d"])
    assert list(found) == sorted(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_clients_with_other_shapes_lie_in_packs_of_their_own(tmp_path):
    store = Store(tmp_path)
    store.keep(3, 8, {"c": tree(1), "d": tree(2, rank=5), "e": tree(3), "f": tree(4, rank=5)})
    finish(store, 3)
    assert packs(store) == ["00003-00008.safetensors", "00003-00009.safetensors"]
    assert values(store, ["c", "d", "e", "f"]) == [1, 2, 3, 4]
    assert Store(tmp_path).personal(["f"])[0]["a"].shape == (5, 3)


def test_packs_in_which_no_client_has_its_state_are_removed(tmp_path):
    store = Store(tmp_path)
    store.keep(1, 0, {"idle": tree(1)})
    finish(store, 1)
    for number in (2, 3):
        store.keep(number, 0, {"c": tree(number), "d": tree(number)})
        assert (tmp_path / "personal" / "00002-00000.safetensors").exists(), "until the commit"
        finish(store, number)
    assert packs(store) == ["00001-00000.safetensors", "00003-00000.safetensors"]
    assert values(store, ["idle", "c", "d"]) == [1, 3, 3]


def test_the_disk_holds_at_most_twice_what_is_live_and_nothing_is_lost(tmp_path):
    store = Store(tmp_path)
    expected, merged = {}, set()
    for number in range(1, 61):
        expected |= rounds(store, [number])
        sizes = {p: p.stat().st_size for p in (tmp_path / "personal").iterdir()}
        one = (tmp_path / "personal" / f"{number:05d}-00000.safetensors").stat().st_size / 4
        assert sum(sizes.values()) < 2.5 * one * len(expected), f"round {number}"
        merged |= {p.name for p in sizes if "merged" in p.name}
        assert dict(zip(CLIENTS, values(store), strict=True)) == {
            c: expected.get(c) for c in CLIENTS
        }
    assert merged
    assert values(Store(tmp_path)) == values(store), "a new store reads the same states"


def test_merging_copies_no_more_than_was_written(tmp_path, monkeypatch):
    from fedvlm.store.packs import Packs

    written, plain = [], Packs._write

    def counted(self, name, kept):
        written.append((name, len(kept)))
        plain(self, name, kept)

    monkeypatch.setattr(Packs, "_write", counted)
    rounds(Store(tmp_path), range(1, 61))
    copies = [n for name, n in written if "merged" in name]
    assert 0 < sum(copies) <= 60 * 8
    assert max(copies) <= 2 * 8, "never all states at once"


@pytest.mark.parametrize("last", [7, 23])
def test_a_resumed_store_ends_with_the_same_files(tmp_path, last):
    whole, cut = Store(tmp_path / "whole"), Store(tmp_path / "cut")
    rounds(whole, range(1, 31))
    rounds(cut, range(1, last + 1))
    cut.keep(last + 1, 0, {c: tree(99) for c in CLIENTS[:3]})  # and killed
    cut = Store(tmp_path / "cut")
    cut.rewind()
    rounds(cut, range(last + 1, 31))

    def files(store):
        return {p.name: p.read_bytes() for p in (store.folder / "personal").iterdir()}

    assert files(cut) == files(whole)


def test_packs_that_a_killed_process_could_not_remove_are_removed(tmp_path, monkeypatch):
    from fedvlm.store.packs import Packs

    store = Store(tmp_path)
    rounds(store, range(1, 30))
    before = packs(store)
    monkeypatch.setattr(Packs, "sweep", lambda self, kept: None)
    rounds(store, [30])
    monkeypatch.undo()
    assert set(before) < set(packs(store))
    again = Store(tmp_path)
    again.rewind()
    assert len(packs(again)) < len(packs(store)) + len(before)
    assert values(again) == values(store)
    other = Store(tmp_path / "other")
    rounds(other, range(1, 31))
    assert packs(again) == packs(other)


def test_another_process_sees_a_round_once_it_is_told(tmp_path):
    server, other = Store(tmp_path), Store(tmp_path)
    assert values(other, CLIENTS[:2]) == [None, None]
    server.keep(1, 0, {CLIENTS[0]: tree(1)})
    other.keep(1, 1, {CLIENTS[1]: tree(2)})
    server.refresh(1)
    finish(server, 1)
    other.refresh(1)
    assert values(server, CLIENTS[:2]) == values(other, CLIENTS[:2]) == [1, 2]
    merged = set()
    for number in range(2, 40):
        rounds(server, [number])
        other.refresh(number)
        assert values(other) == values(server)
        merged |= {name for name in packs(server) if "merged" in name}
    assert merged, "packs were merged, so the test covers merged states"


def test_what_is_not_committed_does_not_count(tmp_path):
    store = Store(tmp_path)
    rounds(store, [1])
    before = values(store)
    store.keep(2, 0, {c: tree(9) for c in CLIENTS})
    assert values(store) == [9] * len(CLIENTS), "the running round sees its own states"
    assert values(Store(tmp_path)) == before


def test_the_disk_holds_a_round_before_the_checkpoint_names_it(tmp_path, monkeypatch):
    store = Store(tmp_path)
    rounds(store, range(1, 30))
    synced, before = set(), {}
    plain, replace = os.fsync, os.replace

    def fsync(handle):
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        plain(handle)

    def watched(source, target):
        if Path(target).name == "checkpoint.json":
            before.update(dict.fromkeys(synced))
        replace(source, target)

    monkeypatch.setattr(store._packs._early, "submit", lambda *work: None)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", watched)
    rounds(store, [30])
    new = {p for p in (tmp_path / "personal").iterdir() if p.name.startswith("00030")}
    assert len(new) >= 2
    assert new <= before.keys()
    for name in ("personal", "server", "server/00030.safetensors", "metrics.jsonl"):
        assert tmp_path / name in before, name
    assert tmp_path in synced, "the folder of the checkpoint is synced too"


WRITERS = """
import os, random, sys, torch
from fedvlm.store.run import Store, is_run

def write(folder):
    store = Store(folder)
    with store.locked():
        if not is_run(folder):
            store.create({"config.yaml": "{}"})
        store.rewind()
        first = -1 if store.finished() is None else store.finished()
        print(os.getpid(), flush=True)
        for r in range(first + 1, 100000):
            cohort = random.Random(r).sample(range(24), 8)
            for start in (0, 4):
                group = cohort[start : start + 4]
                kept = {f"c{k}": {"x": torch.full((20000,), float(r))} for k in group}
                store.keep(r, start, kept)
            store.commit(r, {"x": torch.full((9,), float(r))}, {"round": r}, {"round": r})

for line in sys.stdin:  # a line starts one writer: a fork, with torch imported already
    if writer := os.fork():
        os.waitpid(writer, 0)
        print("ended", flush=True)
    else:
        write(line.strip())
"""


@pytest.fixture
def writers():
    """A process that starts writers. It reads a folder, and prints a process id and ``ended``."""
    command = [sys.executable, "-c", WRITERS]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process


def test_kill_in_the_middle_of_a_pack_loses_nothing_that_is_committed(tmp_path, writers):
    folder = tmp_path / "run"
    draw = random.Random(0)
    torn = last = kills = 0
    while kills < 4 or ((not torn or not last) and kills < 40):  # a busy machine needs more
        kills += 1
        writers.stdin.write(f"{folder}\n")
        writer = int(writers.stdout.readline())
        time.sleep(0.2 + draw.random() * 0.2)
        os.kill(writer, signal.SIGKILL)
        assert writers.stdout.readline() == "ended\n"
        store = Store(folder)
        with store.locked():
            done = store.finished()
            left = {p.name: p for p in (folder / "personal").iterdir()}
            torn += any(".tmp" in n or int(n[:5]) > done for n in left)
            store.rewind()
            expected = {}
            for r in range(done + 1):
                expected |= dict.fromkeys(random.Random(r).sample(range(24), 8), float(r))
            found = store.personal([f"c{k}" for k in expected])
            assert [set(t["x"].tolist()) for t in found] == [{v} for v in expected.values()]
            assert set(store.server()["x"].tolist()) == {float(done)}
            assert [entry["round"] for entry in store.lines()] == list(range(done + 1))
            assert not [p for p in folder.rglob("*") if ".tmp" in p.name]
        assert done >= last
        last = done
    assert last, "no round was finished"
    assert torn, "no kill hit an unfinished round"
