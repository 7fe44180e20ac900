"""The next token: each rule against transformers' own processors or the plain formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engines.base import Sampling
from server.engines.sampling import RowSampler, logprobs, sample


class FixedDraw(RowSampler):
    """Draws the numbers it is given instead of random ones."""

    def __init__(self, sampling: Sampling, uniform: float) -> None:
        super().__init__(sampling, [])
        self._fixed = uniform

    def uniform(self) -> float:
        return self._fixed


def warped(logits: Tensor, rule: Sampling) -> Tensor:
    """Probabilities that transformers draws from."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(rule.temperature)])
    if rule.top_k:
        chain.append(TopKLogitsWarper(rule.top_k))
    if rule.top_p < 1:
        chain.append(TopPLogitsWarper(rule.top_p))
    if rule.min_p:
        chain.append(MinPLogitsWarper(rule.min_p))
    return chain(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].double().softmax(-1)


@pytest.mark.parametrize("vocab", [40, 1500])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "rule",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=1),
        Sampling(top_k=7, temperature=1.3),
        Sampling(top_k=300),
        Sampling(top_k=5000),
        Sampling(top_p=0.5),
        Sampling(top_p=0.95, temperature=0.7),
        Sampling(top_p=1e-6),
        Sampling(min_p=0.1),
        Sampling(min_p=0.4, temperature=2.0),
        Sampling(top_k=20, top_p=0.8, min_p=0.05, temperature=1.1),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_transformers(vocab, spread, rule):
    """Wrong order of rules, renormalisation, or a nucleus cut at the candidate limit."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    draws = 500
    samplers = [FixedDraw(rule, (i + 0.5) / draws) for i in range(draws)]
    drawn = sample(logits.expand(draws, -1), samplers)
    found = torch.bincount(torch.tensor(drawn), minlength=vocab).double() / draws
    # equally spaced draws hit each token as often as its probability says, up to one draw
    assert (found - warped(logits, rule)).abs().max() <= 1.001 / draws + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_no_draw_leaves_the_kept_tokens(uniform):
    """At the ends of the running sum a token of probability 0 could be drawn."""
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20:23] = torch.tensor([0.1, 3.0, 0.2])
    for rule in (Sampling(), Sampling(top_k=10), Sampling(top_p=0.999999)):
        assert sample(logits, [FixedDraw(rule, uniform)])[0] in (20, 21, 22)


def test_temperature_zero_is_the_best_token_beside_rows_that_draw():
    """A greedy row must stay greedy in a mixed batch."""
    logits = torch.randn(3, 100, generator=torch.Generator().manual_seed(3))
    samplers = [
        RowSampler(Sampling(temperature=0.0), []),
        RowSampler(Sampling(temperature=5.0, seed=1), []),
        RowSampler(Sampling(temperature=0.0, top_k=5, top_p=0.1), []),
    ]
    chosen = sample(logits, samplers)
    assert chosen[0] == int(logits[0].argmax())
    assert chosen[2] == int(logits[2].argmax())


def test_a_seeded_row_draws_the_same_tokens_alone_and_in_any_batch():
    """A generator shared by the batch would tie a request's tokens to its neighbours."""
    steps = torch.randn(20, 1000, generator=torch.Generator().manual_seed(4))
    others = [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0.0), Sampling(top_k=500)]
    for rule in (Sampling(seed=11), Sampling(seed=11, top_p=0.9), Sampling(seed=11, top_k=30)):
        alone, inside = RowSampler(rule, []), RowSampler(rule, [])
        neighbours = [RowSampler(other, []) for other in others]
        for logits in steps:
            batch = torch.stack([steps[0], logits, *steps[1:4]])
            together = sample(batch, [neighbours[0], inside, *neighbours[1:]])
            assert together[1] == sample(logits[None], [alone])[0]


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-40, 1e-38, 1e-5])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}])
@pytest.mark.parametrize("penalty", [1.0, 0.001])
def test_no_legal_setting_writes_a_token_that_does_not_exist(temperature, cut, penalty):
    """Infinite logits draw the id behind the vocabulary, and the next pass ends the engine."""
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(7)) * 30
    rule = Sampling(temperature=temperature, repetition_penalty=penalty, logprobs=1, **cut)
    sampler = RowSampler(rule, [1, 2, 3])
    edited = logits[0].clone()
    sampler.edit(edited)
    chosen = sample(logits, [sampler])
    assert chosen == [int(edited.argmax())]
    assert logprobs(logits, chosen, [sampler])[0] is not None


def test_rows_without_a_seed_differ():
    """Fresh entropy: two unseeded choices of one request must not be copies."""
    logits = torch.zeros(2, 1000)
    samplers = [RowSampler(Sampling(), []) for _ in range(2)]
    pairs = [sample(logits, samplers) for _ in range(8)]
    assert any(first != second for first, second in pairs)


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """It covers the prompt and the answer, and multiplies negative logits."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(5)) * 3
    prompt, written = [1, 4, 4, 9], [2, 9, 17]
    sampler = RowSampler(Sampling(temperature=0.0, repetition_penalty=penalty), prompt)
    for token in written:
        sampler.wrote(token)
    scores = logits[0].clone()
    sampler.edit(scores)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + written]), logits.clone()
    )[0]
    torch.testing.assert_close(scores, expected)


def test_frequency_and_presence_count_what_was_written_and_bias_adds():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence; the prompt is free."""
    logits = torch.randn(30, generator=torch.Generator().manual_seed(6))
    rule = Sampling(
        frequency_penalty=0.5, presence_penalty=-0.25, logit_bias=((3, 2.0), (8, -100.0))
    )
    sampler = RowSampler(rule, [5, 5, 5])
    for token in (7, 7, 3):
        sampler.wrote(token)
    expected = logits.clone()
    expected[7] -= 2 * 0.5 - 0.25
    expected[3] += 2.0 - 0.5 + 0.25
    expected[8] -= 100
    scores = logits.clone()
    sampler.edit(scores)
    torch.testing.assert_close(scores, expected)


def test_edits_touch_only_their_own_row_and_not_the_logits():
    """An edit in place on the model's logits would falsify logprobs and the neighbours."""
    logits = torch.zeros(2, 10)
    logits[:, 4] = 1.0
    before = logits.clone()
    samplers = [
        RowSampler(Sampling(temperature=0.0, logit_bias=((4, -50.0), (6, 5.0))), []),
        RowSampler(Sampling(temperature=0.0), []),
    ]
    assert sample(logits, samplers) == [6, 4]
    assert torch.equal(logits, before)


def test_logprobs_are_of_the_raw_logits():
    """Before temperature, penalties and truncation, in float32, best first."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(7)).bfloat16()
    samplers = [
        RowSampler(Sampling(temperature=0.2, top_k=1, logprobs=3, logit_bias=((9, 9.0),)), []),
        RowSampler(Sampling(), []),
        RowSampler(Sampling(logprobs=0), []),
    ]
    first, none, bare = logprobs(logits, [9, 1, 2], samplers)
    table = torch.log_softmax(logits.float(), -1)
    assert none is None
    assert first is not None
    assert bare is not None
    assert first.logprob == pytest.approx(float(table[0, 9]))
    best = table[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist())
    assert bare.logprob == pytest.approx(float(table[2, 2]))
    assert bare.top == ()


def test_any_integer_is_a_seed():
    """OpenAI's seeds are signed; torch refuses what does not fit 64 bits."""
    for seed in (-1, 0, 2**63, 2**80):
        assert math.isfinite(RowSampler(Sampling(seed=seed), []).uniform())
