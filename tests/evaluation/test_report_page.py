"""The report in a real browser: offline from a file, light and dark, by keyboard, on a phone."""

import numpy as np
import pytest

from saber_jax.evaluation import report
from tests import chromium, media_files
from tests.evaluation.report_files import SED, write_run

pytestmark = chromium.needed
browser = chromium.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    clips = root / "corpus" / "clips"
    film = media_files.write_clip(
        clips / f"{SED[0]['clip_id']}.mp4",
        frames=np.asarray(media_files.gray_frames(12)),
        audio=media_files.tone(1.0),
        codecs=("libx264", "aac"),
        pixels="yuv420p",
    )
    for row in SED[1:]:
        (clips / f"{row['clip_id']}.mp4").write_bytes(film.read_bytes())
    assert report.main(["--workdir", str(root), "--out", str(root / "report.html")]) == 0
    return (root / "report.html").as_uri()


def _selected(page):
    return page.locator("#list [aria-selected=true]").inner_text().splitlines()[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1100])
def test_nothing_sticks_out_and_text_stands_out(browser, address, width, dark):
    with chromium.opened(browser, address, width=width, dark=dark) as page:
        for view in ("clips", "pairs"):
            page.locator(f"[data-view={view}]").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = "(node => [node.color, node.backgroundColor])(getComputedStyle(document.body))"
        ink, paper = (_luminance(colour) for colour in page.evaluate(colours))
        assert (ink > paper) == dark
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7  # WCAG AAA.


def _luminance(colour: str) -> float:
    channels = np.array([int(part) for part in colour[4:-1].split(",")]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_a_clip_plays(browser, address):
    with chromium.opened(browser, address) as page:
        film = page.locator("#example video")
        film.evaluate("film => { film.muted = true; return film.play(); }")
        page.wait_for_function("document.querySelector('#example video').currentTime > 0.2")
        assert film.evaluate("film => film.videoWidth") == 84


def test_the_list_goes_by_keyboard_alone(browser, address):
    with chromium.opened(browser, address) as page:
        assert _selected(page) == "clip0"
        page.keyboard.press("j")
        assert _selected(page) == "clip1"
        page.locator("#list").focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowUp")
        assert _selected(page) == "clip2"
        page.keyboard.press("End")
        assert _selected(page) == "clip7"
        assert page.locator("#example h3").inner_text() == "clip7"
        page.locator("[data-view=clips]").focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("[data-view=pairs]").get_attribute("aria-selected") == "true"
        assert "Rejected, said without audio" in page.locator("#example").inner_text()


def test_filters_narrow_the_list_down(browser, address):
    with chromium.opened(browser, address) as page:
        page.select_option("#filter-type", "sarcasm")
        assert page.locator("#count").inner_text() == "5 of 8"
        page.select_option("#filter-outcome", "follows the voice")
        assert page.locator("#list [role=option]").count() == 2
        page.select_option("#filter-language", "zh")
        assert page.locator("#example").inner_text() == "No example fits these filters."


def test_differences_are_marked_and_can_be_hidden(browser, address):
    with chromium.opened(browser, address) as page:
        texts = page.locator("#example .fields .text").filter(has=page.locator("ins"))
        # Only the reasoning differs from the reference, in both stages.
        assert texts.locator("ins").all_inner_texts() == ["So happy.", "So contempt."]
        assert page.locator("#example .fields del").count() >= 2
        page.locator("#differences").uncheck()
        assert not page.locator("#example .fields del").first.is_visible()


def test_what_a_model_says_is_never_markup(browser, address):
    with chromium.opened(browser, address) as page:
        assert page.locator("#example b").count() == 0
        assert "</script><b>" in page.locator("#example").inner_text()
