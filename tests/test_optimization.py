"""Learning rates of layers and of the head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bkd_hf import BKDConfig, BKDTrainer, InputError
from bkd_hf.optimization import layer_depths
from tests.architectures import EVERY, tiny

DECAY, RATE = 0.5, 0.1

# By the beginnings of names, the number of blocks above, counted with the head as the first.
EXPECTED: dict[str, dict[str, int]] = {
    "ViT": {"vit.embeddings": 3, "vit.layers.0": 2, "vit.layers.1": 1, "vit.layernorm": 0, "classifier": 0},
    "DeiT": {"deit.embeddings": 3, "deit.layers.0": 2, "deit.layers.1": 1, "deit.layernorm": 0, "classifier": 0},
    "DINOv2": {"dinov2.embeddings": 3, "dinov2.encoder.layer.0": 2, "dinov2.encoder.layer.1": 1,
               "dinov2.layernorm": 0, "classifier": 0},
    "Swin": {"swin.embeddings": 3, "swin.encoder.layers.0": 2, "swin.encoder.layers.1": 1, "swin.layernorm": 0,
             "classifier": 0},
    "ConvNeXt": {"convnext.embeddings": 3, "convnext.encoder.stages.0": 2,
                 "convnext.encoder.stages.1.downsampling_layer": 2, "convnext.encoder.stages.1.layers": 1,
                 "convnext.layernorm": 0, "classifier": 0},
    "ResNet": {"resnet.embedder": 3, "resnet.encoder.stages.0": 2, "resnet.encoder.stages.1": 1, "classifier": 0},
    "CIFAR ResNet": {"conv": 4, "norm": 4, "blocks.0": 3, "blocks.1": 2, "blocks.2": 1, "classifier": 0},
    "EfficientNet": {"efficientnet.embeddings": 8, "efficientnet.encoder.top_": 0, "classifier": 0,
                     **{f"efficientnet.encoder.blocks.{i}": 7 - i for i in range(7)}},
}  # fmt: skip


def trainer_for(folder: Path, model: nn.Module, **options) -> BKDTrainer:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    args = BKDConfig(str(folder), method="ce", learning_rate=RATE, optim="sgd", save_strategy="no", use_cpu=True,
                     logging_steps=1, lr_scheduler_type="constant", disable_tqdm=True, **options)  # fmt: skip
    return BKDTrainer(
        model, args=args, train_dataset=[{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    )


def rates_of(trainer: BKDTrainer) -> dict[str, float]:
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    optimizer = trainer.create_optimizer()
    return {names[parameter]: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("head_rate", [None, 3.0])
def test_rates_fall_with_the_depth_by_the_right_powers(name, head_rate, tmp_path):
    model = tiny(name, 1)
    rates = rates_of(trainer_for(tmp_path, model, layer_decay=DECAY, weight_decay=0.1, head_learning_rate=head_rate))
    assert rates.keys() == dict(model.named_parameters()).keys()
    for parameter, rate in rates.items():
        power = next(power for start, power in EXPECTED[name].items() if parameter.startswith(start))
        is_of_head = head_rate is not None and parameter.startswith("classifier")
        assert rate == pytest.approx(head_rate if is_of_head else RATE * DECAY**power), parameter


@pytest.mark.parametrize("name", EVERY)
def test_every_depth_is_there_and_the_head_is_above_all(name):
    model = tiny(name, 1)
    depths = layer_depths(model)
    assert set(depths) == set(model.parameters())
    assert set(depths.values()) == set(range(max(depths.values()) + 1))
    assert depths[list(model.parameters())[-1]] == max(depths.values())


def test_a_decay_of_one_trains_as_without_and_the_full_rate_is_logged(tmp_path):
    states = []
    for options in ({}, {"layer_decay": 1.0}, {"layer_decay": DECAY}):
        trainer = trainer_for(tmp_path, tiny("ViT", 1), num_train_epochs=2, **options)
        trainer.train()
        states.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        assert [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry] == [RATE] * 2
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_low_rank_updates_have_the_rates_of_their_layers(tmp_path):
    pytest.importorskip("peft")
    rates = rates_of(trainer_for(tmp_path, tiny("ViT", 1), layer_decay=DECAY, adapter="lora"))
    of_layer = {name.split(".")[2] if "lora" in name else name: rate for name, rate in rates.items()}
    assert of_layer == pytest.approx(
        {"0": RATE * DECAY**2, "1": RATE * DECAY, "classifier.weight": RATE, "classifier.bias": RATE}
    )


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.01, float("nan")])
def test_decay_is_checked(decay, tmp_path):
    with pytest.raises(InputError, match=r"^--layer_decay must be above 0 and at most 1, got"):
        BKDConfig(str(tmp_path), layer_decay=decay)


def test_a_model_whose_depth_cannot_be_told_is_refused():
    model = nn.ModuleDict({"features": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), "head": nn.Linear(4, 5)})
    with pytest.raises(InputError, match=r"^--layer_decay: ModuleDict has no list of blocks"):
        layer_depths(model)


def test_decay_has_no_effect_on_the_head_alone(tmp_path):
    with pytest.warns(UserWarning, match="--layer_decay has no effect: --freeze_backbone"):
        BKDConfig(str(tmp_path), layer_decay=0.9, freeze_backbone=True)
