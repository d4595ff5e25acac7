"""What the prices say of a plan is what is counted in the model that was really rewritten to it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest

from onnx_lrs import Config
from onnx_lrs.calibration.subject import Subject, examine
from onnx_lrs.graph.layers import Layer
from onnx_lrs.graph.rewrite import rewrite
from onnx_lrs.planning.plan import Limit, limits_of
from onnx_lrs.planning.prices import Macs, Params, Plan, Size, alive_after, cost_of
from onnx_lrs.planning.search import stand_in
from onnx_lrs.solvers import Candidate
from onnx_lrs.solvers.problem import AnyFactors
from tests import small_nets as nets
from tests.builders import make, node, normal

SAME = {"pads": [1, 1, 1, 1]}
WIDTH = 24


def conv_chain(opset: int = 17, bias: bool = True) -> onnx.ModelProto:
    """Four Conv in a row, pools and activations between: filters may die in the first three."""
    nodes, constants, name = [], {}, "x"
    for i, stride in enumerate((1, 2, 1, 1)):
        inputs = [name, f"w{i}", *[f"b{i}"] * bias]
        nodes += [node("Conv", inputs, [f"c{i}"], f"conv{i}", strides=[stride] * 2, **SAME)]
        nodes += [node("Relu", [f"c{i}"], [f"r{i}"])]
        constants |= {f"w{i}": normal(WIDTH, WIDTH, 3, 3, seed=i)} | ({f"b{i}": normal(WIDTH)} if bias else {})
        name = f"r{i}"
    nodes.insert(4, node("MaxPool", ["r1"], ["p1"], kernel_shape=[2, 2], strides=[2, 2]))
    nodes[5].input[0] = "p1"
    return make(nodes, {"x": (1, WIDTH, 16, 16)}, ["r3"], constants, opset=opset)


def gemm_chain(opset: int = 17, bias: bool = True, shared: bool = False) -> onnx.ModelProto:
    """Four Gemm in a row; with ``shared`` they read one and the same bias."""
    nodes, constants, name = [], {}, "x"
    for i in range(4):
        biases = [] if not bias else ["b0" if shared else f"b{i}"]
        nodes += [node("Gemm", [name, f"w{i}", *biases], [f"g{i}"], f"fc{i}"), node("Relu", [f"g{i}"], [f"r{i}"])]
        constants |= {f"w{i}": normal(48, 48, seed=i)} | {b: normal(48) for b in biases}
        name = f"r{i}"
    return make(nodes, {"x": ("N", 48)}, ["r3"], constants, opset=opset)


def branches() -> onnx.ModelProto:
    """One Conv that two others read, whose outputs are added: filters of the first die where both drop them."""
    nodes = [
        node("Conv", ["x", "w0", "b"], ["a"], "first", **SAME),
        node("Relu", ["a"], ["r"]),
        node("Conv", ["r", "w1", "b1"], ["c"], "left", **SAME),
        node("Conv", ["r", "w2"], ["d"], "right"),
        node("Add", ["c", "d"], ["s"]),
        node("Relu", ["s"], ["t"]),
        node("Conv", ["t", "w3", "b"], ["y"], "last", **SAME),
    ]
    constants = {"w0": normal(WIDTH, WIDTH, 3, 3), "w1": normal(48, WIDTH, 3, 3), "w2": normal(48, WIDTH, 1, 1)}
    constants |= {"w3": normal(WIDTH, 48, 3, 3), "b": normal(WIDTH), "b1": normal(48)}
    return make(nodes, {"x": (1, WIDTH, 10, 10)}, ["y"], constants)


def matmul_chain() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w0"], ["a"], "up"),
        node("Add", ["a", "b0"], ["b"]),
        node("Relu", ["b"], ["c"]),
        node("MatMul", ["c", "w1"], ["d"], "down"),
        node("MatMul", ["d", "w2"], ["e"], "out"),
    ]
    constants = {"w0": normal(40, 64), "b0": normal(64), "w1": normal(64, 40), "w2": normal(40, 32)}
    return make(nodes, {"x": (1, 5, 40)}, ["e"], constants)


NETS = {
    "conv chain": conv_chain(),
    "conv chain without bias": conv_chain(bias=False),
    "gemm chain": gemm_chain(),
    "gemm chain without bias": gemm_chain(bias=False),
    "gemm chain of opset 9": gemm_chain(opset=9),
    "gemm chain with one bias": gemm_chain(shared=True),
    "branches": branches(),
    "matmul": matmul_chain(),
    "conv net": nets.conv_net(),
    "two inputs": nets.two_inputs(),
}


# parameters that may be counted too many: a C of zeros for each Gemm without one, a bias that nobody shares at last
ROOM = {"gemm chain of opset 9": 2 * 4, "gemm chain with one bias": 48, "branches": WIDTH}


def candidate(layer: Layer, rng: np.random.Generator) -> Candidate | None:
    """Return some form that the layer may take; channels often, so that filters die."""
    square = len(layer.geometry.kernel) == 2 and min(layer.geometry.kernel) > 1 and set(layer.geometry.strides) == {1}
    form = rng.choice(
        [
            "dense",
            "low-rank",
            "channels",
            "channels",
            "low-rank + channels",
            *["spatial", "projected", "tucker"] * square,
        ]
    )
    if form == "dense":
        return None
    rank = int(rng.integers(1, min(layer.out, layer.d) // 2)) if form != "channels" else 0
    count = int(rng.integers(1, layer.channels)) if "channels" in form else 0
    support = np.sort(rng.choice(layer.channels, count, replace=False))
    height, width = (*layer.geometry.kernel, 1, 1)[:2]
    params = rank * (layer.out + layer.d) + count * layer.taps * layer.out
    if form == "projected":
        params = rank * (layer.channels + layer.out * layer.taps)
    if form == "spatial":
        params = rank * (layer.channels * height + layer.out * width)
    inner = 0
    if form == "tucker":
        inner = int(rng.integers(1, layer.channels))
        params = layer.channels * inner + inner * rank * layer.taps + rank * layer.out
    return Candidate(str(form), rank, params, 0.1, support, 0.0, inner=inner)


def random_plan(subject: Subject, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    found = {layer.node: candidate(layer, rng) for layer in subject.layers}
    return Plan({name: chosen for name, chosen in found.items() if chosen is not None})


def fitted(layer: Layer, chosen: Candidate) -> AnyFactors:
    """Return random factors as a fit leaves them: with what the mean of the input adds to the bias."""
    return dataclasses.replace(stand_in(layer, chosen), bias_shift=np.ones(layer.out))


def really(subject: Subject, plan: Plan) -> onnx.ModelProto:
    factors = {la.node: fitted(la, plan.chosen[la.node]) for la in subject.layers if la.node in plan.chosen}
    model = rewrite(subject.view, subject.layers, factors, subject.ranks).model
    onnx.checker.check_model(model, full_check=True)
    return model


def subject_of(model: onnx.ModelProto) -> Subject:
    return examine(model, model, Config(threads=1), None)


@pytest.mark.parametrize("name", NETS)
def test_a_plan_costs_what_is_counted_in_the_rewritten_model(name):
    subject = subject_of(NETS[name])
    narrowed = 0
    for seed in range(12):
        plan = random_plan(subject, seed)
        model = really(subject, plan)
        too_many = cost_of(Params(subject), subject, plan) - nets.count_params(model)
        assert 0 <= too_many <= ROOM.get(name, 0), (seed, plan)
        assert cost_of(Macs(subject), subject, plan) == nets.count_macs(model, {"N": 1}), (seed, plan)
        said, real = cost_of(Size(subject), subject, plan), model.ByteSize()
        assert real <= said <= real + 0.1 * real + 1500 * len(plan.chosen), (seed, plan)
        narrowed += bool(alive_after(subject, plan))
    assert narrowed >= (3 if "chain" in name or name == "matmul" else 0), "no filters died: nothing was tested"


def test_nothing_chosen_costs_what_the_original_does():
    for model in NETS.values():
        subject = subject_of(model)
        for price in (Params(subject), Macs(subject), Size(subject)):
            assert price.before == price.now == cost_of(price, subject, Plan({}))
        counts = nets.count_params(model), nets.count_macs(model, {"N": 1}), model.ByteSize()
        assert tuple(price(subject).before for price in (Params, Macs, Size)) == counts


def test_limits_are_fractions_of_the_original_rounded_down():
    subject = subject_of(NETS["conv net"])
    found = limits_of(subject, {"params": 0.5, "macs": 0.25, "size": 1.0}, None)
    assert [limit.name for limit in found] == ["params", "macs", "size"]
    assert [limit.most for limit in found] == [subject.params // 2, sum(subject.macs.values()) // 4, subject.file_bytes]
    assert Limit("params", found[0].price, 1 / 3).most == subject.params // 3
