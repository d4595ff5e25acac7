"""Cases that were wrong once: each a small model that a user may well have."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnx_lrs
from onnx_lrs import Budget, Config
from onnx_lrs.calibration.capture import Setting, rows_per_call
from onnx_lrs.calibration.subject import examine
from onnx_lrs.data import open_samples
from onnx_lrs.graph import model as models
from onnx_lrs.graph.layers import find
from onnx_lrs.graph.model import View
from onnx_lrs.planning.allocate import Choice, allocate
from onnx_lrs.planning.plan import _tempered
from tests.builders import make, node, normal


def model_of(nodes, weights, shape, output="y"):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def smooth(rng, *shape):
    """Weights that are nearly of low rank in every form."""
    return (rng.standard_normal(shape) * np.linspace(2, 0.1, shape[1])[:, None, None]).astype(np.float32)


def valid_convs(size=16):
    """Two 5x5 convolutions without padding: the k x 1 part of the spatial form works on wider rows than the output."""
    rng = np.random.default_rng(0)
    weights = {"a": smooth(rng, 16, 16, 5, 5), "b": smooth(rng, 16, 16, 5, 5)}
    nodes = [
        helper.make_node("Conv", ["x", "a"], ["m"], name="first"),
        helper.make_node("Relu", ["m"], ["r"]),
        helper.make_node("Conv", ["r", "b"], ["y"], name="second"),
    ]
    return model_of(nodes, weights, ["N", 16, size, size])


@pytest.mark.parametrize("fraction", [0.6, 0.4, 0.3])
def test_macs_of_spatial_layers_without_padding_keep_to_the_budget(fraction):
    x = np.random.default_rng(1).standard_normal((40, 16, 16, 16)).astype(np.float32)
    result = onnx_lrs.compress(valid_convs(), data=x, budget=Budget(macs=fraction))
    assert result.after.macs <= fraction * result.before.macs
    assert sum(layer.macs_after for layer in result.layers) == result.after.macs


@pytest.mark.parametrize("fraction", [0.6, 0.4])
def test_macs_of_projected_layers_without_padding_keep_to_the_budget(fraction):
    """Their 1x1 part works at all positions of the input, which are more than those of the output."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((24, 4, 5, 5)), rng.standard_normal((4, 16))
    model = model_of(
        [helper.make_node("Conv", ["x", "a"], ["y"], name="only")],
        {"a": np.einsum("orab,ri->oiab", *mixing).astype(np.float32)},
        ["N", 16, 12, 12],
    )
    x = rng.standard_normal((40, 16, 12, 12)).astype(np.float32)
    result = onnx_lrs.compress(model, data=x, config=Config(budget=Budget(macs=fraction), multiple=4))
    (layer,) = result.layers
    assert (layer.form, layer.rank) == ("projected", 4)
    assert layer.macs_after == result.after.macs <= fraction * result.before.macs
    assert layer.error < 1e-3


def test_a_batch_baked_into_a_reshape_is_fed_one_by_one():
    rng = np.random.default_rng(2)
    weights = {"w": rng.standard_normal((64, 48)).astype(np.float32), "shape": np.array([1, 64])}
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["y"], name="fc"),
    ]
    x = rng.standard_normal((30, 8, 8)).astype(np.float32)
    result = onnx_lrs.compress(model_of(nodes, weights, ["N", 8, 8]), data=x, budget=Budget(params=0.6))
    assert result.after.params <= 0.6 * result.before.params
    assert result.quality[0].samples == 6


def test_a_first_axis_that_is_no_batch_is_not_joined():
    """A running mean over axis 0 mixes the samples of a joined batch."""
    weights = {"w": np.random.default_rng(3).standard_normal((64, 48)).astype(np.float32)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "w"], ["y"], name="fc"),
    ]
    model = model_of(nodes, weights, ["T", 64])
    items = [{"x": np.random.default_rng(i).standard_normal((5, 64)).astype(np.float32)} for i in range(8)]
    samples = open_samples(items, models.signature(model)[0], None)
    assert not examine(model, model, Config(), samples).dynamic_batch


def test_a_call_holds_fewer_samples_when_the_maps_are_large():
    view = View(valid_convs(size=128))
    layers, _ = find(view)
    shapes = {"x": (1, 16, 128, 128), "m": (1, 16, 124, 124), "r": (1, 16, 124, 124), "y": (1, 16, 120, 120)}
    batches = [
        rows_per_call(layers, shapes, 1, Setting(memory, 65536, 32, 1, 0, True), 20) for memory in (2**31, 2**28, 2**20)
    ]
    assert batches[0] == 32 > batches[1] > batches[2] == 1


@pytest.mark.parametrize("dim", [-1, 0])
def test_an_open_dimension_may_be_written_as_a_number_below_one(dim):
    model = valid_convs()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = dim
    assert models.signature(model)[0][0].shape == (None, 16, 16, 16)


def test_one_wild_layer_does_not_drown_the_others():
    tame = [[Choice((100,), 0.0), *(Choice((100 - 10 * i,), 1e-3 * i**2) for i in range(1, 9))] for _ in range(6)]
    wild = [Choice((100,), 0.0), Choice((50,), _tempered(1e11))]
    alone, together = allocate(tame, (300,)), allocate([*tame, wild], (400,))
    assert together is not None
    assert together[-1] == 0
    losses = [sum(layer[i].loss for layer, i in zip(tame, plan, strict=False)) for plan in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(onnx_lrs.OnnxLrsError, match="matches no layer"):
        onnx_lrs.compress(valid_convs(), config=Config(exclude=("frist",)))
    for wrong in ({"exclude": "first"}, {"budget": 0.5}):
        with pytest.raises(onnx_lrs.OnnxLrsError):
            Config(**wrong)


def test_labels_that_nobody_asked_for_may_hold_anything(tmp_path):
    x = np.random.default_rng(1).standard_normal((10, 16, 16, 16)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, labels=np.eye(10))
    assert onnx_lrs.compress(valid_convs(), data=tmp_path / "data.npz", budget=Budget(params=0.9)).quality


def test_the_output_is_written_through_a_link(tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real.onnx")
    onnx_lrs.compress(valid_convs(), tmp_path / "link.onnx", budget=Budget(params=0.9))
    assert (tmp_path / "link.onnx").is_symlink()
    assert onnx.load(tmp_path / "real.onnx").graph.node


def test_a_bias_that_several_layers_share_is_counted_once_for_each_that_gets_its_own():
    """Exporters store equal biases once; a layer that is compressed gets a new one, and the old one stays."""
    constants = {f"w{i}": normal(40, 40, seed=i) for i in range(3)} | {"b": normal(40)}
    nodes = [
        node("Gemm", ["x", "w0", "b"], ["a"], "one"),
        node("Gemm", ["a", "w1", "b"], ["c"], "two"),
        node("Gemm", ["c", "w2", "b"], ["y"], "three"),
    ]
    model = make(nodes, {"x": ("N", 40)}, {"y": ("N", 40)}, constants)
    for params in (0.3, 0.5, 0.7, 0.9):
        config = Config(budget=Budget(params=params), threads=1, multiple=1)
        done = onnx_lrs.compress(model, data={"x": normal(100, 40)}, config=config)
        assert done.after.params <= params * done.before.params
