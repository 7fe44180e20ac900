"""What every answer must be, whichever engine wrote it; streamed and whole in one shape.

The invariants by their numbers in design.md, section 6.
"""

from __future__ import annotations

from server.api.answers import ChatCompletion, ChatCompletionChunk
from server.policy import WITHHELD


def joined(chunks):
    """The whole answer that the chunks of a stream add up to."""
    choices, usage = {}, None
    for chunk in chunks:
        assert "error" not in chunk, chunk
        ChatCompletionChunk.model_validate(chunk)
        if not chunk["choices"]:
            assert usage is None, "usage comes once"
            usage = chunk["usage"]
            continue
        assert usage is None, "usage is the last chunk"
        (choice,) = chunk["choices"]
        whole = choices.setdefault(
            choice["index"],
            {
                "text": "",
                "reasoning": "",
                "calls": [],
                "tokens": [],
                "logprobs": [],
                "ids": [],
                "risk": None,
                "finish": None,
            },
        )
        assert whole["finish"] is None, "I8: nothing comes after the terminal event of a choice"
        whole["text"] += choice["delta"].get("content", "")
        whole["reasoning"] += choice["delta"].get("reasoning", "")
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(whole["calls"])
                whole["calls"].append([call["function"]["name"], ""])
            whole["calls"][call["index"]][1] += call["function"]["arguments"]
        risk = choice.get("risk")
        if risk is not None:
            whole["tokens"] += risk["tokens"]
            whole["risk"] = risk if "status" in risk else whole["risk"]
        whole["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
        whole["ids"] += choice.get("token_ids", [])
        whole["finish"] = choice["finish_reason"]
    assert all(choice["finish"] is not None for choice in choices.values()), "I8"
    for choice in choices.values():
        if choice["risk"] is not None:
            choice["risk"] = {**choice["risk"], "tokens": choice.pop("tokens")}
    return [choices[i] for i in sorted(choices)], usage


def flattened(answer):
    """The same shape, from an answer that was not streamed."""
    ChatCompletion.model_validate(answer)
    choices = []
    for i, choice in enumerate(answer["choices"]):
        assert choice["index"] == i
        flat = {
            "text": choice["message"]["content"] or "",
            "reasoning": choice["message"].get("reasoning") or "",
            "calls": [
                [call["function"]["name"], call["function"]["arguments"]]
                for call in choice["message"].get("tool_calls", [])
            ],
            "logprobs": (choice["logprobs"] or {"content": []})["content"],
            "ids": choice.get("token_ids", []),
            "risk": choice.get("risk"),
            "finish": choice["finish_reason"],
        }
        choices.append(flat if flat["risk"] is not None else {**flat, "tokens": []})
    return choices, answer["usage"]


def field_of(entry):
    """The field that the offsets of a token or a span point into."""
    return entry["segment"], entry.get("tool_call_index")


def check_choice(choice):
    """I9, I10 and what a client may rely on inside one choice."""
    text, risk = choice["text"], choice["risk"]
    tokens, withheld = risk["tokens"], text == WITHHELD
    for token in tokens:
        assert token["risk"] is None or 0 <= token["risk"] <= 1
    assert sum(risk["unscored"].values()) == sum(token["risk"] is None for token in tokens)
    assert set(risk["unscored"]) <= {"not_read", "nonfinite"}
    if withheld:
        assert choice["finish"] == "content_filter"
        assert all(token["token"] == "" and token["token_id"] is None for token in tokens)
        assert choice["logprobs"] == choice["ids"] == risk["spans"] == []
        return
    fields = {("content", None): text, ("reasoning", None): choice["reasoning"]}
    fields |= {("tool_call", i): arguments for i, (_, arguments) in enumerate(choice["calls"])}
    ends = dict.fromkeys(fields, 0)
    for token in tokens:
        field, start, end = field_of(token), token["start"], token["end"]
        assert start == ends[field], "I10: no gap, no repetition"
        assert fields[field][start:end] == token["token"]
        ends[field] = end
    assert ends == {field: len(shown) for field, shown in fields.items()}
    visible = [token for token in tokens if token["token"] and token["segment"] != "reasoning"]
    scored = [token for token in visible if token["risk"] is not None]
    assert risk["status"] == (
        "unavailable" if not scored else "scored" if len(scored) == len(visible) else "partial"
    )
    assert (risk["score"] is None) == (risk["flagged"] is None) == (not scored)
    assert (risk["reason"] is None) == (risk["status"] == "scored")
    flagged = [
        t["token"] for t in tokens if t["token"] and (t["risk"] or -1) >= risk["token_threshold"]
    ]
    assert "".join(span["text"] for span in risk["spans"]) == "".join(flagged)
    for span in risk["spans"]:
        assert fields[field_of(span)][span["start"] : span["end"]] == span["text"]
        assert 0 <= span["risk"] <= 1  # a scale of its own: it may lie below the tokens' threshold
    assert risk["calibrated"] == (risk["alpha"] == 1)
    if choice["logprobs"]:
        assert [entry["risk"] for entry in choice["logprobs"]] == [t["risk"] for t in tokens]
    if choice["ids"]:
        assert choice["ids"] == [token["token_id"] for token in tokens]


async def both_ways(wire, text, **fields):
    """I1, I2: choices that are the same streamed and whole, and account for every token."""
    answer = await wire.chat(text, **fields)
    assert answer.status_code == 200, answer.text
    choices, usage = flattened(answer.json())
    chunks = await wire.chunks(text, stream_options={"include_usage": True}, **fields)
    assert (choices, usage) == joined(chunks)
    assert usage["completion_tokens"] == sum(len(c["risk"]["tokens"]) for c in choices)
    for choice in choices:
        check_choice(choice)
    return choices
