"""What a policy lets out, over the fake engine (digits are flagged, alpha 0 calms them)."""

from __future__ import annotations

import pytest

from server.engines.base import EngineDeadError, GenerationRequest
from server.engines.fake import FakeEngine
from server.monitor import RiskPlan
from server.policy import WITHHELD, Ending, Observer, Order, answer


def order(text, *, policy, alpha=1.0, engine, max_tokens=100):
    risk = RiskPlan(
        probe=engine.probes[0],
        alpha=alpha,
        token_threshold=0.5,
        response_threshold=0.5,
        operating_point=None,
        contributors=0,
        with_tokens=True,
        policy=policy,
    )
    request = GenerationRequest(
        request_id="r",
        prompt_token_ids=tuple(text.encode()),
        max_tokens=max_tokens,
        probe=risk.probe.card.name,
        read_last=True,
        alpha=alpha,
    )
    return Order(request=request, plan=risk)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def told():
    return []


async def play(engine, made, told):
    observer = Observer(lambda step: None, lambda risk, tokens: told.append("attempt"), told.append)
    events = [event async for event in answer(engine, made, observer=observer)]
    assert [isinstance(event, Ending) for event in events] == [False] * (len(events) - 1) + [True]
    return "".join(event.text for event in events[:-1]), events[:-1], events[-1]


async def test_flag_shows_everything(engine, told):
    """The default changes no token of the answer."""
    text, pieces, ending = await play(engine, order("in 1969", policy="flag", engine=engine), told)
    assert text == "in 1969"
    assert len(pieces) == 7
    assert ending.finish_reason == "stop"
    assert ending.risk.is_flagged
    assert told == ["attempt"]


async def test_stop_ends_at_the_first_flagged_token_and_frees_the_engine(engine, told):
    """Generation itself ends: tokens after the flag must not be paid for."""
    text, _, ending = await play(engine, order("in 1969 x", policy="stop", engine=engine), told)
    assert text == "in 1"
    assert ending.finish_reason == "content_filter"
    assert ending.completion_tokens == 4
    assert engine.health().running == 0
    assert told == ["attempt", "stopped"]


async def test_stop_leaves_an_unflagged_answer_alone(engine, told):
    """A policy that fires on everything is an outage."""
    text, _, ending = await play(engine, order("no number", policy="stop", engine=engine), told)
    assert (text, ending.finish_reason) == ("no number", "stop")
    assert told == ["attempt"]


async def test_withhold_replaces_a_flagged_answer_and_keeps_its_risks(engine, told):
    """An id, a log-probability or a span text would give away what was withheld."""
    made = order("in 1969", policy="withhold", engine=engine)
    text, pieces, ending = await play(engine, made, told)
    assert text == WITHHELD
    assert ending.finish_reason == "content_filter"
    tokens = [token for piece in pieces for token in piece.tokens]
    assert len(tokens) == ending.completion_tokens == 8
    assert all(token.text == "" and token.token_id is None for token in tokens)
    assert all(token.logprobs is None for token in tokens)
    assert max(token.risk for token in tokens if token.risk is not None) > 0.9
    assert ending.risk.is_flagged
    assert ending.risk.score > 0.5
    assert ending.risk.spans == ()
    assert told == ["attempt", "withheld"]


async def test_withhold_lets_an_unflagged_answer_out_whole(engine, told):
    """In one piece, with everything that the policy flag would give."""
    text, pieces, ending = await play(
        engine, order("no number", policy="withhold", engine=engine), told
    )
    assert (text, len(pieces), ending.finish_reason) == ("no number", 1, "stop")


async def test_withhold_does_not_withhold_what_could_not_be_scored(engine, told):
    """Documented: not scored is not flagged, `status` says so; the policy does not guess."""
    text, _, ending = await play(engine, order("7[nan:1]", policy="withhold", engine=engine), told)
    assert text == "7"
    assert ending.risk.status == "unavailable"


async def test_retry_makes_a_flagged_answer_once_more_with_alpha_zero(engine, told):
    """The first attempt is thrown away; what is returned says under which alpha it was made."""
    text, _, ending = await play(engine, order("in 1969", policy="retry", engine=engine), told)
    assert text == "in 1969"
    assert ending.risk.plan.alpha == 0
    assert not ending.risk.plan.is_calibrated
    assert not ending.risk.is_flagged
    assert [(a.alpha, a.is_flagged) for a in ending.risk.attempts] == [(1.0, True), (0.0, False)]
    assert ending.completion_tokens == 8  # of the returned attempt
    assert told == ["attempt", "retried", "attempt"]


async def test_retry_uses_the_alpha_of_the_request_for_the_second_attempt(engine, told):
    """The first one always runs without suppression: only then its risk is calibrated."""
    made = order("in 1969", policy="retry", alpha=0.9, engine=engine)
    _, _, ending = await play(engine, made, told)
    assert [a.alpha for a in ending.risk.attempts] == [1.0, 0.9]
    assert ending.risk.is_flagged  # returned whatever its risk


async def test_retry_returns_an_unflagged_first_attempt(engine, told):
    """No second generation for an answer that needs none."""
    _, _, ending = await play(engine, order("no number", policy="retry", engine=engine), told)
    assert len(ending.risk.attempts) == 1
    assert ending.risk.plan.is_calibrated
    assert told == ["attempt"]


@pytest.mark.parametrize("policy", ["flag", "stop", "withhold", "retry"])
async def test_a_dying_engine_is_an_error_under_every_policy(engine, told, policy):
    """Half an answer must never pass for a whole one."""
    with pytest.raises(EngineDeadError):
        await play(engine, order("in 1969[die:5]", policy=policy, engine=engine), told)


@pytest.mark.parametrize("policy", ["flag", "stop", "withhold", "retry"])
async def test_closing_the_events_frees_the_engine(engine, policy):
    """A client that leaves while its answer is buffered counts as well."""
    made = order("in 19 [loop]", policy=policy, engine=engine, max_tokens=100_000)
    silent = Observer(lambda step: None, lambda risk, tokens: None, lambda action: None)
    events = answer(engine, made, observer=silent)
    if policy == "flag":
        await anext(events)
        assert engine.health().running == 1
    await events.aclose()
    assert engine.health().running == 0
