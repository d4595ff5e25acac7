"""INT8 and float16 at the end of a run: against onnxruntime's own call, and what the whole way makes of it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

import onnx_lrs
from onnx_lrs import Budget, Config, cli, errors
from onnx_lrs.calibration.subject import Inputs, examine, open_material
from onnx_lrs.config import PRECISIONS
from onnx_lrs.data import open_samples
from onnx_lrs.graph import model as models
from onnx_lrs.planning.gate import Drop
from onnx_lrs.planning.precision import Quantiser, kept_within
from onnx_lrs.runtime.quantise import Recipe, ranges_of, stand_in_ranges, to_fp16, to_int8
from tests import small_nets as nets
from tests.builders import make, node, normal, run

IMAGES = nets.as_floats(nets.pictures(160))
CONFIG = Config(threads=1, fit="independent", multiple=4, precision="int8", budget=Budget(params=0.3))


class Batches:
    """A CalibrationDataReader over the images."""

    def __init__(self, images: np.ndarray, size: int = 32) -> None:
        self._feeds = iter([{"image": images[i : i + size]} for i in range(0, len(images), size)])

    def get_next(self):
        return next(self._feeds, None)


def integers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


def off(one: onnx.ModelProto, other: onnx.ModelProto, images: np.ndarray = IMAGES) -> float:
    a, b = (run(model, {"image": images})[0] for model in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


# -------------------------------------------------------------------------------------- beside onnxruntime's own call


@pytest.mark.parametrize("method", ["MinMax", "Percentile", "Entropy"])
def test_ranges_batch_by_batch_give_what_quantize_static_gives(method, tmp_path):
    model = nets.conv_net()
    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Batches(IMAGES[:32]),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod[method],
    )
    recipe = Recipe.of({"calibrate_method": method})
    ours = to_int8(model, ranges_of(model, [{"image": IMAGES[:32]}], recipe, 1), recipe)
    theirs = onnx.load(tmp_path / "int8.onnx")
    mine, its = integers(ours), integers(theirs)
    assert mine.keys() == its.keys()
    for name, value in its.items():
        np.testing.assert_allclose(mine[name], value, rtol=1e-5, atol=1 if value.dtype.kind in "iu" else 0)
    assert models.signature(ours) == models.signature(model)


def test_the_lowest_and_highest_of_several_batches_count():
    model = nets.conv_net()
    whole = ranges_of(model, [{"image": IMAGES}], Recipe(), 1)
    parts = ranges_of(model, [{"image": IMAGES[i : i + 7]} for i in range(0, 160, 7)], Recipe(), 1)
    for name, data in whole.items():
        np.testing.assert_allclose(np.ravel(data.range_value), np.ravel(parts[name].range_value), rtol=1e-5)


def test_excluded_nodes_stay_in_float():
    model = nets.conv_net()
    some = to_int8(model, stand_in_ranges(model), Recipe(exclude=frozenset({"c2"})))
    by_name = to_int8(model, stand_in_ranges(model), Recipe.of({"nodes_to_exclude": "fc9,*onv2"}))
    assert by_name == some
    kept = {n.output[0]: n for n in some.graph.node if n.op_type == "Conv"}
    assert kept["c2"].input[1] == "conv2.w"
    assert "conv1.w" not in integers(some)
    assert integers(some)["conv2.w"].dtype == np.float32


def test_an_older_opset_is_raised_for_scales_of_channels():
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    model = make(nodes, {"x": [1, 4, 3, 3]}, ["y"], {"w": normal(5, 4, 1, 1)}, opset=9)
    found = to_int8(model, stand_in_ranges(model), Recipe())
    assert models.opset(found) == 13
    assert integers(found)["w_scale"].shape == (5,)
    assert models.opset(model) == 9


def test_half_precision_keeps_inputs_and_outputs():
    model = nets.conv_net()
    half = to_fp16(model)
    assert models.signature(half) == models.signature(model)
    assert {t.data_type for t in half.graph.initializer} == {TensorProto.FLOAT16}
    assert 0 < off(model, half) < 1e-2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"calibrate_method": "guess"}, "calibrate_method is one of minmax, entropy, percentile"),
        ({"activation_type": "float"}, "activation_type is one of QInt8"),
        ({"per_channel": "2"}, "per_channel is one of True or False"),
        ({"NoSuchThing": "1"}, "has no option of that name"),
        ({"CalibPercentil": "99"}, "has no option of that name"),
        ({"SmoothQuant": "True"}, "does not go with this tool"),
    ],
)
def test_unknown_options_are_refused(options, said):
    with pytest.raises(errors.ConfigError, match=said):
        Recipe.of(options)


def test_options_reach_the_quantiser():
    recipe = Recipe.of({"activation_type": "QInt8", "per_channel": "False", "ActivationSymmetric": "True"})
    model = nets.conv_net()
    found = integers(to_int8(model, stand_in_ranges(model), recipe))
    assert found["image_zero_point"].dtype == np.int8
    assert found["conv1.w_scale"].shape == ()
    assert recipe.extra == {"ActivationSymmetric": True}
    assert Recipe.of({"CalibPercentile": "99.9"}).extra == {"CalibPercentile": 99.9}


# ------------------------------------------------------------------------------------------- what is done before it


def quantiser(model: onnx.ModelProto, images: np.ndarray = IMAGES, **changed) -> Quantiser:
    config = dataclasses.replace(CONFIG, **changed)
    samples = open_samples(images, models.signature(model)[0], None)
    import contextlib

    material = open_material(Inputs(images), models.signature(model)[0], config, contextlib.ExitStack())
    return Quantiser(examine(model, model, config, samples), material, config)


def plain(used: Quantiser, model: onnx.ModelProto, images: np.ndarray = IMAGES) -> onnx.ModelProto:
    """What quantize_static makes of a model."""
    return to_int8(model, ranges_of(model, [{"image": images}], used.recipe, 1), used.recipe)


def uneven(seed: int = 0) -> onnx.ModelProto:
    """conv_net with its first fully connected layer as a product whose inner channels differ by orders of magnitude."""
    model = nets.conv_net()
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((24, 768)) * np.logspace(0, -3, 24)[:, None]
    second = rng.standard_normal((96, 24)) * np.logspace(-1, 2, 24)
    place = next(i for i, n in enumerate(model.graph.node) if n.output[0] == "g1")
    old = model.graph.node[place]
    inner = node("Gemm", ["flat", "inner.w"], ["inner"], "inner", transB=1)
    outer = node("Gemm", ["inner", "outer.w", "fc1.b"], ["g1"], "outer", transB=1)
    rest = [inner if n is old else n for n in model.graph.node]
    rest.insert(place + 1, outer)
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in rest]
    del model.graph.node[:]
    model.graph.node.extend(rest)
    values = {"inner.w": first / 28, "outer.w": second}
    model.graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in values.items())
    kept = [t for t in model.graph.initializer if t.name != "fc1.w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def test_bases_between_factors_make_integers_hurt_less():
    model = uneven()
    used = quantiser(model)
    assert off(model, used.finished(model)) < 0.5 * off(model, plain(used, model))


def test_what_is_prepared_is_the_same_network():
    model = uneven()
    prepared = quantiser(model).prepared(model).model
    assert prepared != model
    assert off(model, prepared) < 0.02  # biases make up for weights that are not rounded yet


def test_biases_take_the_mean_of_what_rounding_changes():
    rng = np.random.default_rng(0)
    weight = (0.004 * rng.uniform(0.1, 1, (8, 6, 3, 3))).astype(np.float32)
    weight[:, 0, 0, 0] = 1.0  # steps of 1/127: what is below half of that is gone
    nodes = [node("Conv", ["image", "w"], ["logits"], pads=[1] * 4)]
    model = make(nodes, {"image": ["N", 6, 7, 7]}, ["logits"], {"w": weight})
    images = (1 + 0.1 * rng.standard_normal((64, 6, 7, 7))).astype(np.float32)
    used = quantiser(model, images)
    fed = {"image": images}
    errors_of = [run(q, fed)[0] - run(model, fed)[0] for q in (plain(used, model, images), used.finished(model))]
    before, after = (np.abs(e.mean(axis=(0, 2, 3))).mean() for e in errors_of)
    assert after < 0.1 * before


def test_float_models_are_left_alone():
    model = nets.conv_net()
    used = quantiser(model, precision="float32")
    assert not used.rounds
    assert used.finished(model) is model
    assert used.stand_in(model) is model


class Threshold:
    """A gate of a relative error on the images."""

    def __init__(self, model: onnx.ModelProto, limit: float) -> None:
        self._model, self._limit, self.search = model, limit, np.arange(len(IMAGES))

    def drop(self, model, items):
        return Drop(off(self._model, model), "relative error")

    def holds(self, drop):
        return drop.value <= self._limit


def test_what_loses_too_much_stays_in_float():
    model = nets.conv_net()
    values = integers(model)
    weight = values["conv2.w"].copy()
    weight[:, 0, 0, 0] = 60 * np.abs(weight).max()  # one large entry a filter leaves no bits for the others
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in changed.graph.initializer:
        if tensor.name == "conv2.w":
            tensor.CopyFrom(numpy_helper.from_array(weight, "conv2.w"))
    used = quantiser(changed)
    prepared = used.prepared(changed)
    assert used.by_loss(prepared)[0] == "c2"
    whole, best = (off(changed, used.rounded(prepared, kept)) for kept in ((), ("c2",)))
    assert best < whole
    mixed, kept = kept_within(used, Threshold(changed, (whole + best) / 2), changed)
    assert kept == {"c2"}
    assert off(changed, mixed) <= (whole + best) / 2
    everything, kept = kept_within(used, Threshold(changed, whole), changed)
    assert kept == frozenset()
    assert off(changed, everything) == pytest.approx(whole)
    _, kept = kept_within(used, Threshold(changed, 0.0), changed)  # nothing would do
    assert kept == frozenset()


# ------------------------------------------------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def found():
    return onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=CONFIG)


def test_the_result_is_the_compressed_network_in_integers(found):
    original = nets.conv_net()
    names = ["original", "INT8", "low-rank + sparse", "low-rank + sparse, INT8"]
    assert [variant.name for variant in found.variants] == names
    assert [variant.chosen for variant in found.variants] == [False, False, False, True]
    assert found.model == found.variants[-1].model
    assert "QuantizeLinear" in ops(found.model)
    assert models.signature(found.model) == models.signature(original)
    sizes = [variant.file_bytes for variant in found.variants]
    assert sizes[0] > sizes[1] > sizes[3]
    assert found.after.file_bytes == sizes[3]
    assert found.after.params <= 0.3 * found.before.params
    assert found.variants[0].quality[0].relative_l2 == 0.0
    assert found.quality[0].relative_l2 == pytest.approx(found.variants[-1].quality[0].relative_l2)
    assert off(original, found.model) < 1.2 * off(original, found.variants[2].model) + 0.05


def test_the_record_tells_the_ways_as_json(found):
    written = json.loads(found.to_json())
    assert [variant["chosen"] for variant in written["variants"]] == [False, False, False, True]
    assert "model" not in written["variants"][0]
    assert written["settings"]["precision"] == "int8"


def test_our_float_output_quantises_with_the_users_own_call(found, tmp_path):
    small = found.variants[2].model
    onnx.save(small, tmp_path / "small.onnx")
    quantize_static(
        tmp_path / "small.onnx", tmp_path / "int8.onnx", Batches(IMAGES), quant_format=QuantFormat.QDQ, per_channel=True
    )
    written = onnx.load(tmp_path / "int8.onnx")
    assert not [t.name for t in written.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert off(small, written) < 0.1


def test_with_a_limit_of_what_may_be_lost_the_output_is_never_clearly_slower():
    config = dataclasses.replace(CONFIG, budget=Budget(max_drop=0.2))
    found = onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=config)
    if found.unchanged:
        assert found.model == nets.conv_net()
        return
    chosen = next(variant for variant in found.variants if variant.chosen)
    assert chosen.latency_ms <= min(variant.latency_ms for variant in found.variants[:2]) / 0.97
    assert found.after.file_bytes <= found.before.file_bytes


def test_half_precision_needs_no_data():
    found = onnx_lrs.compress(nets.conv_net(), config=dataclasses.replace(CONFIG, precision="fp16", fit="cascade"))
    assert [variant.name for variant in found.variants][-1] == "low-rank + sparse, FP16"
    assert {t.data_type for t in found.model.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}


def test_a_dry_run_times_integers_and_writes_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, dry_run=True)
    found = onnx_lrs.compress(nets.conv_net(), tmp_path / "no.onnx", data=IMAGES, config=config)
    assert not (tmp_path / "no.onnx").exists()
    assert len(found.variants) == 4
    assert found.variants[0].quality is None


def test_a_budget_of_bytes_counts_integers():
    config = dataclasses.replace(CONFIG, budget=Budget(size=0.2))
    found = onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=config)
    assert found.after.file_bytes <= 0.2 * found.before.file_bytes
    assert found.after.params > 0.2 * found.before.params  # four bytes became one


def test_sentences_of_any_length_go_through():
    config = dataclasses.replace(CONFIG, budget=Budget(params=0.6))
    found = onnx_lrs.compress(nets.block(), data=nets.sentences(), config=config)
    assert "QuantizeLinear" in ops(found.model)
    assert found.quality[0].relative_l2 < 0.5


def test_a_model_in_integers_may_be_given(tmp_path):
    onnx.save(nets.conv_net(), tmp_path / "float.onnx")
    options = {"quant_format": QuantFormat.QDQ, "per_channel": True, "activation_type": QuantType.QUInt8}
    quantize_static(tmp_path / "float.onnx", tmp_path / "given.onnx", Batches(IMAGES), **options)
    config = dataclasses.replace(CONFIG, precision="float32")
    found = onnx_lrs.compress(tmp_path / "given.onnx", tmp_path / "small.onnx", data=0.5 * IMAGES, config=config)
    given, written = onnx.load(tmp_path / "given.onnx"), onnx.load(tmp_path / "small.onnx")
    assert found.settings["precision"] == "int8"
    assert found.before.file_bytes == (tmp_path / "given.onnx").stat().st_size
    assert 0 <= found.before.params - nets.count_params(nets.conv_net()) <= 6  # limits of three Clips
    assert found.after.params <= 0.3 * found.before.params
    assert found.after.file_bytes < found.before.file_bytes
    for name in ("image_scale", "r1_scale", "r3_zero_point", "logits_scale"):  # not those of the darker images
        assert integers(written)[name] == integers(given)[name]
    assert models.signature(written) == models.signature(given)
    assert off(given, written) < 1.0
    looked = onnx_lrs.inspect(tmp_path / "given.onnx")
    assert [layer.op for layer in looked.layers if layer.eligible] == ["Conv", "Gemm"]
    assert "INT8" in looked.notes[0]
    with pytest.raises(errors.ConfigError, match="does not go with --quantize fp16"):
        onnx_lrs.compress(given, data=IMAGES, config=dataclasses.replace(CONFIG, precision="fp16"))


@pytest.mark.parametrize(
    ("config", "data", "said"),
    [
        (CONFIG, None, "needs typical inputs"),
        (dataclasses.replace(CONFIG, method="ddlr", budget=Budget(gain=0.1)), IMAGES, "guarantees an error"),
        (dataclasses.replace(CONFIG, method="greedy", structure="elements"), IMAGES, "single elements"),
    ],
)
def test_what_does_not_go_together_is_said(config, data, said):
    with pytest.raises(errors.ConfigError, match=said):
        onnx_lrs.compress(nets.conv_net(), data=data, config=config)


def test_settings_are_checked():
    with pytest.raises(errors.ConfigError, match="use int8 or fp16"):
        Config(precision="int4")
    with pytest.raises(errors.ConfigError, match="Add --quantize int8"):
        Config(quantize_options={"per_channel": "True"})
    assert PRECISIONS[0] == "float32"


def test_the_command_line(tmp_path, capsys):
    onnx.save(nets.conv_net(), tmp_path / "model.onnx")
    np.save(tmp_path / "data.npy", IMAGES)
    call = [str(tmp_path / "model.onnx"), "-o", str(tmp_path / "small.onnx"), "--data", str(tmp_path / "data.npy")]
    call += ["--params", "0.3", "--fit", "independent", "--threads", "1", "--quantize", "int8"]
    assert cli.main([*call, "--quantize-option", "calibrate_method=percentile", "ActivationSymmetric=False"]) == 0
    said = capsys.readouterr().err
    assert "low-rank + sparse, INT8" in said
    assert "handed out" in said
    assert "of them on integers" in said
    assert "QuantizeLinear" in ops(onnx.load(tmp_path / "small.onnx"))
    assert cli.main([*call, "--quantize-option", "calibrate_method=magic"]) == 2
    with pytest.raises(SystemExit):
        cli.main([*call, "--quantize-option", "nothing"])
