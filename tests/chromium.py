"""A real headless Chromium for tests of pages; they are skipped by name where there is none."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATH = next((path for path in map(shutil.which, NAMES) if path), None)
needed = pytest.mark.skipif(PATH is None, reason="no chromium on the PATH (apt install chromium)")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A playwright browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=PATH, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, address: str, *, width: int = 1100, dark: bool = False) -> Iterator[Any]:
    """A playwright page. On leaving, it must have had no error and asked for nothing outside."""
    problems: list[str] = []
    scheme = "dark" if dark else "light"
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: said.type == "error" and problems.append(said.text))
    page.on("request", lambda request: _outside(request.url, address, problems))
    page.goto(address)
    yield page
    page.close()
    assert not problems


def _outside(url: str, address: str, problems: list[str]) -> None:
    origin = "/".join(address.split("/")[:3])
    if not url.startswith((origin, "data:", "blob:")):
        problems.append(f"asked for {url}")
