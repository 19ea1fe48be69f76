"""Balanced Knowledge Distillation for long-tailed image classification, for Hugging Face transformers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The module of each public name. Loaded on first use, so that `import bkd_hf` stays fast.
_HOMES = {
    "config": ["BKDConfig"],
    "augmentations": ["default_augmentation"],
    "data": ["class_counts", "long_tailed_counts", "make_long_tailed"],
    "errors": ["InputError", "PublishError"],
    "images": ["ImageDataset"],
    "loading": ["load_image_dataset", "load_text_dataset"],
    "losses": [
        "balanced_distillation_loss",
        "balanced_softmax_loss",
        "bkd_loss",
        "class_balanced_weights",
        "cross_entropy_loss",
        "deferred_weights",
        "dist_loss",
        "dive_loss",
        "dkd_loss",
        "focal_loss",
        "kd_loss",
        "ldam_loss",
        "logit_adjustment_loss",
        "ltkd_loss",
        "wsl_loss",
    ],
    "methods": ["METHODS"],
    "objective": ["Objective", "Progress"],
    "metrics": [
        "LongTailEvaluation",
        "NotFiniteError",
        "expected_calibration_error",
        "long_tail_metrics",
        "post_hoc_logit_adjustment",
        "shot_groups",
        "wilson_interval",
    ],
    "modeling_cifar_resnet": ["CifarResNetConfig", "CifarResNetForImageClassification"],
    "models": ["load_classifier", "load_processor"],
    "plots": ["save_plots"],
    "hub": ["publish_folder"],
    "results": ["load_results"],
    "text_data": ["TextDataset"],
    "teacher": ["FrozenTeacher", "align_labels", "load_teacher"],
    "trainer": ["BKDTrainer", "TeacherLogitsError", "TrainingDivergedError"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
