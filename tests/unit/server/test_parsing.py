"""The plain parser, by itself and from the prompt that it continues."""

from __future__ import annotations

import pytest

from probes.errors import ModelError
from server.engines.fake_model import fake_tokenizer
from server.parsing import plain_parsers


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
    parsers = plain_parsers(fake_tokenizer(), reasoning="deepseek_r1")
    assert fields(parsers.open(list(prompt.encode())), text) == {
        "reasoning": reasoning,
        "content": content,
    }


def test_special_tokens_are_shown_when_they_are_the_markup():
    """Hidden, they could not be parsed; shown without need, every marker would be content."""
    tokenizer = fake_tokenizer()
    assert not plain_parsers(tokenizer, reasoning="deepseek_r1").shows_special_tokens
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert plain_parsers(tokenizer, reasoning="deepseek_r1").shows_special_tokens


def test_an_unknown_name_says_where_others_are():
    """Most of vLLM's names are not known here."""
    with pytest.raises(ModelError, match="--engine vllm"):
        plain_parsers(fake_tokenizer(), reasoning="qwen3")
