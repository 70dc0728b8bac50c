"""The documentation site in headless Chromium: no error, nothing asked of others, and it fits a telephone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docs_site
import pytest

pytest.importorskip("zensical", reason="the extra `docs` is not installed")

SCREENSHOTS = Path(__file__).parent / "screenshots"
PAGES = ["", "docs/how_it_works/", "docs/options/", "examples/train_compare_judge/"]


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the built site, served on this machine alone; built only where there is a browser."""
    pages = docs_site.build(tmp_path_factory.mktemp("site") / "docs")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(pages)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", 375),
        ("dark", 1280),
        pytest.param("light", 1280, marks=pytest.mark.slow),
        pytest.param("dark", 375, marks=pytest.mark.slow),
    ],
)
def test_pages_load_without_an_error_and_fit(browser: Any, address: str, scheme: str, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, asked, errors = context.new_page(), list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    SCREENSHOTS.mkdir(exist_ok=True)
    for path in PAGES:
        page.goto(address + path, wait_until="networkidle")
        name = path.rstrip("/").rpartition("/")[2] or "overview"
        page.screenshot(path=SCREENSHOTS / f"site-{name}-{scheme}-{width}.png")
        sizes = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert sizes[0] <= sizes[1], path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((v) => v < 80)")
        assert dark == (scheme == "dark")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')").startswith("#")  # to the text, past the menu
    context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert len(asked) > 2 * len(PAGES)
