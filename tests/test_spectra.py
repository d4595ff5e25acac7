"""Effective ranks: planted ranks are found, in every kind of layer and by every way to the statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_lrs
from onnx_lrs import Config, cli
from tests.builders import make, node

FLAT = 0.99  # the share of the energy that the rank keeps


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]


def planted(rng: np.random.Generator, out: int, d: int, rank: int) -> np.ndarray:
    """Return a matrix (out, d) whose ``rank`` singular values are all 1."""
    return (orthonormal(rng, out, rank) @ orthonormal(rng, d, rank).T).astype(np.float32)


def gemm(weight: np.ndarray) -> onnx.ModelProto:
    out, d = weight.shape
    return make([node("Gemm", ["x", "w"], ["y"], "fc", transB=1)], {"x": ["N", d]}, {"y": ["N", out]}, {"w": weight})


def conv(weight: np.ndarray, size: int) -> onnx.ModelProto:
    channels = weight.shape[1]
    nodes = [node("Conv", ["x", "w"], ["y"], "conv", kernel_shape=[3, 3])]
    return make(nodes, {"x": ["N", channels, size, size]}, ["y"], {"w": weight})


def rank_of(model: onnx.ModelProto, data: np.ndarray, config: Config | None = None) -> tuple[int, int]:
    """Return the effective and the full rank of the only layer."""
    (layer,) = onnx_lrs.inspect(model, data=data, config=config or Config(threads=1)).layers
    return layer.effective_rank, layer.full_rank


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_rank_planted_in_a_conv_is_found(rank):
    """On white noise every direction that the weight passes has the same energy."""
    rng = np.random.default_rng(rank)
    weight = planted(rng, 24, 6 * 9, rank).reshape(24, 6, 3, 3)
    data = rng.standard_normal((40, 6, 12, 12), np.float32)
    assert rank_of(conv(weight, 12), data) == (rank, 24)


@pytest.mark.parametrize("rank", [1, 7])
def test_the_rank_planted_in_the_inputs_of_a_gemm_is_found(rank):
    """The weight has full rank; it is the samples that use few directions. Their common mean does not count."""
    rng = np.random.default_rng(rank)
    weight = orthonormal(rng, 40, 32).astype(np.float32)
    data = rng.standard_normal((400, rank)) @ orthonormal(rng, 32, rank).T + 10 * rng.standard_normal(32)
    assert rank_of(gemm(weight), data.astype(np.float32)) == (rank, 32)


def test_directions_of_less_than_a_percent_of_the_energy_do_not_count():
    rng = np.random.default_rng(0)
    scales = np.array([1.0, 1.0, 1.0, 0.05, 0.05])  # squared: the last two are 0.17 % of the energy
    data = (rng.standard_normal((2000, 5)) * scales) @ orthonormal(rng, 32, 5).T
    assert 2 * 0.05**2 / np.square(scales).sum() < 1 - FLAT
    assert rank_of(gemm(np.eye(32, dtype=np.float32)), data.astype(np.float32)) == (3, 32)


def test_the_rank_planted_in_a_layer_too_wide_for_its_statistics_is_found():
    """2304 features at 256 MiB: the moments are those of the outputs, which must give the same answer."""
    rng = np.random.default_rng(0)
    weight = planted(rng, 32, 2304, 6)
    data = rng.standard_normal((300, 2304), np.float32)
    answers = [rank_of(gemm(weight), data, Config(threads=1, memory_bytes=size)) for size in (2**28, 2**31)]
    assert answers == [(6, 32)] * 2


def test_one_sample_is_enough_for_a_conv_and_tells_nothing_of_a_gemm():
    rng = np.random.default_rng(0)
    weight = planted(rng, 24, 6 * 9, 4).reshape(24, 6, 3, 3)
    assert rank_of(conv(weight, 40), rng.standard_normal((1, 6, 40, 40), np.float32)) == (4, 24)
    assert rank_of(gemm(planted(rng, 32, 32, 8)), rng.standard_normal((1, 32), np.float32)) == (0, 32)


def test_the_command_line_tells_ranks_with_data_only(tmp_path: Path, capsys):
    rng = np.random.default_rng(0)
    onnx.save(gemm(planted(rng, 32, 32, 3)), tmp_path / "net.onnx")
    np.save(tmp_path / "data.npy", rng.standard_normal((200, 32), np.float32))
    call = ["inspect", str(tmp_path / "net.onnx"), "--threads", "1", "--json", "-"]
    for more, rank in (([], None), (["--data", str(tmp_path / "data.npy")], 3)):
        assert cli.main([*call, *more]) == 0
        out, told = capsys.readouterr()
        assert json.loads(out)["layers"][0]["effective_rank"] == rank
        assert ("3/32" in told) == (rank is not None)
