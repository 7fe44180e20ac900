"""The card says of a probe what holds for this one."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from offline.caveats import not_good_for
from probes.spans import Pooling

WINDOW = Pooling("max_window", 8)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("alias match; 1 sample(s) agree", "lists of accepted ones"),
        ("language model judge-8b, prompt 0a1b; 1 sample(s) agree", "another model said"),
        ("inference by nli@main; 1 sample(s) agree", "another model said"),
    ],
)
def test_the_labels_are_those_of_the_judge(judge: str, said: str) -> None:
    """A card that blames lists of accepted answers where a model judged sends its reader astray."""
    assert [said in sentence for sentence in not_good_for(judge, WINDOW)].count(True) == 1


def test_every_pooling_has_a_sentence_and_no_language_is_made_up() -> None:
    kinds = get_args(get_type_hints(Pooling)["kind"])
    said = {kind: not_good_for("alias match", Pooling(kind)) for kind in kinds}
    assert len(set(said.values())) == len(kinds)
    assert not any("English" in sentence for sentences in said.values() for sentence in sentences)
