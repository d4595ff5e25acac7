"""The records become JSON and come back; the page that documents them is complete."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lrs.config import CompareConfig, Config, CudaOptions, Training
from onnx_lrs.report import comparison, refinement, training
from onnx_lrs.report import result as records
from onnx_lrs.report.comparison import ComparedModel, Comparison, LayerTime, Timed
from onnx_lrs.report.refinement import Refinement
from onnx_lrs.report.result import (
    Certificate,
    ChangedAnswer,
    Changes,
    CurvePoint,
    Inspection,
    LayerInfo,
    LayerResult,
    Optimised,
    OptimisedGraph,
    OutputQuality,
    Pareto,
    ParetoPoint,
    Ratio,
    Refined,
    Result,
    SearchStep,
    SkippedLayer,
    Totals,
    Variant,
    ratio_of,
)
from onnx_lrs.report.training import Trained, TrainedEpoch

PAGE = (Path(__file__).parent.parent / "docs" / "result.md").read_text(encoding="utf-8")
RECORDS = [Result, Certificate, Totals, Ratio, OutputQuality, LayerResult, SkippedLayer, Inspection, LayerInfo]
RECORDS += [
    Optimised,
    OptimisedGraph,
    SearchStep,
    Changes,
    ChangedAnswer,
    Pareto,
    ParetoPoint,
    CurvePoint,
    Refined,
    Variant,
]
REFINED, TRAINED = [Refinement], [Trained, TrainedEpoch]
COMPARED = [Comparison, ComparedModel, Timed, LayerTime]


def full_result() -> Result:
    before, after = Totals(1000, 2000, 4000, 3.0), Totals(500, 0, 2000, 1.5)
    graph = OptimisedGraph({"com.microsoft.nchwc.Conv": 1}, 1, 1, 2, 1, 0, ("relu",), ("c.sum",))
    layer = LayerResult("c", "Conv", (8, 4, 3, 3), "low-rank", 2, 0, 0, 4, 8, 8, 288, 88, 900, 400, math.inf)
    layer = dataclasses.replace(layer, curve=(CurvePoint("low-rank", 2, 0, 0, 88, math.nan, True),))
    return Result(
        input="a.onnx",
        output=None,
        before=before,
        after=after,
        ratio=ratio_of(before, after),
        quality=(OutputQuality("y", 0.1, math.nan, 10),),
        layers=(layer,),
        skipped=(SkippedLayer("d", "Gemm", 10, 10, "too small"),),
        settings=Config(exclude=("x",), shapes={"i": (1, 2)}).to_dict(),
        environment={"provider": "CPUExecutionProvider"},
        seconds={"total": 1.5},
        peak_memory_bytes=7,
        notes=("One.", "Two."),
        search=(SearchStep(0.5, 0.45, math.nan, "accuracy", "alone", False),),
        optimised=Optimised(graph, dataclasses.replace(graph, elsewhere=None)),
        changes=(Changes("y", 1, 1, 0, (ChangedAnswer(3, "a.png", 0, 1, 0, (2.0, 1.0), (1.0, math.inf), "cat"),)),),
        pareto=Pareto("params", 0.5, (ParetoPoint(0.4, 0.02, 1),), None),
        call="onnx-lrs a.onnx",
        model=object(),  # type: ignore[arg-type]
    )


def full_inspection() -> Inspection:
    layers = (
        LayerInfo("c", "Conv", (8, 4, 3, 3), 288, 900, True, None),
        LayerInfo("m", "MatMul", (), 0, 5, False, "both inputs are computed"),
    )
    return Inspection("a.onnx", 17, 8, "pytorch 2", ("x float32 [N,4]",), ("y float32 [N,8]",), Totals(1, 2, 3), layers)


@pytest.mark.parametrize("record", [full_result(), full_inspection()])
def test_json_comes_back_as_it_went(record):
    text = record.to_json()
    assert json.loads(text) == record.to_dict()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(record.to_json(indent=None))


@pytest.mark.parametrize("record", [full_result(), full_inspection()])
def test_keys_are_the_fields_in_their_order(record):
    names = [field.name for field in dataclasses.fields(record) if field.name != "model"]
    assert list(record.to_dict()) == names


def test_non_finite_numbers_become_null():
    plain = full_result().to_dict()
    assert plain["quality"][0]["cosine"] is None
    assert plain["layers"][0]["error"] is None
    assert plain["ratio"]["macs"] is None
    assert plain["ratio"]["latency_ms"] == 2.0


def test_nested_records_keep_every_field():
    plain = full_result().to_dict()
    assert set(plain["layers"][0]) == {field.name for field in dataclasses.fields(LayerResult)}
    assert plain["layers"][0]["shape"] == [8, 4, 3, 3]
    assert plain["settings"]["shapes"] == {"i": [1, 2]}
    assert full_inspection().to_dict()["layers"][0]["reason"] is None


def test_models_and_pictures_are_not_in_the_json():
    result = full_result()
    (changes,) = result.changes
    pictured = dataclasses.replace(changes.examples[0], thumbnail=b"a picture")
    plain = dataclasses.replace(result, changes=(dataclasses.replace(changes, examples=(pictured,)),)).to_dict()
    assert "model" not in plain
    assert plain == result.to_dict()


@given(st.floats(), st.floats())
def test_any_float_makes_valid_json(error, cosine):
    changed = dataclasses.replace(full_result(), quality=(OutputQuality("y", error, cosine, 1),))
    entry = json.loads(changed.to_json(), parse_constant=pytest.fail)["quality"][0]
    for value, written in ((error, entry["relative_l2"]), (cosine, entry["cosine"])):
        assert written == (value if math.isfinite(value) else None)


def test_ratio_is_before_over_after():
    ratio = ratio_of(Totals(10, 20, 30, 4.0), Totals(5, 5, 60, 8.0))
    assert ratio == Ratio(params=2.0, macs=4.0, file_bytes=0.5, latency_ms=0.5)
    assert ratio_of(Totals(1, 1, 1), Totals(1, 1, 1, 2.0)).latency_ms is None
    assert math.isnan(ratio_of(Totals(1, 0, 1), Totals(1, 0, 1)).macs)


# ----------------------------------------------------------------------------------------------- docs/result.md


def documented(title: str) -> list[str]:
    """Return the names in the first column of the table under a heading."""
    sections = PAGE.replace("\n### ", "\n## ").split("\n## ")
    (section,) = [section for section in sections if section.splitlines()[0] == title]
    return [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("record", RECORDS + COMPARED + REFINED + TRAINED, ids=lambda record: record.__name__)
def test_the_page_documents_every_field_of_a_record_in_order(record):
    fields = [field.name for field in dataclasses.fields(record) if field.metadata.get("json", True)]
    assert documented(record.__name__) == fields
    assert "`model`" in PAGE


def test_the_page_documents_every_setting():
    assert documented("Settings") == [field.name for field in dataclasses.fields(Config)]


def test_the_page_documents_every_setting_of_a_comparison():
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `settings`") and "CompareConfig" in line]
    named = row.replace("`CompareConfig`", "").split("`")[3::2]
    fields = [field.name for field in dataclasses.fields(CompareConfig)]
    assert [name for name in named if name in fields] == fields
    assert set(named) - set(fields) == {field.name for field in dataclasses.fields(CudaOptions)}


def test_the_page_documents_every_setting_of_a_training():
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `refine`")]
    assert row.split("`")[5::2] == [field.name for field in dataclasses.fields(Training)]


@pytest.mark.parametrize(
    ("module", "listed"),
    [(records, RECORDS), (comparison, COMPARED), (refinement, REFINED), (training, TRAINED)],
)
def test_no_record_was_forgotten(module, listed):
    public = {
        value
        for name, value in vars(module).items()
        if dataclasses.is_dataclass(value) and not name.startswith("_") and value.__module__ == module.__name__
    }
    assert public == set(listed)


def test_the_page_knows_every_form_and_the_schema():
    for form in records.Form.__args__:
        assert f"`{form}`" in PAGE
    assert f"Version of this format, {records.SCHEMA}." in PAGE
