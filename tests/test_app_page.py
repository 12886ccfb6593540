"""The playground's page: its buttons, and the page in a browser."""

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

from fedvlm.rounds import federate

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


@pytest.fixture(scope="module")
def does(finished_run, tmp_path_factory):
    from fedvlm.after.asked import Asked
    from fedvlm.after.opened import open_run
    from fedvlm.app.page import Handlers

    return Handlers(Asked(open_run(finished_run)), tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def bad(does):
    """An uploaded file that is no picture."""
    path = does._folder / "bad.png"
    path.write_bytes(b"no picture")
    return path


@pytest.fixture(scope="module")
def picture(does, new_rows):
    """An uploaded picture."""
    return Path(shutil.copy(new_rows / "picture.png", does._folder))


@NEEDS_GRADIO
def test_only_uploaded_files_are_read(does, picture, new_rows, tmp_path):
    (link := picture.with_name("link.png")).symlink_to(new_rows / "picture.png")
    for other in (new_rows / "picture.png", link, picture.parent / "none.png", picture.parent):
        assert "was not uploaded here" in does.ask(str(other), "What?", ["site-0"], None)
        page, _ = does.ask_many([str(other)], "What?", ["site-0"])
        assert "was not uploaded here" in page
    assert "1 model answered." in does.ask(str(picture), "What?", ["site-0"], None)


@NEEDS_GRADIO
def test_a_bad_picture_is_a_message_on_the_page(does, bad):
    assert "the image does not decode" in does.ask(str(bad), "What?", ["site-0"], None)
    assert "there is no picture" in does.ask(None, "What?", ["site-0"], None)
    assert "no model is chosen" in does.ask(str(bad), "What?", [], None)


@NEEDS_GRADIO
def test_a_held_out_row_comes_with_its_picture_question_and_answer(does):
    image, question, reference, said = does.take("site-1", 2)
    row = does.asked.held_out().row("site-1", 2)
    assert (image.tobytes(), question, reference) == (
        row.images[0].tobytes(),
        row.question,
        row.reference,
    )
    assert "Row 2 of" in said
    assert "got the number 999" in does.take("site-1", 999)[3]
    assert "got the number 0" in does.take("site-1", None)[3]


@NEEDS_GRADIO
def test_a_batch_gives_a_table_and_a_file(does, picture, bad):
    import pandas as pd

    models = ["site-0", "untuned"]
    page, download = does.ask_many([str(picture), str(bad)], "What?", models)
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


def asked_directly(page, address, file):
    """The answer to a request that names a file of the machine."""
    picture = {"path": str(file), "meta": {"_type": "gradio.FileData"}}
    models = ["site-0", "site-2", "global", "untuned"]
    asked = {"data": [picture, "What?", models, None]}
    url = f"{address.partition('?')[0]}gradio_api/run/ask"
    return page.context.request.post(url, data=asked).text()


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
        uploaded = next(uploads.rglob("picture.png"))
        assert "4 models" in asked_directly(page, address, uploaded)
        assert asked_directly(page, address, new_rows / "picture.png") == '{"error":null}'
        process.send_signal(signal.SIGTERM)
        printed = process.stdout.read()
        assert "was not uploaded by a user" in printed
        assert "graceful" not in printed
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
