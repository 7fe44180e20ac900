"""vLLM's parsers behind our seam, token by token; no engine runs."""

from __future__ import annotations

import pytest

from probes.errors import ModelError
from server.detokenizer import Detokenizer
from server.monitor import Token
from server.parsing import plain_parsers
from server.segments import Segmenter


@pytest.fixture(scope="module")
def tokenizer(demo_model_path):
    """The demo model's, with the markers of a model that reasons."""
    from server.engines.checkpoint import load_tokenizer

    made = load_tokenizer(demo_model_path, revision=None)
    made.add_tokens(["<think>", "</think>"])
    return made


def parse(parsers, tokenizer, prompt, text):
    """The fields and the tokens that a client would see."""
    prompt_ids = tokenizer(prompt).input_ids
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    segmenter = Segmenter(parsers.open(prompt_ids), stops=False)
    pieces = []
    for token_id in tokenizer(text).input_ids:
        pieces += segmenter.push([Token(token_id, detokenizer.push(token_id), 0, 0)])
    pieces += segmenter.finish([])[0]
    fields = {
        segment: "".join(piece.text for piece in pieces if piece.segment == segment)
        for segment in ("reasoning", "content")
    }
    for token in segmenter.tokens:
        assert fields[token.segment][token.start : token.end] == token.text
    return fields["reasoning"], fields["content"], [token.segment for token in segmenter.tokens]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Hi.", "<think>It is 7.</think>It is 8."),
        ("Hi.", "It is 7.</think>It is 8."),
        ("Hi.<think>", "It is 7 😀 né.</think>\n\nIt is 日本語."),
        ("Hi.<think>", "It is"),
        ("Hi.<think>\n\n</think>", "It is 8."),
        ("Hi.", "<think></think>It is 8."),
    ],
)
def test_deepseek_r1_means_the_same_here_and_there(tokenizer, prompt, text):
    """One name, one rule: a client must not see which engine runs."""
    from server.engines.vllm.parsers import VllmParsers

    theirs = parse(VllmParsers(tokenizer, reasoning="deepseek_r1"), tokenizer, prompt, text)
    ours = parse(plain_parsers(tokenizer, reasoning="deepseek_r1"), tokenizer, prompt, text)
    assert theirs == ours
    assert theirs[0] or theirs[1]


def test_other_families_come_with_their_own_rules(tokenizer):
    """`qwen3` takes text without markers for content where `deepseek_r1` takes it for reasoning."""
    from server.engines.vllm.parsers import VllmParsers

    parsers = VllmParsers(tokenizer, reasoning="qwen3")
    assert parse(parsers, tokenizer, "Hi.", "<think>a</think>b")[:2] == ("a", "b")


def test_what_cannot_be_parsed_is_refused_before_the_engine_starts(tokenizer, demo_model_path):
    """A parser without its markers would call everything content, or everything reasoning."""
    from server.engines.checkpoint import load_tokenizer
    from server.engines.vllm.parsers import VllmParsers

    with pytest.raises(ModelError, match=r"no 'nothing'; it has .*deepseek_r1"):
        VllmParsers(tokenizer, reasoning="nothing")
    plain = load_tokenizer(demo_model_path, revision=None)
    with pytest.raises(ModelError, match=r"reasoning_parser: .*deepseek_r1"):
        VllmParsers(plain, reasoning="deepseek_r1")
