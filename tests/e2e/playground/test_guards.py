"""What must hold whatever the model says and whoever looks: safety, stream parsing, access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

Open: TypeAlias = Callable[..., Page]

HOSTILE = (
    "<img src=http://203.0.113.1/x onerror=\"document.title='owned'\">"
    "<script>document.title='owned'</script><b>1648</b> &lt;i&gt;"
)


def ask(page: Page, prompt: str) -> None:
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    expect(page.locator("#announcer")).not_to_be_empty()


def test_a_hostile_answer_is_only_text(fake: str, visit: Open) -> None:
    """Model output is written by whoever wrote the prompt, a document or the training data."""
    page = visit(fake)
    page.locator("#settings summary").click()
    page.fill("#max-tokens", "300")
    ask(page, HOSTILE)
    page.locator(".column summary").click()
    assert page.locator("risk-answer").evaluate("(answer) => answer.textContent") == HOSTILE
    assert page.locator("#answers :is(img, script, b, i)").count() == 0
    assert page.title() == "hneurons playground"


def test_the_policy_stops_what_a_bug_would_let_in(fake: str, visit: Open) -> None:
    """The second lock: even code that tried could not parse HTML or reach another host."""
    page = visit(fake, allowed="Content Security Policy|TrustedHTML")
    attempts: dict[str, str] = page.evaluate(
        """async () => {
            const attempt = async (work) => {
                try { await work(); return "allowed"; } catch (error) { return error.name; }
            };
            return {
                html: await attempt(() => { document.body.innerHTML += "<i>x</i>"; }),
                fetch: await attempt(() => fetch("http://127.0.0.1:9/")),
            };
        }"""
    )
    assert attempts == {"html": "TypeError", "fetch": "TypeError"}
    violation = """async () => {
        const event = new Promise((done) =>
            document.addEventListener("securitypolicyviolation", done, { once: true }));
        const image = document.createElement("img");
        image.src = "http://127.0.0.1:9/x.png";
        document.body.append(image);
        return (await event).effectiveDirective;
    }"""
    assert page.evaluate(violation) == "img-src"


def test_events_are_found_wherever_the_stream_is_cut(fake: str, visit: Open) -> None:
    """Chunk borders fall anywhere: between CR and LF, inside an emoji, inside a field name."""
    page = visit(fake)
    stream = (
        ": comment\r\n\r\n"
        'data: {"a": "🦊"}\n\n'
        "data:no space\r\revent: other\rdata: two\r\ndata: lines\r\n\r\n"
        ": keep-alive\n\nid: 7\nretry: 5\n\ndata\n\ndata: [DONE]\n\ndata: unfinished\n"
    )
    expected = ['{"a": "🦊"}', "no space", "two\nlines", "", "[DONE]"]
    results: list[list[str]] = page.evaluate(
        """async (text) => {
            const { events } = await import("/playground/sse.js");
            const bytes = new TextEncoder().encode(text);
            const read = async (...cuts) => {
                const pieces = [0, ...cuts].map((cut, i, all) => bytes.slice(cut, all[i + 1]));
                const found = [];
                const body = new ReadableStream({
                    pull(stream) {
                        if (pieces.length) stream.enqueue(pieces.shift());
                        else stream.close();
                    },
                });
                for await (const data of events(body)) found.push(data);
                return found;
            };
            const results = [await read(...bytes.keys())];
            for (let cut = 1; cut < bytes.length; cut += 1) {
                results.push(await read(cut), await read(cut, Math.min(cut + 3, bytes.length)));
            }
            return results;
        }""",
        stream,
    )
    assert len(results) > 200
    for found in results:
        assert found == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_object_to(fake: str, visit: Open, scheme: str) -> None:
    """Names, roles, contrast and structure, in each state a person meets."""
    page = visit(fake, color_scheme=scheme)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    _assert_accessible(page, "welcome")
    page.locator("#alpha").fill("0.5")
    ask(page, "[nan:2]ab 1648")
    for summary in page.locator("summary").all():
        summary.click()
    page.locator(".token[data-level=flagged]").first.focus()
    _assert_accessible(page, "two answers, one token focused, all details open")
    page.get_by_role("tab", name="Score a text").click()
    _assert_accessible(page, "score a text")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_tint(fake: str, visit: Open, scheme: str) -> None:
    """4.5 to 1 at least, from the pixels that the browser would paint, for risks 0 to 1."""
    page = visit(fake, color_scheme=scheme)
    ask(page, "ab 1648")
    ratios: list[float] = page.locator(".token[data-level=flagged]").first.evaluate(
        """(token) => {
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            const luminance = (...colours) => {
                for (const colour of colours) {
                    canvas.fillStyle = colour;
                    canvas.fillRect(0, 0, 1, 1);
                }
                const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((byte) => {
                    const share = byte / 255;
                    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const card = getComputedStyle(token.closest(".column")).backgroundColor;
            return Array.from({ length: 21 }, (_, i) => {
                token.style.setProperty("--risk", i / 20);
                const { color, backgroundColor } = getComputedStyle(token);
                const pair = [luminance(card, backgroundColor), luminance(color)];
                return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
            });
        }"""
    )
    assert len(set(ratios)) > 15, "the tint does not follow the risk"
    assert min(ratios) >= 4.5


def test_flags_are_visible_without_colour(fake: str, visit: Open) -> None:
    """High contrast modes and colour-blind eyes take the tint away; the underline stays."""
    page = visit(fake, forced_colors="active")
    ask(page, "[nan:2]ab 1648")
    looks = {
        level: page.locator(f".token[data-level={level}]").first.evaluate(
            "(t) => { const s = getComputedStyle(t);"
            " return [s.textDecorationLine, s.textDecorationThickness, s.outlineStyle]; }"
        )
        for level in ("low", "flagged", "unscored")
    }
    assert looks["low"][0] == "none"
    assert looks["flagged"][:2] == ["underline", "3px"]
    assert looks["unscored"][2] in {"dotted", "dashed"}


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_fits_its_window(fake: str, visit: Open, width: int) -> None:
    """Nobody should scroll sideways, with the widest content on the page."""
    page = visit(fake, width=width, height=800)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    page.locator("#alpha").fill("0.5")
    ask(page, "1648" * 12 + " [nan:3]and some prose after it 7")
    for summary in page.locator("summary").all():
        summary.click()
    page.locator(".token").last.focus()
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0
    card = page.get_by_role("tooltip").bounding_box()
    assert card is not None
    assert card["x"] >= 0
    assert card["x"] + card["width"] <= width


def test_less_motion_means_none(fake: str, visit: Open) -> None:
    """prefers-reduced-motion is a medical need for some."""
    page = visit(fake, reduced_motion="reduce")
    ask(page, "ab 1648")
    moving: list[Any] = page.evaluate(
        """() => [...document.querySelectorAll("*")].filter((element) => {
            const { transitionDuration, animationName } = getComputedStyle(element);
            const still = transitionDuration.split(", ").every((duration) => duration === "0s");
            return animationName !== "none" || !still;
        }).map((element) => element.tagName)"""
    )
    assert moving == []


def _assert_accessible(page: Page, state: str) -> None:
    results = Axe().run(page)
    assert results.violations_count == 0, f"{state}:\n{results.generate_report()}"
