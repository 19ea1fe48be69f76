"""ONNX export: the files' outputs match the student's, and reports about them."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from bkd_hf import InputError, load_classifier, load_processor, load_results, onnx_export, onnx_files
from bkd_hf.announcer import Announcer
from bkd_hf.arguments import parse_arguments
from bkd_hf.export_report import lines, plot_latency
from bkd_hf.files import unlock
from bkd_hf.hub import prepare
from bkd_hf.onnx_export import export_run, recorded_arguments
from bkd_hf.rehearsal import check_before_work
from bkd_hf.run import run
from bkd_hf.schema import find_fault
from bkd_hf.spaces import build_space
from tests.architectures import NAMES, tiny
from tests.conftest import REPOSITORY
from tests.faults import main_of
from tests.tiny_models import tiny_vit

RECIPE = REPOSITORY / "scripts" / "recipes" / "digits.yaml"
FILES = {"onnx/model.onnx", "onnx/model_quantized.onnx"}
SIZE = 32


# ---- A model


def pixels(number: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, 3, SIZE, SIZE), dtype=np.float32)


def test_files_answer_as_the_model_does_for_any_number_of_images(tmp_path):
    # Attention and a cosine head; convolutions are in the run below. An export takes seconds: all others of
    # tests/architectures.py are in the table of model_cards/onnx/README.md.
    torch.manual_seed(0)
    tiny("ViT", 1).save_pretrained(tmp_path / "model")
    model = load_classifier(str(tmp_path / "model"), NAMES, cosine_scale=7.0).eval()
    path, quantized = tmp_path / "model.onnx", tmp_path / "quantized.onnx"
    about = onnx_files.describe(load_processor("cifar-resnet-8", SIZE, [0.1] * 3, [0.2] * 3), NAMES)
    onnx_files.to_onnx(model, (SIZE, SIZE), path, about)
    onnx_files.quantize(path, quantized, [pixels(32, seed) for seed in range(3)], about)
    in_torch = onnx_files.torch_answers(model)
    exact, rounded = (onnx_files.onnx_answers(file, threads=1) for file in (path, quantized))
    for number in (1, 5):
        images = pixels(number, 9)
        logits = in_torch(images)
        assert np.ptp(logits) > 1e-2
        np.testing.assert_allclose(exact(images), logits, rtol=0, atol=1e-5 * max(1, np.abs(logits).max()))
        assert 0 < np.abs(rounded(images) - logits).max() < 0.2 * np.ptp(logits)
    for file in (path, quantized):
        told = onnx.load(file)
        assert {entry.domain: entry.version for entry in told.opset_import}[""] == onnx_files.OPSET
        found = {entry.key: entry.value for entry in told.metadata_props}
        assert json.loads(found["class_names"]) == NAMES
        assert json.loads(found["image_mean"]) == [0.1] * 3
        assert json.loads(found["image_size"]) == [SIZE, SIZE]
        assert str(REPOSITORY).encode() not in file.read_bytes()
        assert b"site-packages" not in file.read_bytes()


def test_a_model_that_decides_by_its_input_is_not_exportable(tmp_path):
    class Choosy(nn.Module):
        def forward(self, pixel_values):
            return pixel_values.flatten(1) if pixel_values.sum() > 0 else -pixel_values.flatten(1)

    with pytest.raises(InputError, match=r"Choosy is not exportable, because .*use its student with torch") as error:
        onnx_files.to_onnx(Choosy(), (2, 2), tmp_path / "model.onnx", {})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_file_says_nothing_of_the_model(tmp_path):
    class Flat(nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values.flatten(1))

    with pytest.raises(FileNotFoundError):
        onnx_files.to_onnx(Flat(), (2, 2), tmp_path / "nowhere" / "model.onnx", {})


def test_calibration_images_are_of_all_classes_alike():
    labels = np.repeat(np.arange(6), [900, 500, 100, 20, 3, 0])
    chosen = onnx_files.choose_calibration_images(labels, seed=1)
    assert np.bincount(labels[chosen], minlength=6).tolist() == [102, 102, 100, 20, 3, 0]
    assert np.array_equal(chosen, onnx_files.choose_calibration_images(labels, seed=1))
    assert not np.array_equal(chosen, onnx_files.choose_calibration_images(labels, seed=2))
    assert len(onnx_files.choose_calibration_images(np.arange(9000), seed=1)) <= 2048


def test_time_is_that_of_one_answer(monkeypatch):
    clock = iter(range(10**9))  # a tick is a second
    monkeypatch.setattr(onnx_files.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(onnx_files, "WINDOW_SECONDS", 3.5)
    shapes = []
    found = onnx_files.latencies({"a": lambda images: shapes.append(images.shape)}, {"a": (4, 6)})
    assert found == {"a": {"1": 4 / 3, "32": 4 / 3}}  # in 4 s 3 answers, and their 3 looks at the clock
    assert set(shapes) == {(1, 3, 4, 6), (32, 3, 4, 6)}


# ---- A run


def arguments(folder: Path, *options: str):
    teacher = ["--teacher_model_name_or_path", str(folder.parent / "teacher"), "--force_teacher"]
    short = ["--num_train_epochs", "2", "--lr_step_epochs", "1", "--lr_step_factors", "0.1", "--disable_tqdm", "true"]
    given = ["--output_dir", str(folder), *teacher, *short, "--num_threads", "1", "--head_bias", "balanced", *options]
    return parse_arguments(given, digits_recipe=RECIPE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A finished run whose teacher was given, and takes images of its own size."""
    folder = tmp_path_factory.mktemp("export") / "run"
    names = [str(digit) for digit in range(10)]
    teacher = tiny_vit(1, 10, id2label=dict(enumerate(names)), label2id={name: int(name) for name in names})
    teacher.save_pretrained(folder.parent / "teacher")
    load_processor("cifar-resnet-8", 8).save_pretrained(folder.parent / "teacher")
    run(arguments(folder))
    return folder


@pytest.fixture(scope="module")
def exported(plain) -> Path:
    """The same command again, with --export."""
    folder = Path(shutil.copytree(plain, plain.with_name("exported")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "WINDOWS", 1)
        run(arguments(folder, "--export", "onnx", "--hub_model_id", "user/digits"))
    return folder


@pytest.fixture
def copy(plain, exported, tmp_path, monkeypatch) -> Path:
    """A run that is finished and not exported; the exporter writes the file of the other one, which is the same."""

    def write(model, size, path, metadata):
        shutil.copy(exported / "onnx" / "model.onnx", path)

    monkeypatch.setattr(onnx_export, "to_onnx", write)
    monkeypatch.setattr(onnx_files, "WINDOWS", 1)
    yield Path(shutil.copytree(plain, tmp_path / "run"))
    unlock()


@pytest.mark.slow
def test_results_of_an_export(exported):
    results = load_results(exported)
    models, student = results["export"]["models"], results["student"]["metrics"]
    assert list(models) == ["student", "onnx", "int8", "teacher"]
    assert "head_bias_shift" in results["student"]
    for name in ("student", "onnx"):
        assert models[name]["metrics"]["accuracy"] == pytest.approx(student["accuracy"])
        assert models[name]["metrics"]["few_shot_accuracy"] == pytest.approx(student["few_shot_accuracy"])
    assert models["int8"]["metrics"]["accuracy"] == pytest.approx(student["accuracy"], abs=0.1)
    assert 0 < results["export"]["largest_logit_difference"] < results["export"]["tolerance"] < 0.1
    assert results["export"]["num_calibration_images"] == 51 + 51 + 51 + 32 + 20 + 12 + 8 + 5 + 3 + 2
    assert results["export"]["cpu_threads"] == 1
    assert results["export"]["num_eval_images"] == 400
    assert "The student was asked about" not in (exported / "README.md").read_text()
    assert {(exported / name).stat().st_size for name in FILES} == {models[n]["bytes"] for n in ("onnx", "int8")}
    assert models["int8"]["bytes"] < models["onnx"]["bytes"] / 2
    assert all(model["seconds"]["1"] > 0 for model in models.values())
    assert not [path.name for path in exported.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.slow
def test_an_export_is_not_made_twice(exported, capsys):
    before = {name: (exported / name).stat().st_mtime_ns for name in (*FILES, "results.json")}
    publish = main_of("publish.py")
    assert publish([str(exported), "--export", "onnx", "--repo_id", "user/digits", "--dry_run"]) == 0
    output = capsys.readouterr().out
    assert "exported already" in output
    assert all(name in output for name in (*FILES, "figures/latency.png"))
    assert before == {name: (exported / name).stat().st_mtime_ns for name in before}
    torch.set_num_threads(1)  # which the script took from this process
    with pytest.raises(SystemExit, match="2"):
        publish([str(exported)])
    assert "required: --repo_id" in capsys.readouterr().err


@pytest.mark.slow
def test_the_app_answers_by_it(exported, monkeypatch):
    pytest.importorskip("gradio", reason="gradio (extra `space`) is not installed")
    space = build_space(exported, "user/app")
    assert {path.name for path in (space / "model").iterdir()} == {"model.onnx", "preprocessor_config.json"}
    assert "torch" not in (space / "requirements.txt").read_text()
    monkeypatch.setattr("torch.nn.Module.__call__", None)  # torch would raise
    app = runpy.run_path(str(space / "app.py"))
    image = Image.fromarray((load_digits().images[0] * 255 / 16).astype(np.uint8))
    shown = re.findall(r"<b>(\d)</b>.*?([\d.]+)%</span>", app["answer"](image))
    monkeypatch.undo()
    with torch.no_grad():
        inputs = load_processor(str(exported))(image.convert("RGB"), return_tensors="pt")
        expected = load_classifier(str(exported), list("0123456789")).eval()(**inputs).logits[0].softmax(dim=0)
    assert [int(name) for name, _ in shown] == expected.topk(5).indices.tolist()
    assert [float(share) for _, share in shown] == pytest.approx((100 * expected.topk(5).values).tolist(), abs=0.06)


@pytest.mark.slow
def test_code_in_the_card_names_the_digit(exported, tmp_path, monkeypatch, capsys):
    card = (exported / "README.md").read_text()
    table = re.search(r"\| student \(ONNX, int8\) \|(.*)\|", card)
    assert table
    assert len(table[1].split("|")) == 7
    assert "![Accuracy against the time for one image](figures/latency.png)" in card
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "onnxruntime" in block)
    assert "torch" not in code.replace("needs no torch", "")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(exported / file))
    monkeypatch.chdir(tmp_path)
    told = []
    for digit in load_digits().images[:20]:
        Image.fromarray((digit * 255 / 16).astype(np.uint8)).save("image.png")
        exec(code.replace('from_pretrained("user/digits"', f"from_pretrained({str(exported)!r}"), {})
        told.append(capsys.readouterr().out.strip())
    accuracy = np.mean([a == str(b) for a, b in zip(told, load_digits().target[:20], strict=True)])
    assert accuracy > 0.3  # of 10 classes, after two epochs


@pytest.mark.slow
def test_what_is_pushed(exported, plain, tmp_path):
    assert set(prepare(exported, "user/digits").files) >= FILES
    lonely = Path(shutil.copytree(plain, tmp_path / "of_an_earlier_student"))
    shutil.copytree(exported / "onnx", lonely / "onnx")
    assert not FILES & set(prepare(lonely, "user/digits").files)
    lacking = Path(shutil.copytree(exported, tmp_path / "lacking"))
    (lacking / "onnx" / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"has no onnx/model\.onnx, which its results tell of"):
        prepare(lacking, "user/digits")


@pytest.mark.slow
def test_a_file_that_answers_otherwise_is_not_kept(copy, monkeypatch):
    monkeypatch.setattr(onnx_files, "TOLERANCE", 1e-12)
    with pytest.raises(InputError, match=r"logits differ from torch's by up to .* so it was not kept"):
        export_run(recorded_arguments(copy), Announcer())
    assert not list(copy.rglob("*.onnx"))
    assert "export" not in load_results(copy)


@pytest.mark.slow
def test_a_teacher_trained_in_the_run_is_timed(copy, capsys):
    record = json.loads((copy / "bkd_run.json").read_text())
    given = Path(record["model"].pop("teacher_model_name_or_path"))
    (copy / "bkd_run.json").write_text(json.dumps(record))
    assert "teacher" not in export_run(recorded_arguments(copy), Announcer())["export"]["models"]
    assert "The teacher's time is not measured" in capsys.readouterr().out
    shutil.copytree(given, copy / "teacher")
    (copy / "onnx" / "model.onnx").unlink()
    assert "teacher" in export_run(recorded_arguments(copy), Announcer())["export"]["models"]


@pytest.mark.slow
def test_of_a_large_evaluation_set_a_part_is_asked(copy, monkeypatch):
    monkeypatch.setattr(onnx_export, "EVALUATION_IMAGES", 100)
    results = export_run(recorded_arguments(copy), Announcer())
    assert results["export"]["num_eval_images"] == 100
    num_right = results["export"]["models"]["onnx"]["metrics"]["accuracy"] * 100
    assert num_right == pytest.approx(round(num_right))
    told = "The student was asked about 100 of 400 test images, of each class in proportion."
    assert told in lines(results)
    assert told in (copy / "README.md").read_text()


def test_other_images_are_refused(copy):
    record = json.loads((copy / "bkd_run.json").read_text())
    record["data"]["split_seed"] = 1
    (copy / "bkd_run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="digits does not hold the images that this run was trained and evaluated on"):
        export_run(recorded_arguments(copy), Announcer())
    with pytest.raises(InputError, match=r"has no bkd_run\.json, which tells its data"):
        recorded_arguments(copy / "figures")


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_libraries_are_named_before_any_work(library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=rf'{library}, which --export onnx needs, .* pip install "bkd_hf\[export\]"'):
        check_before_work(arguments(tmp_path / "run", "--export", "onnx"))


@pytest.mark.slow
def test_a_loss_by_rounding_is_told(exported):
    results = load_results(exported)
    exact, rounded = (results["export"]["models"][name]["metrics"] for name in ("onnx", "int8"))
    rounded |= exact
    assert not any("WARNING" in line for line in lines(results))
    rounded["few_shot_accuracy"] = exact["few_shot_accuracy"] - 0.03
    assert "WARNING: int8 loses 3.0 points few-shot: use onnx/model.onnx where that matters." in lines(results)


@pytest.mark.slow
def test_a_malformed_section_is_refused_and_a_figure_needs_no_few_shot_class(exported):
    results = load_results(exported)
    for model in results["export"]["models"].values():
        model.get("metrics", {}).pop("few_shot_accuracy", None)
    assert plot_latency(results).axes[0].get_ylabel() == "test accuracy (%)"
    del results["export"]["models"]["onnx"]["seconds"]["32"]
    assert "export.models.onnx.seconds" in find_fault(results)
