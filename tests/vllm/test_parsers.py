"""vLLM's parsers behind our seam, token by token; no engine runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from probes.errors import ModelError
from server.detokenizer import Detokenizer
from server.monitor import Token
from server.parsing import ToolUse
from server.plain_parsers import plain_parsers
from server.segments import Segmenter


@pytest.fixture(scope="module")
def tokenizer(demo_model_path):
    """The demo model's, with the markers of a model that reasons."""
    from server.engines.checkpoint import load_tokenizer

    made = load_tokenizer(demo_model_path, revision=None)
    made.add_tokens(["<think>", "</think>"])
    made.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    return made


FIND = {
    "type": "function",
    "function": {
        "name": "find",
        "parameters": {
            "type": "object",
            "properties": {"year": {"type": "integer"}, "of": {"type": "string"}},
            "required": ["year"],
        },
    },
}
USE = ToolUse(tools=(FIND,))
CALL = '<tool_call>\n{"name": "find", "arguments": %s}\n</tool_call>'


def parse(rules, tokenizer, prompt, text):
    """The fields that a client would see, by their names, and whose tokens they are of."""
    prompt_ids = tokenizer(prompt).input_ids
    ends = frozenset({tokenizer.eos_token_id})
    detokenizer = Detokenizer(
        tokenizer, prompt_ids, shown_but=ends if rules.shows_special_tokens else None
    )
    segmenter = Segmenter(rules.open(prompt_ids), stops=False)
    pieces = []
    for token_id in tokenizer(text).input_ids:
        pieces += segmenter.push([Token(token_id, detokenizer.push(token_id), 0, 0)])
    pieces += segmenter.finish([])[0]
    fields, names = {}, {}
    for piece in pieces:
        fields[piece.field] = fields.get(piece.field, "") + piece.text
        if piece.opens is not None:
            names[piece.call] = piece.opens.function
    for token in segmenter.tokens:
        field = fields.get((token.segment, token.call), "")
        assert field[token.start : token.end] == token.text
    return fields, names, [(token.segment, token.call) for token in segmenter.tokens]


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

    names = {"reasoning": "deepseek_r1", "tool_call": None}
    theirs = parse(VllmParsers(tokenizer, **names).rules(None), tokenizer, prompt, text)
    ours = parse(plain_parsers(tokenizer, **names).rules(None), tokenizer, prompt, text)
    assert theirs == ours
    assert theirs[0]


@pytest.mark.parametrize(
    "text",
    [
        "I look. " + CALL % '{"year": 1969}',
        CALL % '{"year": 1969, "of": "a \\"}\\" é 😀"}' + "\n" + CALL % '{"year": 7}',
        "a < b, <b>no</b> call",
        CALL.replace("\n", "") % '{"of": {"a": {"b": {}}}}',
        '<tool_call>{"name": "find", "arguments": {"year": 19',
    ],
)
@pytest.mark.parametrize("reasoning", [None, "deepseek_r1"])
def test_hermes_means_the_same_here_and_there(tokenizer, text, reasoning):
    """The same for calls, alone and behind reasoning; `}}` is one token of two owners."""
    from server.engines.vllm.parsers import VllmParsers

    names = {"reasoning": reasoning, "tool_call": "hermes"}
    text = f"<think>Which year?</think>{text}" if reasoning else text
    theirs = parse(VllmParsers(tokenizer, **names).rules(USE), tokenizer, "Hi.", text)
    ours = parse(plain_parsers(tokenizer, **names).rules(USE), tokenizer, "Hi.", text)
    assert theirs[:2] == ours[:2]
    assert ("reasoning", None) in theirs[0] or reasoning is None


def test_calls_that_are_demanded_come_with_a_grammar(tokenizer):
    """In the model's own markup, where vLLM knows it; the schema of arguments only where strict."""
    from server.engines.vllm.parsers import VllmParsers

    parsers = VllmParsers(tokenizer, reasoning=None, tool_call="hermes")
    assert parsers.rules(None).grammar is None
    assert parsers.rules(USE).grammar is None
    strict = replace(USE, tools=({**FIND, "function": {**FIND["function"], "strict": True}},))
    for use in (USE, strict):
        for demanded in (replace(use, must_call=True), replace(use, function="find")):
            grammar = parsers.rules(demanded).grammar
            assert grammar.kind == "structural_tag"
            assert '<tool_call>{\\"name\\": \\"find' in grammar.text
            assert ("year" in grammar.text) == (use is strict)


def test_one_call_is_one_call(tokenizer):
    """`parallel_tool_calls: false`: a second call is not shown, whatever the model writes."""
    from server.engines.vllm.parsers import VllmParsers

    parsers = VllmParsers(tokenizer, reasoning=None, tool_call="hermes")
    rules = parsers.rules(replace(USE, parallel=False))
    text = CALL % '{"year": 1}' + CALL % '{"year": 2}'
    fields, names, _ = parse(rules, tokenizer, "Hi.", text)
    assert (fields, names) == ({("tool_call", 0): '{"year": 1}'}, {0: "find"})


def test_tools_that_vllm_does_not_take_are_the_clients_error(tokenizer):
    """ValueError is a 400; what vLLM says of it may quote the client, so we do not."""
    from server.engines.vllm.parsers import VllmParsers

    parsers = VllmParsers(tokenizer, reasoning=None, tool_call="hermes")
    with pytest.raises(ValueError, match="cannot serve these tools"):
        parsers.rules(replace(USE, function="other"))


def test_other_families_come_with_their_own_rules(tokenizer):
    """`qwen3` takes text without markers for content where `deepseek_r1` takes it for reasoning."""
    from server.engines.vllm.parsers import VllmParsers

    rules = VllmParsers(tokenizer, reasoning="qwen3", tool_call=None).rules(None)
    fields, _, _ = parse(rules, tokenizer, "Hi.", "<think>a</think>b")
    assert fields == {("reasoning", None): "a", ("content", None): "b"}


def test_what_cannot_be_parsed_is_refused_before_the_engine_starts(tokenizer, demo_model_path):
    """A parser without its markers would call everything content, or everything reasoning."""
    from server.engines.checkpoint import load_tokenizer
    from server.engines.vllm.parsers import VllmParsers

    with pytest.raises(ModelError, match=r"no 'nothing'; it has .*deepseek_r1"):
        VllmParsers(tokenizer, reasoning="nothing", tool_call=None)
    plain = load_tokenizer(demo_model_path, revision=None)
    with pytest.raises(ModelError, match=r"do not fit the model: .*deepseek_r1"):
        VllmParsers(plain, reasoning="deepseek_r1", tool_call=None)
