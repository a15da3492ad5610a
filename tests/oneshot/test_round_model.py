"""Rounding a 2:4 model to 8 bits: smoothed inputs, prices of layers, and the choice of those that keep 16 bits."""

import copy

import pytest
import torch
from tiny_reordered import IDS, llama

from prox24_lightning.calibration.output_divergence import OutputDivergence
from prox24_lightning.calibration.rounded_inputs import rounded_inputs
from prox24_lightning.calibration.smoothing import smoothing_factors
from prox24_lightning.oneshot import prune_layerwise, round_model
from prox24_lightning.oneshot.progress import LayerProgress
from prox24_lightning.oneshot.rounding.budget import LossRise, RoundedLayers, RoundingPrice, within_rise
from prox24_lightning.oneshot.rounding.smooth_inputs import smooth_inputs
from prox24_lightning.weights.rounding import round_weight

BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(0)}]


@pytest.fixture(scope="module")
def pruned():
    """A 2:4 LLaMA in bfloat16 whose norms make outliers of some channels."""
    model, _ = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 40.0
            layer.post_attention_layernorm.weight[7] = 40.0
    model.to(torch.bfloat16)
    prune_layerwise(model, BATCHES, method="magnitude", refine=None, progress=False)
    return model


@pytest.fixture
def model(pruned):
    return copy.deepcopy(pruned)


def layers_of(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def zeros_of(model):
    return {name: layer.weight == 0 for name, layer in layers_of(model).items()}


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


@torch.no_grad()
def rise(model, exact, rounded):
    """The divergence from ``exact`` with the inputs of the layers ``rounded`` in int8."""
    measure = OutputDivergence([lambda: exact(IDS, use_cache=False)])
    found = layers_of(model)
    with rounded_inputs([found[name] for name in rounded], "int8"):
        measure._runs = [lambda: model(IDS, use_cache=False)]
        return measure()


def test_smoothing_changes_no_output_and_no_zero(model):
    before, zeros = logits(model), zeros_of(model)
    done = smooth_inputs(model, BATCHES, "int8", layers_of(model), progress=False)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(zeros[name], now) for name, now in zeros_of(model).items())
    found = {name: one for one in done for name in one.names}
    assert set(found) == set(layers_of(model))
    attention = found["model.layers.0.self_attn.q_proj"]
    assert attention.names == tuple(f"model.layers.0.self_attn.{key}_proj" for key in "qkv")
    assert attention.exponent is not None
    assert attention.after < 0.5 * attention.before
    assert not any(one.reason for one in done)
    # Two such scales are never one: what was smoothed already gains little.
    again = smooth_inputs(model, BATCHES, "int8", layers_of(model), progress=False)
    assert next(one for one in again if one.names == attention.names).before == pytest.approx(attention.after, rel=0.05)


def test_factors_are_powers_of_two_and_none_where_nothing_is_gained():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 16, generator=generator) for n in (64, 8))
    x[:, 5] *= 64
    columns = torch.arange(16).view(8, 2)
    found = smoothing_factors(x, x.abs().amax(0), [weight], columns, "int8")
    assert torch.equal(found.factors.log2(), found.factors.log2().round())
    assert found.factors.shape == (8,)
    assert found.factors.argmax() == 2  # the pair of inputs with the outlier
    assert found.after < 0.5 * found.before
    plain = smoothing_factors(x.sign(), torch.ones(16), [weight], columns, "int8")  # ones are exact already
    if plain.exponent is None:
        assert torch.equal(plain.factors, torch.ones(8))
    assert plain.after <= plain.before


def test_smoothing_lowers_the_rise_of_the_loss(model):
    exact, names = copy.deepcopy(model), list(layers_of(model))
    plain = rise(model, exact, names)
    report = round_model(model, BATCHES, "int8", progress=False)
    assert report.smoothed
    assert rise(model, exact, names) < 0.5 * plain


def test_float8_is_smoothed_only_where_it_is_asked_for(model):
    asked = round_model(copy.deepcopy(model), BATCHES, "fp8_e4m3", smooth=True, progress=False)
    report = round_model(model, BATCHES, "fp8_e4m3", progress=False)
    assert asked.smoothed
    assert not report.smoothed


def test_tuned_models_predict_closer_to_16_bits(model):
    form = "fp8_e4m3"
    exact, untuned = copy.deepcopy(model), copy.deepcopy(model)
    round_model(untuned, BATCHES, form, smooth=False, progress=False)
    report = round_model(model, BATCHES, form, smooth=False, tune_steps=20, progress=False)

    def rise_of(changed):
        measured = OutputDivergence([lambda: exact(**BATCHES[1], use_cache=False)])
        measured._runs = [lambda: changed(**BATCHES[1], use_cache=False)]
        with rounded_inputs(layers_of(changed).values(), form):
            return measured()

    # Both at weights and inputs of 8 bits, on the batch that is not trained on.
    assert report.tuned == pytest.approx((rise_of(untuned), rise_of(model)), rel=1e-3)
    assert report.tuned[1] < report.tuned[0]
    assert f"by {report.tuned[1]:.5f} tuned" in str(report)
    layers, before = layers_of(model), dict(exact.named_parameters())
    for name, layer in layers.items():
        assert torch.equal(layer.weight, round_weight(layer.weight, form))
        assert not layer.weight[before[f"{name}.weight"] == 0].any()
    others = {n: p for n, p in model.named_parameters() if n.removesuffix(".weight") not in layers}
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in others.items())


def test_a_model_without_gradients_is_rounded_all_the_same(model, caplog):
    untuned = copy.deepcopy(model)
    round_model(untuned, BATCHES, "int8", smooth=False, progress=False)
    forward = model.forward
    model.forward = torch.no_grad()(lambda **batch: forward(**batch))
    report = round_model(model, BATCHES, "int8", smooth=False, tune_steps=2, progress=False)
    assert report.tuned is None
    assert "tune_steps=2 is left out: " in caplog.text
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), untuned.parameters(), strict=True))


@pytest.mark.parametrize("steps", [-1, 2.0, True])
def test_steps_that_cannot_be(model, steps):
    with pytest.raises(ValueError, match="tune_steps=.* must be a whole number"):
        round_model(model, BATCHES, "int8", tune_steps=steps, progress=False)


def test_layers_keep_16_bits_until_the_rise_is_within_the_bound(model):
    exact = copy.deepcopy(model)
    every = round_model(copy.deepcopy(model), BATCHES, "int8", smooth=False, max_loss_rise=10, progress=False)
    assert every.kept == ()
    bound = every.budget.rise_without / 3
    report = round_model(model, BATCHES, "int8", smooth=False, max_loss_rise=bound, progress=False)
    assert 0 < len(report.kept) < len(layers_of(model))
    rounded = [name for name in layers_of(model) if name not in report.kept]
    assert report.budget.rise <= bound
    measured = OutputDivergence([lambda one=one: exact(**one, use_cache=False) for one in BATCHES])
    measured._runs = [lambda one=one: model(**one, use_cache=False) for one in BATCHES]
    with rounded_inputs([layers_of(model)[name] for name in rounded], "int8"):
        assert 0 < report.budget.rise < measured()  # which holds the noise of 16 bits too
    # Weights are what their form says.
    for name, layer in layers_of(model).items():
        if name in report.kept:
            assert torch.equal(layer.weight, layers_of(exact)[name].weight)
        else:
            assert torch.equal(layer.weight, round_weight(layer.weight, "int8"))
    # Layers that servers run as one have one form.
    for layer in range(2):
        parts = [f"model.layers.{layer}.self_attn.{key}_proj" in report.kept for key in "qkv"]
        assert len(set(parts)) == 1
    assert f"{len(report.kept)} of {len(layers_of(model))} in 16 bits" in str(report)


def test_what_16_bits_make_of_any_change_is_no_rise(model):
    layers, name = layers_of(model), "model.layers.0.self_attn.o_proj"
    exact = {key: layer.weight.detach().clone() for key, layer in layers.items()}
    prune_layerwise(model, BATCHES, method="keep", refine=None, weights="fp8_e4m3", progress=False)
    switch = RoundedLayers(layers, exact, "fp8_e4m3")
    with switch.inputs_too(()):
        divergence = OutputDivergence([lambda: model(IDS, use_cache=False)])
    with switch.nudged([name]):
        assert all(torch.equal(layer.weight, exact[key]) for key, layer in layers.items())
        noise = divergence()
    with switch.inputs_too([name]):
        rounded = divergence()
    assert 0 < noise < rounded
    assert LossRise(switch, divergence)([name]) == pytest.approx(rounded - noise)
    assert LossRise(switch, iter([3.0, 2.0]).__next__)([name]) == 0
    assert not layers[name]._forward_hooks


def test_a_bound_of_nothing_keeps_every_layer(model):
    exact = copy.deepcopy(model.state_dict())
    report = round_model(model, BATCHES, "fp8_e4m3", smooth=False, max_loss_rise=1e-12, progress=False)
    assert set(report.kept) == set(layers_of(model))
    assert report.budget.rise == 0
    assert all(torch.equal(value, exact[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf"), "0.7"])
def test_bounds_that_mean_nothing(model, bound):
    with pytest.raises(ValueError, match="max_loss_rise=.* must be positive"):
        round_model(model, BATCHES, "int8", max_loss_rise=bound, progress=False)


def test_the_layers_that_cost_most_for_what_they_save_keep_16_bits():
    each = (("a", 3, 1), ("b", 4, 4), ("c", 2, 1), ("d", 1, 0))
    prices = [RoundingPrice((name,), rise, gain) for name, rise, gain in each]
    rises = {price.names[0]: price.rise for price in prices}
    asked = []

    def measured(names):
        asked.append(list(names))
        return sum(rises[name] for name in names)

    found = within_rise(prices, measured, 4)
    assert found.kept == ("d", "a", "c")  # d saves nothing at all
    assert (found.rise, found.rise_without, found.gain_left) == (4, 10, 4 / 6)
    assert within_rise(prices, measured, 10).kept == ()
    assert len(asked) <= 5


def test_divergence_of_equal_and_of_other_outputs():
    logits = torch.randn(2, 5, 7)
    output = type("Output", (), {"logits": logits})()
    measure = OutputDivergence([lambda: output])
    assert measure() == pytest.approx(0, abs=1e-7)
    output.logits = logits + 3  # the same probabilities
    assert measure() == pytest.approx(0, abs=1e-6)
    output.logits = logits.roll(1, -1)
    expected = (logits.softmax(-1) * (logits.log_softmax(-1) - output.logits.log_softmax(-1))).sum(-1).mean()
    assert measure() == pytest.approx(float(expected), rel=1e-5)
    hidden = [torch.ones(3)]
    error = OutputDivergence([lambda: hidden[0]])
    hidden[0] = torch.full((3,), 1.1)
    assert error() == pytest.approx(0.01, rel=1e-4)


def test_one_logit_is_a_value_not_a_probability():
    output = type("Output", (), {"logits": torch.ones(4, 1)})()
    measure = OutputDivergence([lambda: output])
    output.logits = torch.full((4, 1), 1.1)
    assert measure() == pytest.approx(0.01, rel=1e-4)


def test_an_error_without_words_is_named(model, monkeypatch, caplog):
    def failing(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr("prox24_lightning.oneshot.rounding.round_model.tune_rounded", failing)
    round_model(model, BATCHES, "int8", smooth=False, tune_steps=2, progress=False)
    assert "tune_steps=2 is left out: NotImplementedError" in caplog.text


def test_the_bar_of_steps_holds_all_that_is_tried(model, monkeypatch):
    bars = []

    class Bar(LayerProgress):
        def step(self, layers, name):
            super().step(layers, name)
            bars.append((self._bar.tasks[0].completed, self._bar.tasks[0].total))

    def tried_twice(*args, step, **kwargs):
        for _ in range(1 + 2 * (3 + 1)):
            step()

    monkeypatch.setattr("prox24_lightning.oneshot.rounding.round_model.LayerProgress", Bar)
    monkeypatch.setattr("prox24_lightning.oneshot.rounding.round_model.tune_rounded", tried_twice)
    round_model(model, BATCHES, "int8", smooth=False, tune_steps=3, progress=False)
    assert bars == [(number, 5 if number <= 5 else 9) for number in range(1, 10)]


def test_what_is_not_finite_tunes_nothing_and_is_within_no_bound(model, monkeypatch, caplog):
    monkeypatch.setattr(
        "prox24_lightning.oneshot.rounding.round_model.tune_rounded", lambda *args, **kwargs: (float("nan"),) * 2
    )
    report = round_model(model, BATCHES, "int8", smooth=False, tune_steps=2, progress=False)
    assert report.tuned is None
    assert "tune_steps=2 is left out: ValueError: the predictions differ from those of 16 bits by nan" in caplog.text
    layers = layers_of(model)
    switch = RoundedLayers(layers, {name: layer.weight.detach() for name, layer in layers.items()}, "int8")
    assert LossRise(switch, lambda: float("nan"))(list(layers)) == float("inf")
