"""Solves side by side: in order, no more at once than asked, and the same bytes as in turn."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info

import onnx_lrs
from onnx_lrs.planning.workers import Task, Workers
from onnx_lrs.solvers.blas import LARGE
from tests.builders import make, node

RNG = np.random.default_rng(0)


def square(x: int) -> int:
    return x * x


def slow_square(x: int) -> int:
    time.sleep(0.02 * (5 - x))  # the last ones are done first
    return x * x


def blas_threads() -> int:
    return max(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(jobs):
    told = []
    with Workers(jobs, 1) as workers:
        found = workers.map(
            slow_square, [Task(1, (x,)) for x in range(5)], done=lambda i, r: told.append((i, r, threading.get_ident()))
        )
    assert found == [x * x for x in range(5)]
    assert told == [(x, x * x, threading.get_ident()) for x in range(5)]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_solves_at_once_than_memory_has_room_for(most):
    running, highest, lock = 0, 0, threading.Lock()

    def solve() -> None:
        nonlocal running, highest
        with lock:
            running += 1
            highest = max(highest, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    with Workers(4, 1) as workers:
        workers.map(solve, [Task(1, ()) for _ in range(8)], most)
    assert highest == most


@pytest.mark.parametrize("jobs", [1, 3])
def test_threads_of_blas_depend_on_the_size_alone(jobs):
    sizes = [10, LARGE, 20, 2 * LARGE, 30]
    with Workers(jobs, 2) as workers:
        found = workers.map(blas_threads, [Task(size, ()) for size in sizes])
    assert found[::2] == [1, 1, 1]
    assert len({*found[1::2]}) == 1  # as many as OPENBLAS_NUM_THREADS lets it have, both times


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_solve_is_the_error_of_the_map(jobs):
    with Workers(jobs, 1) as workers, pytest.raises(TypeError, match="multiply"):
        workers.map(square, [Task(1, (1,)), Task(1, ("a",)), Task(1, (2,))])


def test_a_given_executor_is_used_and_left_open():
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="mine") as mine:
        with Workers(3, 1, mine) as workers:
            names = workers.map(lambda: threading.current_thread().name, [Task(1, ()), Task(1, ())])
        assert all(name.startswith("mine") for name in names)
        assert mine.submit(square, 3).result() == 9


def branches():
    """Return a net with layers on one level and a chain behind them."""

    def matrix(*shape: int) -> np.ndarray:
        return (RNG.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    weights = {
        "a": matrix(64, 48),
        "b": matrix(64, 48),
        "c": matrix(48, 40),
        "d": matrix(40, LARGE),
        "e": matrix(LARGE, 32),
    }
    nodes = [
        node("MatMul", ["x", "a"], ["p"]),
        node("MatMul", ["x", "b"], ["q"]),
        node("Relu", ["p"], ["r"]),
        node("Add", ["r", "q"], ["s"]),
        node("MatMul", ["s", "c"], ["t"]),
        node("Relu", ["t"], ["u"]),
        node("MatMul", ["u", "d"], ["v"]),
        node("Relu", ["v"], ["w"]),
        node("MatMul", ["w", "e"], ["y"]),
    ]
    return make(nodes, {"x": ["N", 64]}, ["y"], weights)


@pytest.mark.parametrize("fit", ["cascade", "independent"])
def test_serial_and_parallel_give_the_same_bytes(fit, tmp_path):
    model = branches()
    data = {"x": (RNG.standard_normal((300, 12)) @ RNG.standard_normal((12, 64))).astype(np.float32)}

    def written(name: str, **more: object) -> bytes:
        jobs = more.pop("jobs", 1)
        config = onnx_lrs.Config(budget=onnx_lrs.Budget(params=0.4), fit=fit, jobs=jobs, threads=2)
        path = tmp_path / name
        result = onnx_lrs.compress(model, path, data=data, config=config, **more)
        assert sum(layer.form != "dense" for layer in result.layers) >= 3
        return path.read_bytes()

    serial = written("serial.onnx")
    assert written("threads.onnx", jobs=3) == serial
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert written("given.onnx", executor=executor) == serial
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as executor:
        assert written("processes.onnx", executor=executor) == serial
