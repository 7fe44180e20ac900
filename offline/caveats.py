"""What a probe is not good for: sentences of its card, by how it was made."""

from __future__ import annotations

from probes.spans import Pooling

_RESPONSE = {
    "max_window": "The score of a whole response is that of its worst window; a wrong claim inside "
    "a long answer is diluted there, and the tokens show more.",
    "max": "The score of a whole response is that of its worst token: the longer it is, the more "
    "likely one is flagged by chance.",
    "first": "The score of a whole response is that of its first token; what follows is not in it.",
    "last": "The score of a whole response is that of its last token; what stands before it is in "
    "it only as far as the model carries it along.",
    "mean": "The score of a whole response is the mean over its tokens; in a long one a wrong "
    "claim does not show.",
}
_LISTS = (
    "The labels come from comparing answers with lists of accepted ones. Where several answers are "
    "true the lists often know one, so some right answers were learned as wrong."
)
_MODELS = "The labels are what another model said of the answers; where it errs, so does the probe."


def not_good_for(judge: str, pooling: Pooling) -> tuple[str, ...]:
    """`judge` as the card names it: a rule that compares, or a model."""
    return (
        "It is no fact checker: it estimates from a few neurons whether the model makes an answer "
        "up. A confident error can get a low risk and a correct rare fact a high one.",
        "It was fitted on short answers (one claim each) to the questions of its sources, in their "
        "language, and on ordinary prose. Facts inside long answers were measured on texts of "
        "others alone (rows 'given text', where there are any); mathematics, reasoning and text "
        "about a given document were not measured. What it flags of text in other languages is "
        "known only where a row says so, and can be several times as much.",
        "Between a wrong and a right claim of the same form it tells less than between claims and "
        "everything else; compare the rows of tokens.",
        _LISTS if " match" in judge else _MODELS,
        "A risk is a probability for the mixture that it was calibrated on (see below), in which "
        "wrong answers are frequent. Where they are rarer, the true rate behind a risk is lower; "
        "go by the false-positive rates of the operating points.",
        _RESPONSE[pooling.kind],
        "It belongs to exactly the weights, the tokenizer and the chat template that it names: "
        "fine-tunes, adapters and quantised copies need a probe of their own.",
        "Between domains it loses much of its edge; see the rows of sources it was not fitted on.",
        "Scaling its neurons (alpha) changes how readily the model complies, not what it knows. It "
        "repairs no hallucinations, and risks at alpha other than 1 are not calibrated.",
    )
