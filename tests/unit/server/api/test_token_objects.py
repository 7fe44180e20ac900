"""No float leaves that JSON cannot say: null means "not scored" and nothing else."""

from __future__ import annotations

import math

import pytest

from server.api.token_objects import chat_logprobs, text_logprobs
from server.detokenizer import TokenNames
from server.engines.base import RequestFailedError, TokenLogprobs
from server.engines.fake_model import fake_tokenizer
from server.monitor import Token

NAMES = TokenNames(fake_tokenizer())


def token(logprob, risk=None):
    return Token(97, "a", 0, 1, risk, logprobs=TokenLogprobs(logprob, ((98, -math.inf),)))


def test_minus_infinity_is_clipped():
    """A padded vocabulary has logits of minus infinity; vLLM writes -9999.0."""
    found = chat_logprobs([token(-math.inf)], NAMES, with_risk=False)
    assert found["content"][0]["logprob"] == -9999.0
    assert found["content"][0]["top_logprobs"][0]["logprob"] == -9999.0
    assert text_logprobs([token(-math.inf)], NAMES)["top_logprobs"] == [{"b": -9999.0}]


def test_nan_ends_the_request():
    """orjson would write null, and a client would add None to a float."""
    with pytest.raises(RequestFailedError):
        chat_logprobs([token(math.nan)], NAMES, with_risk=True)
    with pytest.raises(RequestFailedError):
        text_logprobs([token(math.nan)], NAMES)


def test_an_entry_has_risk_only_when_risk_was_asked_for():
    """And never an `index`, which LangChain cannot add up."""
    with_risk = chat_logprobs([token(-1.0, 0.5)], NAMES, with_risk=True)["content"][0]
    without = chat_logprobs([token(-1.0, 0.5)], NAMES, with_risk=False)["content"][0]
    assert with_risk == {**without, "risk": 0.5}
    assert set(without) == {"token", "bytes", "logprob", "top_logprobs"}


def test_tokens_without_logprobs_have_no_entry():
    """Not asked for, or withheld."""
    plain = Token(97, "a", 0, 1)
    withheld = token(-1.0)._replace(token_id=None)
    assert chat_logprobs([plain, withheld], NAMES, with_risk=True) is None
    assert text_logprobs([plain, withheld], NAMES) is None
