"""How the next token is chosen: one call for all rows of a batch, each with its own rules.

A row's choice depends on its own logits and its own generator only, so a seeded request writes the
same tokens alone and in any batch. The order of rules is that of vLLM and transformers: logit bias,
repetition, frequency and presence penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engines.base import Sampling, TokenLogprobs

GREEDY_BELOW = 1e-5  # a temperature; vLLM has the same. Logits divided by 1e-40 are infinite
CANDIDATES = 256  # truncated rows are searched among this many best tokens before a full sort


class RowSampler:
    """The rules of one row and what they remember: its generator and the tokens it has written."""

    def __init__(self, sampling: Sampling, prompt_token_ids: Sequence[int]) -> None:
        self.sampling = sampling
        self.greedy = sampling.temperature < GREEDY_BELOW
        self.edits = bool(
            sampling.logit_bias
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or sampling.repetition_penalty != 1
        )
        self._prompt = set(prompt_token_ids) if sampling.repetition_penalty != 1 else set()
        self._written: Counter[int] = Counter()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed % 2**64)

    def wrote(self, token_id: int) -> None:
        """The row has written `token_id`: penalties count it from now on."""
        if self.edits:
            self._written[token_id] += 1

    def uniform(self) -> float:
        """The row's next random number, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def edit(self, scores: Tensor) -> None:
        """Apply bias and penalties in place to the row's `[vocab]` float32."""
        rule, device = self.sampling, scores.device
        if rule.logit_bias:
            biased = torch.tensor([token for token, _ in rule.logit_bias], device=device)
            bias = scores.new_tensor([value for _, value in rule.logit_bias])
            scores.index_add_(0, biased, bias)
        if rule.repetition_penalty != 1:
            seen = torch.tensor(sorted(self._prompt | self._written.keys()), device=device)
            old = scores[seen]
            factor = rule.repetition_penalty
            scores[seen] = torch.where(old < 0, old * factor, old / factor)
        if self._written and (rule.frequency_penalty or rule.presence_penalty):
            ids = torch.tensor(list(self._written), device=device)
            counts = scores.new_tensor(list(self._written.values()))
            scores[ids] -= rule.frequency_penalty * counts + rule.presence_penalty


def sample(logits: Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """One token id per row of `logits` `[rows, vocab]`, which must be finite and is not changed."""
    if not any(sampler.edits for sampler in samplers):
        if all(sampler.greedy for sampler in samplers):
            chosen: list[int] = _best(logits).tolist()
            return chosen
        scores = logits.float()
    else:
        scores = logits.to(torch.float32, copy=True)
        for row, sampler in enumerate(samplers):
            if sampler.edits:
                sampler.edit(scores[row])
    chosen = _best(scores).tolist()
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawing:
        drawn = _draw(scores[drawing], [samplers[row] for row in drawing])
        for row, token_id in zip(drawing, drawn, strict=True):
            chosen[row] = token_id
    return chosen


def logprobs(
    logits: Tensor, chosen: Sequence[int], samplers: Sequence[RowSampler]
) -> list[TokenLogprobs | None]:
    """Log-probabilities of the raw `[rows, vocab]` logits, for the rows that asked for them."""
    result: list[TokenLogprobs | None] = [None] * len(samplers)
    asking = [row for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None]
    if not asking:
        return result
    table = logits[asking].float().log_softmax(-1)
    best = table.topk(max(samplers[row].sampling.logprobs or 0 for row in asking), dim=-1)
    for index, row in enumerate(asking):
        count = samplers[row].sampling.logprobs
        ids, values = best.indices[index, :count].tolist(), best.values[index, :count].tolist()
        result[row] = TokenLogprobs(
            float(table[index, chosen[row]]), tuple(zip(ids, values, strict=True))
        )
    return result


def _best(scores: Tensor) -> Tensor:
    """Index of the first of the largest in each row of `[rows, vocab]`.

    Not by `argmax`, which takes 19 ms on CPU for 16 rows of 49,152 bfloat16 (torch 2.13) where
    `max` takes 0.7: a quarter of a decoding step.
    """
    return scores.max(-1).indices


def _draw(scores: Tensor, samplers: Sequence[RowSampler]) -> list[int]:
    """Draw one token per row of `[rows, vocab]` float32, all of them with a temperature.

    By inversion in the order of token ids: rounding noise that swaps two equal candidates in a
    sorted order must not change the draw. Sorts are kept to the few best tokens where these hold
    everything that top-k, top-p or min-p leave.
    """
    rules = [sampler.sampling for sampler in samplers]
    device = scores.device
    uniform = torch.tensor([s.uniform() for s in samplers], dtype=torch.float64, device=device)
    scores = scores / scores.new_tensor([rule.temperature for rule in rules])[:, None]
    truncated = [
        row for row, rule in enumerate(rules) if rule.top_k or rule.top_p < 1 or rule.min_p > 0
    ]
    if not truncated:
        return _invert(scores, uniform).tolist()

    chosen = [-1] * len(rules)
    rest = [row for row in range(len(rules)) if row not in set(truncated)]
    width = min(scores.shape[1], max(CANDIDATES, *(rules[row].top_k for row in truncated)))
    for candidates in dict.fromkeys((width, scores.shape[1])):
        if not truncated:
            break
        part = scores[truncated]
        values, ids = part.topk(candidates, dim=-1)
        kept, complete = _keep(
            values, part.logsumexp(-1), [rules[row] for row in truncated], part.shape[1]
        )
        ids, order = ids.sort(dim=-1)
        values = values.masked_fill(~kept, -torch.inf).gather(-1, order)
        picked = ids.gather(-1, _invert(values, uniform[truncated])[:, None])[:, 0].tolist()
        done = complete.tolist()
        for row, token_id, whole in zip(truncated, picked, done, strict=True):
            if whole:
                chosen[row] = token_id
        truncated = [row for row, whole in zip(truncated, done, strict=True) if not whole]
    if rest:
        for row, token_id in zip(rest, _invert(scores[rest], uniform[rest]).tolist(), strict=True):
            chosen[row] = token_id
    return chosen


def _keep(
    values: Tensor, total: Tensor, rules: Sequence[Sampling], vocab: int
) -> tuple[Tensor, Tensor]:
    """Which of the best `values` `[rows, candidates]` (descending) each row's rules keep.

    `total` `[rows]` is the logsumexp over the whole vocabulary. Also returns `[rows]` bool: whether
    the rule provably keeps nothing beyond these candidates.
    """
    count = values.shape[1]
    rank = torch.arange(count, device=values.device)
    top_k = torch.tensor([rule.top_k or vocab for rule in rules], device=values.device)[:, None]
    top_p = values.new_tensor([rule.top_p for rule in rules])[:, None]
    floor = values.new_tensor(
        [math.log(rule.min_p) if rule.min_p > 0 else -math.inf for rule in rules]
    )[:, None]

    kept = rank < top_k
    # top-p is of the mass that top-k leaves
    inside = values.masked_fill(~kept, -torch.inf).logsumexp(-1)
    mass = torch.where(top_k[:, 0] <= count, inside, total)[:, None]
    before = (values - mass).exp().cumsum(-1) - (values - mass).exp()
    kept &= (before < top_p) | (top_p >= 1)
    kept &= values >= values[:, :1] + floor
    kept[:, 0] = True
    return kept, ~kept[:, -1] | (top_k[:, 0] <= count) | torch.tensor(count == vocab)


def _invert(scores: Tensor, uniform: Tensor) -> Tensor:
    """Indices `[rows]` drawn from softmax(`scores` `[rows, n]`), by inverting its running sum."""
    running = (scores - scores.amax(-1, keepdim=True)).double().exp().cumsum(-1)
    total = running[:, -1]
    # `uniform * total` may round up to `total`, behind which no token stands
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(running, target[:, None], right=True)[:, 0]
