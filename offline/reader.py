"""Teacher-forced passes that read nothing twice: what all prompts begin with once, then each
distinct prompt once, then the tokens of all answers, and only these are recorded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from probes.errors import ModelError
from probes.neurons import find_ffns, text_config
from probes.tap import Recorder

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Ids: TypeAlias = tuple[int, ...]
Position = Literal["read", "write"]

SURPRISE_ELEMENTS = 2**24  # logits that are float32 at a time


class Text(NamedTuple):
    """An answer and the prompt that it was written to; at least one token each."""

    prompt: Ids
    written: Ids


class Rows(NamedTuple):
    """What was read at the written tokens of some texts, laid end to end; on the CPU."""

    cett: Tensor  # [rows, layers * neurons]
    residual: Tensor  # [rows, chosen layers, hidden] float32
    logprob: Tensor  # [rows] float32, nats, given what stands before the token
    entropy: Tensor  # [rows] float32, nats, likewise

    def part(self, start: int, stop: int) -> Rows:
        """A view of some rows."""
        return Rows(*(tensor[start:stop] for tensor in self))


def common_start(prompts: Sequence[Ids]) -> Ids:
    """What all prompts begin with, less than the whole of any: the last token is always read."""
    shortest = min(len(prompt) for prompt in prompts)
    extremes = zip(min(prompts), max(prompts), strict=False)  # what these share all share
    same = takewhile(lambda pair: pair[0] == pair[1], extremes)
    return tuple(token for token, _ in same)[: shortest - 1]


class Reader:
    """Reads batches of texts whose prompts all begin with `shared`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        position: Position,
        residual_layers: Sequence[int],
        shared: Ids,
        longest: int,
    ) -> None:
        """`residual_layers` index transformers' hidden_states; `longest` text in tokens.

        ModelError for a model whose cache cannot hand one prompt to several answers.
        """
        self._model = model
        self._model.train(False)
        self._ffns = find_ffns(model)
        self._width = self._ffns[0].intermediate_size
        self._residual_layers = residual_layers
        self._shift = 1 if position == "read" else 0
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        # A shared start leaves a gap before shorter prompts, and windows count the gap.
        window = getattr(text_config(model), "sliding_window", None) or longest
        self.shared = shared if longest <= window else ()
        self._start = self._read_start()

    def empty(self, rows: int, dtype: torch.dtype) -> Rows:
        """Room for so many rows; `cett` in `dtype`."""
        width, hidden = len(self._ffns) * self._width, self._ffns[0].hidden_size
        return Rows(
            torch.empty(rows, width, dtype=dtype),
            torch.empty(rows, len(self._residual_layers), hidden),
            torch.empty(rows),
            torch.empty(rows),
        )

    @torch.inference_mode()
    def read(self, texts: Sequence[Text], into: Rows) -> None:
        """Fill `into`, which has one row per written token."""
        prompts = list(dict.fromkeys(text.prompt for text in texts))
        number = {prompt: i for i, prompt in enumerate(prompts)}
        cache, seen = self._read_prompts(prompts)
        chosen = torch.tensor([number[text.prompt] for text in texts])
        cache.batch_select_indices(chosen)
        seen = seen[chosen]

        fed = [(text.prompt[-1], *text.written) for text in texts]
        longest = max(map(len, fed))
        ids = torch.tensor([(*one, *[0] * (longest - len(one))) for one in fed])
        here = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in fed])
        row = torch.tensor([i for i, text in enumerate(texts) for _ in text.written])
        column = torch.tensor([t for text in texts for t in range(len(text.written))])

        def keep(layer: int, values: Tensor) -> None:
            values = values.reshape(len(texts), longest, -1)  # OPT flattens its batch
            place = slice(layer * self._width, (layer + 1) * self._width)
            into.cett[:, place] = _pick(values, row, column + self._shift)

        mask = torch.cat([seen, here], dim=1)
        with Recorder(self._ffns, on_layer=keep):
            output = self._model(**self._inputs(ids, mask, cache), output_hidden_states=True)
        for k, layer in enumerate(self._residual_layers):
            into.residual[:, k] = _pick(output.hidden_states[layer], row, column + self._shift)
        written = ids[row, column + 1]
        step = max(1, SURPRISE_ELEMENTS // output.logits.shape[-1])
        for start in range(0, len(row), step):
            some = slice(start, start + step)
            predicted = _pick(output.logits, row[some], column[some]).float().log_softmax(-1)
            chosen_id = written[some, None].to(predicted.device)
            into.logprob[some] = predicted.gather(-1, chosen_id)[:, 0]
            into.entropy[some] = torch.special.entr(predicted.exp()).sum(-1)

    def _read_prompts(self, prompts: Sequence[Ids]) -> tuple[Cache, Tensor]:
        """The cache of all prompts without their last token, and its mask `[prompts, slots]`."""
        cache = copy.deepcopy(self._start)
        cache.batch_repeat_interleave(len(prompts))
        rest = [prompt[len(self.shared) : -1] for prompt in prompts]
        longest = max(map(len, rest))
        ids = torch.tensor([[0] * (longest - len(one)) + list(one) for one in rest])
        here = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in rest])
        seen = torch.ones(len(prompts), len(self.shared), dtype=torch.int64)
        mask = torch.cat([seen, here.long()], dim=1)
        if longest:
            self._model.base_model(**self._inputs(ids, mask, cache))  # no logits
        return cache, mask

    @torch.inference_mode()
    def _read_start(self) -> Cache:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache = DynamicCache(config=self._model.config)
        other = [type(one).__name__ for one in cache.layers if not isinstance(one, DynamicLayer)]
        if other:
            raise ModelError(
                f"{type(self._model).__name__} keeps {other[0]}, not keys and values, of what it "
                f"has read; only attention models are supported"
            )
        if self.shared:
            mask = torch.ones(1, len(self.shared), dtype=torch.int64)
            self._model.base_model(**self._inputs(torch.tensor([self.shared]), mask, cache))
        return cache

    def _inputs(self, ids: Tensor, mask: Tensor, cache: Cache) -> dict[str, object]:
        """Arguments of a pass over `ids` `[rows, tokens]`, the last columns of `mask`."""
        device = self._model.device
        inputs: dict[str, object] = {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if self._takes_positions:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            inputs["position_ids"] = positions.to(device)
        return inputs


def _pick(values: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`values[row, column]`, wherever they live."""
    return values[row.to(values.device), column.to(values.device)]
