"""Recorder and Meter against the formula written out with plain hooks."""

from __future__ import annotations

import copy

import pytest
import torch

from probes import tap
from probes.errors import ModelError, ProbeMismatchError
from probes.neurons import find_ffns
from probes.tap import Meter, Recorder

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2",
    "gpt2", "gpt_neox", "opt", "falcon", "bloom", "square", "square_gpt2",
]  # fmt: skip


@pytest.mark.parametrize("kept_whole", [tap.KEPT_WHOLE, 0], ids=["decoding", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_meter_equals_recorder_equals_formula(
    family, kept_whole, make_model, make_probe, plain_cett, tokens, monkeypatch
):
    """The train/serve skew: two implementations of one formula drift apart unseen."""
    monkeypatch.setattr(tap, "KEPT_WHOLE", kept_whole)
    model = make_model(family)
    ffns = find_ffns(model)
    probes = [make_probe(ffns, seed=1), make_probe(ffns, seed=2, count=5)]
    plain = plain_cett(model, ffns, tokens)
    with torch.no_grad(), Recorder(ffns) as recorder:
        model(tokens)
        recorded = [recorder.cett(layer).reshape(plain[layer].shape) for layer in range(3)]
    last = torch.tensor([6, 2, 0])  # column that is read of each row
    with torch.no_grad(), Meter(ffns, probes, suppression=True) as meter:
        passes = []
        for only in (None, None, torch.arange(3) * 7 + last):  # the first shows if h may be kept
            meter.begin(batch=3, only=only)
            model(tokens)
            passes.append(meter.logits())
    if kept_whole:
        assert meter.output_stays is (family != "falcon")
    assert passes[0].dtype == torch.float32
    assert passes[0].shape == (3, 7, 4)
    assert passes[2].shape == (3, 1, 4)
    for layer in range(3):
        torch.testing.assert_close(recorded[layer].double(), plain[layer], rtol=1e-5, atol=1e-7)
    for index, probe in enumerate(probes):
        heads = meter.head_slice(index)
        for source in (recorded, plain):
            expected = _logits(probe, source)
            for logits, wanted in zip(
                passes, (expected, expected, expected[range(3), last][:, None]), strict=True
            ):
                found = logits[..., heads].double()
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_suppression_equals_formula_row_by_row(family, make_model, make_probe, plain_cett, tokens):
    """z is read before suppression and h after it; each row has an alpha of its own."""
    model = make_model(family)
    ffns = find_ffns(model)
    probe = make_probe(ffns)
    masks = [torch.zeros(ffns[0].intermediate_size, dtype=torch.bool) for _ in ffns]
    for layer, neuron in probe.h_neurons:
        masks[layer][neuron] = True
    alphas = torch.tensor([0.0, 0.5, 2.0])
    expected = _logits(probe, plain_cett(model, ffns, tokens, alphas=alphas, masks=masks))
    with torch.no_grad(), Meter(ffns, [probe], suppression=True) as meter:
        meter.begin([(0, alpha) for alpha in alphas.tolist()])
        model(tokens)
        torch.testing.assert_close(meter.logits().double(), expected, rtol=1e-4, atol=1e-5)


def test_alpha_one_row_is_bit_identical_beside_suppressed_rows(llama, ffns, make_probe, tokens):
    """I4: a neighbour's alpha must not change a request."""
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
        meter.begin([(0, 1.0)] * 3)
        alone = llama(tokens).logits
        alone_risk = meter.logits()
        meter.begin([(0, 0.0), (0, 1.0), (0, 3.0)])
        mixed = llama(tokens).logits
        mixed_risk = meter.logits()
    assert torch.equal(mixed[1], alone[1])
    assert torch.equal(mixed_risk[1], alone_risk[1])
    assert not torch.equal(mixed[0], alone[0])
    assert not torch.equal(mixed[2], alone[2])


def test_each_row_suppresses_the_neurons_of_its_own_probe(llama, ffns, make_probe, tokens):
    """With a union of all probes' neurons, one probe would silence another's."""
    probes = [make_probe(ffns, seed=1), make_probe(ffns, seed=2)]
    ids = tokens[:1].expand(2, -1)
    with torch.no_grad():
        outputs = []
        for index in range(2):
            with Meter(ffns, [probes[index]], suppression=True) as meter:
                meter.begin([(0, 0.0)])
                outputs.append(llama(tokens[:1]).logits[0])
        with Meter(ffns, probes, suppression=True) as meter:
            meter.begin([(0, 0.0), (1, 0.0)])
            together = llama(ids).logits
    torch.testing.assert_close(together[0], outputs[0])
    torch.testing.assert_close(together[1], outputs[1])
    assert not torch.allclose(outputs[0], outputs[1])


def test_two_probes_may_share_neurons(llama, ffns, make_probe, tokens):
    """index_copy with a column twice has no defined winner."""
    probe = make_probe(ffns)
    with torch.no_grad(), Meter(ffns, [probe, probe], suppression=True) as meter:
        meter.begin([(1, 0.5)] * 3)
        llama(tokens)
        twice = meter.logits()
    with torch.no_grad(), Meter(ffns, [probe], suppression=True) as meter:
        meter.begin([(0, 0.5)] * 3)
        llama(tokens)
        once = meter.logits()
    torch.testing.assert_close(twice, torch.cat([once, once], -1))


def test_monitoring_changes_nothing_and_leaves_nothing_behind(llama, ffns, make_probe, tokens):
    """I6, and trap 17: the reference scales weights in place, which cannot be undone."""
    before = copy.deepcopy(llama.state_dict())
    with torch.no_grad():
        plain = llama(tokens).logits
        with Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
            meter.begin([(0, 1.0)] * 3)
            assert torch.equal(llama(tokens).logits, plain)
            meter.begin([(0, 0.0)] * 3)
            assert not torch.equal(llama(tokens).logits, plain)
            meter.begin()
            assert torch.equal(llama(tokens).logits, plain)
        assert torch.equal(llama(tokens).logits, plain)
    for ffn in ffns:
        assert "forward" not in vars(ffn.module)
        assert not ffn.module._forward_hooks
        assert not ffn.module._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


def test_a_replaced_forward_is_given_back(llama, ffns, make_probe, tokens):
    """Accelerate puts a forward of its own on modules of a sharded model."""
    module = ffns[0].module
    own = type(module).forward.__get__(module)
    module.forward = own
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=False) as meter:
        meter.begin()
        llama(tokens)
        meter.logits()
    assert module.forward is own


def test_one_meter_at_a_time(ffns, make_probe):
    """Closing the inner of two would take the outer's tap away."""
    probe = make_probe(ffns)
    with (
        Meter(ffns, [probe], suppression=False),
        pytest.raises(RuntimeError, match="tapped already"),
    ):
        Meter(ffns, [probe], suppression=False).attach()
    again = Meter(ffns, [probe], suppression=False)
    again.attach()
    again.close()
    again.close()  # twice is once


def test_contributions_add_up_to_the_token_logit(llama, ffns, make_probe, tokens):
    """What the page shows must be shares of the number it stands beside."""
    probes = [make_probe(ffns, seed=1), make_probe(ffns, seed=2, count=5)]
    with torch.no_grad(), Meter(ffns, probes, suppression=False) as meter:
        meter.begin()
        llama(tokens)
        logits = meter.logits()
        shares = meter.contributions(1, 2, 4, 100)
        assert meter.contributions(1, 2, 4, 2) == shares[:2]
    pairs = set(zip(probes[1].layer.tolist(), probes[1].neuron.tolist(), strict=True))
    assert {(layer, neuron) for layer, neuron, _ in shares} == pairs
    sizes = [abs(value) for *_, value in shares]
    assert sizes == sorted(sizes, reverse=True)
    total = sum(value for *_, value in shares) + float(probes[1].bias[0])
    assert total == pytest.approx(float(logits[2, 4, meter.head_slice(1)][0]), abs=1e-5)


def test_contributions_need_logits_first(ffns, make_probe):
    with pytest.raises(RuntimeError, match="whose logits were taken"):
        Meter(ffns, [make_probe(ffns)], suppression=False).contributions(0, 0, 0, 1)


def test_a_layer_that_did_not_run_is_an_error_not_a_low_risk(llama, ffns, make_probe, tokens):
    """Hooks do not fire on replayed graphs; stale readings would look like fresh ones."""
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=False) as meter:
        meter.begin()
        llama(tokens)
        meter.logits()
        meter.begin()
        with pytest.raises(ModelError, match=r"did not run model\.layers\.0"):
            meter.logits()


def test_non_finite_activations_reach_the_logit(llama, ffns, make_probe, tokens):
    """The monitor turns NaN into "not scored"; a meter that hides it would make up a score."""
    layer = int(make_probe(ffns).layer[0])
    llama.model.layers[layer].mlp.up_proj.weight.data[:, 0] = float("nan")
    for alpha in (1.0, 0.0):
        with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
            meter.begin([(0, alpha)] * 3)
            llama(tokens)
            assert meter.logits().isnan().all()


def test_flattened_batches_need_to_know_their_rows(make_model, make_probe, tokens):
    """OPT feeds [batch * tokens, hidden]; guessing one row would mix requests."""
    model = make_model("opt")
    ffns = find_ffns(model)
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
        meter.begin()
        model(tokens)
        with pytest.raises(ValueError, match="batch="):
            meter.logits()
        meter.begin([(0, 1.0)] * 3)
        model(tokens)
        assert meter.logits().shape == (3, 7, 2)


def test_wrong_number_of_alphas_is_refused(llama, ffns, make_probe, tokens):
    """[3, 7, n] reshaped to 7 rows would scale the wrong requests silently."""
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
        meter.begin([(0, 0.5)] * 7)
        with pytest.raises(ValueError, match="7 alphas were given for a batch of 3 rows"):
            llama(tokens)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -0.5])
def test_bad_alpha_is_refused(alpha, ffns, make_probe):
    with (
        Meter(ffns, [make_probe(ffns)], suppression=True) as meter,
        pytest.raises(ValueError, match="alpha must be a finite number >= 0"),
    ):
        meter.begin([(0, alpha)])


def test_suppression_can_be_left_out(ffns, make_probe):
    with (
        Meter(ffns, [make_probe(ffns)], suppression=False) as meter,
        pytest.raises(ValueError, match="made without suppression"),
    ):
        meter.begin([(0, 0.5)])


def test_a_meter_needs_a_probe(ffns):
    with pytest.raises(ValueError, match="at least one probe"):
        Meter(ffns, [], suppression=False)


def test_probe_of_another_model_is_refused(make_model, ffns, make_probe):
    """Same shapes, other weights: the column norms tell."""
    other = find_ffns(make_model("mistral"))
    other[0].module.weight.data *= 1.5
    probe = make_probe(other)
    with pytest.raises(ProbeMismatchError, match="column_norm of layer 0"):
        Meter(ffns, [probe], suppression=False)
    with pytest.raises(ProbeMismatchError, match="num_layers is 1"):
        Meter(ffns[:1], [make_probe(ffns)], suppression=False)
    bloom = find_ffns(make_model("bloom"))
    with pytest.raises(ProbeMismatchError, match="intermediate_size is 48"):
        Meter(ffns, [make_probe(bloom)], suppression=False)


def test_time_in_the_meter_is_counted(llama, ffns, make_probe, tokens):
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=False) as meter:
        meter.begin()
        before = meter.seconds_total
        llama(tokens)
        during = meter.seconds_total
        meter.logits()
        assert 0 < before < during < meter.seconds_total < 60


def test_bfloat16_is_read_in_float32(make_model, make_probe, plain_cett, tokens):
    """Trap 12: quotients in the model's dtype are off by up to 0.8 %."""
    model = make_model("llama").bfloat16()
    ffns = find_ffns(model)
    probe = make_probe(ffns)
    plain = plain_cett(model, ffns, tokens)
    with torch.no_grad(), Meter(ffns, [probe], suppression=True) as meter:
        meter.begin()
        model(tokens)
        found = meter.logits()
    torch.testing.assert_close(found.double(), _logits(probe, plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alphas", [None, [(0, 0.0), (0, 1.0), (0, 2.0)]])
def test_meter_under_torch_compile_equals_eager(alphas, llama, ffns, make_probe, tokens):
    """Hooks are dropped by some compiled paths; the tap is traced with its layer."""
    torch._dynamo.reset()
    with torch.no_grad(), Meter(ffns, [make_probe(ffns)], suppression=True) as meter:
        meter.begin(alphas)
        llama(tokens)
        eager = meter.logits()
        compiled = torch.compile(llama.model, backend="eager", fullgraph=True)
        for _ in range(2):
            meter.begin(alphas)
            compiled(tokens)
            torch.testing.assert_close(meter.logits(), eager, rtol=1e-5, atol=1e-5)


def test_streaming_recorder_keeps_nothing(llama, ffns, tokens):
    """All layers of an 8B model at once would not fit."""
    layers = []
    with torch.no_grad(), Recorder(ffns, on_layer=lambda at, x: layers.append((at, x.shape))) as r:
        llama(tokens)
        assert layers == [(at, (3, 7, 48)) for at in range(3)]
        with pytest.raises(ModelError, match="not recorded"):
            r.cett(0)
    assert not ffns[0].module._forward_hooks


def _logits(probe, values):
    """`[batch, tokens, heads]` float64 from dense CETT per layer."""
    picked = torch.stack(
        [values[at][..., j].double() for at, j in zip(probe.layer, probe.neuron, strict=True)], -1
    )
    return picked @ probe.weight.double() + probe.bias.double()
