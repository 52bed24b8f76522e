"""Chromium without a window: what a page looks like, measured. Debian: apt-get install chromium-driver."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
READABLE = 4.5
"""Contrast of text that WCAG 2 asks for (AA)."""

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="needs Chromium and ChromeDriver (Debian: apt-get install chromium-driver)"
)


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A driver of the browser, ended afterwards."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def window(driver: Any, width: int, height: int, *, scheme: str = "light") -> None:
    """Show pages in a window of this size, a phone's below 500 pixels, in a `light` or `dark` scheme."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def size_of_page(driver: Any) -> tuple[int, int]:
    """Width of the page's content and of the window."""
    return tuple(driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]"))


def contrast(driver: Any, element: Any) -> float:
    """WCAG's contrast of an element's text and what lies behind it, 1 to 21."""
    found = driver.execute_script(
        "let back = arguments[0], style = getComputedStyle(back), text = style.color;"
        "while (back.parentElement && style.backgroundColor === 'rgba(0, 0, 0, 0)') {"
        "  back = back.parentElement; style = getComputedStyle(back); }"
        "return [text, style.backgroundColor];",
        element,
    )
    lighter, darker = sorted(map(_luminance, found), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = (int(number) / 255 for number in re.findall(r"\d+", colour)[:3])
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def picture(driver: Any, name: str) -> None:
    """A screenshot, where somebody asked for one."""
    if folder := os.environ.get("WEB_PICTURES"):
        driver.save_screenshot(str(Path(folder) / name))
