"""Default optimisations do not change results: loss curves with and without them."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from bkd_hf import BKDConfig, BKDTrainer, ImageDataset, load_classifier, load_image_dataset, load_processor
from bkd_hf.models import prefer_channels_last
from tests.tiny_models import tiny_vit

pytestmark = pytest.mark.slow

NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def digits():
    return load_image_dataset("digits")["eval"].select(range(128))


def curve(digits, tmp_path: Path, channels_last: bool = True, bf16: bool = False, **options) -> list[float]:
    """The loss, epoch by epoch."""
    dataset = ImageDataset(digits, load_processor("cifar-resnet-8", 16), **{"augmentation": "pad_crop"} | options)
    torch.manual_seed(0)
    student, teacher = (load_classifier("cifar-resnet-8", NAMES, 16) for _ in range(2))
    if channels_last:
        prefer_channels_last(student)
        prefer_channels_last(teacher)
    args = BKDConfig(
        output_dir=str(tmp_path), num_train_epochs=5, per_device_train_batch_size=32, learning_rate=0.01, optim="sgd",
        momentum=0.9, max_grad_norm=0, use_cpu=True, bf16=bf16, save_strategy="no", logging_strategy="epoch",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = BKDTrainer(student, teacher, args, train_dataset=dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    """Neither of them: fp32, rows of pixels one after another, every image decoded when it is seen."""
    return curve(digits, tmp_path_factory.mktemp("plain"), channels_last=False, cache_images="none")


@pytest.mark.parametrize(
    ("optimisation", "tolerance"),
    [
        ({"cache_images": "memory", "channels_last": False}, 0),
        ({"as_bytes": True, "channels_last": False}, 0),  # normalised where they arrive, by the same arithmetic
        ({"channels_last": True}, 1e-3),  # the same sums in another order
        ({"bf16": True}, 0.03),  # 8 bits of mantissa: about 0.4 % in each product
    ],
)
def test_loss_curve_stays(digits, plain, tmp_path, optimisation, tolerance):
    assert plain[-1] < 0.85 * plain[0]  # there is a curve
    assert curve(digits, tmp_path, **optimisation) == pytest.approx(plain, rel=tolerance, abs=0)


def test_loss_curve_stays_when_photographs_are_decoded_reduced(tmp_path):
    """JPEGs of 256×256 pixels, whose crops are shown at 16×16: decoded at 1/2 to 1/8 of their size, or in full."""
    generator = np.random.default_rng(0)
    photographs = []
    for _ in range(64):
        coarse = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        photographs.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    images = datasets.Dataset.from_dict(
        {"image": photographs, "label": [i % 10 for i in range(64)]}, features=features
    )
    reduced, full = (
        curve(images, tmp_path, augmentation="random_resized_crop", cache_images="none", reduced_decoding=on)
        for on in (True, False)
    )
    assert reduced != full
    assert reduced == pytest.approx(full, rel=0.02)


def vit_weights(digits, tmp_path, **options) -> torch.Tensor:
    """All weights of a ViT after two epochs of distillation, as one vector."""
    AcceleratorState._reset_state(reset_partial_state=True)  # compiling is a property of the process
    args = BKDConfig(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16, learning_rate=0.05, optim="sgd",
        use_cpu=True, save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    student, teacher = tiny_vit(1, 10, 16), tiny_vit(2, 10, 16)
    BKDTrainer(
        student, teacher, args, train_dataset=ImageDataset(digits, load_processor("cifar-resnet-8", 16))
    ).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return torch.cat([parameter.detach().flatten() for parameter in student.parameters()])


def test_a_short_last_step_is_not_compiled_anew(digits, tmp_path):
    """It is filled up with examples that do not count, and a model without BatchNorm ends as without that."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    graphs = []
    for size in (64, 76):  # four full steps; four, and one of 12
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = vit_weights(digits.select(range(size)), tmp_path, **options)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    eager = vit_weights(digits.select(range(76)), tmp_path)
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6)
