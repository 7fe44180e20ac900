"""What a person sees and does, against the real server process with the fake engine.

The fake engine repeats the user's text one byte per token and reads a high logit on digits; words
in square brackets direct it (server/engines/fake.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

Open: TypeAlias = Callable[..., Page]


def send(page: Page, prompt: str, *, alpha: float | None = None) -> None:
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    if alpha is not None:
        page.locator("#alpha").fill(str(alpha))
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def ask(page: Page, prompt: str, *, alpha: float | None = None) -> None:
    """Send and wait for the end, which the page announces."""
    send(page, prompt, alpha=alpha)
    expect(page.locator("#announcer")).not_to_be_empty()


def tokens(page: Page, column: int = 0) -> list[dict[str, Any]]:
    """Tokens that show text: their text, served entry and look."""
    shown: list[dict[str, Any]] = (
        page.locator(".column")
        .nth(column)
        .locator(".token")
        .evaluate_all(
            """(spans) => spans.map((span) => ({
                text: span.textContent, entry: span.entry, level: span.dataset.level,
                tint: getComputedStyle(span).backgroundColor,
                underline: getComputedStyle(span).textDecorationThickness,
            }))"""
        )
    )
    return shown


def served(address: str, prompt: str, *, alpha: float = 1) -> dict[str, Any]:
    """The same question asked without a browser: `choices[0]`."""
    body = {
        "model": httpx.get(f"{address}v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 96,
        "risk": {"alpha": alpha, "contributors": 5},
    }
    response = httpx.post(f"{address}v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def strength(colour: str) -> float:
    """Alpha of a computed colour: how strong the tint is."""
    match = re.search(r"/ ([\d.e-]+)\)$", colour) or re.search(r"rgba\(.*, ([\d.e-]+)\)$", colour)
    return float(match[1]) if match else 1.0


def test_every_token_is_tinted_with_the_number_that_was_served(fake: str, visit: Open) -> None:
    """A tint that is not the served risk, or no risk at all, is the one unforgivable bug."""
    page = visit(fake)
    ask(page, "Signed in 1648, 24 Oct")
    expected = served(fake, "Signed in 1648, 24 Oct")["risk"]["tokens"]
    shown = tokens(page)
    assert [token["entry"] for token in shown] == [t for t in expected if t["end"] > t["start"]]
    assert {token["level"] for token in shown} >= {"low", "flagged"}
    for token in shown:
        assert isinstance(token["entry"]["risk"], float)
        assert strength(token["tint"]) == pytest.approx(token["entry"]["risk"], abs=0.01)
    assert page.locator("risk-answer").evaluate("(a) => a.textContent") == "Signed in 1648, 24 Oct"


def test_the_page_flags_what_the_server_flags(fake: str, visit: Open) -> None:
    """The page cuts spans by itself at a chosen operating point: one rule, two places."""
    page = visit(fake)
    ask(page, "🦊 1648 and 24 é 7")
    risk = served(fake, "🦊 1648 and 24 é 7")["risk"]
    figures = [f"{span['text'].strip()}{span['risk']:.2f}" for span in risk["spans"]]
    assert len(figures) == 3
    assert page.locator(".spans li").all_text_contents() == figures
    expect(page.locator(".score")).to_have_text(f"{risk['score']:.2f}")
    expect(page.locator(".verdict")).to_have_text("Flagged" if risk["flagged"] else "Not flagged")


def test_offsets_are_code_points(fake: str, visit: Open) -> None:
    """In UTF-16 everything after an emoji would be tinted one place too late."""
    page = visit(fake)
    ask(page, "🦊🦊 7 é 8")
    flagged = [token["text"] for token in tokens(page) if token["level"] == "flagged"]
    assert flagged == ["7", "8"]
    assert [token["text"] for token in tokens(page)][:2] == ["🦊", "🦊"]


def test_pointing_at_a_token_shows_its_number_and_its_neurons(fake: str, visit: Open) -> None:
    """The tint is an impression; the card holds the exact number."""
    page = visit(fake)
    ask(page, "In 1648")
    entry = served(fake, "In 1648")["risk"]["tokens"][3]
    page.locator(".token", has_text="1").hover()
    card = page.get_by_role("tooltip")
    expect(card).to_contain_text(f"{entry['risk']:.4f}")
    expect(card).to_contain_text("higher is worse")
    expect(card).to_contain_text("not causes")
    rows = card.locator("tbody tr").all_inner_texts()
    assert len(rows) == len(entry["contributors"]) > 0
    for row, share in zip(rows, entry["contributors"], strict=True):
        layer, neuron, value = row.split()
        assert (int(layer), int(neuron)) == (share["layer"], share["neuron"])
        assert float(value.replace("\N{MINUS SIGN}", "-")) == pytest.approx(
            share["value"], abs=6e-4
        )
    card.hover()  # one may walk into the card, to read or to select
    expect(card).to_be_visible()
    page.mouse.move(5, 5)
    expect(card).to_be_hidden()


def test_everything_can_be_done_from_the_keyboard(fake: str, visit: Open) -> None:
    """One tab stop for an answer, arrows inside it, Escape closes the card."""
    page = visit(fake)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    press = page.keyboard.press
    for _ in range(4):  # skip link, tab, prompt
        press("Tab")
        if page.evaluate("document.activeElement.id") == "prompt":
            break
    page.keyboard.type("ab 16 c 8")
    press("Enter")
    expect(page.locator("#announcer")).to_contain_text("higher is worse")
    for _ in range(40):
        press("Tab")
        if page.evaluate("document.activeElement.className") == "token":
            break
    focused = page.locator(":focus")
    card = page.get_by_role("tooltip")
    expect(focused).to_have_text("a")
    expect(card).to_be_visible()
    assert focused.get_attribute("aria-describedby") == card.get_attribute("id")
    press("ArrowRight")
    expect(focused).to_have_text("b")
    press("ArrowDown")
    expect(focused).to_have_text("1")
    expect(card).to_contain_text("at or over")
    press("End")
    expect(focused).to_have_text("8")
    press("ArrowRight")  # the end: nothing happens, least of all an error
    expect(focused).to_have_text("8")
    press("ArrowUp")
    expect(focused).to_have_text("6")
    press("Home")
    expect(focused).to_have_text("a")
    press("Escape")
    expect(card).to_be_hidden()
    press("Tab")
    assert page.evaluate("document.activeElement.className") != "token"
    press("Shift+Tab")
    expect(focused).to_have_text("a")


def test_alpha_shows_both_answers_side_by_side(fake: str, visit: Open) -> None:
    """The number at another alpha must not look like a calibrated one."""
    page = visit(fake)
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: bodies.append(json.loads(request.post_data or "{}")))
    ask(page, "In 1648", alpha=0.5)
    expect(page.locator(".column")).to_have_count(2)
    first, second = (body for body in bodies if "messages" in body)
    assert first.pop("risk")["alpha"] == 1
    assert second.pop("risk")["alpha"] == 0.5
    assert first == second, "something else than alpha differs, the seed perhaps"
    for column, alpha in enumerate((1, 0.5)):
        expected = served(fake, "In 1648", alpha=alpha)["risk"]["tokens"]
        assert [token["entry"] for token in tokens(page, column)] == [
            entry for entry in expected if entry["end"] > entry["start"]
        ]
    left, right = page.locator(".column").all()
    boxes = [left.bounding_box(), right.bounding_box()]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] == boxes[1]["y"]
    expect(right).to_contain_text("risk not calibrated")
    expect(right).to_contain_text("not a fix for hallucinations")
    expect(right).to_contain_text("The same text as at alpha 1")
    expect(left).not_to_contain_text("not calibrated")
    right.locator(".token").first.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Not calibrated at this alpha")


def test_a_token_without_a_number_looks_not_scored_and_not_low(fake: str, visit: Open) -> None:
    """Null is a third state: shown as low it would be a promise that nobody made."""
    page = visit(fake)
    ask(page, "[nan:2]abcd")
    shown = tokens(page)
    assert [token["level"] for token in shown].count("unscored") == 1
    hole = page.locator(".token[data-level=unscored]")
    style = hole.evaluate(
        "(t) => [getComputedStyle(t).backgroundImage, getComputedStyle(t).outlineStyle]"
    )
    assert "repeating-linear-gradient" in style[0]
    assert style[1] == "dotted"
    hole.hover()
    expect(page.get_by_role("tooltip")).to_contain_text("Not scored")
    expect(page.get_by_role("tooltip")).to_contain_text("not a finite number")
    expect(page.locator(".response")).to_contain_text("Not scored: 1 token")
    expect(page.locator("risk-sparkline svg")).to_have_attribute(
        "aria-label", re.compile("1 not scored")
    )


def test_the_sparkline_tells_its_story_in_words(fake: str, visit: Open) -> None:
    """A picture without text does not exist for a screen reader."""
    page = visit(fake)
    ask(page, "ab 7")
    worst = max(token["entry"]["risk"] for token in tokens(page))
    label = page.locator("risk-sparkline svg").get_attribute("aria-label") or ""
    assert f"Highest {worst:.2f} at token 4, “7”" in label
    assert "higher is worse" in label
    assert page.locator("risk-sparkline .dots").get_attribute("d")


def test_another_operating_point_changes_flags_and_not_numbers(fake: str, visit: Open) -> None:
    """The points come from the probe's card; choosing one asks the server nothing."""
    page = visit(fake)
    ask(page, "In 1648")
    before = tokens(page)
    points = httpx.get(f"{fake}v1/probes").json()["data"][0]["thresholds"]
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    tokens_at = page.get_by_role("group", name="Flag tokens")
    answers_at = page.get_by_role("group", name="Flag answers")
    for point in points["token"]["operating_points"]:
        tokens_at.locator(f"[value={point['name']}]").check(force=True)
        after = tokens(page)
        assert [token["entry"] for token in after] == [token["entry"] for token in before]
        for token in after:
            assert (token["level"] == "flagged") == (token["entry"]["risk"] >= point["threshold"])
    score = served(fake, "In 1648")["risk"]["score"]
    for point in points["response"]["operating_points"]:
        answers_at.locator(f"[value={point['name']}]").check(force=True)
        verdict = "Flagged" if score >= point["threshold"] else "Not flagged"
        expect(page.locator(".verdict")).to_have_text(verdict)
    assert page.get_by_role("radio").count() == 6
    assert requests == []


def test_an_operating_point_can_be_chosen_while_an_answer_streams(fake: str, visit: Open) -> None:
    """The answer is not over because somebody looked at it differently."""
    page = visit(fake)
    send(page, "[hang:8]It was signed in 1648")
    expect(page.locator(".token").nth(2)).to_be_visible()
    answers_at = page.get_by_role("group", name="Flag answers")
    answers_at.get_by_role("radio", name="10 %").check(force=True)
    expect(page.locator(".state")).to_have_text("writing")
    expect(page.locator(".response")).to_contain_text("known when the answer is complete")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".response")).to_contain_text("the answer did not reach its end")


def test_a_given_text_is_scored_without_generating(fake: str, visit: Open) -> None:
    """Pasted text goes to /v1/risk and gets the same look as an answer."""
    page = visit(fake)
    page.get_by_role("tab", name="Score a text").click()
    page.fill("#score-question", "When?")
    page.fill("#score-answer", "In 1648 🦊 7")
    with page.expect_response("**/v1/risk") as answer:
        page.click("#score-send")
    expected = answer.value.json()["risk"]["tokens"]
    expect(page.locator("#announcer")).to_contain_text("read, not generated")
    assert [token["entry"] for token in tokens(page)] == [
        entry for entry in expected if entry["end"] > entry["start"]
    ]
    assert page.locator("risk-answer").evaluate("(a) => a.textContent") == "In 1648 🦊 7"
    assert page.locator(".token[data-level=flagged]").count() == 5


@pytest.mark.parametrize(
    ("status", "headers", "sentence"),
    [
        (429, {"retry-after": "3"}, "The server is busy. Try again in 3 seconds."),
        (503, {"retry-after": "1"}, "The server is not ready. Try again in 1 second."),
        (500, {}, "Broken on purpose."),
    ],
)
def test_a_refusal_is_shown_in_words(
    fake: str, visit: Open, status: int, headers: dict[str, str], sentence: str
) -> None:
    """An empty column would look like an empty answer."""
    page = visit(fake)
    body = json.dumps({"error": {"message": "broken on purpose", "type": "x", "param": None}})

    def refuse(route: Route) -> None:
        route.fulfill(status=status, headers=headers, content_type="application/json", body=body)

    page.route("**/v1/chat/completions", refuse)
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_have_text(sentence)
    expect(page.locator(".state")).to_have_text("failed")


def test_the_servers_own_words_explain_a_bad_value(fake: str, visit: Open) -> None:
    """A 400 says what is too much for this model; the page passes that on."""
    page = visit(fake)
    page.locator("#settings summary").click()
    page.fill("#max-tokens", "9999999")
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("context holds 4096 tokens")


def test_an_error_inside_the_stream_keeps_what_was_written(fake: str, visit: Open) -> None:
    """The text that came is real; that the answer broke off must be just as visible."""
    page = visit(fake)
    ask(page, "[fail:5]abcdefgh")
    expect(page.get_by_role("alert")).not_to_be_empty()
    expect(page.locator(".state")).to_have_text("failed")
    text = page.locator("risk-answer").inner_text()
    assert text
    assert "abcdefgh".startswith(text)
    expect(page.locator(".response")).to_contain_text("the answer did not reach its end")


def test_a_stream_that_ends_early_is_not_taken_for_an_answer(fake: str, visit: Open) -> None:
    """A cut connection raises nothing by itself (reliability F12)."""
    page = visit(fake)
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}, "finish_reason": None}]}
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {json.dumps(chunk)}\n\n"
        ),
    )
    ask(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("ended before the answer was complete")
    unscored = page.locator(".token[data-level=unscored]")
    expect(unscored).to_have_text("half")


def test_stop_ends_the_answer_and_keeps_its_text(fake: str, visit: Open) -> None:
    """The stop button aborts the request, so the server stops generating too."""
    page = visit(fake)
    page.locator("#settings summary").click()
    page.fill("#max-tokens", "3000")
    send(page, "[slow:20][loop]abc ")
    expect(page.locator(".token").nth(5)).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".state")).to_have_text("stopped by you")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    count = page.locator(".token").count()
    page.wait_for_timeout(300)
    assert page.locator(".token").count() == count
    assert 5 <= count < 3000


def test_nothing_jumps_while_an_answer_streams(fake: str, visit: Open) -> None:
    """A reader loses the line when tints or numbers move the text."""
    page = visit(fake)
    send(page, "[slow:15]It was signed in 1648 at Westphalia")
    first = page.locator(".token").first
    expect(first).to_be_visible()
    place = first.bounding_box()
    page.evaluate("globalThis.layoutShift = 0")
    expect(page.locator("#announcer")).not_to_be_empty()
    assert first.bounding_box() == place
    assert page.evaluate("globalThis.layoutShift") < 0.01


def test_a_server_without_a_probe_says_so_and_still_answers(
    serve: Callable[..., str], visit: Open
) -> None:
    """Not scored must not look like a clean bill of health."""
    page = visit(serve("demo", "--engine", "fake", "--probe", "none"))
    expect(page.locator("#probe")).to_contain_text("No probe is loaded")
    expect(page.locator("#alpha")).to_be_disabled()
    expect(page.locator("#score-send")).to_be_disabled()
    ask(page, "In 1648")
    expect(page.locator("risk-answer")).to_have_text("In 1648")
    expect(page.locator(".column")).to_contain_text("Not scored")
    assert [token["level"] for token in tokens(page)] == ["unscored"]


def test_a_key_is_asked_for_used_and_not_kept(serve: Callable[..., str], visit: Open) -> None:
    """The key lives in memory: no storage, no address, gone on reload."""
    address = serve("demo", "--engine", "fake", "--playground", HNEURONS_API_KEYS="sesame")
    page = visit(address)
    expect(page.locator("#server")).to_contain_text("API key")
    page.fill("#api-key", "wrong")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key")).to_be_visible()
    page.fill("#api-key", "sesame")
    page.get_by_role("button", name="Use key").click()
    ask(page, "In 1648")
    expect(page.locator("#key")).to_be_hidden()
    assert page.locator(".token[data-level=flagged]").count() == 4
    kept = "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
    assert page.evaluate(kept) == [0, 0, "", address]


def test_examples_fill_the_prompt_and_send_it(fake: str, visit: Open) -> None:
    """Right and wrong examples are told apart by their headings."""
    page = visit(fake)
    expect(page.locator("#server")).to_have_attribute("data-state", "ready")
    expect(page.locator("#examples")).to_contain_text("gets these right")
    expect(page.locator("#examples")).to_contain_text("makes things up")
    page.get_by_role("button", name="Peace of Westphalia").click()
    expect(page.locator("#announcer")).not_to_be_empty()
    expect(page.locator("risk-answer")).to_have_text(page.input_value("#prompt"))
