"""The answers of a sweep: every item of every behaviour set under every alpha and set of neurons.

Asked over HTTP of a server that has the probe and its controls loaded, through the request field
that anybody may set (`risk.alpha`); greedy, so an answer can be had again. Each is on disk before
the next one counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
from tqdm import tqdm

from offline.behaviour import Item, read_items
from offline.chat_client import ChatClient, at_most, connect
from offline.invented import invented_items
from offline.models import LoadedTokenizer
from offline.questions import shuffle_key
from offline.records import Appender, Header, SweepAnswer, read_records, versions
from probes.errors import HNeuronsError
from probes.probe import Probe

SHIPPED_SETS = Path(__file__).parent / "data" / "behaviour"
INVENTED = "invented_entities"
INVENTED_ITEMS = 48
PROBED = "probe"  # the suppression set of the probe itself, beside "random-1", "random-2", ..
NO_CHANGE = 1.0  # alpha that leaves the model alone: asked once, it counts for every set


class SweepError(HNeuronsError):
    """The server lacks a probe of the sweep, or the answers are not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is asked, and under which alphas."""

    alphas: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 3.0)
    controls: int = 3  # random suppression sets
    items: int = 0  # per behaviour set, at most; 0: all
    max_tokens: int = 48
    seed: int = 0  # of the invented names and the random neurons; answers are greedy

    def __post_init__(self) -> None:
        if NO_CHANGE not in self.alphas or len(set(self.alphas)) < 2:
            raise SweepError(f"alphas must hold 1 and at least one other, not {self.alphas}")
        if not all(0 <= alpha <= 3 for alpha in self.alphas):
            raise SweepError(f"alphas must lie in [0, 3], not {self.alphas}")


class Ask(NamedTuple):
    """One request. `probe` is the name under which the server has the neurons."""

    id: str
    item: Item
    probe: str
    alpha: float


def read_sets(paths: Sequence[Path], *, seed: int) -> dict[str, list[Item]]:
    """Behaviour set -> its items: the shipped ones and the invented when no path is given."""
    sets = {path.stem: read_items(path) for path in paths or sorted(SHIPPED_SETS.glob("*.jsonl"))}
    if not paths:
        sets[INVENTED] = invented_items(INVENTED_ITEMS, seed=seed)
    elif len(sets) < len(paths):
        raise SweepError("two behaviour sets have one name; rename a file")
    return sets


def cut(sets: Mapping[str, Sequence[Item]], most: int) -> dict[str, list[Item]]:
    """At most `most` items of each set (0: all), in an order that is not the file's."""
    return {
        name: sorted(items, key=lambda item: shuffle_key(item.id))[: most or None]
        for name, items in sets.items()
    }


def sweep_header(
    probe: Probe,
    sets: Mapping[str, Sequence[Item]],
    settings: SweepSettings,
    *,
    model_id: str,
    tokenizer: LoadedTokenizer,
) -> Header:
    """Header of the answers. How many items, alphas and controls is no setting: a run may go on to
    ask more. `sets` are whole."""
    return Header(
        kind="sweep",
        model_id=model_id,
        model_revision=tokenizer.revision,
        tokenizer_sha256=tokenizer.tokenizer_sha256,
        chat_template_sha256=tokenizer.chat_template_sha256,
        settings={
            "probe": probe.id,
            "seed": str(settings.seed),
            "max_tokens": str(settings.max_tokens),
            **{f"set {name}": _digest(items) for name, items in sorted(sets.items())},
        },
        libraries=versions(),
    )


def asks(
    sets: Mapping[str, Sequence[Item]], names: Mapping[str, str], settings: SweepSettings
) -> list[Ask]:
    """Every request of the sweep, the first item of every set before the second of any: a sweep
    that is stopped can be summed up with fewer items.

    names  neurons ("probe", "random-1", ..) -> name of the probe on the server
    """
    chosen = cut(sets, settings.items)
    most = max(map(len, chosen.values()))
    return [
        Ask(f"{name}/{items[rank].id}/{neurons}/{alpha:g}", items[rank], names[neurons], alpha)
        for rank in range(most)
        for name, items in sorted(chosen.items())
        if rank < len(items)
        for neurons, alpha in conditions(names, settings.alphas)
    ]


def conditions(neurons: Iterable[str], alphas: Sequence[float]) -> list[tuple[str, float]]:
    """`(neurons, alpha)`; without a change all suppression sets are one."""
    changed = [(name, alpha) for name in neurons for alpha in alphas if alpha != NO_CHANGE]
    return [(PROBED, NO_CHANGE), *changed]


def missing(wanted: Sequence[Ask], path: Path, header: Header) -> list[Ask]:
    """What `path` does not hold yet; repairs the tail of a killed run."""
    with Appender(path, header):
        done = {answer.id for answer in read_records(path, SweepAnswer)[1]}
    return [ask for ask in wanted if ask.id not in done]


async def ask_all(
    wanted: Sequence[Ask],
    path: Path,
    *,
    base_url: str,
    header: Header,
    settings: SweepSettings,
    in_flight: int,
    done: int,
    api_key: str | None = None,
    trust_env: bool = True,
) -> None:
    """Append an answer to `path` for each of `wanted`; `done` are there already."""
    with Appender(path, header) as out:
        async with connect(
            base_url,
            in_flight=in_flight,
            api_key=api_key,
            like=header.model_id,
            trust_env=trust_env,
        ) as client:
            with tqdm(total=done + len(wanted), initial=done, unit="answer", desc="sweep") as bar:
                async for answer in at_most(
                    in_flight, wanted, lambda ask: _answer(client, ask, settings)
                ):
                    out.append(answer)
                    bar.update()


async def _answer(client: ChatClient, ask: Ask, settings: SweepSettings) -> SweepAnswer:
    body: dict[str, object] = {
        "messages": [msgspec.to_builtins(message) for message in ask.item.messages],
        "max_tokens": settings.max_tokens,
        "temperature": 0.0,
        "return_token_ids": True,
        "risk": {"probe": ask.probe, "alpha": ask.alpha, "tokens": False},
    }
    completion = await client.complete(body, name=ask.id)
    choice = completion.choices[0]
    if completion.text is None or not choice.token_ids:
        raise SweepError(f"{ask.id}: the server returned no text or no token ids")
    applied = (choice.risk or {}).get("alpha")
    if applied != ask.alpha:
        raise SweepError(f"{ask.id}: the server applied alpha {applied}, not {ask.alpha}")
    return SweepAnswer(
        id=ask.id,
        text=completion.text,
        tokens=len(choice.token_ids),
        finish_reason=choice.finish_reason,
    )


def _digest(items: Sequence[Item]) -> str:
    lines = sorted(msgspec.json.encode(item) for item in items)
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]
