"""Where a model is read: Recorder (every neuron, offline) and Meter (a probe's neurons, online).

Both tap the down projections that `find_ffns` found and leave nothing behind when closed.
A tapped layer that did not run is an error, never an empty reading.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from probes.cett import cett, h_norm
from probes.errors import ModelError, ProbeMismatchError
from probes.neurons import FFN
from probes.probe import Probe
from probes.suppression import scales, suppress

# Up to this many elements of z, z and h are kept as they are, and gathered and reduced for all
# layers together: two operations instead of two per layer while decoding, where each costs the call
# and not the numbers. Of a longer pass (a prompt) only what is read is kept, or all of it would
# stay in memory.
KEPT_WHOLE = 2**18


class Recorder:
    """CETT of every neuron of every layer in the last forward pass.

        with Recorder(ffns) as recorder:
            model(input_ids)
            recorder.cett(3)                       # [batch, tokens, neurons] float32

    With `on_layer` each layer's CETT is handed over as soon as it exists and is not kept, so that
    memory is bounded by one layer. Where a model flattens its batch (OPT), so does the result:
    `[batch * tokens, neurons]`.
    """

    def __init__(
        self, ffns: Sequence[FFN], *, on_layer: Callable[[int, Tensor], None] | None = None
    ) -> None:
        self._ffns = ffns
        self._on_layer = on_layer
        self._kept: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for ffn in self._ffns:
            self._handles.append(ffn.module.register_forward_hook(self._hook(ffn)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    def cett(self, layer: int) -> Tensor:
        """`[batch, tokens, neurons]` float32 of the last pass, on the layer's device."""
        if layer not in self._kept:
            raise ModelError(f"layer {layer} was not recorded: it did not run, or is streamed")
        return self._kept[layer]

    def _hook(self, ffn: FFN) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        norms = ffn.column_norms()

        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            values = cett(args[0].detach(), norms, h_norm(output.detach()).unsqueeze(-1))
            if self._on_layer is not None:
                self._on_layer(ffn.layer, values)
            else:
                self._kept[ffn.layer] = values

        return record


class Meter:
    """Logits of several probes at once, read during ordinary forward passes.

        with Meter(ffns, probes, suppression=True) as meter:
            meter.begin([(0, 1.0), (0, 0.5)])      # per batch row: probe, alpha
            model(input_ids)
            meter.logits()                         # [batch, tokens, total_heads] float32

    The probes' neurons are laid end to end: `weight` is `[neurons, total_heads]` with one block per
    probe, so one matrix product serves them all. z is read before suppression, h after it.
    Not thread-safe: one pass at a time.
    """

    def __init__(self, ffns: Sequence[FFN], probes: Sequence[Probe], *, suppression: bool) -> None:
        if not probes:
            raise ValueError("a meter needs at least one probe")
        # Wall time spent in the meter, 0 inside compiled graphs. A sample: in each pass one layer
        # is timed and counts for all, since two clocks in every layer cost as much as the reading.
        self.seconds_total = 0.0
        self._suppression = suppression
        self._passes = 0
        self._batch: int | None = None
        self.only: Tensor | None = None  # of the running pass, see begin()
        # Whether h is still what the projection put out when the pass has ended: some decoders go
        # on to write into it (Falcon adds its attention's output). Unknown until a pass was seen.
        self.output_stays: bool | None = None
        self._cett: Tensor | None = None
        self._lay_out(ffns, probes)

    def _lay_out(self, ffns: Sequence[FFN], probes: Sequence[Probe]) -> None:
        """Order all neurons by layer; cut weights, masks and columns to that order."""
        by_layer = {ffn.layer: ffn for ffn in ffns}
        total_neurons = sum(len(probe.layer) for probe in probes)
        total_heads = sum(len(probe.bias) for probe in probes)
        weight = torch.zeros(total_neurons, total_heads)
        masks = torch.zeros(len(probes), total_neurons, dtype=torch.bool)
        self._head_slices: list[slice] = []
        self._token_heads: list[int] = []
        row = column = 0
        for index, probe in enumerate(probes):
            _refuse_other_shape(probe, by_layer)
            rows = slice(row, row + len(probe.layer))
            heads = slice(column, column + len(probe.bias))
            weight[rows, heads] = probe.weight
            masks[index, rows] = probe.suppress
            self._head_slices.append(heads)
            self._token_heads.append(column + probe.head(probe.card.token.head))
            row, column = rows.stop, heads.stop

        layer = torch.cat([probe.layer for probe in probes])
        order = torch.argsort(layer, stable=True)
        self._layer = layer[order]
        self._neuron = torch.cat([probe.neuron for probe in probes])[order]
        used = torch.tensor(sorted(set(layer.tolist())))
        self._taps = [
            _Tap(self, by_layer[number], self._neuron[here], masks[:, order][:, here])
            for number in used.tolist()
            for here in [self._layer == number]
        ]
        home = self._taps[-1].columns.device  # logits are made where the last layer lives
        self._layer_index = torch.searchsorted(used, self._layer).to(home)
        width = ffns[0].intermediate_size
        self._flat = self._layer_index * width + self._neuron.to(home)  # among whole z end to end
        self._column_norm = torch.cat([probe.column_norm for probe in probes])[order].to(home)
        self._weight = weight[order].to(home)
        self._bias = torch.cat([probe.bias for probe in probes]).to(home)

    def __enter__(self) -> Self:
        self.attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def attach(self) -> None:
        """Tap the probed layers; RuntimeError where a meter taps them already."""
        for tap in self._taps:
            tap.refuse_tapped()
        for tap in self._taps:
            tap.attach()

    def close(self) -> None:
        """Give every layer its own forward back and drop what was read."""
        for tap in self._taps:
            tap.close()
        self._cett = None

    def begin(
        self,
        alphas: Sequence[tuple[int, float]] | None = None,
        *,
        batch: int | None = None,
        only: Tensor | None = None,
    ) -> None:
        """Call before every forward pass.

        `alphas` holds (probe index, alpha) per batch row; None: no row suppresses. `batch` is
        needed without alphas where a model flattens its batch (OPT), and ignored elsewhere.
        `only` `[batch]` int64 names the one token of each row that is read, counted through the
        pass end to end (`row * tokens + column`); the readings then have one token per row.
        """
        started = time.perf_counter()
        self._batch = len(alphas) if alphas is not None else batch
        self.only = only
        self._cett = None
        active = [] if alphas is None or all(alpha == 1 for _, alpha in alphas) else alphas
        if active and not self._suppression:
            raise ValueError("this meter was made without suppression: alpha must be 1")
        rows = [probe for probe, _ in active]
        values = [alpha for _, alpha in active]
        for tap in self._taps:
            tap.reset(scales(values, tap.masks[rows]) if active else None)
        self._passes += 1
        self._taps[self._passes % len(self._taps)].stands_for = len(self._taps)
        self.seconds_total += time.perf_counter() - started

    def logits(self) -> Tensor:
        """`[batch, tokens, total_heads]` float32 of the pass that just ran.

        `tokens` is 1 after `begin(only=...)`. Values may be non-finite when the model's are.
        """
        started = time.perf_counter()
        silent = [tap.name for tap in self._taps if tap.z is None]
        if silent:
            raise ModelError(
                f"the forward pass did not run {silent[0]} (and {len(silent) - 1} more probed "
                f"projections), so its neurons could not be read; call begin() before each pass"
            )
        home = self._weight.device
        z = torch.cat([tap.z.to(home) for tap in self._taps if tap.z is not None], dim=-1)
        if self._taps[0].whole:
            z = z.index_select(-1, self._flat)
        norm = h_norm(torch.stack([tap.h.to(home) for tap in self._taps if tap.h is not None], -2))
        if self.output_stays is None and all(tap.watched is not None for tap in self._taps):
            self.output_stays = all(tap.output_stayed() for tap in self._taps)
        if z.dim() == 2:
            if self._batch is None:
                raise ValueError("this model flattens its batch: pass batch=... to begin()")
            z = z.reshape(self._batch, -1, z.shape[-1])
            norm = norm.reshape(self._batch, -1, norm.shape[-1])
        self._cett = cett(z, self._column_norm, norm.index_select(-1, self._layer_index))
        logits: Tensor = self._cett @ self._weight + self._bias
        self.seconds_total += time.perf_counter() - started
        return logits

    def head_slice(self, probe_index: int) -> slice:
        """Where a probe's heads lie among `total_heads`."""
        return self._head_slices[probe_index]

    def contributions(
        self, probe_index: int, batch_row: int, token: int, k: int
    ) -> list[tuple[int, int, float]]:
        """The `k` largest (by magnitude) `weight * cett` in a probe's token head, largest first.

        Of the pass whose `logits` were taken last; `batch_row` counts all rows of that pass.
        """
        if self._cett is None:
            raise RuntimeError("contributions are of a pass whose logits were taken")
        weight = self._weight[:, self._token_heads[probe_index]]
        shares = (self._cett[batch_row, token] * weight).cpu()
        largest = shares.abs().topk(min(k, int((weight != 0).sum()))).indices.tolist()
        return [(int(self._layer[i]), int(self._neuron[i]), float(shares[i])) for i in largest]


class _Tap:
    """One layer of a Meter: what to pick there, and what the running pass left.

    It takes the place of the projection's `forward` and calls it: one frame instead of two hooks
    (half the cost per layer), and torch.compile traces it as it traces the layer.

    z     `[..., columns]` or whole `[..., neurons]`, the model's dtype, before suppression
    h     `[..., hidden]`, the model's dtype, after suppression; or its norm `[..., 1]` float32
    watched  h beside its norm, in the pass that shows whether h may be kept
    scale `[rows, suppressed]` float32 while some row has an alpha other than 1
    """

    def __init__(self, meter: Meter, ffn: FFN, columns: Tensor, masks: Tensor) -> None:
        device = ffn.weight.device
        self.name = ffn.name
        self.columns = columns.to(device)  # may repeat: two probes may share a neuron
        # Suppression needs each column once: masks [probes, suppressed].
        suppressed = torch.tensor(sorted(set(columns[masks.any(0)].tolist())), dtype=torch.int64)
        self.suppressed = suppressed.to(device)
        rows = [torch.isin(suppressed, columns[mask]) for mask in masks]
        self.masks = torch.stack(rows).to(device)
        self.z: Tensor | None = None
        self.h: Tensor | None = None
        self.watched: Tensor | None = None
        self.scale: Tensor | None = None
        self.whole = False  # z is all of the layer's z, not only the columns
        self.stands_for = 0  # how many layers the time spent in this one is counted for
        self._meter = meter
        self._module = ffn.module
        self._inner: Callable[[Tensor], Tensor] = ffn.module.forward

    def refuse_tapped(self) -> None:
        if isinstance(getattr(self._module.forward, "__self__", None), _Tap):
            raise RuntimeError(f"{self.name} is tapped already; close that meter first")

    def attach(self) -> None:
        self._inner = self._module.forward
        self._had_own = "forward" in vars(self._module)  # accelerate replaces forward as well
        self._module.forward = self.forward

    def close(self) -> None:
        if vars(self._module).get("forward") == self.forward:
            if self._had_own:
                self._module.forward = self._inner
            else:
                del self._module.forward
        self.reset(None)

    def reset(self, scale: Tensor | None) -> None:
        """Forget the last pass; the next one is suppressed by `scale`."""
        self.z = self.h = self.watched = None
        self.scale = scale if len(self.suppressed) else None
        self.stands_for = 0

    def output_stayed(self) -> bool:
        """Whether h has the norm at the end of the pass that it had when it was put out."""
        assert self.h is not None
        assert self.watched is not None
        return torch.equal(_norm_of_itself(self.watched), self.h)

    def forward(self, z: Tensor, /) -> Tensor:
        """The projection's own forward, read on both sides."""
        # A clock cannot be traced, and `stands_for` must not become a guard: hence the order.
        timed = not torch.compiler.is_compiling() and self.stands_for > 0
        entered = time.perf_counter() if timed else 0.0
        only = self._meter.only
        read = z if only is None else z.flatten(0, -2).index_select(0, only)
        self.whole = read.numel() <= KEPT_WHOLE
        self.z = read if self.whole else read.index_select(-1, self.columns)
        if self.scale is not None:
            z = suppress(z, self.suppressed, self.scale)
        passed = time.perf_counter() if timed else 0.0
        h = self._inner(z)
        returned = time.perf_counter() if timed else 0.0
        if only is not None:
            h_read = h.flatten(0, -2).index_select(0, only)  # a copy: nobody writes into it
            self.h = h_read if self.whole else _norm_of_itself(h_read)
        elif self.whole and self._meter.output_stays:
            self.h = h
        else:
            self.h = _norm_of_itself(h)
            if self.whole and self._meter.output_stays is None:
                self.watched = h
        if timed:
            here = passed - entered + time.perf_counter() - returned
            self._meter.seconds_total += here * self.stands_for
        return h


def _norm_of_itself(h: Tensor) -> Tensor:
    """`[..., 1]` float32: the norm of `h`, in a form whose own norm it is."""
    return h_norm(h).unsqueeze(-1)


def _refuse_other_shape(probe: Probe, by_layer: dict[int, FFN]) -> None:
    """The probe's neurons must exist here, with the column norms that the probe was fitted on."""
    for number in sorted(set(probe.layer.tolist())):
        ffn = by_layer.get(number)
        if ffn is None:
            raise ProbeMismatchError(
                probe.id, "num_layers", expected=probe.card.model.num_layers, found=len(by_layer)
            )
        here = probe.layer == number
        columns = probe.neuron[here]
        if int(columns.max()) >= ffn.intermediate_size:
            raise ProbeMismatchError(
                probe.id,
                "intermediate_size",
                expected=probe.card.model.intermediate_size,
                found=ffn.intermediate_size,
            )
        norms = ffn.column_norms().cpu()[columns]
        if not torch.allclose(norms, probe.column_norm[here], rtol=1e-4, atol=0.0):
            raise ProbeMismatchError(
                probe.id,
                f"column_norm of layer {number}",
                expected=[round(x, 6) for x in probe.column_norm[here].tolist()[:4]],
                found=[round(x, 6) for x in norms.tolist()[:4]],
            )
