"""The playground: answers as HTML, the door with the token, and the page in a browser."""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fedvlm.after.asked import Replies, Reply
from fedvlm.app import answers, server
from fedvlm.errors import DataError, FedVLMError
from fedvlm.rounds import federate
from test_cli import call

HOSTILE = '<img src=x onerror="alert(1)"> **bold** ${1+1} {{value}} `x` \\'
NEEDS_GRADIO = pytest.mark.skipif(not find_spec("gradio"), reason="needs gradio (extra app)")
CHROMIUM = shutil.which("chromium")
CALLS = """
import sys
def noted(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        open(__file__ + ".calls", "a").write(f"{event} {given[1:]}\\n")
sys.addaudithook(noted)
"""
"""A module that Python imports at its start: it notes each call to another address."""
BROWSED = pytest.mark.skipif(
    not (find_spec("gradio") and find_spec("playwright") and CHROMIUM),
    reason="needs gradio (extra app), playwright and chromium",
)


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


# -- the page, which needs gradio


@pytest.fixture(scope="module")
def does(finished_run, tmp_path_factory):
    from fedvlm.after.asked import Asked
    from fedvlm.after.opened import open_run
    from fedvlm.app.page import Handlers

    return Handlers(Asked(open_run(finished_run)), tmp_path_factory.mktemp("served"))


@NEEDS_GRADIO
def test_a_bad_picture_is_a_message_on_the_page(does, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    assert "the image does not decode" in does.ask(str(bad), "What?", ["site-0"], None)
    assert "there is no picture" in does.ask(None, "What?", ["site-0"], None)
    assert "no model is chosen" in does.ask(str(bad), "What?", [], None)


@NEEDS_GRADIO
def test_a_held_out_row_comes_with_its_picture_question_and_answer(does):
    image, question, reference, said = does.take("site-1", 2)
    row = does.asked.held_out().row("site-1", 2)
    assert (image.tobytes(), question, reference) == (
        row.image.tobytes(),
        row.question,
        row.reference,
    )
    assert "Row 2 of" in said
    assert "got the number 999" in does.take("site-1", 999)[3]
    assert "got the number 0" in does.take("site-1", None)[3]


@NEEDS_GRADIO
def test_a_batch_gives_a_table_and_a_file(does, new_rows, tmp_path):
    import pandas as pd

    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    models = ["site-0", "untuned"]
    page, download = does.ask_many([str(new_rows / "picture.png"), str(bad)], "What?", models)
    assert "1 of 2 pictures answered." in page
    table = pd.read_csv(
        download.value["path"] if isinstance(download.value, dict) else download.value
    )
    assert list(table["picture"]) == ["picture.png", "picture.png", "bad.png"]
    assert list(table["model"][:2]) == models
    for files, asked, said in (
        ([], "What?", "there are no pictures"),
        ([str(bad)] * 201, "What?", "choose at most 200"),
        ([str(bad)], " ", "the question is empty"),
    ):
        assert said in does.ask_many(files, asked, models)[0]


@contextlib.contextmanager
def served(folder, uploads, *words):
    """Runs ``fedvlm app``; gives the process and the address that it has printed."""
    uploads.mkdir()
    (uploads / "sitecustomize.py").write_text(CALLS)
    source = Path(federate.__file__).parents[1]
    paths = map(str, (uploads, source, os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "fedvlm", "app", str(folder), "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**env, "TMPDIR": str(uploads)},
    ) as process:
        try:
            line = next((line for line in process.stdout if "http://" in line), "")
            yield process, re.search(r"http://\S+", line)[0]
        finally:
            process.kill()


@contextlib.contextmanager
def browser(width):
    """A page of Chromium, and what it has complained about or fetched from elsewhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, odd = chromium.new_page(viewport={"width": width, "height": 900}), []
        page.on("console", lambda said: odd.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: odd.append(str(error)))
        page.on("request", lambda asked: odd.append(asked.url) if _elsewhere(asked.url) else None)
        page.on("dialog", lambda dialog: odd.append(dialog.message))
        yield page, odd
        chromium.close()


def _elsewhere(url):
    return not url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture
def hostile_run(tmp_path):
    """The folder of a run in which a site's name is HTML and a template."""
    import fedvlm

    rows = fedvlm.scenes(style="concept", sites=3, rows=16).to_pandas()
    rows["site"] = rows["site"].replace("site-1", "<img src=x onerror=alert(1)>${1+1}")
    rows.to_parquet(tmp_path / "rows.parquet")
    federate.run(
        {
            "output": str(tmp_path / "run"),
            "data": {"path": str(tmp_path / "rows.parquet"), "columns": {"answer": "chosen"}},
            "partition": {"kind": "column", "column": "site", "min_rows": 4},
            "algorithm": {"name": "plora"},
            "train": {"rounds": 1, "local_steps": 2, "batch_size": 4},
            "eval": {"max_rows": 2, "max_new_tokens": 4},
            "lora": {"rank": 2, "alpha": 4},
            "engine": {"threads": 1},
        }
    )
    return tmp_path / "run"


@BROWSED
@pytest.mark.slow
@pytest.mark.waits
@pytest.mark.parametrize("width", [400, 1400])
def test_a_person_asks_in_a_browser_and_nothing_leaves_the_machine(
    hostile_run, new_rows, tmp_path, width
):
    uploads = tmp_path / "uploads"
    with served(hostile_run, uploads) as (process, address), browser(width) as (page, odd):
        page.goto(address)
        page.locator("input[type=file]").first.set_input_files(str(new_rows / "picture.png"))
        page.locator("#picture img").wait_for()
        page.get_by_role("button", name="Ask", exact=True).click()
        table = page.locator("#answers table")
        table.wait_for()
        names = table.locator("tbody th").all_inner_texts()
        assert sorted(names) == sorted(
            ["site-0", "<img src=x onerror=alert(1)>${1+1}", "site-2", "global", "untuned"]
        )
        assert table.locator(".said").count() == 5
        assert overflow(page) <= 0
        page.get_by_text("Take a held-out row").click()
        page.get_by_role("button", name="Take this row").click()
        page.get_by_text("the answer is").wait_for()
        page.wait_for_timeout(1000)  # the page takes over the picture and the question
        page.get_by_role("button", name="Ask", exact=True).click()
        page.get_by_text("Answer in the data").wait_for()
        page.get_by_role("tab", name="Many pictures").click()
        page.locator("input[type=file]").last.set_input_files(str(new_rows / "picture.png"))
        page.get_by_text("picture.png").wait_for()
        page.get_by_role("button", name="Ask about all pictures").click()
        page.get_by_text("1 of 1 pictures answered.").wait_for()
        assert overflow(page) <= 0
        assert odd == []
        assert list(uploads.rglob("picture.png"))
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.stdout.read()
        process.wait(30)
        assert not list(uploads.glob("fedvlm-app-*"))
        assert not list(uploads.glob("*.calls")), (uploads / "sitecustomize.py.calls").read_text()


@BROWSED
@pytest.mark.slow
@pytest.mark.waits
def test_without_the_token_the_server_gives_nothing(finished_run, tmp_path):
    import urllib.error
    import urllib.request

    words = ("--password", "twelveLetters1")
    with served(finished_run, tmp_path / "uploads", *words) as (process, address):
        base = address.partition("?")[0]
        assert address == f"{base}?token=twelveLetters1"
        for path in ("", "config", "gradio_api/info", "gradio_api/upload", "assets/x"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(base + path, data=None)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
