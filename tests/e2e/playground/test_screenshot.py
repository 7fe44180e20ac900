"""The picture in the README is true: the demo model, its shipped probe, the page, and the pixels.

To take it again: pytest tests/e2e/playground/test_screenshot.py --basetemp=FOLDER
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from playwright.sync_api import Locator, Page, expect

Open: TypeAlias = Callable[..., Page]

QUESTION = "When was the Peace of Westphalia signed, and where?"
MAX_SCREENSHOT_BYTES = 300_000
ANSWER_MS = 240_000  # two answers of some 50 tokens, on a machine that does other things too


@pytest.fixture(scope="session")
def demo(demo_model_path: Path, serve: Callable[..., str]) -> str:
    """Address of `make serve`: the demo model with the shipped probe."""
    return serve("demo", OMP_NUM_THREADS="1")  # does not collapse when other tests run beside it


def test_the_screenshot_shows_a_real_answer_with_tinted_tokens(
    demo: str, visit: Open, tmp_path: Path
) -> None:
    """A page that looks fine without a single risk would pass every other look at it."""
    page = visit(demo)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    page.fill("#prompt", QUESTION)
    page.press("#prompt", "Enter")
    expect(page.locator("#announcer")).not_to_be_empty(timeout=ANSWER_MS)
    expect(page.locator(".state")).to_have_text("ended by itself")

    risks = page.locator(".token").evaluate_all("(spans) => spans.map(({ entry }) => entry.risk)")
    assert len(risks) > 20
    assert all(isinstance(risk, float) and 0 <= risk <= 1 for risk in risks)
    assert 0 <= float(page.locator(".score").inner_text()) <= 1

    flagged = page.locator(".token[data-level=flagged]")
    worst = page.locator(".token").nth(risks.index(max(risks)))
    calmest = page.locator(".token").nth(risks.index(min(risks)))
    assert flagged.count() > 0, "the model invents a date and a place here; nothing was flagged"
    assert _redness(page, worst) > _redness(page, calmest) + 0.1

    worst.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(f"{max(risks):.4f}")
    picture = page.screenshot(path=tmp_path / "playground.png")
    assert len(picture) < MAX_SCREENSHOT_BYTES


def test_the_committed_screenshot_is_small(repository: Path) -> None:
    """It travels with every clone."""
    picture = repository / "docs" / "assets" / "playground.png"
    assert 20_000 < picture.stat().st_size < MAX_SCREENSHOT_BYTES


def _redness(page: Page, token: Locator) -> float:
    """How much more red than blue a token's pixels are, from 0 to 1: what a person sees."""
    encoded = base64.b64encode(token.screenshot()).decode()
    blank = page.context.new_page()  # the page's own policy would not let an image be read
    redness: float = blank.evaluate(
        """async (encoded) => {
            const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0));
            const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
            const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
            canvas.drawImage(image, 0, 0);
            const { data } = canvas.getImageData(0, 0, image.width, image.height);
            let difference = 0;
            for (let i = 0; i < data.length; i += 4) difference += data[i] - data[i + 2];
            return difference / (data.length / 4) / 255;
        }""",
        encoded,
    )
    blank.close()
    return redness
