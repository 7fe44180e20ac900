"""Which rows run in the next pass: requests are admitted and retired at every step.

Knows no thread, no event loop and no HTTP: `add` rows, call `step`, hand out what it returns.
A waiting prompt is first read (*prefill*) together with others of similar length, in a cache of its
own; then its row joins the one batch that decodes. A long prompt is read in several passes, with a
decoding pass after each, so that running streams go on. What a prompt that was read lately begins
with is not read again (`prefixes`); every row has its own copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from server.engines.base import Contribution, GenerationRequest, Reading, RequestFailedError, Step
from server.engines.cache import BatchCache
from server.engines.forward import Forward, Tap
from server.engines.prefill import WORTH_SHARING, Prefill
from server.engines.prefixes import PrefixCache
from server.engines.row import Outcome, Row
from server.engines.sampling import logprobs, sample


class Scheduler:
    """The queue, the prompt that is being read, and the batch that decodes."""

    def __init__(
        self,
        forward: Forward,
        *,
        eos_token_ids: frozenset[int],
        max_num_seqs: int,
        prefill_tokens: int,
        prefix_tokens: int,
    ) -> None:
        self._forward = forward
        self._eos = eos_token_ids
        self._max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens
        self._prefixes = PrefixCache(prefix_tokens)
        self._waiting: list[Row] = []
        self._prefill: Prefill | None = None
        self._rows: list[Row] = []
        self._cache = forward.new_cache()
        # Plain numbers, because another thread looks at them.
        self.running = 0  # rows that are being read or decode
        self.waiting = 0
        self.waiting_tokens = 0
        self.cached_tokens_total = 0  # prompt tokens whose keys and values were there already

    @property
    def idle(self) -> bool:
        return self.running + self.waiting == 0

    @property
    def rows(self) -> list[Row]:
        """Every row that is here, in whatever state."""
        return [*self._waiting, *(self._prefill.rows if self._prefill else ()), *self._rows]

    def add(self, rows: Iterable[Row]) -> None:
        """Queue `rows` behind those that wait."""
        self._waiting.extend(rows)
        self._count()

    def forget_prefixes(self) -> None:
        """Taps name other probes from now on: what their suppression has written is not theirs."""
        self._prefixes.clear()

    def step(self) -> list[tuple[Row, Outcome]]:
        """At most one prefill pass and one decoding pass; what they gave to each row, in order."""
        self._drop_aborted()
        outcomes: list[tuple[Row, Outcome]] = []
        if self._prefill is None:
            self._prefill = self._next_prefill()
            self._count()  # what is read from here on does not wait, and a pass may take seconds
        if self._prefill is not None:
            outcomes += self._read_prompts(self._prefill)
        if self._rows:
            outcomes += self._decode()
        self._count()
        return outcomes

    def _count(self) -> None:
        self.running = len(self._rows) + (len(self._prefill.rows) if self._prefill else 0)
        self.waiting = len(self._waiting)
        self.waiting_tokens = sum(len(row.prompt) for row in self._waiting)

    def _drop_aborted(self) -> None:
        self._waiting = [row for row in self._waiting if not row.aborted]
        if self._prefill is not None and all(row.aborted for row in self._prefill.rows):
            self._prefill = None
        self._retire([row for row in self._rows if row.aborted])

    def _next_prefill(self) -> Prefill | None:
        """The first that waits, and others with as much to read as far as one pass holds them.

        A row that begins like a chosen one is left for the next pass, where that much is known.
        """
        free = self._max_num_seqs - len(self._rows)
        prefill = Prefill(self._forward, self._prefixes)
        for row in self._waiting if free > 0 else ():
            if len(prefill.rows) == free:
                break
            prefill.offer(row, self._prefill_tokens)
        if not prefill.rows:
            return None
        self._waiting = [row for row in self._waiting if row not in prefill.rows]
        prefill.begin()
        self.cached_tokens_total += prefill.start * len(prefill.rows)
        return prefill

    def _read_prompts(self, prefill: Prefill) -> list[tuple[Row, Outcome]]:
        """One pass over the next chunk; rows that it has read to the end write their first token.

        The others stay in `prefill`, which ends with its last row.
        """
        rows, chunk = list(prefill.rows), prefill.chunk(self._prefill_tokens)
        scoring = [i for i, row in enumerate(rows) if row.sampler is None]
        logits = self._forward(chunk, prefill.cache, _taps(rows), read_all=bool(scoring))
        read = [i for i, row in enumerate(rows) if prefill.cache.lengths[i] == len(row.prompt)]
        if not (read or scoring):
            return []
        readings = self._readings(
            rows, prefill.cache, [len(part) for part in chunk], read_all=bool(scoring)
        )
        for i in scoring:
            rows[i].score(readings[i])
        outcomes: list[tuple[Row, Outcome]] = [
            (rows[i], tuple(rows[i].readings)) for i in read if rows[i].sampler is None
        ]
        writing = [i for i in read if rows[i].sampler is not None and not rows[i].aborted]
        steps = self._write(
            [rows[i] for i in writing], logits[writing], [readings[i] for i in writing]
        )
        for i in read:
            prompt = rows[i].prompt
            worth = len(prompt) - prefill.start >= WORTH_SHARING and self._prefixes.takes(prompt)
            # Keys and values that overflowed would spread to everybody who begins alike.
            if worth and logits[i].isfinite().all():
                self._prefixes.keep(rows[i].salt, prompt, prefill.cache, i)
        for i, (row, step) in zip(writing, steps, strict=True):
            if _goes_on(step):
                self._cache.admit(prefill.cache, i)
                self._rows.append(row)
        prefill.retire(read)
        if not prefill.rows:
            self._prefill = None
        return outcomes + steps

    def _decode(self) -> list[tuple[Row, Outcome]]:
        """Feed every row its last token; rows that are done leave the batch."""
        rows = list(self._rows)
        logits = self._forward([row.written[-1:] for row in rows], self._cache, _taps(rows))
        outcomes = self._write(rows, logits, self._readings(rows, self._cache, [1] * len(rows)))
        self._retire([row for row, outcome in outcomes if not _goes_on(outcome)])
        return outcomes

    def _readings(
        self,
        rows: Sequence[Row],
        cache: BatchCache,
        counts: Sequence[int],
        *,
        read_all: bool = False,
    ) -> list[list[Reading]]:
        """Readings of the pass that has fed `counts[row]` tokens to each row.

        None for rows without a probe; of a row that generates, and of every row unless the pass
        has read all, the last token's only; of one that is scored those that it wants.
        """
        taps = _taps(rows)
        table = self._forward.readings(taps, columns=max(counts) if read_all else 1)
        result: list[list[Reading]] = []
        for index, (row, tap, count) in enumerate(zip(rows, taps, counts, strict=True)):
            found: list[Reading] = []
            first = max(0, count - 1)
            if row.sampler is None:
                first = min(count, max(0, row.first_wanted - (cache.lengths[index] - count)))
            for token in range(first, count) if tap.probe is not None else ():
                position = cache.lengths[index] - count + token
                column = token if read_all else 0
                values = table[index][column]
                k = row.request.contributors
                shares: tuple[Contribution, ...] = ()
                if k and not any(math.isnan(value) for value in values):
                    shares = self._forward.contributions(tap, row=index, column=column, k=k)
                found.append(Reading(position, values, shares))
            result.append(found)
        return result

    def _write(
        self, rows: Sequence[Row], logits: Tensor, readings: Sequence[Sequence[Reading]]
    ) -> list[tuple[Row, Outcome]]:
        """Choose each row's next token from `logits` `[rows, vocab]`, or end the row."""
        if not rows:
            return []
        samplers = [row.sampler for row in rows if row.sampler is not None]
        assert len(samplers) == len(rows)
        finite = torch.isfinite(logits.sum(-1, dtype=torch.float32)).tolist()
        if not all(finite):
            logits = torch.nan_to_num(logits)  # those rows end below; the others are untouched
        chosen = sample(logits, samplers)
        tables = logprobs(logits, chosen, samplers)
        outcomes: list[tuple[Row, Outcome]] = []
        for index, row in enumerate(rows):
            request = row.request
            assert isinstance(request, GenerationRequest)
            reading = readings[index][-1] if readings[index] else None
            if len(row.written) == request.max_tokens:
                outcomes.append((row, Step(None, reading, finish_reason="length")))
                continue
            if not finite[index]:
                outcomes.append((row, _nonfinite(row)))
                continue
            token_id = chosen[index]
            row.written.append(token_id)
            samplers[index].wrote(token_id)
            step = Step(token_id, reading, tables[index])
            if token_id in self._eos and not request.sampling.ignore_eos:
                step = step._replace(finish_reason="stop")
            elif len(row.written) == request.max_tokens and not request.read_last:
                step = step._replace(finish_reason="length")
            outcomes.append((row, step))
        return outcomes

    def _retire(self, rows: Iterable[Row]) -> None:
        for row in rows:
            index = self._rows.index(row)
            self._cache.retire(index)
            self._rows[index] = self._rows[-1]
            self._rows.pop()
        if not self._rows and self._cache.allocated:
            self._cache = self._forward.new_cache()  # as wide as the longest row there ever was


def _taps(rows: Sequence[Row]) -> list[Tap]:
    return [row.tap for row in rows]


def _goes_on(outcome: Outcome) -> bool:
    return isinstance(outcome, Step) and outcome.finish_reason is None


def _nonfinite(row: Row) -> RequestFailedError:
    return RequestFailedError(
        "nonfinite_logits",
        f"the model's logits are not finite after {len(row.prompt) + len(row.written)} tokens "
        f"(alpha {row.tap.alpha:g}); the request cannot go on",
    )
