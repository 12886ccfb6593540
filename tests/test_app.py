"""The playground without gradio: answers as HTML, the door with the token, and the command."""

import asyncio
import contextlib

import pytest

from fedvlm.after.asked import Replies, Reply
from fedvlm.app import answers, server
from fedvlm.errors import DataError, FedVLMError
from test_cli import call

HOSTILE = '<img src=x onerror="alert(1)"> **bold** ${1+1} {{value}} `x` \\'


def replies(*said):
    made = (Reply(f"site-{n}", text, 0.5) for n, text in enumerate(said))
    return Replies(tuple(made), 0.25)


def test_equal_answers_have_the_same_letter_and_the_most_frequent_one_is_a():
    assert answers.marks(["x", "y", "y", "z"]) == ["B", "A", "A", "C"]
    assert answers.marks(["x", "x"]) == ["", ""]
    assert answers.marks([str(n) for n in range(30)])[25:28] == ["Z", "27", "28"]


def test_the_answers_are_a_table_with_confidence_time_and_the_answer_of_the_data():
    page = answers.answers(replies("a lamp", "a lamp", "LAMPE"), "a lamp")
    assert "2 different answers from 3 models" in page
    assert "0.25 s, all models together" in page
    assert page.count("as in the data") == 2
    assert page.count("50 %") == 3
    assert "All 2 models give the same answer." in answers.answers(replies("x", "x"))
    assert "one model after another" in answers.answers(replies("x", "y"), alone=True)
    assert "an empty answer" in answers.answers(replies("", "y"))
    assert [answers.percent(p) for p in (0.004, 0.5, 0.994, 0.9951, 1)] == [
        "0 %",
        "50 %",
        "99 %",
        "> 99 %",
        "100 %",
    ]


@pytest.mark.parametrize(
    "page",
    [
        answers.answers(Replies((Reply(HOSTILE, HOSTILE, 0.1),), 1.0), HOSTILE),
        answers.batch({HOSTILE: Replies((Reply("a", HOSTILE, 0.1),), 1.0)}, [HOSTILE]),
        answers.batch({"a.png": DataError(HOSTILE)}, ["site-0"]),
        answers.problem(HOSTILE),
        answers.note(HOSTILE),
    ],
)
def test_texts_stay_texts_in_html_and_in_the_pages_templates(page):
    assert "<img" not in page
    assert not set("${}`\\") & set(page)
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;" in page


def test_a_batch_is_a_table_with_a_file_and_names_the_pictures_that_cannot_be_used():
    found = {"a.png": replies("x", "y"), "b.png": DataError("it does not decode")}
    page = answers.batch(found, ["site-0", "site-1"])
    assert "1 of 2 pictures answered." in page
    assert '<td colspan="2"><b>Not possible:</b> <bdi>it does not decode' in page
    rows = answers.table(found, "What?")
    assert [row["model"] for row in rows] == ["site-0", "site-1", None]
    assert rows[1] == {
        "picture": "a.png",
        "question": "What?",
        "model": "site-1",
        "answer": "y",
        "confidence": 0.5,
        "problem": None,
    }
    assert rows[2]["problem"] == "it does not decode"


async def inside(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"the page"})


def visit(query="", cookie=None, kind="http"):
    """The messages that a browser gets at a door with the token ``secret``."""
    headers = [(b"cookie", cookie.encode())] if cookie else []
    scope = {"type": kind, "path": "//elsewhere", "query_string": query.encode()}
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(server.Door(inside, "secret", 80)({**scope, "headers": headers}, None, send))
    return sent


def test_the_door_opens_with_the_token_once_and_then_with_the_cookie():
    start, _ = visit("token=secret")
    headers = dict(start["headers"])
    assert (start["status"], headers[b"location"]) == (303, b"/")
    cookie = headers[b"set-cookie"].decode()
    assert cookie == "fedvlm-80=secret; HttpOnly; SameSite=Strict; Path=/"
    start, body = visit(cookie=f"other=1; {cookie.partition(';')[0]}")
    assert (start["status"], body["body"]) == (200, b"the page")
    headers = dict(start["headers"])
    assert headers[b"x-own"] == b"1"
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    ("query", "cookie"),
    [
        ("", None),
        ("token=", None),
        ("token=secre%C3%A9", None),
        ("", "fedvlm-80=wrong"),
        ("", "fedvlm-81=secret"),
        ("", "fedvlm-80"),
    ],
)
def test_the_door_stays_closed_without_the_token(query, cookie):
    start, body = visit(query, cookie)
    assert start["status"] == 401
    assert body["body"] == server.CLOSED
    assert visit(query, cookie, "websocket") == [{"type": "websocket.close", "code": 1008}]


def test_only_addresses_of_this_machine_are_loopback():
    hosts = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.1.5", "example.org")
    assert [server.is_loopback(host) for host in hosts] == [True, True, True, False, False, False]


def test_a_port_in_use_is_refused_with_what_to_do():
    with contextlib.closing(server.listen("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(FedVLMError, match=rf"port {number}: .*; choose another --port"):
            server.listen("127.0.0.1", number)
    with pytest.raises(FedVLMError, match="choose another --port"):
        server.listen("127.0.0.1", 70_000)


def test_the_command_names_the_extra_where_gradio_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    code, _, errors = call(capsys, monkeypatch, "app", "runs/none")
    assert (code, errors) == (2, "error: this needs gradio: pip install 'fedvlm[app]'\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("runs/none",), "there is no folder 'runs/none'"),
        (("runs/none", "--password", "short"), "--password needs at least 12 letters and digits"),
        (("runs/none", "--password", "with;semicolon"), "letters and digits, and nothing else"),
    ],
)
def test_a_wrong_command_is_refused_with_the_reason(capsys, monkeypatch, words, said):
    monkeypatch.setattr(server, "needs_gradio", lambda: None)
    code, _, errors = call(capsys, monkeypatch, "app", *words)
    assert code == 2
    assert said in errors
