"""Who runs when. Each test looks at the passes that the scheduler ran: (rows, tokens per row)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from server.engines.base import RequestFailedError, ScoreRequest, Step
from server.engines.forward import Forward, Tap
from server.engines.row import Outcome, Row
from server.engines.scheduler import Scheduler


class WatchedForward(Forward):
    """Remembers the shape of every pass; can spoil the logits of rows that were fed a token."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model, None)
        self.passes: list[tuple[int, int]] = []
        self.poison: int | None = None

    def __call__(
        self, token_ids: Any, cache: Any, taps: Sequence[Tap], *, read_all: bool = False
    ) -> torch.Tensor:
        self.passes.append((len(token_ids), max(map(len, token_ids))))
        logits = super().__call__(token_ids, cache, taps, read_all=read_all).clone()
        for row, ids in enumerate(token_ids):
            if ids[-1] == self.poison:
                logits[row, 3] = torch.nan
        return logits


@pytest.fixture
def forward(tiny_folder) -> WatchedForward:
    return WatchedForward(LlamaForCausalLM.from_pretrained(tiny_folder).eval())


@pytest.fixture
def make_scheduler(forward: WatchedForward) -> Callable[..., Scheduler]:
    def make(**options: Any) -> Scheduler:
        limits = {
            "eos_token_ids": frozenset({2}),
            "max_num_seqs": 4,
            "prefill_tokens": 32,
            "prefix_tokens": 256,
        }
        return Scheduler(forward, **{**limits, **options})

    return make


def run(scheduler: Scheduler, rows: Sequence[Row] = (), limit: int = 200) -> dict[Row, list[Any]]:
    """Step until idle; the outcomes of each row."""
    scheduler.add(rows)
    outcomes: dict[Row, list[Outcome]] = {}
    with torch.inference_mode():
        for _ in range(limit):
            if scheduler.idle:
                return outcomes
            for row, outcome in scheduler.step():
                outcomes.setdefault(row, []).append(outcome)
    raise AssertionError("the scheduler does not come to an end")


def step(scheduler: Scheduler) -> list[tuple[Row, Outcome]]:
    with torch.inference_mode():
        return scheduler.step()


def test_prompts_of_similar_length_are_read_in_one_pass(make_scheduler, forward, request_of):
    """Sixteen prompts one by one would cost sixteen passes before the first token."""
    rows = [Row(request_of([5] * n, 2), Tap()) for n in (8, 6, 7)]
    outcomes = run(make_scheduler(), rows)
    assert forward.passes == [(3, 8), (3, 1)]
    assert [len(outcomes[row]) for row in rows] == [2, 2, 2]


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(make_scheduler, forward, request_of):
    """A 4,000-token prompt in one pass would stop every running stream for seconds."""
    scheduler = make_scheduler()
    short = Row(request_of([5, 6], 20), Tap())
    scheduler.add([short])
    step(scheduler)
    forward.passes.clear()
    scheduler.add([Row(request_of([7] * 90, 3), Tap())])
    steps_of_short = 0
    for _ in range(3):
        steps_of_short += sum(row is short for row, _ in step(scheduler))
    assert forward.passes == [(1, 32), (1, 1), (1, 32), (1, 1), (1, 26), (2, 1)]
    assert steps_of_short == 3


def test_short_prompts_do_not_pay_for_a_long_neighbour(make_scheduler, forward, request_of):
    """Padding to the longest: nine tokens must not become ninety."""
    rows = [Row(request_of([5] * n, 1), Tap()) for n in (3, 30, 4)]
    run(make_scheduler(prefill_tokens=64), rows)
    assert forward.passes == [(2, 4), (1, 30)]


def test_no_more_rows_run_than_allowed_and_the_first_come_first(
    make_scheduler, forward, request_of
):
    """The bound on memory; and a queue that is not first come, first served can starve."""
    scheduler = make_scheduler(max_num_seqs=2)
    rows = [Row(request_of([5, 6, 7], 4), Tap()) for _ in range(5)]
    outcomes = run(scheduler, rows)
    assert max(count for count, _ in forward.passes) == 2
    assert list(outcomes) == rows
    assert all(len(steps) == 4 for steps in outcomes.values())


def test_a_row_that_ends_makes_room_at_the_next_step(make_scheduler, forward, request_of):
    """Waiting for the whole batch to end would be static batching."""
    scheduler = make_scheduler(max_num_seqs=2)
    rows = [Row(request_of([5, 6], n), Tap()) for n in (9, 2, 3)]
    run(scheduler, rows)
    assert forward.passes[:3] == [(2, 2), (2, 1), (1, 2)]
    assert forward.passes[3:5] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding"])
def test_an_aborted_row_is_gone_at_the_next_step(make_scheduler, forward, request_of, when):
    """Ghost generations: nobody reads, but the row still computes."""
    scheduler = make_scheduler(max_num_seqs=1)
    row = Row(request_of([5] * 80 if when == "reading" else [5, 6], 50), Tap())
    ahead = [Row(request_of([7], 50), Tap())] if when == "waiting" else []
    scheduler.add([*ahead, row])
    step(scheduler)
    row.aborted = True
    forward.passes.clear()
    outcomes = step(scheduler)
    assert all(other is not row for other, _ in outcomes)
    assert forward.passes == ([(1, 1)] if ahead else [])
    assert (scheduler.running, scheduler.waiting) == (len(ahead), 0)
    for other in ahead:
        other.aborted = True
    step(scheduler)
    assert scheduler.idle
    assert scheduler._cache.rows == 0


def test_length_with_read_last_ends_with_a_step_that_only_reads(make_scheduler, request_of):
    """Without the hidden step the last token of a `length` finish is never scored."""
    plain = Row(request_of([5, 6], 3), Tap())
    reading = Row(request_of([5, 6], 3, read_last=True), Tap())
    outcomes = run(make_scheduler(), [plain, reading])
    shown = [entry.token_id for entry in outcomes[plain]]
    assert [entry.token_id for entry in outcomes[reading]] == [*shown, None]
    assert [entry.finish_reason for entry in outcomes[plain]] == [None, None, "length"]
    assert [entry.finish_reason for entry in outcomes[reading]] == [None, None, None, "length"]


def test_a_stop_token_ends_the_row_unless_it_is_ignored(make_scheduler, request_of):
    """Running past the end of the answer, or stopping a load test early."""
    [first] = run(make_scheduler(), [Row(request_of([5, 6], 1), Tap())]).values()
    eos = frozenset({first[0].token_id})
    for ignore, count, reason in ((False, 1, "stop"), (True, 4, "length")):
        row = Row(request_of([5, 6], 4, ignore_eos=ignore), Tap())
        steps = run(make_scheduler(eos_token_ids=eos), [row])[row]
        assert len(steps) == count
        assert steps[-1].finish_reason == reason
        assert steps[0].token_id == first[0].token_id


def test_nonfinite_logits_end_only_their_own_request(make_scheduler, forward, request_of):
    """NaN laundered into tokens by argmax; or one bad request that ends its neighbours."""
    alone = Row(request_of([5, 6], 6), Tap())
    expected = run(make_scheduler(), [alone])[alone]
    forward.poison = 9
    good, bad = Row(request_of([5, 6], 6), Tap()), Row(request_of([8, 9], 6), Tap())
    outcomes = run(make_scheduler(), [good, bad])
    assert outcomes[good] == expected
    [failure] = outcomes[bad]
    assert isinstance(failure, RequestFailedError)
    assert failure.code == "nonfinite_logits"


def test_what_overflowed_is_not_kept_for_others(make_scheduler, forward, request_of):
    """Its keys are NaN, and would be the beginning of whatever is asked next."""
    scheduler = make_scheduler()
    beginning = list(range(10, 34))
    forward.poison = 9
    run(scheduler, [Row(request_of([*beginning, 9], 3), Tap())])
    assert scheduler._prefixes.tokens == 0
    run(scheduler, [Row(request_of([*beginning, 8], 3), Tap())])
    assert scheduler._prefixes.tokens == 25


def test_an_empty_batch_gives_its_memory_back(make_scheduler, request_of):
    """It is as wide as the longest answer and as tall as the busiest hour."""
    scheduler = make_scheduler()
    for _ in range(2):
        scheduler.add([Row(request_of([5, 6], 4), Tap()) for _ in range(3)])
        step(scheduler)
        assert scheduler._cache.allocated
        run(scheduler)
        assert not scheduler._cache.allocated


def test_a_prompt_that_is_read_does_not_wait(make_scheduler, forward, request_of, monkeypatch):
    """The queue looked full for as long as a pass took, and refused who had room."""
    scheduler = make_scheduler()
    scheduler.add([Row(request_of([5] * 20, 2), Tap())])
    seen = []
    whole = forward.__call__

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((scheduler.running, scheduler.waiting, scheduler.waiting_tokens))
        return whole(*args, **kwargs)

    monkeypatch.setattr(
        WatchedForward, "__call__", lambda _, *args, **kwargs: watched(*args, **kwargs)
    )
    step(scheduler)
    assert seen[0] == (1, 0, 0)


def test_scores_and_generations_share_a_pass(make_scheduler, forward, request_of):
    """Scoring must take the production path, and must not wait for a pass of its own."""
    score = Row(ScoreRequest(request_id="s", token_ids=(5, 6, 7), start=1, probe="p"), Tap())
    generate = Row(request_of([5, 6], 2), Tap())
    outcomes = run(make_scheduler(), [score, generate])
    assert forward.passes[0] == (2, 3)
    assert outcomes[score] == [()]  # no probe is attached here
    assert [type(entry) for entry in outcomes[generate]] == [Step, Step]


def test_the_counts_are_those_of_the_queue(make_scheduler, request_of):
    """Health and admission read them from another thread."""
    scheduler = make_scheduler(max_num_seqs=2)
    scheduler.add([Row(request_of([5] * n, 9), Tap()) for n in (4, 4, 5, 6)])
    assert (scheduler.running, scheduler.waiting, scheduler.waiting_tokens) == (0, 4, 19)
    step(scheduler)
    assert (scheduler.running, scheduler.waiting, scheduler.waiting_tokens) == (2, 2, 11)
