"""Text from tokens, one at a time: never half a character, never one too few."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.detokenizer import Detokenizer, TokenNames, decode
from server.engines.fake_model import EOS, IM_END, VOCAB_SIZE, fake_tokenizer

SAMPLE = ["The answer is 42. naïve café — 日本語のテキスト 😀 😆 🙂 🚀 👩‍👩‍👧 ok\n\n"] * 3
REPLACEMENT = "\ufffd"


def byte_level_with_merges() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and SmolLM2: words, and pieces of characters with a space before them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: a word carries the space before it, rare characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzHW,.!", "\u2581H", "He", "\u2581He", "ll"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "H"), ("H", "e"), ("\u2581H", "e"), ("l", "l")]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


BYTES, MERGED, SENTENCEPIECE = fake_tokenizer(), byte_level_with_merges(), sentencepiece_like()
TOKENIZERS = {"bytes": BYTES, "merged": MERGED, "sentencepiece": SENTENCEPIECE}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def pieces(tokenizer, ids, prompt=()):
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token_id) for token_id in ids]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_a_character_belongs_to_the_token_that_completes_it():
    """Half a character shown is U+FFFD on the screen, and offsets that are wrong from there on."""
    ids = ids_of(BYTES, "é😀x")
    assert pieces(BYTES, ids) == ["", "é", "", "", "", "😀", "x"]


@each_tokenizer
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_any_text_comes_back_whole(tokenizer, text):
    """A lost or doubled character shifts every span after it."""
    ids = ids_of(tokenizer, text)
    found = pieces(tokenizer, ids)
    assert "".join(found) == decode(tokenizer, ids)
    assert not any(REPLACEMENT in piece for piece in found)


@each_tokenizer
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer, data):
    """Sampled tokens need not be sound UTF-8; the text must still be that of the tokens."""
    size = len(tokenizer)
    byte_tokens = st.integers(3, 258)  # the byte-fallback range, a mix of bytes elsewhere
    ids = data.draw(st.lists(st.integers(0, size - 1) | byte_tokens, max_size=40))
    found = "".join(pieces(tokenizer, ids))
    whole = decode(tokenizer, ids)
    if tokenizer is SENTENCEPIECE and REPLACEMENT in whole:
        # Of a run of byte tokens that is not sound its decoder replaces every byte, those of whole
        # characters included, which were shown already and stay. There is nothing to compare.
        return
    assert found == whole.rstrip(REPLACEMENT)


@given(text=st.text(min_size=1, max_size=20), cut=st.integers(0, 80))
def test_an_unfinished_character_at_the_end_is_dropped_and_nothing_else(text, cut):
    """max_tokens may end inside an emoji; the text before it must not go with it."""
    try:
        ids = list(text.encode())[:cut]
    except UnicodeEncodeError:
        return
    assert "".join(pieces(BYTES, ids)) == bytes(ids).decode(errors="ignore")


def test_text_before_an_unfinished_character_in_the_same_token_is_shown():
    """A space is often merged with the first bytes of an emoji: DecodeStream would swallow it."""
    names = TokenNames(MERGED)
    token_id = next(i for i in range(len(MERGED)) if names.utf8(i) == " 😀".encode()[:3])
    assert pieces(MERGED, [*ids_of(MERGED, "ok"), token_id])[-1] == " "


@each_tokenizer
def test_special_tokens_are_hidden(tokenizer):
    """The end of the turn is a token with an entry, never text."""
    end = tokenizer.eos_token_id
    ids = ids_of(tokenizer, "Hello")
    found = pieces(tokenizer, [*ids, end, *ids_of(tokenizer, "x"), end])
    assert found[len(ids)] == found[-1] == ""
    assert "Hello" in "".join(found)


def test_after_a_prompt_a_sentencepiece_word_keeps_its_space():
    """Without the prompt the decoder takes the first word for the beginning of the text."""
    prompt = ids_of(SENTENCEPIECE, "Hello Hello Hello")
    ids = ids_of(SENTENCEPIECE, "Hello Hello")
    assert "".join(pieces(SENTENCEPIECE, ids, prompt)) == " Hello Hello"
    assert "".join(pieces(SENTENCEPIECE, ids)) == "Hello Hello"


@each_tokenizer
@given(prompt=st.text("aHe 日😀\n", max_size=40), answer=st.text("aHe 日😀\n", max_size=40))
def test_prompt_and_answer_join_without_a_seam(tokenizer, prompt, answer):
    """What the answer adds is what decoding both together adds."""
    before, after = ids_of(tokenizer, prompt), ids_of(tokenizer, answer)
    joined = decode(tokenizer, [*before, *after])
    found = "".join(pieces(tokenizer, after, before))
    assert joined.endswith(found)
    assert joined[: len(joined) - len(found)].strip() == decode(tokenizer, before).strip()


def test_a_prompt_may_end_inside_a_character():
    """Token ids as prompt can be cut anywhere; the answer then completes the character."""
    emoji = list("😀".encode())
    assert pieces(BYTES, [*emoji[2:], 33], emoji[:2]) == ["", "😀", "!"]


@each_tokenizer
def test_the_window_stays_small(tokenizer):
    """Decoding everything again for each token makes long answers quadratic."""
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids_of(tokenizer, "Hello 日本語 😀, " * 50):
        detokenizer.push(token_id)
        assert len(detokenizer._window) <= 24


def test_names_of_tokens_are_their_bytes():
    """OpenAI's `bytes` joined are the text; a name alone may be half a character."""
    for tokenizer, text in ((BYTES, "é😀x"), (MERGED, "naïve 😀"), (SENTENCEPIECE, "Hello é")):
        names = TokenNames(tokenizer)
        joined = b"".join(names.utf8(token_id) for token_id in ids_of(tokenizer, text)).decode()
        assert joined.strip() == text
    assert TokenNames(BYTES).text(0xC3) == REPLACEMENT
    assert TokenNames(BYTES).text(IM_END) == "<|im_end|>"
    assert TokenNames(BYTES).utf8(EOS) == b"<|endoftext|>"
    assert TokenNames(BYTES).utf8(VOCAB_SIZE + 5) == b""  # the model's vocabulary may be padded


class Shouting(PreTrainedTokenizerFast):
    """A family with a decoder of its own, as CPM, Luke and Whisper have."""

    def _decode(self, *args, **kwargs):
        return super()._decode(*args, **kwargs).upper()


def test_a_tokenizer_that_decodes_in_its_own_way_is_heard():
    """The short cut to the library's Rust decoder would give text that the family never shows."""
    tokenizer = Shouting(tokenizer_object=byte_level_with_merges().backend_tokenizer)
    ids = ids_of(tokenizer, "The answer is ok")
    assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids) == "THE ANSWER IS OK"
