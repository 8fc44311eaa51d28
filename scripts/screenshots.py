"""The pictures of docs/images, of a campaign or a folder of runs: python scripts/screenshots.py LOG_DIR

Needs playwright and a Chromium (scripts/install_chromium.sh).
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import BrowserContext, sync_playwright
from rich.console import Console

from retrain.cli.watch import Watcher
from retrain.report import write_report

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MOST_BYTES = 300_000


def shoot(context: BrowserContext, page_file: Path, out: Path, *, size: tuple[int, int], scheme: str, at: str) -> None:
    """A picture of the part of the page that begins with the element `at`, which the pointer is on."""
    page = context.new_page()
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(page_file.as_uri())
    page.evaluate("(at) => document.querySelector(at).scrollIntoView()", at)
    token = page.locator(".tokens .planning, .tokens span").first
    if at == "#completions" and token.count():
        token.dispatch_event("click")
    page.wait_for_timeout(200)
    page.screenshot(path=out)
    page.close()


def live_view(folder: Path, out: Path) -> None:
    console = Console(width=132, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Watcher(folder).screen(40))
    console.save_svg(str(out), title=f"retrain status {folder.name} --watch")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pictures of docs/images.")
    parser.add_argument("folder", type=Path, help="a campaign, or a folder of runs")
    folder = parser.parse_args().folder
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        print("no Chromium on PATH: scripts/install_chromium.sh", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        report = write_report(folder, Path(temporary) / "report.html")
        profile = Path(temporary) / "profile"
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, args=FLAGS
        )
        shoot(context, report, IMAGES / "report.png", size=(1180, 900), scheme="light", at="body")
        shoot(context, report, IMAGES / "report-phone.png", size=(390, 844), scheme="dark", at="#completions")
        shoot(context, report, IMAGES / "report-credit.png", size=(1180, 620), scheme="light", at="#completions")
        context.close()
    live_view(folder, IMAGES / "status-watch.svg")
    large = [path for path in IMAGES.iterdir() if path.stat().st_size > MOST_BYTES]
    for path in sorted(IMAGES.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
