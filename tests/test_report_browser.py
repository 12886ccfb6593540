"""The HTML report in a browser: charts, widths, contrast, no errors. Needs Chromium."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hostile
from fedvlm.report.write import ASSETS, write_report
from fedvlm.rounds import federate

CHROMIUM = Path("/usr/bin/chromium")

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    settings = hostile.settings(tmp_path_factory.mktemp("browser"))
    return write_report(federate.run(settings).folder).as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


def becomes(page, expression):
    """Waits for an expression. The page's policy forbids playwright's own way, which is eval."""
    for _ in range(100):
        if page.evaluate(expression):
            return True
        page.wait_for_timeout(50)
    return False


@pytest.fixture
def opened(browser, address):
    """Opens the report; afterwards, nothing was logged and nothing was asked of a network."""
    noise, contexts = [], []

    def show(width=800, scheme="light", **options):
        contexts.append(
            browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, **options
            )
        )
        page = contexts[-1].new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: noise.append(dialog.message))
        page.on("request", lambda sent: noise.append(sent.url))
        page.goto(address)
        if options.get("java_script_enabled", True):
            becomes(page, "document.querySelectorAll('.plot:not(.drawn)').length == 0")
        return page

    yield show
    for context in contexts:
        context.close()
    assert [text for text in noise if text != address and not text.startswith("data:")] == []


NARROW = """[...document.querySelectorAll('.plot svg')].filter(
    s => s.getBoundingClientRect().width < 0.7 * s.parentElement.clientWidth
      || s.getBoundingClientRect().width > s.parentElement.clientWidth).length"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_are_drawn_and_nothing_is_wider_than_the_window(opened, scheme):
    page = opened(400, scheme)
    plots = page.locator(".plot").count()
    assert plots == page.locator(".plot svg").count() >= 5
    assert page.locator(".plot svg path[aria-roledescription]").count() > 20, "marks are drawn"
    for width in (400, 800, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        assert becomes(page, f"{NARROW} == 0"), "charts fill the column"
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_chart_writes_names_as_they_are(opened):
    page = opened()
    texts = page.locator(".plot").first.locator("svg text").all_text_contents()
    assert set(hostile.SITES) <= set(texts)
    assert page.locator("main b, main u, main i, main img:not([src^='data:'])").count() == 0


def test_paper_is_light_and_open(opened):
    page = opened(scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    closed = "document.querySelectorAll('details:not([open])').length"
    assert page.evaluate(closed) > 0
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.left = {closed} }})")
    page.pdf(format="A4")
    assert page.evaluate("window.left") == 0
    assert page.evaluate(closed) > 0, "as before"


def test_without_scripts_all_numbers_are_there(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("table").count() >= 5
    assert page.locator("article.row").count() == 9


def test_axe_finds_nothing(opened):
    axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is missing")
    page = opened(400, bypass_csp=True)
    page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found["violations"]] == []
        assert "color-contrast" in [rule["id"] for rule in found["passes"]]


# The contrast of the theme, by the formula of WCAG 2.2


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def themes():
    style = (Path(ASSETS) / "report" / "style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.+?)\}", style, re.DOTALL)
    light, dark = (dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", block)) for block in blocks)
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_marks_stand_out_from_the_paper(theme):
    colours = themes()[theme]
    for name in ("ink", "soft", "link", "good", "bad", "open", "warn"):
        for ground in ("paper", "tint"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in (f"c{k}" for k in range(8)):
        assert contrast(colours[name], colours["paper"]) >= 3, name
