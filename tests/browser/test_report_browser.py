"""The report in a real Chromium: nothing is fetched, nothing runs that others wrote, everything can be used."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, Playwright, sync_playwright

from report_runs import HOSTILE, credit_row, generation_row, make_campaign, make_run, metrics_row
from retrain.report import write_report
from scripts.screenshots import FLAGS, NAMES

pytestmark = pytest.mark.browser

# The value of a custom property as an "rgb(r, g, b)".
SHOWN = """(name) => {
  const probe = document.createElement('i');
  probe.style.color = getComputedStyle(document.documentElement).getPropertyValue(name);
  document.body.append(probe);
  return getComputedStyle(probe).color;
}"""


@dataclass
class Opened:
    """A page with what its console said, what failed in it and what it asked for."""

    page: Page
    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def is_quiet(self) -> bool:
        return self.console == [] and self.errors == [] and len(self.requests) == 1


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    assert program, "no Chromium on PATH: scripts/install_chromium.sh"
    context = playwright.chromium.launch_persistent_context(
        tmp_path_factory.mktemp("profile"), executable_path=program, headless=True, args=FLAGS
    )
    yield context
    context.close()


@pytest.fixture
def show(browser: BrowserContext, tmp_path: Path) -> Iterator:
    """Opens the report of a folder."""
    pages = []

    def open_report(folder: Path, *, width: int = 1200, scheme: str = "light") -> Opened:
        page = browser.new_page()
        pages.append(page)
        opened = Opened(page)
        page.on("console", lambda message: opened.console.append(message.text))
        page.on("pageerror", lambda error: opened.errors.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.set_viewport_size({"width": width, "height": 740})
        page.emulate_media(color_scheme=scheme)
        page.goto(write_report(folder, tmp_path / f"page{len(pages)}.html").as_uri())
        return opened

    yield open_report
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    long = credit_row(5, tokens=["wait"] * 400, advantages=[0.5] * 400, uncertainty=[0.1] * 400, planning=[3])
    return make_campaign(tmp_path_factory.mktemp("c") / "ablation", credit=[credit_row(1), long, credit_row(10)])


def colors(page: Page) -> tuple[str, str]:
    return tuple(
        page.evaluate("(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color] })()")
    )


def luminance(color: str) -> float:
    """WCAG 2.2's relative luminance of an "rgb(r, g, b)"."""
    parts = [int(part) / 255 for part in color[4:-1].split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_draws_and_asks_for_nothing(show, campaign: Path) -> None:
    opened = show(campaign)
    page = opened.page
    assert page.locator("figure svg[role=img]").count() == page.locator("figure").count() > 8
    assert page.locator("figure .band").count() > 8
    assert page.locator("#samples .tokens span").count() == 4
    assert opened.is_quiet(), (opened.console, opened.errors, opened.requests)


def test_the_policy_is_in_force(show, campaign: Path) -> None:
    """A request or a script that got in nevertheless would be stopped: the browser says so."""
    opened = show(campaign)
    opened.page.evaluate(
        "() => { const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
        " const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s) }"
    )
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in line for line in opened.console) >= 2


def test_what_others_wrote_does_nothing(show, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        credit=[credit_row(1, prompt=HOSTILE, reference=HOSTILE, tokens=[HOSTILE, "<b>", "\u202e", "\0"])],
        row=lambda step: metrics_row(step, warnings=[HOSTILE]),
    )
    opened = show(run)
    page = opened.page
    page.wait_for_timeout(200)
    assert page.title() == "Run run"
    assert page.locator("main img, main script, main b").count() == 0
    assert page.locator(".tokens span").first.text_content() == HOSTILE
    assert opened.is_quiet(), (opened.console, opened.errors, opened.requests)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(show, campaign: Path, scheme: str) -> None:
    page = show(campaign, scheme=scheme).page
    back, text = map(luminance, colors(page))
    assert (back < text) == (scheme == "dark")
    assert (max(back, text) + 0.05) / (min(back, text) + 0.05) > 7, "contrast, WCAG AAA"
    page.click("#theme")
    assert (luminance(colors(page)[0]) > 0.5) == (scheme == "dark"), "the button turns it over"
    page.click("#theme")
    assert tuple(map(luminance, colors(page))) == (back, text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_of_curves_can_be_seen(show, campaign: Path, scheme: str) -> None:
    """At least 3 to 1 against what they are drawn on (WCAG 1.4.11)."""
    page = show(campaign, scheme=scheme).page
    for i in range(8):
        drawn, panel = (page.evaluate(SHOWN, name) for name in (f"--c{i}", "--panel"))
        light, dark = sorted(map(luminance, (drawn, panel)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3, (i, drawn, panel)


@pytest.mark.parametrize("width", [320, 360, 768, 1200])
def test_no_width_scrolls_sideways(show, campaign: Path, width: int) -> None:
    opened = show(campaign, width=width)
    page = opened.page
    page.select_option("#step", "5")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate(
            "Math.max(...[...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().right))"
        )
        <= width
    )
    assert opened.is_quiet()


def test_a_turned_phone_draws_anew(show, campaign: Path) -> None:
    page = show(campaign, width=360).page
    page.set_viewport_size({"width": 740, "height": 360})
    page.wait_for_function("document.querySelector('figure svg').viewBox.baseVal.width > 320 || innerWidth > 740")
    assert page.evaluate("document.documentElement.scrollWidth") <= 740


def test_shades(show, campaign: Path) -> None:
    page = show(campaign).page
    page.select_option("#step", "1")

    def shades() -> list[float]:
        texts = page.eval_on_selector_all(".tokens span", "(all) => all.map((one) => one.style.backgroundColor)")
        return [float(text.rpartition("/")[2].rstrip(")")) if "/" in text else 0.0 for text in texts]

    assert shades() == [0.325, 0.65, 0.163, 0.0], "by the size of the advantage; none on an environment's token"
    assert "advantage +1" in page.text_content("#scale")
    page.check('input[value="uncertainty"]')
    assert shades()[1] == 0.65
    assert shades()[0] == pytest.approx(0.65 * (0.1 / 2.0) ** 0.5, abs=1e-3)
    assert page.eval_on_selector_all(".tokens .planning", "(all) => all.map((one) => one.textContent)") == [
        "let",
        " me",
    ]
    assert page.locator(".tokens .context").text_content() == "\n5"


def test_the_keyboard_is_enough(show, campaign: Path) -> None:
    page = show(campaign).page
    page.locator("#run").focus()
    page.keyboard.press("ArrowDown")
    assert page.input_value("#run") == "grpo+gtpo_sepa_s2"
    assert page.input_value("#step") == "10"
    page.locator("#earlier").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert page.input_value("#step") == "1"
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.text_content("#token") == '" me", token 2 of 4: advantage -1, uncertainty 2, plans'
    page.keyboard.press("End")
    assert "written by the environment" in page.text_content("#token")
    chart = page.locator("figure svg[role=img]").first
    chart.focus()
    page.keyboard.press("End")
    tip = page.locator("figure .tip").first
    assert tip.text_content().startswith("step 10\ngrpo+gtpo_sepa: 52% (")
    assert "3 seeds" in tip.text_content()
    page.keyboard.press("Escape")
    assert not tip.is_visible()


def test_a_curve_can_be_taken_out(show, campaign: Path) -> None:
    page = show(campaign).page
    figure = page.locator("figure").first
    assert figure.locator(".curve[class*=' s']").count() >= 2
    before = figure.locator(".plot path.curve").count()
    figure.locator(".legend button").first.click()
    assert figure.locator(".plot path.curve").count() == before - 1
    assert figure.locator(".legend button").first.get_attribute("aria-pressed") == "false"
    assert "grpo" not in figure.locator("svg[role=img]").get_attribute("aria-label")


def test_pointing_at_a_chart(show, campaign: Path) -> None:
    page = show(campaign).page
    chart = page.locator("figure svg[role=img]").first
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    assert page.locator("figure .tip").first.text_content().startswith("step 1\n")


@pytest.mark.parametrize("steps", [1, 2])
def test_hardly_anything_to_draw(show, tmp_path: Path, steps: int) -> None:
    run = make_run(tmp_path / "run", steps=steps, generations=[generation_row(1, 0.0, 5)], credit=[])
    opened = show(run)
    assert opened.page.locator("figure svg[role=img]").count() > 5
    assert "NaN" not in opened.page.content()
    assert opened.is_quiet(), (opened.console, opened.errors)
