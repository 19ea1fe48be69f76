"""Trains a few epochs, with or without being killed, or resumes; for test_resume.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from transformers import TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, load_classifier, load_image_dataset, load_processor
from bkd_hf.run_folder import last_complete_checkpoint
from tests.tiny_models import tiny_vit

STEPS_PER_EPOCH = 5


class KillAt(TrainerCallback):
    """Dies as by power failure."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def model(kind: str, seed: int) -> torch.nn.Module:
    if kind == "vit":
        return tiny_vit(seed, num_labels=10, image_size=16, hidden_dropout_prob=0.1)
    torch.manual_seed(seed)
    return load_classifier("cifar-resnet-8", [str(n) for n in range(10)], image_size=16)


#: The last draws some images several times in an epoch, and weighs them from the third epoch on.
METHODS = {
    "resnet": {"method": "bkd", "deferred_reweighting_start": 2},
    "ema": {"method": "bkd", "ema_decay": 0.9},
    "vit": {"method": "dkd", "sampler": "class_balanced", "class_weighting": "drw", "class_weighting_start": 2},
}


def train(kind: str, workers: int, output_dir: Path, kill_at: int | None, resume: bool) -> None:
    torch.set_num_threads(1)  # a forked process has no others
    images = load_image_dataset("digits")["train"].select(range(70))
    processor = load_processor("cifar-resnet-8", image_size=16)
    trainer = BKDTrainer(
        model=model(kind, seed=1),
        teacher_model=model(kind, seed=2),
        args=BKDConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=16,
            num_train_epochs=4,
            learning_rate=0.05,
            optim="sgd",
            momentum=0.9,
            lr_step_epochs=[2],
            lr_step_factors=[0.1],
            lr_warmup_epochs=1,
            **METHODS[kind],
            logging_steps=3,
            save_steps=4,
            eval_strategy="epoch",
            dataloader_num_workers=workers,
            dataloader_persistent_workers=workers > 0 and kind == "vit",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=ImageDataset(images, processor, "pad_crop"),
        eval_dataset=ImageDataset(images, processor),
        class_counts=range(1, 11),
        callbacks=[KillAt(kill_at)] if kill_at else [],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir) if resume else None)
    trainer.save_model()
    torch.save(trainer.model.state_dict(), output_dir / "weights.pt")
    trainer.save_state()
