"""sweep.json: what the answers and perplexities of a sweep say, with intervals resampled by item.

One behaviour set, one measure and one set of neurons make a matrix `[items, alphas]`; a point is a
column's mean, a slope the mean of the rows' least-squares slopes. All neurons are resampled by the
same items. That says nothing about the draw of random neurons, so the interval of their difference
to the probe also holds what one more random set could have done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

from offline.behaviour import Item, verdict
from offline.metrics import Figure, Floats
from offline.perplexity import Surprise
from offline.records import Header, Record, RecordError, SweepAnswer, read_record, write_atomic
from offline.sweep_answers import NO_CHANGE, PROBED
from probes.probe import Probe

RESAMPLES = 2000
RANDOM = "random"  # mean over the controls
DIFFERENCE = "probe - random"
OVER_COMPLIANCE = "all"  # every behaviour set but the facts, item by item
EXAMPLES = 2  # items per set that are shown

COMPLIANCE = ("complied", "refused", "changed", "tokens", "cut")
ACCURACY = ("correct", "refused", "changed", "tokens", "cut")


class Point(Record, frozen=True, kw_only=True):
    """Mean of a measure at one alpha, with its 95 % interval."""

    behaviour: str
    measure: str  # complied, refused, changed, correct, cut: shares; tokens; perplexity
    neurons: str  # probe, random-1, .., random
    alpha: float
    value: float
    low: float
    high: float
    n: int


class Slope(Record, frozen=True, kw_only=True):
    """Change of a measure per unit of alpha, with its 95 % interval; of "probe - random", see
    `_as_wide_as_random_sets`."""

    behaviour: str
    measure: str
    neurons: str  # probe, random-1, .., random, probe - random
    value: float
    low: float
    high: float
    n: int


class Example(Record, frozen=True, kw_only=True):
    """What the model said to one item, and how that was read."""

    behaviour: str
    asked: str
    neurons: str
    alpha: float
    verdict: str
    text: str


class SweepFigures(Record, frozen=True, kw_only=True):
    """The dose-response of one probe, and its conditions."""

    probe: str
    model_id: str
    suppressed: int  # neurons in the suppression set, as many in each control
    layers: int  # that they lie in
    controls: tuple[str, ...]
    alphas: tuple[float, ...]
    settings: dict[str, str]  # of the answers: token limit, seed, digests of the sets
    points: tuple[Point, ...]
    slopes: tuple[Slope, ...]
    examples: tuple[Example, ...]

    @classmethod
    def load(cls, path: Path) -> SweepFigures:
        return read_record(path, cls)

    def save(self, path: Path) -> None:
        write_atomic(path, msgspec.json.encode(self))


def make_figures(
    header: Header,
    sets: Mapping[str, Sequence[Item]],
    answers: Sequence[SweepAnswer],
    surprises: Sequence[Surprise],
    *,
    probes: Mapping[str, Probe],
    alphas: Sequence[float],
) -> SweepFigures:
    """All figures of the sweep. `probes` holds the probe and its controls by their short names."""
    probe, controls = probes[PROBED], tuple(name for name in probes if name != PROBED)
    points: list[Point] = []
    slopes: list[Slope] = []
    for table in tables(sets, answers, controls, alphas):
        more_points, more_slopes = summarise(table, alphas)
        points += more_points
        slopes += more_slopes
    of_prose = nats_per_token(surprises, controls, alphas)
    of_nats, more_slopes = summarise(of_prose, alphas)
    points += perplexities(of_nats)
    slopes += more_slopes
    return SweepFigures(
        probe=probe.id,
        model_id=header.model_id,
        suppressed=int(probe.suppress.sum()),
        layers=len(set(probe.layer[probe.suppress].tolist())),
        controls=controls,
        alphas=tuple(alphas),
        settings=header.settings,
        points=tuple(points),
        slopes=tuple(slopes),
        examples=tuple(examples(sets, answers, controls, alphas)),
    )


class Table(NamedTuple):
    """One measure of one behaviour set: neurons -> `[items, alphas]`."""

    behaviour: str
    measure: str
    values: dict[str, Floats]


def tables(
    sets: Mapping[str, Sequence[Item]],
    answers: Sequence[SweepAnswer],
    controls: Sequence[str],
    alphas: Sequence[float],
) -> list[Table]:
    """Every set's measures, and those of all over-compliance sets together.

    RecordError when an answer is missing: the sweep was not run to its end.
    """
    by_id = {answer.id: answer for answer in answers}
    made: list[Table] = []
    for name, items in sorted(sets.items()):
        measures = ACCURACY if all(item.rule == "fact" for item in items) else COMPLIANCE
        kept: dict[str, dict[str, Floats]] = {measure: {} for measure in measures}
        for neurons in (PROBED, *controls):
            rows = np.array([list(_measured(name, i, neurons, alphas, by_id)) for i in items])
            for column, measure in enumerate(measures):
                kept[measure][neurons] = rows[:, :, column]
        made += [Table(name, measure, values) for measure, values in kept.items()]
    return made + list(_together(made, controls))


def summarise(table: Table, alphas: Sequence[float]) -> tuple[list[Point], list[Slope]]:
    """Points and slopes of one table."""
    values = dict(table.values)
    random = [value for neurons, value in values.items() if neurons != PROBED]
    if random:
        values[RANDOM] = np.mean(random, axis=0)
    weights = _weights(len(values[PROBED]))
    across = np.asarray(alphas) - np.mean(alphas)
    across /= (across**2).sum()
    points = [
        _point(table.behaviour, table.measure, neurons, alpha, _interval(value[:, i], weights))
        for neurons, value in values.items()
        for i, alpha in enumerate(alphas)
    ]
    by_item = {neurons: value @ across for neurons, value in values.items()}
    slopes = [
        _slope(table, neurons, _interval(slope, weights)) for neurons, slope in by_item.items()
    ]
    sets = [float(by_item[neurons].mean()) for neurons in table.values if neurons != PROBED]
    if len(sets) > 1:
        of_items = _interval(by_item[PROBED] - by_item[RANDOM], weights)
        slopes.append(_slope(table, DIFFERENCE, _as_wide_as_random_sets(of_items, sets)))
    return points, slopes


def _as_wide_as_random_sets(difference: Figure, sets: Sequence[float]) -> Figure:
    """`difference`, of the probe's slope to the mean of the random sets' and resampled by item,
    with an interval that also holds where the difference of one more random set would lie (95 %,
    Student's prediction interval): with 0 in it, the items or the draw of neurons may have made it.

    sets: one slope each. Three leave two degrees of freedom, and wide intervals: that is what three
    sets can say.
    """
    count = len(sets)
    spread = np.std(sets, ddof=1) * np.sqrt(1 + 1 / count)
    reach = float(stats.t.ppf(0.975, count - 1) * spread)
    return difference._replace(
        low=min(difference.low, difference.value - reach),
        high=max(difference.high, difference.value + reach),
    )


def nats_per_token(
    surprises: Sequence[Surprise], controls: Sequence[str], alphas: Sequence[float]
) -> Table:
    """Of fixed prose, paragraph by paragraph."""
    nats = {(s.neurons, s.alpha): np.array(s.nats) for s in surprises}
    for control in controls:
        nats[control, NO_CHANGE] = nats[PROBED, NO_CHANGE]
    return Table(
        "prose",
        "nats per token",
        {
            neurons: np.stack([nats[neurons, alpha] for alpha in alphas], axis=1)
            for neurons in (PROBED, *controls)
        },
    )


def perplexities(of_nats: Sequence[Point]) -> Iterator[Point]:
    """exp of the mean nats per token."""
    for point in of_nats:
        value, low, high = np.exp([point.value, point.low, point.high]).tolist()
        yield msgspec.structs.replace(point, measure="perplexity", value=value, low=low, high=high)


def examples(
    sets: Mapping[str, Sequence[Item]],
    answers: Sequence[SweepAnswer],
    controls: Sequence[str],
    alphas: Sequence[float],
) -> Iterator[Example]:
    """The first items of each set (in the order in which they are cut) at both ends and at 1."""
    by_id = {answer.id: answer for answer in answers}
    for name, items in sorted(sets.items()):
        for item in items[:EXAMPLES]:
            for neurons in (PROBED, *controls[:1]):
                for alpha in sorted({min(alphas), NO_CHANGE, max(alphas)}):
                    answer = by_id[_key(name, item, neurons, alpha)]
                    yield Example(
                        behaviour=name,
                        asked=" / ".join(message.content for message in item.messages),
                        neurons=neurons,
                        alpha=alpha,
                        verdict=verdict(item, answer.text),
                        text=answer.text,
                    )


def _measured(
    name: str,
    item: Item,
    neurons: str,
    alphas: Sequence[float],
    by_id: Mapping[str, SweepAnswer],
) -> Iterator[tuple[float, ...]]:
    """Per alpha: complied (or correct), refused, changed, tokens, cut."""
    before = _found(by_id, _key(name, item, PROBED, NO_CHANGE))
    for alpha in alphas:
        answer = _found(by_id, _key(name, item, neurons, alpha))
        said = verdict(item, answer.text)
        wanted = "resisted" if item.rule == "fact" else "complied"
        changed, is_cut = answer.text != before.text, answer.finish_reason == "length"
        yield said == wanted, said == "refused", changed, answer.tokens, is_cut


def _together(made: Sequence[Table], controls: Sequence[str]) -> Iterator[Table]:
    """All over-compliance sets in one, item by item."""
    over = {t.behaviour for t in made if t.measure == "complied"}
    for measure in COMPLIANCE if len(over) > 1 else ():
        parts = [t.values for t in made if t.behaviour in over and t.measure == measure]
        yield Table(
            OVER_COMPLIANCE,
            measure,
            {n: np.concatenate([part[n] for part in parts]) for n in (PROBED, *controls)},
        )


def _key(name: str, item: Item, neurons: str, alpha: float) -> str:
    neurons = PROBED if alpha == NO_CHANGE else neurons
    return f"{name}/{item.id}/{neurons}/{alpha:g}"


def _found(by_id: Mapping[str, SweepAnswer], key: str) -> SweepAnswer:
    if key not in by_id:
        raise RecordError(f"the sweep has no answer {key!r}; run `sweep` again to go on with it")
    return by_id[key]


def _weights(n: int) -> NDArray[np.float64]:
    """`[resamples, items]` share of each item in each resample."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def _interval(values: Floats, weights: Floats) -> Figure:
    low, high = np.quantile(weights @ values, (0.025, 0.975))
    return Figure(float(values.mean()), float(low), float(high), len(values))


def _point(behaviour: str, measure: str, neurons: str, alpha: float, figure: Figure) -> Point:
    return Point(
        behaviour=behaviour,
        measure=measure,
        neurons=neurons,
        alpha=alpha,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        n=figure.n,
    )


def _slope(table: Table, neurons: str, figure: Figure) -> Slope:
    return Slope(
        behaviour=table.behaviour,
        measure=table.measure,
        neurons=neurons,
        value=figure.value,
        low=figure.low,
        high=figure.high,
        n=figure.n,
    )
