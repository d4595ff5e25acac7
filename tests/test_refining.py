"""Refining from end to end: what it changes in a file, what it leaves alone, and how it fits into a run."""

import dataclasses
import importlib.util
import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_lrs
from onnx_lrs import Budget, Config, Training, cli
from onnx_lrs.errors import ConfigError, DataError, ModelError, OutputError
from onnx_lrs.solvers.rounding import rounded
from tests import small_nets as nets

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "onnx2torch"))
needs_torch = pytest.mark.skipif(not INSTALLED, reason='needs pip install "onnx-lrs[refine]"')
IMAGES = nets.as_floats(nets.pictures(160))
COURSE = Training(epochs=20, train_batch=8, learning_rate=0.003, loss="l2", augment=False, patience=50, autocast="off")
CONFIG = Config(threads=1, fit="independent", multiple=4)


@pytest.fixture(scope="module")
def pair():
    original = nets.conv_net()
    found = onnx_lrs.compress(original, data=IMAGES, config=dataclasses.replace(CONFIG, budget=Budget(params=0.2)))
    return original, found.model


def shell(model):
    """The model without the values of its floats: what refining must not touch."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return copy.SerializeToString(deterministic=True)


def floats(model):
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}


# ---------------------------------------------------------------- the library


@needs_torch
def test_refining_brings_the_outputs_nearer_and_changes_nothing_but_values(pair, tmp_path):
    original, small = pair
    found = onnx_lrs.refine(original, small, tmp_path / "out.onnx", data=IMAGES, training=COURSE, config=CONFIG)
    written = onnx.load(tmp_path / "out.onnx")
    assert shell(written) == shell(small)
    assert written == found.model
    assert all((floats(small)[name] != values).any() for name, values in floats(written).items())  # biases too
    assert found.after[0].relative_l2 < 0.9 * found.before[0].relative_l2
    assert found.trained.weights == sum(values.size for values in floats(small).values())
    assert found.trained.samples + found.trained.selecting == 128  # 32 judge
    assert found.after[0].samples == 32


@needs_torch
def test_what_judges_is_neither_trained_on_nor_chosen_by(pair):
    """Other samples that judge: the same weights."""
    original, small = pair
    rest, judged = IMAGES[:128], IMAGES[128:]
    both = [
        onnx_lrs.refine(original, small, data=rest, test=test, training=COURSE, config=CONFIG)
        for test in (judged, judged[::-1] * 0.5)
    ]
    assert both[0].model == both[1].model
    assert both[0].after != both[1].after


@needs_torch
def test_with_samples_of_their_own_that_judge_all_others_train(pair):
    found = onnx_lrs.refine(*pair, data=IMAGES[:100], test=IMAGES[100:], training=COURSE, config=CONFIG)
    assert found.trained.samples + found.trained.selecting == 100


@needs_torch
def test_labels_are_trained_on_where_they_belong_to_the_samples(pair):
    labels = nets.run(nets.conv_net(), {"image": IMAGES})[0].argsort(1)[:, -2]  # the second choice
    course = dataclasses.replace(COURSE, label_share=0.5)
    with_labels, without = (
        onnx_lrs.refine(*pair, data=IMAGES, labels=given, training=course, config=CONFIG) for given in (labels, None)
    )
    assert with_labels.model != without.model
    assert with_labels.after[0].accuracy_after is not None
    told = dataclasses.replace(course, label_share=0.0)
    ignored = onnx_lrs.refine(*pair, data=IMAGES, labels=labels, training=told, config=CONFIG)
    assert ignored.model == without.model


@needs_torch
def test_samples_of_any_lengths_and_outputs_that_are_no_classes():
    original = nets.block()
    data = nets.sentences(240)
    small = onnx_lrs.compress(original, data=data, config=dataclasses.replace(CONFIG, budget=Budget(params=0.3))).model
    course = dataclasses.replace(COURSE, loss="auto")
    found = onnx_lrs.refine(original, small, data=data, training=course, config=CONFIG)
    assert set(found.trained.loss.values()) == {"l2"}
    assert found.after[0].relative_l2 < found.before[0].relative_l2
    assert all(epoch.agreement is None for epoch in found.trained.epochs)


@needs_torch
def test_a_run_goes_on_from_its_work_folder(pair, tmp_path):
    class Stop(onnx_lrs.progress.Silent):
        def step(self, label):
            if label.startswith("loss"):
                raise RuntimeError("the power went")

    kept = dataclasses.replace(CONFIG, work=tmp_path / "work")
    whole = onnx_lrs.refine(*pair, data=IMAGES, training=COURSE, config=CONFIG)
    with pytest.raises(RuntimeError, match="the power went"):
        onnx_lrs.refine(*pair, data=IMAGES, training=COURSE, config=kept, progress=Stop())
    rest = onnx_lrs.refine(*pair, data=IMAGES, training=COURSE, config=kept)
    assert rest.model == whole.model
    assert [e.selected for e in rest.trained.epochs] == [e.selected for e in whole.trained.epochs]
    assert rest.trained.epochs[1].seconds != whole.trained.epochs[1].seconds  # it was read, not made again


@needs_torch
def test_the_same_call_gives_the_same_weights_and_another_seed_others(pair):
    found = [
        onnx_lrs.refine(*pair, data=IMAGES, training=COURSE, config=dataclasses.replace(CONFIG, seed=seed)).model
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1]
    assert found[0] != found[2]


@needs_torch
def test_an_operator_that_cannot_be_translated_is_named_and_nothing_is_written(pair, tmp_path):
    original, small = (onnx.ModelProto.FromString(m.SerializeToString()) for m in pair)
    for model in (original, small):
        (logits,) = [n for n in model.graph.node if "logits" in n.output]
        logits.output[0] = "scores"
        model.graph.node.append(onnx.helper.make_node("Hardmax", ["scores"], ["logits"]))
    with pytest.raises(ModelError, match=r"onnx2torch does not know Hardmax \(opset \d+\)"):
        onnx_lrs.refine(original, small, tmp_path / "out.onnx", data=IMAGES, training=COURSE, config=CONFIG)
    assert not list(tmp_path.iterdir())


@needs_torch
def test_compress_says_so_before_it_fits_anything(tmp_path):
    model = nets.conv_net()
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(onnx.helper.make_node("Hardmax", ["scores"], ["logits"]))
    stages = []

    class Note(onnx_lrs.progress.Silent):
        def stage(self, name, steps):
            stages.append(name)

    config = dataclasses.replace(CONFIG, budget=Budget(params=0.2), refine=COURSE)
    with pytest.raises(ModelError, match="Hardmax"):
        onnx_lrs.compress(model, tmp_path / "out.onnx", data=IMAGES, config=config, progress=Note())
    assert stages == ["load"]


@needs_torch
def test_tensors_between_blocks_may_be_compared_too(pair):
    near, plain = (
        onnx_lrs.refine(*pair, data=IMAGES, training=dataclasses.replace(COURSE, block_share=share), config=CONFIG)
        for share in (0.5, 0.0)
    )
    assert set(plain.trained.loss) == {"logits"}
    assert {"r1", "flat"} <= set(near.trained.loss)
    assert near.after[0].relative_l2 < near.before[0].relative_l2
    assert near.model != plain.model


@needs_torch
def test_the_divergence_needs_classes():
    model, data = nets.block(), nets.sentences(40)
    with pytest.raises(ConfigError, match="--loss kl compares class scores; the outputs are"):
        onnx_lrs.refine(model, model, data=data, training=dataclasses.replace(COURSE, loss="kl"), config=CONFIG)


@needs_torch
def test_a_work_folder_knows_labels_and_who_judges(pair, tmp_path):
    kept = dataclasses.replace(CONFIG, work=tmp_path / "work")
    labels = np.arange(len(IMAGES)) % 10
    course = dataclasses.replace(COURSE, epochs=2)
    for more in ({}, {"labels": labels}, {"test": IMAGES[:40]}):
        found = onnx_lrs.refine(*pair, data=IMAGES, training=course, config=kept, **more)
        alone = onnx_lrs.refine(*pair, data=IMAGES, training=course, config=CONFIG, **more)
        assert found.model == alone.model
        assert found.trained.samples == alone.trained.samples


@needs_torch
def test_training_for_int8_writes_weights_that_are_not_rounded(pair):
    """Rounded outputs are off by more than what torch and ONNX Runtime may differ by: parity is checked without."""
    for_int8, plain = (
        onnx_lrs.refine(*pair, data=IMAGES, training=dataclasses.replace(COURSE, fake_quant=how), config=CONFIG)
        for how in (True, False)
    )
    assert shell(for_int8.model) == shell(pair[1])
    assert for_int8.model != plain.model
    assert for_int8.trained.rounded
    assert not plain.trained.rounded
    first, others = (found.trained.epochs[0] for found in (for_int8, plain))
    assert first.selected != others.selected  # the start is rounded too
    assert for_int8.trained.epochs[for_int8.trained.best].selected < first.selected
    assert for_int8.before == plain.before
    for values in floats(for_int8.model).values():
        ratios = values / (np.abs(values).max() / 127)
        assert np.abs(ratios - ratios.round()).max() > 0.1
    assert any("rounded to INT8" in note for note in for_int8.notes)
    assert not any("rounded to INT8" in note for note in plain.notes)


@needs_torch
def test_a_work_folder_tells_training_for_int8_from_other_training(pair, tmp_path):
    kept, found = dataclasses.replace(CONFIG, work=tmp_path / "work"), {}
    course = dataclasses.replace(COURSE, epochs=2, learning_rate=3e-4)
    for how in (False, True, False, True):
        told = dataclasses.replace(course, fake_quant=how)
        model = onnx_lrs.refine(*pair, data=IMAGES, training=told, config=kept).model
        assert model == found.setdefault(how, model)
        assert model == onnx_lrs.refine(*pair, data=IMAGES, training=told, config=CONFIG).model
    assert found[True] != found[False]


@needs_torch
def test_labels_beyond_the_classes_are_refused(pair):
    with pytest.raises(DataError, match="The labels go up to 11; no output has so many classes"):
        onnx_lrs.refine(*pair, data=IMAGES, labels=np.arange(len(IMAGES)) % 12, training=COURSE, config=CONFIG)


@needs_torch
def test_weights_beside_the_models_are_not_overwritten(pair, tmp_path):
    model = onnx.ModelProto.FromString(pair[0].SerializeToString())
    onnx.save(model, tmp_path / "o.onnx", save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(ConfigError, match="would overwrite weights of"):
        onnx_lrs.refine(tmp_path / "o.onnx", pair[1], tmp_path / "out.onnx", data=IMAGES, training=COURSE)
    assert (tmp_path / "out.onnx.data").read_bytes() == before


@needs_torch
def test_models_that_do_not_belong_together_are_refused(pair):
    with pytest.raises(ModelError, match="The models' inputs differ"):
        onnx_lrs.refine(nets.block(), pair[1], data=IMAGES)


@needs_torch
def test_the_output_may_not_be_one_of_the_models(pair, tmp_path):
    names = tmp_path / "original.onnx", tmp_path / "small.onnx"
    for model, name in zip(pair, names, strict=True):
        onnx.save(model, name)
    for name in names:
        with pytest.raises(ConfigError, match="is the input"):
            onnx_lrs.refine(*names, name, data=IMAGES)
    with pytest.raises(OutputError, match="is a folder"):
        onnx_lrs.refine(*names, tmp_path, data=IMAGES)


def test_without_the_extra_the_message_names_it(pair, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    for call in (
        lambda: onnx_lrs.refine(*pair, data=IMAGES),
        lambda: onnx_lrs.compress(pair[0], data=IMAGES, config=Config(refine=COURSE)),
    ):
        with pytest.raises(ConfigError, match="Refining needs torch") as caught:
            call()
        assert 'pip install "onnx-lrs[refine]"' in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epochs": 0}, "--epochs is 0"),
        ({"minutes": 0.0}, "--minutes is 0.0"),
        ({"rounds": 0}, "--rounds is 0"),
        ({"rounds": 5, "epochs": 4}, "--rounds is 5, more than 4 epochs"),
        ({"learning_rate": -1.0}, "--learning-rate is -1.0"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"label_share": 1.5}, "--label-share is 1.5"),
        ({"loss": "mse"}, "--loss is 'mse'"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"block_share": 1.0}, "--block-share is 1.0"),
        ({"patience": 0}, "--patience is 0"),
        ({"train_batch": 0}, "--train-batch is 0"),
        ({"autocast": "maybe"}, "--autocast is 'maybe'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, told):
    with pytest.raises(ConfigError) as caught:
        Training(**settings)
    assert told in caught.value.message


# ---------------------------------------------------------------- as a part of compress


def compressed(**training):
    config = dataclasses.replace(CONFIG, budget=Budget(params=0.2), refine=dataclasses.replace(COURSE, **training))
    return onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=config)


@needs_torch
def test_compress_refines_what_it_made(pair):
    found = compressed()
    assert shell(found.model) == shell(pair[1])
    assert found.quality[0].relative_l2 < 0.9 * found.refined.before[0].relative_l2
    assert found.after.params <= 0.2 * found.before.params
    assert "The errors of the layers are those before training." in found.notes
    alone = onnx_lrs.refine(*pair, data=IMAGES, training=COURSE, config=CONFIG)
    assert alone.model == found.model
    told = json.loads(found.to_json())["refined"]["rounds"]
    assert len(told) == 1
    assert len(told[0]["epochs"]) == 21


@needs_torch
def test_rounds_lead_to_the_same_budget_and_are_judged_against_the_original():
    found = compressed(rounds=2)
    original = nets.conv_net()
    assert found.before.params == nets.count_params(original)
    assert 0 < found.after.params <= 0.2 * found.before.params
    assert [layer.name for layer in found.layers] == ["conv2", "fc1"]
    assert [len(trained.epochs) for trained in found.refined.rounds] == [11, 11]
    feed = {"image": IMAGES[:8]}
    apart = nets.run(found.model, feed)[0] - nets.run(original, feed)[0]
    assert np.linalg.norm(apart) < 0.5 * np.linalg.norm(nets.run(original, feed)[0])


@needs_torch
@pytest.mark.parametrize(
    ("budget", "training", "told"),
    [
        (Budget(gain=0.1), {}, "--gain guarantees"),
        (Budget(max_drop=0.1), {"rounds": 2}, "--rounds goes down to a limit"),
        (None, {"rounds": 2}, "--rounds goes down to a limit"),
    ],
)
def test_what_does_not_go_together_is_refused(budget, training, told):
    method = "ddlr" if budget is not None and budget.gain else "lrs"
    config = Config(budget=budget, method=method, refine=dataclasses.replace(COURSE, **training))
    with pytest.raises(ConfigError, match=told):
        onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=config)


@needs_torch
def test_refining_needs_data():
    with pytest.raises(ConfigError, match="--refine needs typical inputs"):
        onnx_lrs.compress(nets.conv_net(), config=Config(budget=Budget(params=0.5), refine=COURSE))


# ---------------------------------------------------------------- the command line


@pytest.fixture
def files(pair, tmp_path):
    names = [tmp_path / name for name in ("model.onnx", "small.onnx", "data.npy")]
    onnx.save(pair[0], names[0])
    onnx.save(pair[1], names[1])
    np.save(names[2], IMAGES)
    return [str(name) for name in names]


@needs_torch
def test_the_command_refines_and_tells_what_became_better(files, tmp_path, capfd):
    model, small, data = files
    report = tmp_path / "refined.json"
    flags = ["--data", data, "--threads", "1", "--json", str(report), "--no-augment"]
    flags += ["--train-batch", "8", "--learning-rate", "0.003"]
    assert cli.main(["refine", model, small, "-o", str(tmp_path / "out.onnx"), *flags]) == 0
    told = capfd.readouterr().err
    assert "Against the original model" in told
    assert "refined" in told
    assert "was the best. Trained" in told
    assert (tmp_path / "out.onnx").exists()
    assert json.loads(report.read_text())["trained"]["best"] > 0


@needs_torch
def test_compress_takes_the_flags_of_training(files, tmp_path, capfd):
    model, _, data = files
    out = tmp_path / "out.onnx"
    flags = ["--params", "0.2", "--fit", "independent", "--threads", "1", "--refine", "--epochs", "2", "--fake-quant"]
    assert cli.main([model, "-o", str(out), "--data", data, *flags]) == 0
    told = capfd.readouterr().err
    assert "Before training, logits: relative error" in told
    assert "weights rounded to INT8" in told
    assert out.exists()


def test_flags_of_training_without_it_are_refused(files, tmp_path, capfd):
    model, _, data = files
    for flag in (["--epochs", "3"], ["--no-augment"], ["--fake-quant"], ["--rounds", "2"]):
        assert cli.main([model, "-o", str(tmp_path / "out.onnx"), "--data", data, *flag]) == 2
        assert f"{flag[0]} is about training. Add --refine" in " ".join(capfd.readouterr().err.split())


@needs_torch
def test_training_for_integers_sees_the_basis_in_which_weights_are_rounded():
    course = dataclasses.replace(COURSE, epochs=2, fake_quant=True)
    config = dataclasses.replace(CONFIG, budget=Budget(params=0.2), precision="int8", refine=course)
    found = onnx_lrs.compress(nets.conv_net(), data=IMAGES, config=config)
    assert found.refined is not None
    assert found.refined.rounds[0].rounded
    assert not any("unrounded" in note for note in found.notes)
    trained, integers = found.variants[2].model, found.variants[3].model
    stored = {t.name: numpy_helper.to_array(t) for t in integers.graph.initializer}
    compared = 0
    for name, values in floats(trained).items():
        if values.ndim == 4:
            scale = stored[f"{name}_scale"].reshape(-1, 1, 1, 1)
            np.testing.assert_allclose(stored[f"{name}_quantized"] * scale, rounded(values, 0), rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared >= 2
