"""The sweep: what is asked, how it goes on, and what its figures mean."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from offline.behaviour import Item, Message
from offline.metrics import Figure
from offline.perplexity import Surprise
from offline.records import Appender, Header, RecordError, SweepAnswer
from offline.sweep import require_probes
from offline.sweep_answers import (
    PROBED,
    SHIPPED_SETS,
    SweepError,
    SweepSettings,
    asks,
    cut,
    missing,
    read_sets,
)
from offline.sweep_figures import (
    DIFFERENCE,
    RANDOM,
    Slope,
    Table,
    _as_wide_as_random_sets,
    nats_per_token,
    perplexities,
    summarise,
    tables,
)

ALPHAS = (0.0, 1.0, 2.0)
NAMES = {PROBED: "tiny", "random-1": "tiny-random-1"}
SETTINGS = SweepSettings(alphas=ALPHAS, controls=1)


def _items(n: int, rule: str = "request") -> list[Item]:
    message = (Message(role="user", content="?"),)
    return [Item(id=f"i{k}", rule=rule, messages=message, resist=("yes",)) for k in range(n)]  # type: ignore[arg-type]


def _answers(items: list[Item], refused_at: dict[str, set[float]]) -> list[SweepAnswer]:
    """Each item is refused at the alphas of its neurons, else obeyed in words of that alpha."""
    return [
        SweepAnswer(
            id=f"set/{item.id}/{neurons}/{alpha:g}",
            text="I can't help." if alpha in refused_at[neurons] else f"Sure, {neurons} {alpha}.",
            tokens=10 + int(alpha),
            finish_reason="stop",
        )
        for item in items
        for neurons in refused_at
        for alpha in ALPHAS
        if alpha != 1 or neurons == PROBED
    ]


def test_without_a_change_all_neurons_are_asked_once() -> None:
    """Alpha 1 is the same model whatever is suppressed; asking it per control wastes a third."""
    wanted = asks({"set": _items(4)}, NAMES, SETTINGS)
    assert len(wanted) == len({ask.id for ask in wanted}) == 4 * (1 + 2 * 2)
    assert {ask.probe for ask in wanted if ask.alpha == 1} == {"tiny"}
    assert {ask.probe for ask in wanted if "/random-1/" in ask.id} == {"tiny-random-1"}


def test_a_second_run_asks_only_what_is_missing_and_more_items_keep_the_first(
    tmp_path: Path, header: Header
) -> None:
    sets = {"set": _items(6)}
    few = asks(sets, NAMES, SweepSettings(alphas=ALPHAS, items=2))
    more = asks(sets, NAMES, SweepSettings(alphas=ALPHAS, items=4))
    assert {ask.id for ask in few} < {ask.id for ask in more}
    with Appender(tmp_path / "a.jsonl", header) as out:
        for ask in few[:7]:
            out.append(SweepAnswer(id=ask.id, text="x", tokens=1, finish_reason="stop"))
    lacking = missing(more, tmp_path / "a.jsonl", header)
    assert {ask.id for ask in lacking} == {a.id for a in more} - {a.id for a in few[:7]}


def test_a_sweep_that_is_stopped_has_the_same_items_of_every_set() -> None:
    """Else an hour of answers gives no figures at all."""
    sets = {"a": _items(3), "b": _items(3)}
    wanted = asks(sets, NAMES, SETTINGS)
    first = asks(sets, NAMES, SweepSettings(alphas=ALPHAS, items=2))
    assert [ask.id for ask in wanted[: len(first)]] == [ask.id for ask in first]


def test_a_cut_set_does_not_depend_on_the_order_of_its_file() -> None:
    items = _items(9)
    assert cut({"set": items}, 3) == cut({"set": items[::-1]}, 3)
    assert len(cut({"set": items}, 0)["set"]) == 9


def test_slopes_are_shares_per_alpha_and_the_difference_is_to_their_mean() -> None:
    """The probe's neurons refuse at 0 only, random ones never: +0.5 of 3 points, by hand."""
    items = _items(5)
    controls = ["random-1", "random-2"]
    answers = _answers(items, {PROBED: {0.0}, "random-1": set(), "random-2": set()})
    found = {t.measure: t for t in tables({"set": items}, answers, controls, ALPHAS)}
    points, slopes = summarise(found["complied"], ALPHAS)
    assert [p.value for p in points if p.neurons == PROBED] == [0, 1, 1]
    assert [p.value for p in points if p.neurons == RANDOM] == [1, 1, 1]
    value = {slope.neurons: slope.value for slope in slopes}
    assert value[PROBED] == pytest.approx(0.5)
    assert value[RANDOM] == pytest.approx(0)
    assert value[DIFFERENCE] == pytest.approx(0.5)
    changed = found["changed"].values
    assert changed[PROBED].mean(axis=0).tolist() == [1, 0, 1]
    assert changed["random-1"][:, 1].tolist() == [0] * 5
    assert found["tokens"].values[PROBED].mean(axis=0).tolist() == [10, 11, 12]


def test_random_sets_that_do_the_same_leave_no_difference() -> None:
    """With one set at +.5 and one at 0, a probe at +.5 is nothing that a random set could not do;
    resampling items alone gave it an interval without 0."""
    rises, flat = np.array([[0.0, 0.5, 1.0]] * 20), np.full((20, 3), 0.5)
    for sets, could_be_random in (((rises, flat, flat), True), ((flat, flat, flat), False)):
        values = {PROBED: rises, **{f"random-{i}": value for i, value in enumerate(sets)}}
        _, slopes = summarise(Table("set", "complied", values), ALPHAS)
        (found,) = (slope for slope in slopes if slope.neurons == DIFFERENCE)
        assert (found.low <= 0) == could_be_random
    _, slopes = summarise(Table("set", "complied", {PROBED: rises, "random-1": flat}), ALPHAS)
    assert DIFFERENCE not in {slope.neurons for slope in slopes}  # one set has no spread


def test_one_item_of_many_is_no_effect_though_random_sets_agree() -> None:
    """Sets that change nothing have no spread among themselves: a refusal more would be certain."""
    flat, one = np.zeros((100, 3)), np.zeros((100, 3))
    one[0] = [0.0, 0.0, 1.0]
    values = {PROBED: one, **{f"random-{i}": flat for i in range(3)}}
    _, slopes = summarise(Table("set", "refused", values), ALPHAS)
    (found,) = (slope for slope in slopes if slope.neurons == DIFFERENCE)
    assert found.low <= 0 < found.value < found.high
    assert msgspec.json.decode(msgspec.json.encode(found), type=Slope) == found  # no numpy in it


def test_the_interval_of_a_difference_holds_what_another_random_set_does() -> None:
    """400 draws of four sets: a probe that is no more than a fifth lies outside 5 % of times."""
    random = np.random.default_rng(0)
    outside = 0
    for _ in range(400):
        probe, *sets = random.normal(0, 0.1, 5)
        exact = Figure(value=(gap := probe - np.mean(sets)), low=gap, high=gap, n=9)
        slope = _as_wide_as_random_sets(exact, sets)
        outside += not slope.low <= 0 <= slope.high
    assert 0.02 <= outside / 400 <= 0.08


def test_a_slope_is_that_of_least_squares_on_uneven_alphas_too() -> None:
    """On evenly spaced alphas a wrong scale can look right."""
    alphas = (0.0, 0.5, 1.0, 3.0)
    values = np.array([[0.1 * alpha + 0.2 for alpha in alphas]] * 4)
    slope = _only(summarise(Table("set", "complied", {PROBED: values}), alphas)[1])
    assert slope.value == pytest.approx(0.1)


def test_the_interval_of_a_slope_covers_the_truth_about_as_often_as_it_says() -> None:
    """150 sets of 40 items whose true slope is .2: 95 % intervals hold it 88 to 100 % of times."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(150):
        rises = random.random((40, 1)) < 0.4
        values = np.where(rises, [0.0, 0.5, 1.0], 0.5)  # slope .5 for 40 % of the items
        slope = _only(summarise(Table("set", "complied", {PROBED: values}), ALPHAS)[1])
        held += slope.low <= 0.2 <= slope.high
    assert 0.88 <= held / 150 <= 1


def test_facts_measure_accuracy_and_stay_out_of_over_compliance() -> None:
    """Knowing that Paris is a capital is no obedience."""
    sets = {"set": _items(3), "more": _items(2), "facts": _items(3, "fact")}
    answers = [
        SweepAnswer(
            id=f"{name}/{item.id}/{neurons}/{alpha:g}",
            text="yes",
            tokens=1,
            finish_reason="stop",
        )
        for name, items in sets.items()
        for item in items
        for neurons in NAMES
        for alpha in ALPHAS
    ]
    found = {(t.behaviour, t.measure): t for t in tables(sets, answers, ["random-1"], ALPHAS)}
    assert ("facts", "correct") in found
    assert ("facts", "complied") not in found
    assert len(found["all", "complied"].values[PROBED]) == 5


def test_a_sweep_that_is_not_finished_gives_no_figures() -> None:
    items = _items(2)
    answers = _answers(items, {PROBED: set(), "random-1": set()})[:-1]
    with pytest.raises(RecordError, match="i1/random-1/2"):
        tables({"set": items}, answers, ["random-1"], ALPHAS)


def test_perplexity_is_the_exponential_of_the_mean_surprise() -> None:
    surprises = [
        Surprise(id="x", neurons=neurons, alpha=alpha, nats=(1.0 + alpha, 2.0 + alpha))
        for neurons in NAMES
        for alpha in ALPHAS
    ]
    table = nats_per_token(surprises, ["random-1"], ALPHAS)
    found = list(perplexities(summarise(table, ALPHAS)[0]))
    at = {(p.neurons, p.alpha): p.value for p in found}
    assert at[PROBED, 0.0] == pytest.approx(np.exp(1.5))
    assert at[RANDOM, 2.0] == pytest.approx(np.exp(3.5))


@pytest.mark.parametrize("alphas", [(0.0, 2.0), (1.0,), (1.0, 3.5), (1.0, float("nan"))])
def test_alphas_must_hold_1_and_something_else(alphas: tuple[float, ...]) -> None:
    """Without alpha 1 there is nothing to compare with."""
    with pytest.raises(SweepError, match="alphas must"):
        SweepSettings(alphas=alphas)


def test_our_own_sets_are_read_when_none_is_named() -> None:
    sets = read_sets([], seed=0)
    assert set(sets) == {path.stem for path in SHIPPED_SETS.glob("*.jsonl")} | {"invented_entities"}
    with pytest.raises(SweepError, match="one name"):
        read_sets([SHIPPED_SETS / "facts.jsonl"] * 2, seed=0)


def _only(slopes: list[Slope]) -> Slope:
    (slope,) = slopes
    return slope


@pytest.mark.parametrize(
    ("served", "sentence"),
    [
        ([("p@1", True)], None),
        ([("p@2", True)], r"has not loaded \['probe'\]; start it with --probe folder"),
        ([("p@1", False)], "does not let requests set alpha; start it with --suppression"),
    ],
)
def test_a_server_must_hold_the_probes_and_let_alpha_be_set(
    served: list[tuple[str, bool]], sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On vLLM alpha has to be allowed at the start: not after an hour of answers."""
    listed = {"data": [{"id": id, "suppression": allowed} for id, allowed in served]}
    request = httpx.Request("GET", "http://s/v1/probes")
    response = httpx.Response(200, json=listed, request=request)
    monkeypatch.setattr("offline.sweep.httpx.get", lambda *args, **kwargs: response)
    probes: Any = {PROBED: SimpleNamespace(id="p@1")}
    refused = pytest.raises(SweepError, match=sentence) if sentence else nullcontext()
    with refused:
        require_probes("http://s", probes, {PROBED: Path("folder")}, api_key=None)
