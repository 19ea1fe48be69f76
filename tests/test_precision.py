"""`--precision auto` on a CPU with bf16 instructions: measured once, cached, and kept when a run resumes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import bkd_hf.precision
from bkd_hf.arguments import parse_arguments
from bkd_hf.precision import faster_precision, measure_rates, seconds_of_step, settle_precision
from bkd_hf.results import load_results
from tests.architectures import tiny
from tests.test_cli import RECIPE, run_here  # noqa: F401
from tests.test_teachers import processor


@pytest.mark.parametrize(
    ("of_image", "gain", "batch_size", "expected"),
    [
        (1e-4, 2.6, 128, "bf16"),
        (1e-4, 1.05, 128, "fp32"),  # within noise
        (1e-4, 0.8, 128, "fp32"),
        (0.02, 1.2, 64, "bf16"),
        (3.0, 1.8, 64, "bf16"),  # a large model
        (0.01, 2.0, 1, "bf16"),
    ],
)
def test_few_steps_tell_the_faster(of_image, gain, batch_size, expected):
    steps = []

    def step(precision: str, num_images: int) -> float:
        first, later = not steps, sum(1 for other, number, _ in steps if (other, number) == (precision, num_images))
        noise = 1 + 0.3 * (later % 2) + 20.0 * first  # every second step is disturbed; the first loads
        seconds = noise * num_images * of_image / (gain if precision == "bf16" else 1)
        steps.append((precision, num_images, seconds))
        return seconds

    assert faster_precision(rates := measure_rates(step, batch_size)) == expected
    assert rates["bf16"] / rates["fp32"] == pytest.approx(gain)
    assert max(number for _, number, _ in steps) <= batch_size
    assert sum(seconds for *_, seconds in steps) < (5 if of_image < 1 else 200)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_one_of_training(precision):
    model, seen = tiny("ResNet", 0), []
    model.classifier.register_full_backward_hook(lambda module, inward, outward: seen.append(inward[0].dtype))
    assert seconds_of_step(model, torch.randn(4, 3, 32, 32), precision) > 0
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.fixture
def steps(monkeypatch, tmp_path) -> list[str]:
    """The precisions of the steps that are timed, on a CPU with bf16 instructions; a step takes `seconds` of it."""

    class Steps(list):
        seconds: ClassVar = {"fp32": 0.2, "bf16": 0.1}

    def step(model, pixels, precision) -> float:
        steps.append(precision)
        assert pixels.shape[1:] == (3, 16, 16)
        torch.rand(1)
        model(pixel_values=pixels)  # changes the statistics of BatchNorm
        return Steps.seconds[precision]

    steps = Steps()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(bkd_hf.precision, "seconds_of_step", step)
    monkeypatch.setattr(bkd_hf.precision, "CACHE", tmp_path / "cache" / "precision.json")
    return steps


def options_for(folder, *options: str) -> list[str]:
    return [
        "--method", "ce", "--num_train_epochs", "1", "--max_train_samples", "60", "--max_eval_samples", "30",
        "--model_name_or_path", "cifar-resnet-8", "--image_size", "16", "--num_threads", "1", "--use_cpu", "true",
        "--dataloader_num_workers", "0", "--disable_tqdm", "true", "--precision", "auto",
        "--output_dir", str(folder), *options,
    ]  # fmt: skip


def weights_of(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_in_the_precision_that_was_measured_when_it_began(tmp_path, run_here, steps, monkeypatch):  # noqa: F811
    first, told = tmp_path / "first", tmp_path / "told"
    output = run_here(*options_for(first))
    assert {*steps} == {"fp32", "bf16"}
    assert "1 CPU thread, fp32 or bf16." in output
    assert "Precision: bf16. Examples a second of a training step, measured on this machine: " in output
    hardware = load_results(first)["hardware"]
    assert hardware["precision"] == "bf16"
    assert hardware["precision_rates"]["bf16"] == 2 * hardware["precision_rates"]["fp32"]
    assert "(the faster, as measured: " in (first / "README.md").read_text()
    run_here(*options_for(told, "--precision", "bf16"))
    assert weights_of(told) == weights_of(first)

    # Interrupted; goes on where the cache is gone, and the measurement or the processor would say something else.
    for name in ("results.json", "model.safetensors"):
        (first / name).unlink()
    bkd_hf.precision.CACHE.unlink()
    steps.clear()
    steps.seconds.update(fp32=0.1, bf16=0.2)
    assert settle(first)[0].training.bf16
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    run_here(*options_for(first))
    assert (load_results(first)["hardware"], steps) == (hardware, [])
    assert weights_of(told) == weights_of(first)
    assert "This run is finished" in run_here(*options_for(first))

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    arguments, said = settle(first, "--overwrite")
    assert (said[0].split(".")[0], arguments.training.bf16, bool(steps)) == ("Precision: fp32", False, True)


def settle(folder, *options: str):
    """Measure for a tiny ResNet, which is left as it is; returns the options, and what is said."""
    said, arguments = [], parse_arguments(options_for(folder, *options), digits_recipe=RECIPE)
    model = tiny("ResNet", 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    settle_precision(arguments, model, SimpleNamespace(processor=processor(16), say=said.append))
    drawn, _ = torch.rand(1), torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return arguments, said


@pytest.mark.parametrize(
    ("options", "is_new"),
    [(["--per_device_train_batch_size", "7"], True), (["--freeze_backbone", "true"], True), (["--seed", "5"], False)],
)
def test_what_is_kept_belongs_to_one_model_and_batch(tmp_path, steps, options, is_new):
    settle(tmp_path / "run", "--per_device_train_batch_size", "8")
    steps.clear()
    settle(tmp_path / "run", "--per_device_train_batch_size", "8", *options)
    assert bool(steps) == is_new


@pytest.mark.parametrize("damage", ["", "[]", '{"%s": {"fp32": -1.0, "bf16": 2.0}}', '{"%s": {"fp32": "a"}}', None])
def test_a_damaged_file_of_rates_is_made_anew(tmp_path, steps, damage):
    arguments, _ = settle(tmp_path / "run")
    cache = bkd_hf.precision.CACHE
    whole = json.loads(cache.read_text())
    steps.clear()
    if damage is None:  # cannot be written, not even a file
        cache.unlink()
        cache.mkdir()
    else:
        cache.write_text(damage.replace("%s", next(iter(whole))))
    again, _ = settle(tmp_path / "run")
    assert steps
    assert again.precision_rates == arguments.precision_rates
    assert (again.training.bf16, again.for_teacher().training.bf16, again.training.mixed_precision) == (
        True,
        True,
        "bf16",
    )
    assert damage is None or json.loads(cache.read_text()) == whole


@pytest.mark.parametrize(
    ("options", "launcher"), [(["--precision", "bf16"], "no"), (["--bf16", "true"], "no"), (["--bf16", "false"], "no"),
                              (["--bf16_full_eval", "true"], "no"), ([], "bf16")],
)  # fmt: skip
def test_what_is_told_is_not_measured(tmp_path, steps, options, launcher, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    arguments, said = settle(tmp_path / "run", *options)
    assert (steps, said, arguments.training.bf16) == ([], [], "false" not in options)


def test_the_main_process_decides(tmp_path, steps, monkeypatch):
    monkeypatch.setattr(bkd_hf.config.BKDConfig, "process_index", 1)
    monkeypatch.setattr(bkd_hf.precision, "broadcast_object_list", lambda found: [{"fp32": 9.0, "bf16": 1.0}])
    arguments, _ = settle(tmp_path / "run")
    assert (steps, arguments.training.bf16, arguments.for_teacher().training.bf16) == ([], False, False)
