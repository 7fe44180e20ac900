"""Readings meet their tokens; risks are calibrated logits; nothing is guessed."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest

from probes.spans import Pooling
from server.detokenizer import Detokenizer
from server.engines.base import Contribution, Reading, RequestFailedError, Step
from server.engines.fake_model import IM_END, fake_probe, fake_tokenizer
from server.monitor import Monitor, RiskPlan, summarise

FIRST = 10  # position of the first written token
LOW, HIGH = -3.0, 3.0


def plan(*, position="read", threshold=0.5, policy="flag", alpha=1.0):
    return RiskPlan(
        probe=fake_probe(position=position),
        alpha=alpha,
        token_threshold=threshold,
        response_threshold=threshold,
        operating_point=None,
        contributors=0,
        with_tokens=True,
        policy=policy,
    )


def monitor(*, stop=(), risk=None):
    return Monitor(Detokenizer(fake_tokenizer()), first_position=FIRST, stop=stop, plan=risk)


def reading(position, logit=LOW):
    return Reading(FIRST + position, (logit, logit / 2))


def written(text, *, readings, finish="stop", lag=1):
    """Steps that write the bytes of `text`; `readings[i]` is of the i-th token."""
    ids = [*text.encode(), *([IM_END] if finish == "stop" else [])]
    steps = []
    for i, token_id in enumerate(ids):
        read = i - lag
        value = reading(read, readings[read]) if 0 <= read < len(readings) else reading(read)
        steps.append(Step(token_id, value, None, finish if i == len(ids) - 1 else None))
    return steps


def run(watched, steps):
    """What comes out at each step, and the rest."""
    outs = []
    for step in steps:
        outs.append(watched.push(step))
        if watched.finish_reason is not None:
            break
    return [*outs, watched.finish()]


def texts(tokens):
    return [token.text for token in tokens]


def risk_of(logit):
    return 1 / (1 + math.exp(-logit))


def test_a_reading_belongs_to_the_token_that_was_read_one_step_after_it_was_written():
    """Off by one, every risk would tint the word before the hallucination."""
    watched = monitor(risk=plan())
    run(watched, written("abc", readings=[LOW, HIGH, LOW]))
    assert texts(watched.tokens) == ["a", "b", "c", ""]
    assert [t.risk for t in watched.tokens] == [
        *map(pytest.approx, map(risk_of, (LOW, HIGH, LOW))),
        None,
    ]
    assert [t.is_flagged for t in watched.tokens] == [False, True, False, False]
    assert watched.tokens[3].unscored == "not_read"


def test_a_write_probe_reads_the_pass_that_made_the_token():
    """The other kind of probe: same engine, another lag."""
    watched = monitor(risk=plan(position="write"))
    outs = run(watched, written("abc", readings=[LOW, HIGH, LOW], lag=1))
    # The reading of position p is that of the token p + 1: "c" was made while "b" was read.
    assert [t.is_flagged for t in watched.tokens] == [False, False, True, False]
    assert [texts(out) for out in outs] == [["a"], ["b"], ["c"], [], [""]]


def test_text_waits_for_its_reading_only_when_risk_is_on():
    """Without risk there is no reason to be a step late; with risk text never leaves unread."""
    assert [texts(o) for o in run(monitor(), written("ab", readings=[]))] == [
        *[["a"], ["b"]],
        *[[], [""]],
    ]
    assert [texts(o) for o in run(monitor(risk=plan()), written("ab", readings=[LOW, LOW]))] == [
        *[[], ["a"]],
        *[["b"], [""]],
    ]


def test_the_hidden_step_reads_the_last_token_of_a_length_finish():
    """It adds a reading and no token: usage must not change."""
    watched = monitor(risk=plan())
    steps = [
        Step(ord("a"), reading(-1)),
        Step(ord("b"), reading(0)),
        Step(None, reading(1, HIGH), finish_reason="length"),
    ]
    run(watched, steps)
    assert texts(watched.tokens) == ["a", "b"]
    assert watched.finish_reason == "length"
    assert watched.tokens[1].risk == pytest.approx(risk_of(HIGH))
    assert summarise(plan(), watched.tokens).status == "scored"


def test_without_the_hidden_step_the_last_token_is_not_scored():
    """The answer is `partial`: its last word was never read."""
    watched = monitor(risk=plan())
    run(watched, written("ab", readings=[HIGH], finish="length"))
    assert watched.tokens[1].risk is None
    summary = summarise(plan(), watched.tokens)
    assert (summary.status, summary.reason) == ("partial", "not_read")
    assert summary.unscored == {"not_read": 1}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_not_finite_is_not_a_risk(value):
    """`nan_to_num` would call a broken model harmless."""
    watched = monitor(risk=plan())
    run(watched, written("abc", readings=[LOW, value, HIGH]))
    assert [t.unscored for t in watched.tokens] == [None, "nonfinite", None, "not_read"]
    assert watched.tokens[1].risk is None
    summary = summarise(plan(), watched.tokens)
    assert (summary.status, summary.reason) == ("partial", "nonfinite")
    assert summary.score is not None


def test_a_contribution_that_is_not_finite_spoils_its_reading():
    """It is part of the same sum, and JSON would make it null."""
    watched = monitor(risk=plan())
    broken = Reading(FIRST, (LOW, LOW), (Contribution(0, 1, math.nan),))
    run(watched, [Step(97, reading(-1)), Step(IM_END, broken, finish_reason="stop")])
    assert watched.tokens[0].unscored == "nonfinite"


def test_nothing_read_is_unavailable_and_not_harmless():
    """`flagged` is null then: a client that tests `not flagged` must be able to see it."""
    watched = monitor(risk=plan())
    run(watched, written("ab", readings=[math.nan, math.nan]))
    summary = summarise(plan(), watched.tokens)
    assert (summary.status, summary.reason) == ("unavailable", "nonfinite")
    assert summary.score is None
    assert summary.is_flagged is None


def test_an_empty_answer_has_no_score():
    """The end of the turn as first token is an answer like any other."""
    watched = monitor(risk=plan())
    run(watched, [Step(IM_END, reading(-1), finish_reason="stop")])
    summary = summarise(plan(), watched.tokens)
    assert (summary.status, summary.reason, summary.score) == ("unavailable", "no_text", None)
    assert len(watched.tokens) == 1


def test_a_position_is_read_once():
    """A pre-empted request is recomputed; its old positions come by again."""
    watched = monitor(risk=plan())
    outs = [
        watched.push(Step(97, reading(-1))),
        watched.push(Step(98, reading(0, HIGH))),
        watched.push(Step(99, reading(0, LOW))),  # again: ignored
        watched.push(Step(IM_END, reading(2, LOW), finish_reason="stop")),
        watched.finish(),
    ]
    assert [t.risk is not None for t in watched.tokens] == [True, False, True, False]
    assert watched.tokens[0].risk == pytest.approx(risk_of(HIGH))
    assert sum(map(len, outs)) == 4


def test_a_stop_string_cuts_the_text_and_keeps_the_tokens():
    """vLLM's measured case: `hing. Y` in `Sure thing. Yes` leaves `Sure t`."""
    watched = monitor(stop=["hing. Y"])
    outs = run(watched, written("Sure thing. Yes", readings=[]))
    assert "".join(t.text for t in watched.tokens) == "Sure t"
    assert bytes(t.token_id for t in watched.tokens) == b"Sure thing. Y"
    assert watched.finish_reason == "stop"
    shown = ["".join(texts(out)) for out in outs]
    assert shown[:6] == ["", "", "", "", "", ""]  # six characters are held back
    assert watched.tokens[-1].start == watched.tokens[-1].end == 6


def test_a_completing_token_with_text_is_read_by_one_more_pass():
    """Its visible part would otherwise be the one unscored word of the answer."""
    tokenizer = fake_tokenizer()

    class Words(Detokenizer):
        def push(self, token_id):
            return ["Hello", " you. ", "x"][token_id]

    watched = Monitor(Words(tokenizer), first_position=FIRST, stop=["."], plan=plan())
    steps = [
        Step(0, reading(-1)),
        Step(1, reading(0)),
        Step(2, reading(1, HIGH)),
        Step(2, reading(2)),
    ]
    run(watched, steps)
    assert texts(watched.tokens) == ["Hello", " you"]
    assert watched.tokens[1].is_flagged
    assert watched.finish_reason == "stop"
    assert summarise(plan(), watched.tokens).status == "scored"


def test_a_stop_string_at_the_first_token_leaves_an_empty_answer():
    """Everything is cut, the token still counts."""
    watched = monitor(stop=["a"], risk=plan())
    run(watched, written("abc", readings=[LOW, LOW, LOW]))
    assert texts(watched.tokens) == [""]
    assert watched.finish_reason == "stop"
    assert summarise(plan(), watched.tokens).reason == "no_text"


@pytest.mark.parametrize(("kind", "pooled"), [("mean", 2.25), ("max", 4.0)])
def test_a_span_is_pooled_and_calibrated_by_a_rule_of_its_own(kind, pooled):
    """The mean of two risks is not a probability of anything; and a run is right less often than
    its tokens, so it has a calibration of its own."""
    probe = fake_probe()
    span = msgspec.structs.replace(probe.card.token.span, pooling=Pooling(kind))
    token = msgspec.structs.replace(probe.card.token, span=span)
    card = msgspec.structs.replace(probe.card, token=token)
    order = dataclasses.replace(plan(), probe=dataclasses.replace(probe, card=card))
    watched = monitor(risk=order)
    run(watched, written("abcde", readings=[LOW, 0.5, 4.0, LOW, HIGH]))
    spans = summarise(order, watched.tokens).spans
    assert [(span.start, span.end, span.text) for span in spans] == [(1, 3, "bc"), (4, 5, "e")]
    assert spans[0].risk == pytest.approx(risk_of(0.8 * pooled))


def test_a_span_does_not_reach_over_a_token_that_was_not_scored():
    """Nothing is known about the middle; a span over it would claim it."""
    watched = monitor(risk=plan())
    run(watched, written("abc", readings=[HIGH, math.nan, HIGH]))
    assert [span.text for span in summarise(plan(), watched.tokens).spans] == ["a", "c"]


def test_the_score_pools_the_response_head_over_visible_tokens():
    """The fake probe pools the largest mean of two neighbours and calibrates with slope 2."""
    watched = monitor(risk=plan())
    run(watched, written("aébc", readings=[LOW, HIGH, LOW, 1.0, 2.0]))
    # The first byte of "é" has no text of its own: its HIGH must not count.
    assert summarise(plan(), watched.tokens).score == pytest.approx(risk_of(2 * (0.5 + 1.0) / 2))


def test_bytes_of_a_character_ride_with_the_token_that_completes_it():
    """A chunk may carry several risks, never none of them and never one twice."""
    watched = monitor(risk=plan())
    outs = run(watched, written("é!", readings=[LOW, LOW, LOW]))
    assert [texts(out) for out in outs] == [[], [], ["", "é"], ["!"], [""]]


def test_an_engine_that_ends_without_a_reason_is_an_error():
    """The answer would look complete."""
    watched = monitor()
    watched.push(Step(97))
    with pytest.raises(RequestFailedError, match="finish reason"):
        watched.finish()


def test_uncalibrated_under_alpha():
    """The calibration knows nothing of a suppressed model."""
    assert plan().is_calibrated
    assert not plan(alpha=0.5).is_calibrated
