"""The plain parser, by itself and from the prompt that it continues."""

from __future__ import annotations

import pytest

from probes.errors import ModelError
from server.engines.fake_model import fake_tokenizer
from server.parsing import ToolUse
from server.plain_parsers import PlainParser, plain_parsers


def fields(parser, text):
    deltas = [delta for char in text for delta in parser.push(char, 0)] + parser.finish()
    return {
        segment: "".join(delta.text for delta in deltas if delta.segment == segment)
        for segment in ("reasoning", "content")
    }


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("Hi.", "<think>a</think>b", "a", "b"),
        ("Hi.", "a</think>b", "a", "b"),  # the template has written the `<think>`
        ("Hi.<think>", "a</think>b</think>", "a", "b</think>"),
        ("Hi.<think>", "a", "a", ""),  # cut inside the reasoning
        ("Hi.<think>\n\n</think>", "b", "", "b"),  # the template has switched it off
        ("Say </think>\nassistant:", "a</think>b", "a", "b"),  # what a user says ends nothing
        ("Hi.", "a<think>b", "a<think>b", ""),
        ("Hi.", "<thin", "<thin", ""),
        ("Hi.", "", "", ""),
    ],
)
def test_reasoning_ends_at_its_marker(prompt, text, reasoning, content):
    """vLLM's `deepseek_r1`, in the same cases (tests/vllm/test_parsers.py)."""
    parsers = plain_parsers(fake_tokenizer(), reasoning="deepseek_r1", tool_call=None)
    assert fields(parsers.rules(None).open(list(prompt.encode())), text) == {
        "reasoning": reasoning,
        "content": content,
    }


CALL = '<tool_call>\n{"name": "find", "arguments": %s}\n</tool_call>'


def calls(text):
    """(content, [(function, arguments)]), character by character."""
    parser = PlainParser(is_open=False, parses_calls=True)
    deltas = [delta for char in text for delta in parser.push(char, 0)] + parser.finish()
    found = [[delta.opens.function, ""] for delta in deltas if delta.opens]
    for delta in deltas:
        if delta.call is not None:
            found[delta.call][1] += delta.text
    content = "".join(delta.text for delta in deltas if delta.segment == "content")
    return content, [tuple(call) for call in found]


@pytest.mark.parametrize(
    "arguments",
    [
        "{}",
        '{"a": {"b": [1, {}]}}',
        '{"a": "}"}',
        '{"a": "\\"}", "b": "\\\\"}',
        '{"a": "</tool_call>"}',
        '{"é": "日本"}',
    ],
)
def test_arguments_are_what_the_model_wrote(arguments):
    """Up to their own last brace; braces, quotes and markers inside of strings end nothing."""
    assert calls("So: " + CALL % arguments) == ("So: ", [("find", arguments)])


def test_calls_are_numbered_and_nothing_follows_them():
    """Text after a call is dropped, as by vLLM's parser of that name."""
    text = CALL % '{"a": 1}' + "\n" + CALL % "{}" + " done"
    assert calls(text) == ("", [("find", '{"a": 1}'), ("find", "{}")])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"arguments": {}, "name": "find"}</tool_call>',
        '<tool_call>{"name": "find", "arguments": "text"}</tool_call>',
        "<tool_call>",
        '<tool_call>{"name": "fi',
        "a < b <tool",
    ],
)
def test_what_is_no_call_is_shown_as_it_stands(text):
    """A model that writes the markup wrongly has still written it."""
    assert calls(text) == (text, [])


def test_a_call_that_is_cut_keeps_what_it_has():
    """`finish_reason` says that it is incomplete."""
    assert calls('<tool_call>{"name": "find", "arguments": {"a": "b') == (
        "",
        [("find", '{"a": "b')],
    )


def test_a_call_cannot_be_demanded_without_a_grammar():
    """`required` that is only hoped for is `auto`."""
    parsers = plain_parsers(fake_tokenizer(), reasoning=None, tool_call="hermes")
    assert parsers.rules(ToolUse(tools=())).grammar is None
    for use in (ToolUse(tools=(), must_call=True), ToolUse(tools=(), parallel=False)):
        with pytest.raises(ValueError, match="--engine vllm"):
            parsers.rules(use)


def test_special_tokens_are_shown_when_they_are_the_markup():
    """Hidden, they could not be parsed; shown without need, every marker would be content."""
    tokenizer = fake_tokenizer()
    assert (
        not plain_parsers(tokenizer, reasoning="deepseek_r1", tool_call=None)
        .rules(None)
        .shows_special_tokens
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert (
        plain_parsers(tokenizer, reasoning="deepseek_r1", tool_call=None)
        .rules(None)
        .shows_special_tokens
    )


def test_an_unknown_name_says_where_others_are():
    """Most of vLLM's names are not known here."""
    for name in ("reasoning", "tool_call"):
        names = {"reasoning": None, "tool_call": None, name: "qwen3_coder"}
        with pytest.raises(ModelError, match=f"{name}_parser.*--engine vllm"):
            plain_parsers(fake_tokenizer(), **names)
