"""Train the LeNet-5 that the project ships, and draw the digits that go with it.

The network is the Caffe variant that the compression literature uses (431,080 parameters)::

    image (N,1,28,28), 0..255 -> * 1/255
    conv1 5x5x20 -> relu1 -> pool1 2x2 -> conv2 5x5x50 -> relu2 -> pool2 2x2
    flatten (N,800) -> fc1 500 -> relu3 -> fc2 10 -> logits (N,10)

Run it with PyTorch in an environment of its own; nothing else in the project needs PyTorch::

    python tools/make_lenet.py --mnist DIR --out models

DIR holds ``mnist_train.npz`` and ``mnist_test.npz``, each with ``x`` (N,28,28) uint8 and ``y`` (N,).
The test images are used for nothing but the accuracy that is printed: the number of epochs is fixed
beforehand, and no epoch is chosen by its test accuracy.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    import torch

OPSET = 17
IR_VERSION = 8
CLASSES = 10
DIGITS_PER_CLASS = 100
BATCH = 128
LEARNING_RATE = 2e-3
MAX_ROTATION_DEGREES = 10.0
MAX_SHIFT_PIXELS = 2.0
MAX_LOGIT_DIFFERENCE = 1e-4
PARAMETER_SHAPES = {
    "conv1.weight": (20, 1, 5, 5),
    "conv1.bias": (20,),
    "conv2.weight": (50, 20, 5, 5),
    "conv2.bias": (50,),
    "fc1.weight": (500, 800),
    "fc1.bias": (500,),
    "fc2.weight": (10, 500),
    "fc2.bias": (10,),
}
METADATA = {
    "architecture": "LeNet-5, Caffe variant, 431,080 parameters",
    "source": "trained from random weights by tools/make_lenet.py of onnx-lrs",
    "license": "Apache-2.0",
    "dataset": "MNIST (LeCun, Cortes, Burges)",
    "dataset_license": "CC-BY-SA-3.0",
}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images (N,28,28) uint8 with their labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> Labelled:
        """Return the rows at `indices`."""
        return Labelled(self.images[indices], self.labels[indices])


def load_mnist(folder: Path, part: str) -> Labelled:
    """Read ``mnist_<part>.npz`` and check its shapes.

    Parameters
    ----------
    folder : Path
        Folder with the two files.
    part : str
        ``"train"`` or ``"test"``.

    Returns
    -------
    Labelled
    """
    path = folder / f"mnist_{part}.npz"
    with np.load(path) as archive:
        images, labels = archive["x"], archive["y"].astype(np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28):
        raise ValueError(f"{path}: x must be uint8 of shape ({len(labels)}, 28, 28), not {images.dtype} {images.shape}")
    return Labelled(images, labels)


def balanced_draw(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `per_class` indices of every class without replacement, in random order.

    Parameters
    ----------
    labels : ndarray, shape (N,)
        Class of each sample, 0..9.
    per_class : int
        Samples to draw from each class.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    ndarray, shape (10 * per_class,)
        Indices into `labels`.
    """
    drawn = [rng.choice(np.flatnonzero(labels == c), per_class, replace=False) for c in range(CLASSES)]
    return rng.permutation(np.concatenate(drawn))


def draw_digits(train: Labelled, test: Labelled, seed: int) -> dict[str, np.ndarray]:
    """Draw the calibration digits from the training set and the test digits from the test set."""
    calibration = train.take(balanced_draw(train.labels, DIGITS_PER_CLASS, np.random.default_rng([seed, 0])))
    shipped_test = test.take(balanced_draw(test.labels, DIGITS_PER_CLASS, np.random.default_rng([seed, 1])))
    seen = {image.tobytes() for image in calibration.images}
    if any(image.tobytes() in seen for image in shipped_test.images):
        raise RuntimeError("an image is in both the calibration and the test draw; choose another --seed")
    return {
        "calibration": calibration.images,
        "calibration_labels": calibration.labels,
        "test": shipped_test.images,
        "test_labels": shipped_test.labels,
    }


def build_network() -> torch.nn.Sequential:
    """Return the network with PyTorch's default random weights; its input is pixel values over 255."""
    import collections

    from torch import nn

    return nn.Sequential(
        collections.OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu3=nn.ReLU(),
            fc2=nn.Linear(500, CLASSES),
        )
    )


def to_batch(images: np.ndarray) -> torch.Tensor:
    """Turn (N,28,28) uint8 into (N,1,28,28) float32 in 0..1, as the graph does."""
    import torch

    return torch.from_numpy(images[:, None].astype(np.float32)) * (1 / 255)


def augment(batch: torch.Tensor) -> torch.Tensor:
    """Rotate and shift every image of (N,1,28,28) by a random angle and offset of its own."""
    import torch

    count = len(batch)
    angle = (torch.rand(count) * 2 - 1) * math.radians(MAX_ROTATION_DEGREES)
    shift = (torch.rand(count, 2) * 2 - 1) * (MAX_SHIFT_PIXELS / 14)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = torch.nn.functional.affine_grid(theta, list(batch.shape), align_corners=False)
    return torch.nn.functional.grid_sample(batch, grid, align_corners=False)


def train_network(train: Labelled, seed: int, epochs: int) -> torch.nn.Sequential:
    """Train with Adam, a one-cycle learning rate and light augmentation.

    Parameters
    ----------
    train : Labelled
        The training set.
    seed : int
        Seed of weights, order and augmentation.
    epochs : int
        Passes over the training set.

    Returns
    -------
    torch.nn.Sequential
        The trained network, in evaluation mode.
    """
    import torch

    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    network = build_network()
    images, labels = to_batch(train.images), torch.from_numpy(train.labels)
    steps = math.ceil(len(labels) / BATCH)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = torch.nn.functional.cross_entropy(network(augment(images[rows])), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: training loss {total / len(labels):.4f}", flush=True)
    return network.eval()


def graph_nodes() -> list[onnx.NodeProto]:
    """Return the nodes of the graph, in order."""
    conv = {"kernel_shape": [5, 5], "strides": [1, 1], "pads": [0, 0, 0, 0]}
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    rows: list[tuple[str, str, list[str], dict[str, object]]] = [
        ("Mul", "scale", ["image", "pixel_scale"], {}),
        ("Conv", "conv1", ["scale_out", "conv1.weight", "conv1.bias"], conv),
        ("Relu", "relu1", ["conv1_out"], {}),
        ("MaxPool", "pool1", ["relu1_out"], pool),
        ("Conv", "conv2", ["pool1_out", "conv2.weight", "conv2.bias"], conv),
        ("Relu", "relu2", ["conv2_out"], {}),
        ("MaxPool", "pool2", ["relu2_out"], pool),
        ("Flatten", "flatten", ["pool2_out"], {"axis": 1}),
        ("Gemm", "fc1", ["flatten_out", "fc1.weight", "fc1.bias"], {"transB": 1}),
        ("Relu", "relu3", ["fc1_out"], {}),
        ("Gemm", "fc2", ["relu3_out", "fc2.weight", "fc2.bias"], {"transB": 1}),
    ]
    nodes = [helper.make_node(op, inputs, [f"{name}_out"], name=name, **attrs) for op, name, inputs, attrs in rows]
    nodes[-1].output[0] = "logits"
    return nodes


def build_onnx(parameters: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Build the ONNX model from its eight parameter arrays and check it.

    Parameters
    ----------
    parameters : dict of str to ndarray
        One float32 array for each name in `PARAMETER_SHAPES`.

    Returns
    -------
    onnx.ModelProto
    """
    shapes = {name: array.shape for name, array in parameters.items()}
    if shapes != PARAMETER_SHAPES:
        raise ValueError(f"the parameters have the shapes {shapes}, not {PARAMETER_SHAPES}")
    scale = numpy_helper.from_array(np.float32(1 / 255), "pixel_scale")
    initializers = [numpy_helper.from_array(parameters[name], name) for name in PARAMETER_SHAPES]
    graph = helper.make_graph(
        graph_nodes(),
        "lenet5",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [scale, *initializers],
        doc_string="Handwritten digits: pixel values 0..255 in, one logit for each digit out.",
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    model.producer_name = "onnx-lrs"
    model.doc_string = "LeNet-5 (Caffe variant) trained on MNIST by tools/make_lenet.py; weights Apache-2.0."
    helper.set_model_props(model, METADATA)
    onnx.checker.check_model(model, full_check=True)
    return model


def onnx_logits(model: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Run the model with ONNX Runtime on the CPU: (N,28,28) uint8 to (N,10)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images[:, None].astype(np.float32)})[0])


def export(network: torch.nn.Sequential, images: np.ndarray) -> onnx.ModelProto:
    """Build the ONNX model of `network` and compare the two on `images`."""
    import torch

    model = build_onnx({name: value.detach().numpy() for name, value in network.named_parameters()})
    with torch.no_grad():
        expected = network(to_batch(images)).numpy()
    difference = float(np.abs(onnx_logits(model, images) - expected).max())
    print(f"PyTorch and ONNX Runtime logits differ by at most {difference:.2e}")
    if not difference < MAX_LOGIT_DIFFERENCE:
        raise RuntimeError(
            f"the logits differ by {difference:.2e}, the limit is {MAX_LOGIT_DIFFERENCE}; nothing written"
        )
    return model


def accuracy(model: onnx.ModelProto, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of `images` that `model` labels correctly."""
    return float((onnx_logits(model, images).argmax(axis=1) == labels).mean())


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the LeNet-5 that the project ships.")
    parser.add_argument("--mnist", type=Path, required=True, help="folder with mnist_train.npz and mnist_test.npz")
    parser.add_argument("--out", type=Path, default=Path("models"), help="folder to write to (default: models)")
    parser.add_argument("--seed", type=int, default=0, help="seed of training and of the draw (default: 0)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training set (default: 12)")
    return parser.parse_args()


def main() -> None:
    """Train, check, and write ``lenet5.onnx`` and ``digits.npz``."""
    import torch

    arguments = parse_arguments()
    torch.set_num_threads(2)
    train, test = load_mnist(arguments.mnist, "train"), load_mnist(arguments.mnist, "test")
    digits = draw_digits(train, test, arguments.seed)
    model = export(train_network(train, arguments.seed, arguments.epochs), test.images)
    print(f"accuracy on the {len(test.labels):,} test images: {accuracy(model, test.images, test.labels):.2%}")
    shipped = accuracy(model, digits["test"], digits["test_labels"])
    print(f"accuracy on the {len(digits['test']):,} drawn test images: {shipped:.2%}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    onnx.save(model, arguments.out / "lenet5.onnx")
    np.savez_compressed(arguments.out / "digits.npz", **digits)
    for name in ("lenet5.onnx", "digits.npz"):
        print(f"{arguments.out / name}: {(arguments.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
