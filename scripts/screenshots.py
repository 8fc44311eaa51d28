"""The pictures of docs/images, of a campaign or a folder of runs: python scripts/screenshots.py LOG_DIR

The live view with --live, while the runs run; the report without, when they are finished.

Needs playwright and a Chromium (scripts/install_chromium.sh).
"""

from __future__ import annotations

import argparse
import io
import re
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
    """A picture of the part of the page that begins with the element `at`; of the completions, the last run's."""
    page = context.new_page()
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
    page.goto(page_file.as_uri())
    page.evaluate("(at) => document.querySelector(at).scrollIntoView()", at)
    if at == "#completions":
        run = page.locator("#run")
        run.select_option(index=run.locator("option").count() - 1)
        planning = page.locator(".tokens .planning")
        (planning if planning.count() else page.locator(".tokens span")).first.dispatch_event("click")
    page.wait_for_timeout(200)
    page.screenshot(path=out)
    page.close()


def live_view(folder: Path, out: Path) -> None:
    console = Console(width=132, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Watcher(folder).screen(40))
    svg = console.export_svg(title=f"retrain status {folder} --watch")
    # The reader's own fonts: a picture fetches nothing.
    out.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")


def report(folder: Path) -> int:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        print("no Chromium on PATH: scripts/install_chromium.sh", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        page = write_report(folder, Path(temporary) / "report.html")
        profile = Path(temporary) / "profile"
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, headless=True, args=FLAGS
        )
        shoot(context, page, IMAGES / "report.png", size=(1180, 900), scheme="light", at="body")
        shoot(context, page, IMAGES / "report-phone.png", size=(390, 844), scheme="dark", at="#completions")
        shoot(context, page, IMAGES / "report-credit.png", size=(1180, 620), scheme="light", at="#completions")
        context.close()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the pictures of docs/images.")
    parser.add_argument("folder", type=Path, help="a campaign, or a folder of runs")
    parser.add_argument("--live", action="store_true", help="the live view, not the report")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    if arguments.live:
        live_view(arguments.folder, IMAGES / "status-watch.svg")
    elif status := report(arguments.folder):
        return status
    sizes = {path.name: path.stat().st_size for path in sorted(IMAGES.iterdir())}
    print("\n".join(f"{name}: {size:,} bytes" for name, size in sizes.items()))
    return int(max(sizes.values()) > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
