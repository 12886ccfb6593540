"""Calls between server and site that take longer than one message may take."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedvlm.deploy import calls
from fedvlm.deploy.calls import Desk, Late, asking


class Site:
    """A site whose work lasts until ``done`` is set."""

    def __init__(self):
        self.done, self.calls = threading.Event(), []

    def __call__(self, header, blob, limit):
        self.calls.append((header["do"], limit))
        self.done.wait(10)
        return {"did": header["do"]}, blob[::-1]


@pytest.fixture(scope="module", autouse=True)
def _settled():
    """As in a deployed process: :func:`calls.release` then looks at new objects only."""
    calls.settle()
    yield
    gc.unfreeze()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.05)
    monkeypatch.setattr(calls, "GRACE", 0.2)
    monkeypatch.setattr(calls, "SILENCE", 0.5)
    monkeypatch.setattr(calls, "SMALL", 2)
    found = Site()
    yield found
    found.done.set()


def test_a_long_call_is_asked_again_until_it_is_answered(site):
    desk, messages = Desk(site), []

    def exchange(name, header, blob, seconds):
        messages.append((header["do"], len(blob), seconds))
        if len(messages) == 4:
            site.done.set()
        return desk.ask(dict(header), blob)

    call = asking(exchange)
    kept, nothing = call("a", {"do": "train"}, b"abc", 30)
    assert not nothing
    assert [what for what, *_ in messages[:4]] == ["train", "wait", "wait", "wait"]
    assert {size for _, size, _ in messages[1:]} == {0}, "tensors are sent once"
    for _ in range(2):  # the server may ask again when an answer was lost
        fetched = call("a", {"do": "fetch", "number": kept["kept"]}, b"", 30)
        assert fetched == ({"did": "train"}, b"cba")
    assert call("a", {"do": "fetch", "number": "0"}, b"", 30)[0]["error"] == "failed"
    assert max(seconds for *_, seconds in messages) < 1, "a lost site is noticed soon"
    assert site.calls == [("train", 30)]


def test_a_site_says_that_it_is_there_while_it_works(site):
    desk = Desk(site)
    at_work = ({"at_work": True}, b"")
    assert desk.ask({"do": "train", "number": "1", "limit": 9}, b"") == at_work
    assert desk.ask({"do": "ping", "number": "2", "limit": 9}, b"") == ({}, b"")
    assert desk.ask({"do": "wait", "number": "1"}, b"") == at_work
    assert desk.ask({"do": "wait", "number": "2"}, b"")[0]["error"] == "failed"


@pytest.mark.parametrize("blob", [b"", b"ab"])
def test_an_answer_with_few_tensors_takes_one_message(site, blob):
    site.done.set()
    desk, messages = Desk(site), []

    def exchange(name, header, blob, seconds):
        messages.append(header["do"])
        return desk.ask(dict(header), blob)

    assert asking(exchange)("a", {"do": "score"}, blob, 9) == ({"did": "score"}, blob[::-1])
    assert messages == ["score"]


def test_few_messages_with_tensors_are_on_their_way_at_a_time(monkeypatch):
    monkeypatch.setattr(calls, "SENDS", 2)
    monkeypatch.setattr(calls, "SMALL", 2)
    now, most, lock = 0, 0, threading.Lock()

    def exchange(name, header, blob, seconds):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return {"did": name}, b""

    call = asking(exchange)
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda n: call(n, {"do": "train"}, b"abc", 9), "abcdef"))
    assert [header["did"] for header, _ in done] == list("abcdef")
    assert most == 2


def test_a_slow_receiver_delays_others_for_a_limited_time(monkeypatch):
    monkeypatch.setattr(calls, "SENDS", 1)
    monkeypatch.setattr(calls, "SMALL", 2)
    monkeypatch.setattr(calls, "TURN", 0.1)
    let = threading.Event()

    def exchange(name, header, blob, seconds):
        if name == "slow":
            let.wait(10)
        return {"did": name}, b""

    call = asking(exchange)
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(call, "slow", {"do": "train"}, b"abc", 9)
        time.sleep(0.05)
        assert call("fast", {"do": "train"}, b"abc", 9)[0]["did"] == "fast"
        assert not slow.done()
        let.set()
        assert slow.result()[0]["did"] == "slow"


def test_messages_in_a_reference_cycle_are_freed():
    class Task:
        def __init__(self):
            self.own = self

    gc.disable()
    calls.release(calls.HELD)  # what earlier messages have left
    try:
        seen = weakref.ref(Task())
        assert seen() is not None
        calls.release(calls.HELD // 2)
        assert seen() is not None, "small messages wait, so that a search frees several"
        calls.release(calls.HELD // 2)
        assert seen() is None
    finally:
        gc.enable()


def test_the_deadline_holds_for_work_and_for_bytes_that_trickle(site):
    asked, let = [], threading.Event()

    def at_work(*_):
        assert len(asked) < 100, "the server asks for ever"
        asked.append(time.sleep(0.05))
        return {"at_work": True}, b""

    with pytest.raises(Late, match="no answer within 1 s"):
        asking(at_work)("a", {"do": "train"}, b"", 1)
    with pytest.raises(Late):
        asking(lambda *_: asked.append(let.wait(60)))("a", {"do": "train"}, b"", 0.1)
    assert False not in asked, "it waited until the site gave up"
    let.set()


def test_what_goes_wrong_on_the_way_is_raised_where_it_was_asked():
    def broken(*_):
        raise ConnectionError("no way there")

    with pytest.raises(ConnectionError, match="no way there"):
        asking(broken)("a", {"do": "train"}, b"", 1)


def test_clients_that_are_sent_the_same_share_its_bytes():
    import torch
    from safetensors.torch import load

    from fedvlm.deploy.downloads import Written

    written, a, b = Written(), torch.ones(3), torch.zeros(2)
    first = written({"a": a, "b": b})
    assert written({"b": b, "a": a}) is first
    assert load(written({"a": a + 1, "b": b}))["a"].tolist() == [2, 2, 2]
    assert load(written({"a": a}))["a"].tolist() == [1, 1, 1]
    assert written({}) == b""
