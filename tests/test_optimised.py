"""What ONNX Runtime makes of a graph is read off its own file; a provider that does not start is an error."""

from __future__ import annotations

import collections
import dataclasses
import json
import platform
import tempfile

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_lrs
from onnx_lrs import cli
from onnx_lrs.errors import RuntimeEnvironmentError
from onnx_lrs.graph import weights
from onnx_lrs.graph.model import load
from onnx_lrs.runtime import session as sessions
from onnx_lrs.runtime.optimised import look, look_at_both, read
from onnx_lrs.runtime.session import Session, check_provider
from tests import small_nets as nets
from tests.builders import make, node, normal
from tests.devices import starts

BLOCKED = platform.machine().lower() in ("x86_64", "amd64")  # ONNX Runtime has NCHWc for these processors alone
x86 = pytest.mark.skipif(not BLOCKED, reason="NCHWc is for x86-64")
SAME = {"pads": [1, 1, 1, 1]}


def two_convs(channels: int, activation: str = "Relu") -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b"], ["a"], "c1", **SAME),
        node(activation, ["a"], ["r"], "act1"),
        node("Conv", ["r", "w2", "b"], ["s"], "c2", **SAME),
        node(activation, ["s"], ["y"], "act2"),
    ]
    kernel = (channels, channels, 3, 3)
    constants = {"w1": normal(*kernel), "w2": normal(*kernel, seed=1), "b": normal(channels)}
    return make(nodes, {"x": ["N", channels, 12, 12]}, ["y"], constants)


def pair(activation: str = "Relu", size: tuple[int | str, int | str] = (12, 12)) -> onnx.ModelProto:
    """Return a Conv with behind it one that was replaced by a low-rank part and kept channels."""
    nodes = [
        node("Conv", ["x", "w0"], ["x0"], "first"),
        node("Conv", ["x0", "right"], ["m"], "layer.right_product", **SAME),
        node("Conv", ["m", "left", "b"], ["low"], "layer.left_product"),
        node("Gather", ["x0", "kept"], ["g"], "layer.gather", axis=1),
        node("Conv", ["g", "sparse"], ["high"], "layer.sparse_product", **SAME),
        node("Add", ["low", "high"], ["a"], "layer.sum"),
        node(activation, ["a"], ["y"], "act"),
    ]
    constants = {
        "w0": normal(64, 64, 1, 1),
        "right": normal(16, 64, 3, 3),
        "left": normal(64, 16, 1, 1),
        "sparse": normal(64, 16, 3, 3),
        "kept": np.arange(16, dtype=np.int64),
        "b": normal(64),
    }
    return make(nodes, {"x": ["N", 64, *size]}, ["y"], constants)


def written_by_onnxruntime(model: onnx.ModelProto, folder) -> onnx.ModelProto:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "seen.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "seen.onnx")


# ------------------------------------------------------------------------------------------------ what is fused


@x86
def test_channels_in_multiples_of_16_are_all_in_nchwc_and_their_activations_fuse():
    seen = look(two_convs(16), 1)
    assert (seen.convs, seen.nchwc, seen.outside_nchwc) == (2, 2, ())
    assert (seen.activations, seen.unfused_activations) == (2, ())
    assert seen.reorders == 2


@x86
def test_45_channels_stay_outside_nchwc():
    seen = look(two_convs(45), 1)
    assert (seen.convs, seen.nchwc, seen.outside_nchwc) == (2, 0, ("c1", "c2"))
    assert (seen.activations, seen.reorders) == (2, 0)
    assert seen.ops == {"com.microsoft.FusedConv": 2}


@x86
def test_a_pairs_sum_and_the_relu_behind_it_are_fused():
    seen = look(pair(), 1)
    assert (seen.sums, seen.unfused_sums) == (1, ())
    assert (seen.activations, seen.unfused_activations) == (1, ())
    assert seen.ops["Gather"] == 1
    assert "Add" not in seen.ops


@x86
def test_a_leaky_relu_behind_a_fused_sum_stands_alone():
    seen = look(pair("LeakyRelu"), 1)
    assert (seen.sums, seen.unfused_sums) == (1, ())
    assert (seen.activations, seen.unfused_activations) == (0, ("act",))


def test_with_open_height_and_width_a_pairs_sum_is_named_as_not_fused():
    seen = look(pair(size=("H", "W")), 1)
    assert (seen.sums, seen.unfused_sums) == (0, ("layer.sum",))
    assert seen.unfused_activations == ("act",)


def test_a_gemm_takes_its_activation_and_a_matmul_does_not():
    nodes = [
        node("Gemm", ["x", "w", "b"], ["a"], "gemm"),
        node("Relu", ["a"], ["r"], "fused"),
        node("Unsqueeze", ["r", "first"], ["u"], "shape"),
        node("MatMul", ["u", "v"], ["m"], "matmul"),
        node("Add", ["m", "b"], ["n"], "bias"),
        node("Add", ["n", "u"], ["s"], "shortcut"),
        node("Tanh", ["s"], ["y"], "alone"),
    ]
    constants = {"w": normal(16, 16), "v": normal(16, 16), "b": normal(16), "first": np.array([0])}
    seen = look(make(nodes, {"x": ["N", 16]}, ["y"], constants), 1)
    assert (seen.activations, seen.unfused_activations) == (1, ("alone",))
    assert seen.unfused_sums == ("shortcut",), "a bias is no sum"
    assert seen.convs == seen.nchwc == 0


@pytest.mark.parametrize("model", [two_convs(16), two_convs(45), pair(), nets.conv_net(), nets.block()])
def test_the_counts_are_those_of_the_file_that_onnxruntime_writes(model, tmp_path):
    direct = written_by_onnxruntime(model, tmp_path)
    seen = look(model, 1)
    counts = collections.Counter((n.domain, n.op_type) for n in direct.graph.node)
    assert seen.ops == {f"{domain}.{op}" if domain else op: count for (domain, op), count in counts.items()}
    assert seen.convs == sum(count for (_, op), count in counts.items() if op in ("Conv", "FusedConv"))
    assert seen.nchwc == counts["com.microsoft.nchwc", "Conv"]
    assert (seen.copies, seen.elsewhere) == (0, ())
    assert read(direct.graph) == seen


def test_activations_and_sums_of_nothing_that_is_a_layer_do_not_count():
    nodes = [node("Add", ["x", "z"], ["a"], "sum"), node("Relu", ["a"], ["r"], "act")]
    nodes += [node("MaxPool", ["r"], ["y"], "pool", kernel_shape=[2, 2])]
    seen = look(make(nodes, {"x": [1, 4, 8, 8], "z": [1, 4, 8, 8]}, ["y"], {}), 1)
    assert (seen.unfused_sums, seen.unfused_activations) == ((), ())


def test_copies_between_device_and_cpu_are_counted():
    copies = [node(op, [f"x{i}"], [f"y{i}"], domain="") for i, op in enumerate(("MemcpyToHost", "MemcpyFromHost"))]
    seen = read(onnx.helper.make_graph(copies, "graph", [], []), ("shape",))
    assert (seen.copies, seen.elsewhere) == (2, ("shape",))


# ------------------------------------------------------------------------------------------- how it is looked at


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert look(two_convs(16), 1) is not None
    assert not list(tmp_path.iterdir())


def test_without_a_folder_for_it_there_is_no_look_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert look(two_convs(16), 1) is None
    assert look_at_both((two_convs(16), two_convs(16)), 1, "cpu") is None


def test_weights_in_files_are_looked_at_unless_they_are_mapped(tmp_path, monkeypatch):
    path = tmp_path / "outside.onnx"
    onnx.save(two_convs(48), path, save_as_external_data=True, location="outside.data", size_threshold=0)
    model = load(path)
    assert weights.outside_bytes(model)
    assert look(model, 1) == look(two_convs(48), 1)
    monkeypatch.setattr(sessions, "MOST_COPIED", 1)
    assert look(model, 1) is None


def test_a_result_holds_both_graphs(tmp_path):
    result = onnx_lrs.compress(nets.conv_net(), tmp_path / "small.onnx", config=onnx_lrs.Config(threads=1))
    assert result.optimised == look_at_both((nets.conv_net(), onnx.load(tmp_path / "small.onnx")), 1, "cpu")
    assert result.optimised.after.convs > result.optimised.before.convs
    entry = json.loads(result.to_json())["optimised"]["after"]
    assert list(entry) == [field.name for field in dataclasses.fields(result.optimised.after)]
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


# ----------------------------------------------------------------------------------------------------- providers


def test_the_cpu_is_the_default_and_starts():
    check_provider("cpu")
    with Session(two_convs(16), 1) as session:
        assert session.provider == "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("provider", "asked"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_provider_starts_or_is_an_error_that_names_reason_and_remedy(provider, asked, tmp_path, capfd):
    onnx.save(nets.conv_net(), tmp_path / "model.onnx")
    argv = [str(tmp_path / "model.onnx"), "-o", str(tmp_path / "small.onnx"), "--threads", "1", "--provider", provider]
    able, code = starts(provider), cli.main(argv)
    out, err = capfd.readouterr()
    assert out == ""
    if able:
        assert (code, asked in err) == (0, True)
        return
    assert code == 8
    assert not (tmp_path / "small.onnx").exists()
    said, remedy = err.splitlines()  # ONNX Runtime's own lines are held back, and nothing was begun
    assert said.startswith(f"error: --provider {provider}: {asked} did not start")
    assert any(
        reason in said for reason in ("cannot open shared object file", "this build of ONNX Runtime has", "CUDA")
    )
    assert "onnxruntime-gpu" in remedy
    assert remedy.endswith("Or: --provider cpu")


def test_a_fall_back_names_what_would_run_instead():
    if starts("cuda") or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs a build for CUDA on a machine without")
    with pytest.raises(RuntimeEnvironmentError, match="CPUExecutionProvider would run instead: lib") as caught:
        Session(two_convs(16), 1, provider="cuda")
    assert "\x1b" not in str(caught.value)
