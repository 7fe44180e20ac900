"""What the page shows of the real thing: the demo model, its shipped probe, the page, the pixels.

To take docs/assets/playground.png again: pytest tests/e2e/playground/test_demo.py --basetemp=FOLDER
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

Open: TypeAlias = Callable[..., Page]

QUESTION = "Which two countries fought the Football War of 1969?"
pytestmark = pytest.mark.timeout(900)  # loads the model, and writes some 300 tokens

MAX_SCREENSHOT_BYTES = 300_000
ANSWER_MS = 240_000  # two answers of some 50 tokens, on a machine that does other things too


@pytest.fixture(scope="session")
def demo(demo_model_path: Path, serve: Callable[..., str]) -> str:
    """Address of `make serve`: the demo model with the shipped probe."""
    return serve("demo")


def test_the_screenshot_shows_a_real_answer_with_tinted_tokens(
    demo: str, visit: Open, tmp_path: Path
) -> None:
    """A page that looks fine without a single risk would pass every other look at it."""
    page = visit(demo, width=1280, height=780)
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
    assert flagged.count() > 0, "the model names two wrong countries here; nothing was flagged"
    assert _redness(page, worst) > _redness(page, calmest) + 0.1

    worst.focus()
    expect(page.get_by_role("tooltip")).to_contain_text(f"{max(risks):.4f}")
    picture = page.screenshot(path=tmp_path / "playground.png")
    assert len(picture) < MAX_SCREENSHOT_BYTES


def test_the_examples_keep_what_their_headings_promise(demo: str, visit: Open) -> None:
    """An example that shows the opposite of its heading would teach the wrong lesson."""
    page = visit(demo)
    groups = page.evaluate("async () => (await import('/playground/examples.js')).EXAMPLES")
    model = httpx.get(f"{demo}v1/models").json()["data"][0]["id"]
    for group in groups:
        for _, prompt in group["prompts"]:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": 48,
                "risk": True,
            }
            answer = httpx.post(f"{demo}v1/chat/completions", json=body, timeout=ANSWER_MS / 1000)
            choice = answer.json()["choices"][0]
            text = choice["message"]["content"]
            assert bool(choice["risk"]["spans"]) == group["flagged"], f"{prompt} -> {text}"


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
