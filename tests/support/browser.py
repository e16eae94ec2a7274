"""Debian's Chromium, driven by Playwright: opens pages of this machine, records what they do."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_ARGUMENTS = (
    '--no-sandbox',  # the tests may be root
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
)
_REMEDY = (
    'Chromium is not installed. Fix: `make browser` as root (Debian: apt-get install chromium)'
)


_VIDEO_MILLISECONDS = 20_000


@dataclasses.dataclass
class Opened:
    """A page with what it did since it was opened.

    Attributes:
      page: Playwright's page.
      requests: addresses that it asked for, without the content of data: addresses.
      messages: of its console, and its errors.
    """

    page: Any
    requests: list[str] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)

    def asks_nobody(self) -> bool:
        """Whether the page itself was the only request that left the browser."""
        asked = [address for address in self.requests if not address.startswith('data:')]
        return asked == [self.page.url]

    def play_video(self) -> None:
        """Plays the page's first video; raises an error unless pictures are shown."""
        self.page.eval_on_selector('video', 'async (video) => { await video.play(); }')
        self.page.wait_for_function(
            """() => {
              const { readyState, currentTime, videoWidth } = document.querySelector('video');
              return readyState >= 2 && currentTime > 0.2 && videoWidth >= 160;
            }""",
            timeout=_VIDEO_MILLISECONDS,
        )


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Starts Chromium; skips the test, or fails it where CI=true, if it is not installed."""
    program = shutil.which('chromium')
    if program is None:
        pytest.fail(_REMEDY) if os.environ.get('CI') == 'true' else pytest.skip(_REMEDY)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=list(_ARGUMENTS))
        try:
            yield started
        finally:
            started.close()


@contextlib.contextmanager
def opened(browser: Any, file: pathlib.Path, width: int, scheme: str) -> Iterator[Opened]:
    """Opens an HTML file in a window of `width` pixels under the colour scheme."""
    viewport = {'width': width, 'height': 900}
    with contextlib.closing(browser.new_context(viewport=viewport, color_scheme=scheme)) as context:
        shown = Opened(context.new_page())
        shown.page.on('request', lambda request: shown.requests.append(request.url.split(',')[0]))
        shown.page.on('console', lambda message: shown.messages.append(message.text))
        shown.page.on('pageerror', lambda error: shown.messages.append(str(error)))
        shown.page.goto(file.as_uri(), wait_until='load')
        yield shown
