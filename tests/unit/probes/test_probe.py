"""The artifact: saved numbers come back, and what is not a sound probe is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

import probes.probe
from probes.calibration import Platt
from probes.card import KnownAnswer, ProbeCard
from probes.errors import ProbeError, ProbeFormatError
from probes.files import MAX_BYTES
from probes.probe import Probe, fold_scaler

NAMES = ("layer", "neuron", "weight", "column_norm", "suppress", "bias")


def test_what_is_saved_comes_back(make_probe, tmp_path):
    probe = make_probe()
    probe.save(tmp_path / "p")
    again = Probe.load(tmp_path / "p")
    assert again.card == probe.card
    assert again.id == probe.id == f"tiny@{probe.sha256[:12]}"
    for name in NAMES:
        assert torch.equal(getattr(again, name), getattr(probe, name))


def test_same_numbers_give_the_same_bytes_in_any_order(make_card):
    """A probe's name holds its digest: fitting twice must not give two probes."""
    layer, neuron = np.array([2, 0, 0]), np.array([1, 9, 3])
    weight = np.array([[1.0, 2.0], [0.0, 3.0], [-1.0, 0.0]])
    norm = np.array([1.0, 2.0, 3.0])
    probes = [
        Probe.make(
            make_card(),
            layer=layer[order],
            neuron=neuron[order],
            weight=weight[order],
            column_norm=norm[order],
            bias=[0.5, 1.5],
        )
        for order in ([0, 1, 2], [2, 0, 1])
    ]
    assert probes[0].id == probes[1].id
    assert probes[0].neuron.tolist() == [3, 9, 1]
    assert probes[0].column_norm.tolist() == [3.0, 2.0, 1.0]


def test_a_recalibrated_probe_has_another_id(make_probe):
    """Responses name the probe: two sets of thresholds must not share a name."""
    probe = make_probe()
    token = msgspec.structs.replace(probe.card.token, calibration=Platt(slope=9.0, intercept=0.0))
    card = msgspec.structs.replace(probe.card, token=token)
    other = dataclasses.replace(probe, card=card)
    assert other.card.tensors_sha256 == probe.card.tensors_sha256
    assert other.id != probe.id


def test_h_neurons_have_a_positive_token_weight(make_card):
    """Suppressing neurons of negative weight would raise what it should lower."""
    probe = Probe.make(
        make_card(),
        layer=[0, 1, 2],
        neuron=[5, 6, 7],
        weight=[[1.0, 0.0], [-1.0, 1.0], [0.0, 1.0]],
        column_norm=[1.0, 1.0, 1.0],
        bias=[0.0, 0.0],
    )
    assert probe.h_neurons == ((0, 5),)
    assert probe.suppress.tolist() == [True, False, False]
    assert (probe.head("token"), probe.head("answer")) == (0, 1)
    with pytest.raises(ValueError, match="not in tuple"):
        probe.head("none")


def test_neurons_without_weight_are_dropped_when_made(make_card):
    probe = Probe.make(
        make_card(),
        layer=[0, 1],
        neuron=[5, 6],
        weight=[[0.0, 0.0], [1.0, 1.0]],
        column_norm=[1.0, 1.0],
        bias=[0.0, 0.0],
        suppress=[True, False],
    )
    assert probe.neuron.tolist() == [6]
    assert probe.suppress.tolist() == [False]


def test_folded_scaler_gives_the_same_logit():
    """Trap 15: a scaler that is lost or applied twice shifts every logit."""
    rng = np.random.default_rng(0)
    x = np.abs(rng.normal(size=(50, 7))) * 10.0 ** -rng.integers(1, 6, size=7)
    mean, scale = x.mean(0), x.std(0)
    weight, bias = rng.normal(size=(7, 2)), rng.normal(size=2)
    folded, shifted = fold_scaler(weight, bias, mean=mean, scale=scale)
    np.testing.assert_allclose(
        x.astype(np.float32) @ folded.astype(np.float32) + shifted.astype(np.float32),
        (x - mean) / scale @ weight + bias,
        atol=1e-5,
    )


def test_an_existing_folder_is_never_rewritten(make_probe, tmp_path):
    """A server may be reading it."""
    make_probe().save(tmp_path / "p")
    content = (tmp_path / "p" / "probe.json").read_bytes()
    with pytest.raises(ProbeError, match="choose a new folder"):
        make_probe(seed=5).save(tmp_path / "p")
    assert (tmp_path / "p" / "probe.json").read_bytes() == content
    assert sorted(x.name for x in tmp_path.iterdir()) == ["p"]


def test_saved_files_can_be_read_by_others(make_probe, tmp_path):
    """mkdtemp makes 0700; a server under another user must read the probe."""
    make_probe().save(tmp_path / "deep" / "p")
    assert stat.S_IMODE((tmp_path / "deep" / "p").stat().st_mode) == 0o755


def test_a_probe_that_cannot_be_tested_is_neither_saved_nor_loaded(make_probe, tmp_path):
    with pytest.raises(ProbeFormatError, match="no known answers"):
        make_probe(known_answers=()).save(tmp_path / "p")
    assert not (tmp_path / "p").exists()
    with pytest.raises(ProbeFormatError, match="no known answers"):
        _load(tmp_path, make_probe(known_answers=()))


def test_a_card_of_other_tensors_is_not_saved(make_probe, tmp_path):
    probe = dataclasses.replace(make_probe(), bias=torch.zeros(2))
    with pytest.raises(ProbeFormatError, match=r"Probe\.make"):
        probe.save(tmp_path / "p")


# --- unsound tensors -------------------------------------------------------------------------


def _with(tensors, name, change):
    changed = tensors[name].clone()
    change(changed)
    return {**tensors, name: changed}


def _set(index, value):
    def change(tensor):
        tensor[index] = value

    return change


UNSOUND = {
    "nan weight": (lambda t: _with(t, "weight", _set((0, 0), float("nan"))), "weight must be"),
    "inf weight": (lambda t: _with(t, "weight", _set((3, 1), float("inf"))), "weight must be"),
    "huge weight": (lambda t: _with(t, "weight", _set((3, 1), 1e9)), "at most 1e"),
    "zero weights": (lambda t: _with(t, "weight", _set(2, 0.0)), "non-zero weight"),
    "nan bias": (lambda t: _with(t, "bias", _set(0, float("nan"))), "bias must be"),
    "norm 0": (lambda t: _with(t, "column_norm", _set(0, 0.0)), "column_norm must be"),
    "norm < 0": (lambda t: _with(t, "column_norm", _set(0, -1.0)), "column_norm must be"),
    "norm nan": (lambda t: _with(t, "column_norm", _set(0, float("nan"))), "column_norm must"),
    "norm inf": (lambda t: _with(t, "column_norm", _set(0, float("inf"))), "column_norm must"),
    "layer < 0": (lambda t: _with(t, "layer", _set(0, -1)), r"layer must be in \[0, 3\)"),
    "layer beyond": (lambda t: _with(t, "layer", _set(-1, 3)), r"layer must be in \[0, 3\)"),
    "neuron < 0": (lambda t: _with(t, "neuron", _set(0, -1)), r"neuron must be in \[0, 48\)"),
    "neuron beyond": (lambda t: _with(t, "neuron", _set(-1, 48)), r"neuron must be in \[0, 48\)"),
    "unsorted": (lambda t: t | {"layer": t["layer"].flip(0)}, "ascending"),
    "duplicate": (
        lambda t: _with(
            _with(t, "layer", _set(1, t["layer"][0])), "neuron", _set(1, t["neuron"][0])
        ),
        "ascending",
    ),
    "int32 layer": (lambda t: t | {"layer": t["layer"].int()}, "layer is torch.int32"),
    "float16 weight": (lambda t: t | {"weight": t["weight"].half()}, "weight is torch.float16"),
    "float64 bias": (lambda t: t | {"bias": t["bias"].double()}, "bias is torch.float64"),
    "uint8 suppress": (lambda t: t | {"suppress": t["suppress"].byte()}, "suppress is torch.uint8"),
    "short norm": (lambda t: t | {"column_norm": t["column_norm"][1:]}, r"expected .* \[20\]"),
    "one head": (
        lambda t: t | {"weight": t["weight"][:, :1].contiguous()},
        r"expected .* \[20, 2\]",
    ),
    "flat weight": (lambda t: t | {"weight": t["weight"].flatten()}, r"expected .* \[20, 2\]"),
    "scalar bias": (lambda t: t | {"bias": t["bias"][0].clone()}, r"expected .* \[2\]"),
    "layer matrix": (
        lambda t: t | {"layer": t["layer"][:, None].contiguous()},
        r"expected \[neurons\]",
    ),
    "no neurons": (lambda t: {n: x if n == "bias" else x[:0] for n, x in t.items()}, "1 to 65536"),
    "scalar layer": (lambda t: t | {"layer": torch.tensor(1)}, r"expected \[neurons\]"),
    "extra": (lambda t: t | {"scale": torch.ones(3)}, "expected"),
    "missing": (lambda t: {n: x for n, x in t.items() if n != "suppress"}, "expected"),
    "none": (lambda t: {}, "expected"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_tensors_are_refused_although_the_digest_fits(case, make_probe, tmp_path):
    """Digests catch damage; these files were written so."""
    change, message = UNSOUND[case]
    with pytest.raises(ProbeFormatError, match=message):
        _load(tmp_path, make_probe(), change=change)


def test_more_neurons_than_a_probe_may_have_are_refused(make_probe, make_card):
    model = msgspec.structs.replace(make_card().model, intermediate_size=70000)
    with pytest.raises(ProbeFormatError, match="1 to 65536 neurons, not 65537"):
        Probe.make(
            make_card(model=model),
            layer=np.zeros(65537),
            neuron=np.arange(65537),
            weight=np.ones((65537, 2)),
            column_norm=np.ones(65537),
            bias=np.zeros(2),
        )


# --- unsound cards ---------------------------------------------------------------------------

CARDS = {
    "schema": (("schema_version",), 1, "schema_version is 1, expected 3"),
    "formula": (("formula_version",), 2, "formula_version is 2, expected 1"),
    "name": (("name",), "a b", "name must match"),
    "path name": (("name",), "../x", "name must match"),
    "position": (("position",), "think", "Invalid enum value"),
    "no heads": (("heads",), [], "heads must be"),
    "same heads": (("heads",), ["token", "token"], "heads must be"),
    "token head": (("token", "head"), "other", "none of the heads"),
    "response head": (("response", "head"), "other", "none of the heads"),
    "default": (("token", "default"), "fpr_9", "none of"),
    "response default": (("response", "default"), "fpr_9", "none of"),
    "same points": (("token", "operating_points", 1, "name"), "fpr_1", "different names"),
    "threshold": (("token", "operating_points", 0, "threshold"), 1.5, "threshold must be"),
    "rate": (("token", "operating_points", 0, "false_positive_rate"), -0.1, "false_positive"),
    "recall": (("token", "operating_points", 0, "recall"), 2.0, "recall must be"),
    "slope": (("token", "calibration", "slope"), 0.0, "slope > 0"),
    "calibration kind": (("token", "calibration", "type"), "spline", "Invalid value"),
    "window": (("response", "pooling", "window"), 0, "window must be"),
    "pooling": (("response", "pooling", "kind"), "median", "Invalid enum value"),
    "layers": (("model", "num_layers"), 0, "num_layers must be"),
    "dtype": (("model", "dtype"), "int4", "dtype must be"),
    "fingerprint": (("model", "weights_fingerprint"), "", "must not be empty"),
    "no ids": (("known_answers", 0, "token_ids"), [], "as many rows"),
    "too few ids": (("known_answers", 0, "token_ids"), [1], "as many rows"),
    "id beyond": (("known_answers", 0, "token_ids"), [1, 2, 97], r"must be in \[0, 97\)"),
    "id < 0": (("known_answers", 0, "token_ids"), [1, 2, -1], r"must be in \[0, 97\)"),
    "other heads": (("known_answers", 0, "logits"), [[1.0], [1.0], [1.0]], "2 logits per token"),
    "text number": (("schema_version",), "1", "Expected `int`"),
    "no reference": (("token", "reference"), None, "Expected `object`"),
    "null": (("model",), None, "Expected `object`"),
    "unknown field": (("extra",), 1, "unknown field `extra`"),
    "unknown inner field": (("model", "vendor"), "x", "unknown field `vendor`"),
    "free text is text": (("training", "seed"), 0, "Expected `str`"),
}


@pytest.mark.parametrize("case", CARDS)
def test_unsound_cards_are_refused_although_the_digest_fits(case, make_probe, tmp_path):
    path, value, message = CARDS[case]
    with pytest.raises(ProbeFormatError, match=message):
        _load(tmp_path, make_probe(), card=lambda card: _put(card, path, value))


def test_a_card_of_another_schema_is_told_so_and_not_what_it_lacks(make_probe, tmp_path):
    """As every probe of schema 1, which had no calibration of spans."""

    def older(card):
        card["schema_version"] = 1
        del card["token"]["span"]

    with pytest.raises(ProbeFormatError, match=r"schema_version is 1, expected 3: fit and publish"):
        _load(tmp_path, make_probe(), card=older)


@pytest.mark.parametrize("field", ProbeCard.__struct_fields__)
def test_every_field_of_the_card_is_required(field, make_probe, tmp_path):
    with pytest.raises(ProbeFormatError, match=f"missing required field `{field}`"):
        _load(tmp_path, make_probe(), card=lambda card: card.pop(field))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e400", "-1e400"])
def test_non_finite_numbers_in_the_card_are_refused(literal, make_probe, tmp_path):
    """Python's json accepts NaN; then every comparison with a threshold is false."""
    write = _write(tmp_path, make_probe())
    card = json.dumps(write).replace('"slope": 1.5', f'"slope": {literal}')
    assert literal in card
    _seal(tmp_path / "p", card)
    with pytest.raises(ProbeFormatError, match="not a probe card"):
        Probe.load(tmp_path / "p")


# --- damage ----------------------------------------------------------------------------------


@pytest.fixture
def saved(make_probe, tmp_path):
    make_probe().save(tmp_path / "p")
    return tmp_path / "p"


def test_every_truncation_and_every_flipped_bit_is_refused(saved):
    """R12: a damaged probe reads like a sound one unless digests cover every byte."""
    refused = 0
    for file in (saved / "probe.json", saved / "probe.safetensors"):
        content = file.read_bytes()
        cuts = {0, 1, 7, 8, 9, len(content) - 1, *range(0, len(content) - 2, len(content) // 40)}
        damaged = [content[:cut] for cut in cuts]
        for at in range(0, len(content), max(1, len(content) // 150)):
            flipped = bytearray(content)
            flipped[at] ^= 1 << (at % 8)
            damaged.append(bytes(flipped))
        damaged += [content + b"{}", b"\0" * len(content), b""]
        for bad in damaged:
            if bad.rstrip() == content.rstrip():
                continue  # white space behind the last brace
            file.write_bytes(bad)
            with pytest.raises(ProbeFormatError):
                Probe.load(saved)
            refused += 1
        file.write_bytes(content)
    Probe.load(saved)
    assert refused >= 350


def test_one_flipped_bit_in_each_value_of_the_card_is_refused(saved):
    """Also in text that no rule can check, such as who made it."""
    file = saved / "probe.json"
    content = file.read_bytes()
    for name in ProbeCard.__struct_fields__:
        at = content.index(f'"{name}":'.encode()) + len(name) + 4
        flipped = bytearray(content)
        flipped[at] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(ProbeFormatError):
            Probe.load(saved)


def test_one_flipped_bit_in_each_tensor_is_refused(saved):
    file = saved / "probe.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    for name in NAMES:
        start, stop = header[name]["data_offsets"]
        for at in (start, stop - 1):
            flipped = bytearray(content)
            flipped[8 + size + at] ^= 0x10
            file.write_bytes(bytes(flipped))
            with pytest.raises(ProbeFormatError, match="damaged"):
                Probe.load(saved)


def test_tensors_and_card_of_two_probes_do_not_mix(make_probe, saved, tmp_path):
    make_probe(seed=9).save(tmp_path / "q")
    (tmp_path / "q" / "probe.safetensors").replace(saved / "probe.safetensors")
    with pytest.raises(ProbeFormatError, match="not of this card"):
        Probe.load(saved)


def test_truncating_the_file_of_a_loaded_probe_changes_nothing(saved):
    """R16: a memory map would die with SIGBUS here."""
    probe = Probe.load(saved)
    before = probe.weight.clone()
    os.truncate(saved / "probe.safetensors", 10)
    assert torch.equal(probe.weight, before)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 64, b"\0" * 64])
def test_tensors_that_are_no_safetensors_are_refused_although_the_digest_fits(
    content, make_probe, tmp_path
):
    _write(tmp_path, make_probe())
    card = msgspec.to_builtins(make_probe().card)
    card["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    (tmp_path / "p" / "probe.safetensors").write_bytes(content)
    _seal(tmp_path / "p", json.dumps(card))
    with pytest.raises(ProbeFormatError, match="not a safetensors file"):
        Probe.load(tmp_path / "p")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_known_answers_are_finite(value):
    """JSON cannot hold NaN; a card that is made in memory could."""
    with pytest.raises(ValueError, match="must be finite"):
        KnownAnswer(token_ids=(1,), logits=((value,),))


# --- not files of ours -----------------------------------------------------------------------


class _Canary:
    ran = False

    def __reduce__(self):
        return (setattr, (_Canary, "ran", True))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["probe.safetensors", "probe.json"])
def test_a_pickle_is_refused_and_never_run(name, protocol, saved):
    """R13: loading the reference's joblib file runs whatever is in it."""
    (saved / name).write_bytes(pickle.dumps(_Canary(), protocol=protocol))
    with pytest.raises(ProbeFormatError):
        Probe.load(saved)
    assert _Canary.ran is False


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".pt", ".npy", ".PTH"])
def test_files_that_run_code_are_refused_by_name(suffix, tmp_path):
    file = tmp_path / f"classifier{suffix}"
    file.write_bytes(b"x")
    with pytest.raises(ProbeFormatError, match="could run code"):
        Probe.load(file)


@pytest.mark.parametrize("content", ["pickle", "torch", "numpy"])
def test_files_that_run_code_are_refused_by_content(content, saved):
    file = saved / "probe.safetensors"
    if content == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif content == "torch":
        torch.save({"a": torch.ones(1)}, file)
    else:
        np.save(file.with_suffix(".npy"), np.array([{}], dtype=object), allow_pickle=True)
        file.with_suffix(".npy").replace(file)
    with pytest.raises(ProbeFormatError, match="could run code"):
        Probe.load(saved)


def test_no_source_of_ours_can_unpickle():
    """One convenient `torch.load` would undo all of the above."""
    sources = list(Path(probes.probe.__file__).parent.glob("*.py"))
    assert len(sources) > 8
    for source in sources:
        found = re.findall(
            r"import pickle|joblib\.|(?<!safetensors\.)torch\.load|np\.load", source.read_text()
        )
        assert not found, source.name


def test_symbolic_links_are_refused(saved):
    """A link may be pointed elsewhere between check and use."""
    file = saved / "probe.safetensors"
    file.replace(saved / "elsewhere")
    file.symlink_to(saved / "elsewhere")
    with pytest.raises(ProbeFormatError, match="symbolic link"):
        Probe.load(saved)


def test_a_linked_folder_is_fine(saved, tmp_path):
    """Versions are switched by a link to a folder."""
    (tmp_path / "current").symlink_to(saved)
    Probe.load(tmp_path / "current")


def test_a_fifo_is_refused_without_waiting(saved):
    (saved / "probe.json").unlink()
    os.mkfifo(saved / "probe.json")
    with pytest.raises(ProbeFormatError, match="not a regular file"):
        Probe.load(saved)


def test_a_folder_in_place_of_a_file_is_refused(saved):
    (saved / "probe.json").unlink()
    (saved / "probe.json").mkdir()
    with pytest.raises(ProbeFormatError, match="not a regular file"):
        Probe.load(saved)


def test_what_is_missing_is_named(saved, tmp_path):
    (saved / "probe.safetensors").unlink()
    with pytest.raises(ProbeFormatError, match=r"cannot read .*probe\.safetensors \(No such file"):
        Probe.load(saved)
    with pytest.raises(ProbeFormatError, match="is not a folder"):
        Probe.load(tmp_path / "nowhere")


def test_a_file_that_is_too_large_is_refused(saved):
    with (saved / "probe.safetensors").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ProbeFormatError, match="larger than 67108864 bytes"):
        Probe.load(saved)


# --- helpers ---------------------------------------------------------------------------------


def _write(tmp_path, probe, *, change=lambda tensors: tensors):
    """A folder that no `Probe` would save, its digests in order; returns the card as a dict."""
    folder = tmp_path / "p"
    folder.mkdir()
    content = safetensors.torch.save(change({name: getattr(probe, name) for name in NAMES}))
    (folder / "probe.safetensors").write_bytes(content)
    card = msgspec.to_builtins(probe.card)
    card["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    return card


def _seal(folder, card: str) -> None:
    digest = hashlib.sha256(card.encode()).hexdigest()
    (folder / "probe.json").write_text(f'{{"card_sha256": "{digest}", "card": {card}}}')


def _load(tmp_path, probe, *, change=lambda tensors: tensors, card=lambda card: None):
    values = _write(tmp_path, probe, change=change)
    card(values)
    _seal(tmp_path / "p", json.dumps(values))
    return Probe.load(tmp_path / "p")


def _put(card, path, value):
    for step in path[:-1]:
        card = card[step] if not isinstance(card[step], tuple) else _thaw(card, step)
    card[path[-1]] = value


def _thaw(card, step):
    card[step] = list(card[step])
    return card[step]
