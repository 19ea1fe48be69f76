"""Tiny models with random weights of every supported architecture."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn
from transformers import TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, load_classifier

NAMES = ["ant", "bee", "cat", "dog", "eel"]
_LABELS: dict[str, Any] = {
    "num_labels": 5,
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: i for i, name in enumerate(NAMES)},
}
_VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4
}  # fmt: skip
_CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}

#: Name in README → (model class, configuration class, its options).
_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ViT": (T.ViTForImageClassification, T.ViTConfig, _VIT),
    "DeiT": (T.DeiTForImageClassification, T.DeiTConfig, _VIT),
    "BEiT": (T.BeitForImageClassification, T.BeitConfig, _VIT),
    "Swin": (T.SwinForImageClassification, T.SwinConfig, _SWIN),
    "Swin v2": (T.Swinv2ForImageClassification, T.Swinv2Config, _SWIN),
    "ConvNeXt": (T.ConvNextForImageClassification, T.ConvNextConfig, _CONVNEXT),
    "ConvNeXt v2": (T.ConvNextV2ForImageClassification, T.ConvNextV2Config, _CONVNEXT),
    "DINOv2": (
        T.Dinov2ForImageClassification,
        T.Dinov2Config,
        {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2, "image_size": 32,
         "patch_size": 8},
    ),
    "ResNet": (
        T.ResNetForImageClassification,
        T.ResNetConfig,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "RegNet": (
        T.RegNetForImageClassification,
        T.RegNetConfig,
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
    ),
    "EfficientNet": (
        T.EfficientNetForImageClassification,
        T.EfficientNetConfig,
        {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320,
         "depthwise_padding": []},
    ),
    "MobileNet v2": (
        T.MobileNetV2ForImageClassification,
        T.MobileNetV2Config,
        {"image_size": 32, "depth_multiplier": 0.25},
    ),
    "MobileViT": (
        T.MobileViTForImageClassification,
        T.MobileViTConfig,
        {"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 32],
         "num_attention_heads": 2},
    ),
    "PVT": (
        T.PvtForImageClassification,
        T.PvtConfig,
        {"image_size": 32, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
         "depths": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2]},
    ),
    "LeViT": (
        T.LevitForImageClassification,
        T.LevitConfig,
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
         "key_dim": [4, 4, 4]},
    ),
    "SigLIP": (T.SiglipForImageClassification, T.SiglipConfig, {"vision_config": _VIT, "text_config": _TEXT}),
    "CLIP": (
        T.CLIPForImageClassification,
        T.CLIPConfig,
        {"vision_config": _VIT | {"projection_dim": 16}, "text_config": _TEXT | {"projection_dim": 16}},
    ),
}  # fmt: skip


def _builder(model: Any, configuration: Any, options: dict[str, Any]) -> Callable[[], nn.Module]:
    return lambda: model(configuration(**options, **_LABELS))


def _timm() -> nn.Module:
    return T.TimmWrapperForImageClassification(
        T.TimmWrapperConfig(
            architecture="resnet18", model_args={"channels": [4, 8, 8, 16]}, do_pooling=True, **_LABELS
        )
    )


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "CIFAR ResNet": lambda: load_classifier("cifar-resnet-8", NAMES),
    **{name: _builder(*parts) for name, parts in _MODELS.items()},
    "timm": _timm,
}
# The kinds of layer, norm and head there are; the others say the same of one architecture more.
_USUAL = ("CIFAR ResNet", "ResNet", "ViT", "ConvNeXt v2", "EfficientNet")


def why_not(name: str) -> str | None:
    """Say why an architecture cannot be had here; `None` if it can."""
    if name == "timm":
        try:
            importlib.import_module("timm")
        except (ImportError, RuntimeError) as error:  # without it, or with a torchvision that does not fit torch
            return f"timm cannot be imported: {error}"
    return None


def _parameter(name: str) -> Any:
    slow = () if name in _USUAL else (pytest.mark.slow,)
    skipped = (pytest.mark.skip(reason=reason),) if (reason := why_not(name)) else ()
    return pytest.param(name, marks=(*slow, *skipped))


#: Parameters for tests of what holds for every architecture.
EVERY = [_parameter(name) for name in ARCHITECTURES]
#: Without timm, whose configuration does not tell the model's parts.
EVERY_BUT_TIMM = [parameter for parameter in EVERY if parameter.values != ("timm",)]
#: Height and width, where it is not 32.
IMAGE_SIZES = {"LeViT": 64}


def examples(number: int = 16, size: int = 32) -> list[dict]:
    """Images of noise, of five classes in turn."""
    images = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]


def watched_trainer(folder: Path, name: str, seed: int, watcher: TrainerCallback, **options: Any) -> BKDTrainer:
    """A trainer of a tiny model on 16 examples; its `watcher` is a callback of it."""
    settings = {
        "method": "ce", "per_device_train_batch_size": 4, "num_train_epochs": 2, "eval_strategy": "epoch",
        "use_cpu": True, "disable_tqdm": True, **options,
    }  # fmt: skip
    data = examples()
    trainer = BKDTrainer(
        tiny(name, seed), args=BKDConfig(str(folder), **settings), train_dataset=data, eval_dataset=data[:10],
        class_counts=[4, 3, 3, 3, 3], callbacks=[watcher],
    )  # fmt: skip
    trainer.watcher = watcher
    return trainer


def tiny(name: str, seed: int) -> nn.Module:
    """A model of the architecture, the same for the same seed."""
    torch.manual_seed(seed)
    return ARCHITECTURES[name]()
