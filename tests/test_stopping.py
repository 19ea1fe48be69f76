"""Real SIGTERM at any moment: no partial work counts as done, and the same command ends with the same weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, load_classifier, load_image_dataset, load_processor
from bkd_hf.commands.run import main
from bkd_hf.errors import TrainingStopped
from bkd_hf.run_folder import has_checkpoint, last_complete_checkpoint
from bkd_hf.stopping import end_workers, outlive_sigterm
from tests.conftest import REPOSITORY, WORKER_ENVIRONMENT, launch_two_processes
from tests.faults import CHEAP, Run, refused_in_one_line, run, same_outcome, start_two
from tests.tiny_models import tiny_vit

STEPS_PER_EPOCH = 4


class TerminateAt(TrainerCallback):
    """Gets SIGTERM, as if from outside, when something happens at a step."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.terminate)

    def terminate(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def trainer_of(output_dir: Path, *callbacks: TrainerCallback, **options) -> BKDTrainer:
    images = ImageDataset(load_image_dataset("digits")["train"].select(range(64)), load_processor("cifar-resnet-8"))
    torch.manual_seed(0)
    models = [load_classifier("cifar-resnet-8", images.class_names) for _ in range(2)]
    defaults = {
        "num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 0.01, "enable_jit_checkpoint": True,
        "eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1,
    }  # fmt: skip
    args = BKDConfig(str(output_dir), use_cpu=True, disable_tqdm=True, **{**defaults, **options})
    return BKDTrainer(
        *models, args=args, train_dataset=images, eval_dataset=images, class_counts=[7] * 10, callbacks=list(callbacks)
    )


def outcome_of(trainer: BKDTrainer) -> tuple:
    untimed = ("epoch", "step", "loss", "ce_loss", "kd_loss", "eval_loss", "eval_accuracy", "learning_rate")
    history = [{name: entry[name] for name in untimed if name in entry} for entry in trainer.state.log_history]
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry], weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple:
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return outcome_of(trainer)


@pytest.mark.parametrize(
    ("event", "step", "kept"),
    [
        pytest.param("on_train_begin", 0, None, marks=pytest.mark.slow),  # nothing to keep
        ("on_step_begin", 0, 1),
        ("on_pre_optimizer_step", 1, 2),  # BatchNorm has seen the step, the weights have not
        pytest.param("on_step_begin", 3, 4, marks=pytest.mark.slow),  # the last of an epoch, before its evaluation
        ("on_prediction_step", 4, 4),  # in the midst of an evaluation
        pytest.param("on_save", 4, 5, marks=pytest.mark.slow),
        pytest.param("on_step_begin", 7, 8, marks=pytest.mark.slow),  # the last of all
    ],
)
def test_a_training_stops_after_its_step_and_goes_on(tmp_path, whole, event, step, kept):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped) as stopped:
        trainer_of(tmp_path, TerminateAt(event, step)).train()
    assert stopped.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is before
    checkpoint = last_complete_checkpoint(tmp_path)
    assert checkpoint == (None if kept is None else str(tmp_path / f"checkpoint-{kept}"))
    trainer = trainer_of(tmp_path)
    trainer.train(resume_from_checkpoint=checkpoint)
    (history, weights), (expected_history, expected) = outcome_of(trainer), whole
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert history == expected_history


def test_the_last_checkpoint_is_kept_beside_the_best(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    with pytest.raises(TrainingStopped):
        trainer_of(tmp_path, TerminateAt("on_step_begin", 9), num_train_epochs=3, learning_rate=0.1, **options).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_early_stopping_is_an_end(tmp_path):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "num_train_epochs": 9}
    trainer = trainer_of(tmp_path, EarlyStoppingCallback(1, early_stopping_threshold=1.0), **options)
    assert trainer.train().global_step == 2 * STEPS_PER_EPOCH


def test_without_the_option_sigterm_is_what_it_was(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("ours"))
    try:
        trainer_of(tmp_path, TerminateAt("on_step_begin", 1), enable_jit_checkpoint=False).train()
        with pytest.raises(TrainingStopped):
            trainer_of(tmp_path, TerminateAt("on_step_begin", 1)).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["ours"]


def test_while_logits_are_computed_beforehand_it_stops_at_once(tmp_path):
    trainer = trainer_of(tmp_path / "run", teacher_cache=str(tmp_path / "cache"))
    forward, calls = trainer.teacher_model.forward, []

    def terminated(*args, **kwargs):
        calls.append(0)
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(*args, **kwargs)

    trainer.teacher_model.forward = terminated
    with pytest.raises(TrainingStopped):
        trainer.train()
    assert len(calls) == 1
    assert not has_checkpoint(tmp_path / "run")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="not on this system")
def test_workers_outlive_a_signal_to_all_and_end_with_their_loader():
    loader = outlive_sigterm(torch.utils.data.DataLoader(list(range(100)), num_workers=1, prefetch_factor=1))
    batches = iter(loader)
    assert next(batches) == 0
    (worker,) = batches._workers
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert [int(batch) for batch in batches] == list(range(1, 100))
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


# ---- Runs -----------------------------------------------------------------------------------------------------------

#: Teacher and student of a model without BatchNorm and dropout, 11 steps an epoch.
SHORT = (
    *("--num_train_epochs", "3", "--lr_step_epochs", "2", "--lr_step_factors", "0.1", "--lr_warmup_epochs", "0"),
    *("--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "4", "--disable_tqdm", "true"),
    *("--num_threads", "1", "--max_eval_samples", "100", "--precision", "fp32", "--use_cpu", "true"),
)


def wait_for(path: Path, *runs: Run) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def stopped(argv: tuple, sign: Path, folder: Path) -> None:
    process = Run(*argv, "--output_dir", folder)
    wait_for(sign)
    process.kill(signal.SIGTERM)
    code = process.wait()
    lines = [line for line in process.output.splitlines() if line.startswith("stopped: ")]
    assert (code, len(lines), "Traceback" in process.output) == (75, 1, False), process.output
    assert not (folder / "results.json").exists()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_command(tmp_path):
    argv = (*CHEAP[2:], "--method", "bkd", "--force_distillation")
    code, said = run(*argv, "--output_dir", tmp_path / "whole")
    assert code == 0, said
    folder = tmp_path / "run"
    stopped(argv, folder / "bkd_run.lock", folder)  # nothing is trained yet
    stopped(argv, folder / "teacher" / "checkpoint-4", folder)
    assert not (folder / "teacher" / "results.json").exists()
    stopped(argv, folder / "checkpoint-4", folder)
    code, said = run(*argv, "--output_dir", folder)
    assert code == 0, said
    assert "Continuing from checkpoint-" in said
    for part in ("teacher", "."):
        same_outcome(folder / part, tmp_path / "whole" / part)


@pytest.mark.slow
def test_a_comparison_ends_its_cells_and_says_what_is_done(tmp_path):
    argv = ("--methods", "ce", "--seeds", 0, "--output_dir", tmp_path / "out", *CHEAP[2:])
    comparison = Run(*argv, script="compare.py")
    wait_for(tmp_path / "out" / "ce" / "seed0" / "checkpoint-4")
    comparison.kill(signal.SIGTERM)
    assert comparison.wait() == 75, comparison.output
    assert "Stopped: ce seed 0. 0 of 1 cells are finished." in comparison.output
    assert "stopped: the same command goes on with the cells that are not finished" in comparison.output
    assert not (tmp_path / "out" / "ce" / "seed0" / "results.json").exists()


def test_what_goes_on_after_an_overwritten_run_was_interrupted(tmp_path, monkeypatch, capfd):
    """The same command, with --overwrite, would delete the new checkpoint."""
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "complete.json").write_text("{}")

    def interrupted(*argv: str, is_begun: bool) -> str:
        def run(arguments):
            arguments.overwrite = arguments.overwrite and not is_begun  # as when the earlier run has been deleted
            raise KeyboardInterrupt

        monkeypatch.setattr("bkd_hf.commands.run.run", run)
        assert main([*argv, "--output_dir", str(tmp_path)]) == 130
        return capfd.readouterr().err

    assert "the same command continues from" in interrupted(is_begun=True)
    assert "the same command without --overwrite continues from" in interrupted("--overwrite", is_begun=True)
    assert "the same command begins anew" in interrupted("--overwrite", is_begun=False)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> tuple:
    """Options for a model without BatchNorm and dropout."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit(0, num_labels=10, image_size=16).save_pretrained(folder)
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(folder)
    return ("--model_name_or_path", folder, "--method", "ce", "--image_size", 16, *SHORT)


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_the_same_global_batch(tmp_path, vit):
    one, two = ("--per_device_train_batch_size", 32), ("--per_device_train_batch_size", 16)
    code, said = run(*vit, *one, "--output_dir", tmp_path / "whole")
    assert code == 0, said

    # The launcher passes SIGTERM on to both processes.
    folder = tmp_path / "2 to 1"
    words = [*launch_two_processes(), REPOSITORY / "scripts/run_bkd.py", *vit, *two, "--output_dir", folder]
    launched = subprocess.Popen(
        [*map(str, words)], env=WORKER_ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(folder / "checkpoint-4")
    launched.send_signal(signal.SIGTERM)
    said = launched.communicate()[0]
    assert said.count("stopped: the same command continues") == 1, said
    assert not (folder / "results.json").exists()
    assert json.loads((folder / "bkd_run.json").read_text())["training"]["global_batch_size"] == 32
    error = refused_in_one_line(*run(*vit, *two, "--output_dir", folder))
    assert "--global_batch_size is 32 there, 16 here; --global_batch_size 32 keeps the examples of a step" in error
    code, said = run(*vit, *two, "--global_batch_size", 32, "--output_dir", folder)
    assert code == 0, said
    assert "It was saved by 2 processes with 16 examples at a time, now there are 1 with 16" in said

    # Only the first process gets it, and both stop after the same step.
    folder = tmp_path / "1 to 2"
    stopped((*vit, *one), folder / "checkpoint-4", folder)
    both = start_two(*vit, *two, "--output_dir", folder, "--save_steps", 3)
    wait_for(folder / "checkpoint-12")
    both[0].kill(signal.SIGTERM)
    assert [process.wait() for process in both] == [75, 75], [process.output for process in both]
    both = start_two(*vit, *two, "--output_dir", folder)
    assert [process.wait() for process in both] == [0, 0], [process.output for process in both]

    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "2 to 1", "1 to 2")]
    expected, *others = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in weights)
    for found in others:
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_idle_workers_end_at_once():
    loader = outlive_sigterm(DataLoader(range(4), num_workers=2, persistent_workers=True))
    others = set(multiprocessing.active_children())
    assert len(list(loader)) == 4
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    end_workers(loader)
    assert not any(worker.is_alive() for worker in workers)
    assert [worker.exitcode for worker in workers] == [0, 0]
