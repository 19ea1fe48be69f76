"""The moving average of the weights: its values, and that evaluation, saving and publishing use it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, InputError, TrainingDivergedError
from bkd_hf.arguments import parse_arguments
from bkd_hf.averaging_trainer import RAW_WEIGHTS_NAME
from bkd_hf.models import load_weights_strictly
from tests.architectures import examples, tiny, watched_trainer
from tests.faults import CHEAP, interrupt, run, same_outcome

DECAY = 0.4  # reached after 5 steps, of 8


class Watcher(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


def trainer_for(folder: Path, name: str = "CIFAR ResNet", seed: int = 1, **options) -> BKDTrainer:
    settings = {"learning_rate": 0.05, "optim": "sgd", "save_strategy": "epoch"}
    return watched_trainer(folder, name, seed, Watcher(), **settings | options)


def averages(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    average = states[0]
    for n, state in enumerate(states[1:], start=1):
        d = min(DECAY, (1 + n) / (10 + n))
        average = {
            name: d * mean + (1 - d) * state[name] if mean.is_floating_point() else state[name]
            for name, mean in average.items()
        }
    return average


def differing(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert state.keys() == other.keys()
    return [name for name in state if not torch.equal(state[name], other[name])]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CIFAR ResNet", {}),
        ("CIFAR ResNet", {"gradient_accumulation_steps": 2}),
        ("CIFAR ResNet", {"bf16": True}),
        ("Swin", {}),  # has integers that must not be averaged
        ("Swin v2", {}),
    ],
)
def test_the_model_ends_as_the_average_of_its_weights_and_trains_as_without(tmp_path, name, options):
    trainer = trainer_for(tmp_path / "ema", name, ema_decay=DECAY, **options)
    trainer.train()
    states = trainer.watcher.states
    assert len(states) == 8 // options.get("gradient_accumulation_steps", 1)
    for key, value in averages(states).items():
        torch.testing.assert_close(trainer.model.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    plain = trainer_for(tmp_path / "plain", name, **options)
    plain.train()
    assert all(not differing(*pair) for pair in zip(states, plain.watcher.states, strict=True))
    assert differing(plain.model.state_dict(), states[-1]) == []
    assert differing(trainer.model.state_dict(), states[-1]) != []


def test_frozen_weights_stay_as_they_are_to_the_bit(tmp_path):
    trainer = trainer_for(tmp_path, "ViT", ema_decay=DECAY, freeze_backbone=True)
    trainer.train()
    changed = differing(trainer.model.state_dict(), tiny("ViT", 1).state_dict())
    assert sorted(changed) == ["classifier.bias", "classifier.weight"]


def test_weights_of_few_digits_have_no_average(tmp_path):
    trainer = trainer_for(tmp_path, ema_decay=0.9)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(InputError, match=r"--ema_decay 0\.9 needs a student in float32: in torch\.bfloat16"):
        trainer.train()


def test_masks_that_are_not_finite_stay_masks(tmp_path):
    trainer = trainer_for(tmp_path, ema_decay=DECAY)
    mask = torch.tensor([0.0, -torch.inf])
    trainer.model.register_buffer("mask", mask.clone(), persistent=False)
    trainer.train()
    assert torch.equal(trainer.model.mask, mask)


def test_all_that_is_measured_and_saved_is_of_the_average(tmp_path):
    trainer = trainer_for(tmp_path, ema_decay=DECAY)
    trainer.train()
    trainer.save_model()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(measured[-1], abs=0)
    for step, folder in ((4, "checkpoint-4"), (8, "checkpoint-8"), (8, "")):
        saved = tiny("CIFAR ResNet", 3)
        load_weights_strictly(saved, str(tmp_path / folder))
        for key, value in averages(trainer.watcher.states[:step]).items():
            torch.testing.assert_close(saved.state_dict()[key], value, rtol=1e-5, atol=1e-6)
        if folder:
            raw = torch.load(tmp_path / folder / RAW_WEIGHTS_NAME)
            assert differing(raw, trainer.watcher.states[step - 1]) == []
    assert not (tmp_path / RAW_WEIGHTS_NAME).exists()


@pytest.mark.parametrize("name", ["CIFAR ResNet", "ViT"])
def test_resumes_with_exactly_the_same_average(tmp_path, name):
    whole, resumed = (trainer_for(tmp_path, name, seed, ema_decay=0.9, save_steps=3, save_strategy="steps")
                      for seed in (1, 3))  # fmt: skip
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert differing(whole.model.state_dict(), resumed.model.state_dict()) == []


def test_the_best_average_is_loaded(tmp_path):
    trainer = trainer_for(tmp_path, ema_decay=DECAY, load_best_model_at_end=True, metric_for_best_model="eval_loss",
                          greater_is_better=True)  # fmt: skip
    trainer.train()  # the loss falls: the first is the highest
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=0)


def test_the_bias_is_fitted_to_the_average(tmp_path):
    learned, balanced = (
        trainer_for(tmp_path / bias, ema_decay=DECAY, head_bias=bias) for bias in ("learned", "balanced")
    )
    for trainer in (learned, balanced):
        trainer.train()
    ends = learned.model.state_dict(), balanced.model.state_dict()
    assert differing(*ends) == ["classifier.bias"]
    torch.testing.assert_close(ends[1]["classifier.bias"] - ends[0]["classifier.bias"],
                               balanced.head_bias_shift.float())  # fmt: skip


def test_a_training_that_diverges_is_stopped(tmp_path):
    with pytest.raises(TrainingDivergedError, match=r"diverged.* at step [1-8]\."):
        trainer_for(tmp_path, ema_decay=DECAY, learning_rate=1e30).train()


def test_a_second_training_begins_a_new_average(tmp_path):
    trainer = trainer_for(tmp_path, ema_decay=DECAY, save_strategy="no")
    trainer.train()
    trainer.watcher.states.clear()
    trainer.train()
    expected = averages(trainer.watcher.states)
    torch.testing.assert_close(dict(trainer.model.state_dict()), dict(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("began", "goes_on"), [({}, {"ema_decay": 0.9}), ({"ema_decay": 0.9}, {})])
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path, began, goes_on):
    trainer_for(tmp_path, save_strategy="steps", save_steps=3, max_steps=3, **began).train()
    with pytest.raises(InputError, match=r"^--ema_decay is .*: continue as it began, or start anew\.$"):
        trainer_for(tmp_path, **goes_on).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_decay_is_checked(tmp_path, decay):
    with pytest.raises(InputError, match=r"^--ema_decay must be above 0 and below 1, got"):
        BKDConfig(str(tmp_path), ema_decay=decay)


@pytest.mark.parametrize("sharding", [{"fsdp": "full_shard"}, {"deepspeed": {"zero_optimization": {"stage": 2}}}, {}])
def test_sharded_weights_are_refused(tmp_path, sharding, monkeypatch):
    if not sharding:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"^--ema_decay must be left out with FSDP and DeepSpeed: .*, got 0.9\.$"):
        BKDConfig(str(tmp_path), ema_decay=0.9, **sharding)


def test_the_teacher_has_an_average_too_or_one_of_its_own():
    for own, decay in (([], 0.9), (["--teacher_ema_decay", "0.5"], 0.5)):
        arguments = parse_arguments(["--method", "kd", "--ema_decay", "0.9", *own])
        assert (arguments.training.ema_decay, arguments.for_teacher().training.ema_decay) == (0.9, decay)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path):
    argv = (*CHEAP, "--ema_decay", "0.9", "--output_dir")
    for folder in ("whole", "run"):
        code, said = run(*argv, tmp_path / folder)
        assert code == 0, said
    interrupt(tmp_path / "run", last=16)
    code, said = run(*argv, tmp_path / "run")
    assert (code, "Continuing from checkpoint-16" in said) == (0, True), said
    same_outcome(tmp_path / "run", tmp_path / "whole")


def test_nn_modules_have_an_average_too(tmp_path):
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(3 * 32 * 32, 5)

        def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
            return type("Output", (dict,), {"logits": property(lambda self: self["logits"])})(
                logits=self.classifier(pixel_values.flatten(1))
            )

    def trainer() -> BKDTrainer:
        args = BKDConfig(
            str(tmp_path), method="ce", per_device_train_batch_size=4, num_train_epochs=2, save_steps=3, use_cpu=True,
            ema_decay=0.9, disable_tqdm=True,
        )  # fmt: skip
        torch.manual_seed(0)
        return BKDTrainer(Linear(), args=args, train_dataset=examples(), class_counts=[4, 3, 3, 3, 3])

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert differing(whole.model.state_dict(), resumed.model.state_dict()) == []
