"""The rating page in a browser: keys and mouse, saving, the download, hostile texts, a phone."""

import json
import re

import pytest

from extras import rate_answers
from extras.lib import ratings
from tests.conftest import run_script
from tests.extras.browser import Browser, chromium
from utils.runs import write_lines

HOSTILE = "<script>document.title='owned'</script>"
EVIL = f"</script><img src=x onerror=\"document.title='owned'\">{HOSTILE}&\u2028\x1b[2J\x00"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with three pairs to rate, one of them hostile."""
    chromium()
    place = tmp_path_factory.mktemp("rating")
    lines = [{"prompt": f"Question {i}", "before": f"old {i}", "after": f"new {i}", "human": "Me"} for i in range(2)]
    lines.append({"prompt": EVIL, "before": EVIL, "after": "<b>bold</b>", "human": EVIL})
    write_lines(place / "samples.jsonl", lines)
    run_script(rate_answers, SAMPLES=place / "samples.jsonl", OUTPUT_DIR=place / "out")
    return place / "out"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_ratings_are_saved_downloaded_and_imported(folder, browser, tmp_path):
    items, page = ratings.read_items(folder), folder / "rate.html"
    browser.open(page)
    assert browser.texts("#done") == ["0 / 3 rated"] and browser.texts("#place") == ["1 / 3"]
    browser.press(*"1234554321")
    assert browser.texts("#place") == ["1 / 3"], "the preference is missing"
    browser.press("ф", code="KeyA")  # the key A of a Russian keyboard
    assert browser.texts("#done") == ["1 / 3 rated"] and browser.texts("#place") == ["2 / 3"]
    browser.click('[data-answer="0 5"]')
    browser.press(
        "2", "ArrowDown", "4", "ArrowUp", "ArrowUp", "3", "="
    )  # skip the third criterion, grade the fourth 4, then 3
    browser.open(page)  # opened again: every grade is saved
    assert browser.texts("#place") == ["2 / 3"] and browser.texts("#done") == ["1 / 3 rated"]
    pressed = browser.value("[...document.querySelectorAll('[aria-pressed=true]')].map((n) => n.dataset.answer)")
    assert pressed == ["0 5", "1 2", "2 3", "3 4", "10 tie"]
    browser.press("ArrowRight", "ArrowRight", *"3333322222", "b")  # to the last item, then back to the open one
    assert browser.texts("#place") == ["2 / 3"] and browser.texts("#done") == ["2 / 3 rated"]
    browser.click("input")
    browser.press(*"Ann/1")
    browser.click('[data-answer="4 1"]')
    saved = browser.download("#download", tmp_path)
    assert re.fullmatch(r"ratings-Ann_1-\d{4}-\d\d-\d\d\.json", saved.name)
    measured = {rating["item"]: rating for rating in json.loads(saved.read_text(encoding="utf-8"))["ratings"]}
    first, second, third = (measured[item["id"]] for item in items)
    rows = ((1, 2, 3, 4, 5), (5, 4, 3, 2, 1))
    assert first["grades"] == [dict(zip(ratings.CRITERIA, row, strict=True)) for row in rows]
    assert (first["preference"], second["preference"], third["preference"]) == ("a", "tie", "b")
    assert second["grades"][0] == dict(zip(ratings.CRITERIA, (5, 2, 3, 4, 1), strict=True)) and not second["grades"][1]
    run_script(rate_answers, IMPORT=saved, OUTPUT_DIR=folder)
    result = json.loads((folder / "ratings.json").read_text(encoding="utf-8"))
    assert result["raters"] == ["Ann/1"] and result["incomplete"] == 1 and result["items_rated"] == 3


def test_hostile_texts_are_shown_and_not_run(folder, browser):
    browser.open(folder / "rate.html")
    for _ in range(3):
        browser.press("ArrowLeft")
    seen = []
    for _ in range(3):
        seen += browser.texts(".text")
        browser.press("ArrowRight")
    shown = ratings.visible(EVIL)
    assert seen.count(shown) == 3 and "[U+001B][2J[U+0000]" in shown, "prompt, human answer and answer"
    assert "<b>bold</b>" in seen and "owned" not in browser.value("document.title")
    assert browser.value("document.querySelectorAll('img, .text *').length") == 0
    browser.value("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert browser.value("window.ran") is None, "the page blocks other scripts"
    items = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert items and all(url.startswith("file:") for url in items)
    text = (folder / "rate.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in text and not re.search(r"""(src|href)\s*=\s*["']?http""", text)


def test_the_page_warns_if_the_browser_cannot_save_and_the_download_is_complete(folder, browser, tmp_path):
    broken = "Object.defineProperty(window, 'localStorage', { get() { throw new Error('off'); } })"
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source=broken)
    browser.open(folder / "rate.html")
    assert browser.texts("#done") == ["0 / 3 rated"] and "cannot save" in browser.texts(".done")[0]
    browser.press(*"5555544444", "b")
    saved = browser.download("#download", tmp_path)
    (rating,) = json.loads(saved.read_text(encoding="utf-8"))["ratings"]
    assert rating["preference"] == "b" and re.fullmatch(r"rater-[a-z0-9]+", rating["rater"])
    browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
    browser.value("void setTimeout(() => location.reload())")
    assert browser.wait_for("Page.javascriptDialogOpening")["type"] == "beforeunload", (
        "the page warns before grades are lost"
    )
    browser.send("Page.handleJavaScriptDialog", accept=True)
    browser.wait_for("Page.loadEventFired")


def test_the_page_fits_a_phone_and_follows_dark_mode(folder, browser, tmp_path):
    browser.open(folder / "rate.html")
    for name, width, dark in (("light", 900, False), ("dark", 900, True), ("phone", 360, False)):
        browser.screenshot(tmp_path / f"{name}.png", width, 900, dark)
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "no horizontal scrolling"
    sides = browser.value("[...document.querySelectorAll('.side')].map((node) => node.getBoundingClientRect().x)")
    assert sides[0] == sides[1], "below each other on a phone"
