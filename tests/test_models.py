"""The model and the digits that the project ships in models/, and the tool that makes them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

ROOT = Path(__file__).resolve().parents[1]
LENET = ROOT / "models" / "lenet5.onnx"
DIGITS = ROOT / "models" / "digits.npz"
PARAMETERS = 431_080
MIN_ACCURACY = 0.988


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(LENET)


@pytest.fixture(scope="module")
def digits() -> dict[str, np.ndarray]:
    with np.load(DIGITS) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def make_lenet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_lenet", ROOT / "tools" / "make_lenet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def logits(images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(LENET, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": images[:, None].astype(np.float32)})[0]


def parameters(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {name: array for name, array in arrays.items() if name.endswith((".weight", ".bias"))}


def test_the_checker_accepts_the_model(model):
    onnx.checker.check_model(model, full_check=True)


def test_versions_and_provenance(model):
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert model.producer_name == "onnx-lrs"
    assert model.doc_string
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["license"] == "Apache-2.0"
    assert properties["dataset_license"] == "CC-BY-SA-3.0"


def test_parameter_count(model):
    assert sum(array.size for array in parameters(model).values()) == PARAMETERS


def test_parameters_are_finite_float32(model):
    for name, array in parameters(model).items():
        assert array.dtype == np.float32, name
        assert np.isfinite(array).all(), name


def test_layers(model):
    named = {node.name: node.op_type for node in model.graph.node}
    weighted = {name: op for name, op in named.items() if op in {"Conv", "Gemm"}}
    assert weighted == {"conv1": "Conv", "conv2": "Conv", "fc1": "Gemm", "fc2": "Gemm"}


@pytest.mark.parametrize("batch", [1, 7])
def test_any_batch_size_gives_one_row_of_logits_an_image(batch):
    images = np.random.default_rng(batch).integers(0, 256, (batch, 28, 28), dtype=np.uint8)
    together = logits(images)
    assert together.shape == (batch, 10)
    alone = np.concatenate([logits(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_the_tool_builds_the_shipped_file(model, make_lenet):
    rebuilt = make_lenet.build_onnx(parameters(model))
    assert rebuilt == model


def test_the_tool_refuses_parameters_of_another_network(make_lenet):
    with pytest.raises(ValueError, match="shapes"):
        make_lenet.build_onnx({"conv1.weight": np.zeros((6, 1, 5, 5), np.float32)})


def test_the_draw_is_seeded_balanced_and_without_repeats(make_lenet):
    labels = np.random.default_rng(0).integers(0, 10, 500)
    draw = make_lenet.balanced_draw(labels, 20, np.random.default_rng(3))
    np.testing.assert_array_equal(draw, make_lenet.balanced_draw(labels, 20, np.random.default_rng(3)))
    assert len(set(draw.tolist())) == 200
    np.testing.assert_array_equal(np.bincount(labels[draw]), np.full(10, 20))


def test_the_tool_refuses_a_draw_with_a_shared_image(make_lenet):
    labels = np.arange(1000) % 10
    same = make_lenet.Labelled(np.zeros((1000, 28, 28), np.uint8), labels)
    with pytest.raises(RuntimeError, match="both"):
        make_lenet.draw_digits(same, same, seed=0)


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_digits_are_balanced_uint8_images(digits, part):
    images, labels = digits[part], digits[f"{part}_labels"]
    assert (images.dtype, images.shape) == (np.uint8, (1000, 28, 28))
    assert (labels.dtype, labels.shape) == (np.int64, (1000,))
    np.testing.assert_array_equal(np.bincount(labels), np.full(10, 100))


def test_no_image_is_in_both_parts(digits):
    calibration = {image.tobytes() for image in digits["calibration"]}
    assert calibration.isdisjoint(image.tobytes() for image in digits["test"])


def test_accuracy_on_the_test_digits(digits):
    correct = logits(digits["test"]).argmax(axis=1) == digits["test_labels"]
    assert correct.mean() >= MIN_ACCURACY
