from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from bkd_hf import CifarResNetConfig, CifarResNetForImageClassification, InputError, load_classifier, load_processor
from bkd_hf.teacher import load_teacher
from tests.tiny_models import tiny_vit


@pytest.mark.parametrize(
    ("depth", "shortcut", "classes", "parameters"),
    [(32, "A", 100, 470_004), (20, "A", 10, 269_722), (56, "A", 10, 853_018), (110, "A", 10, 1_727_962)],
)
def test_parameters_are_those_of_the_literature(depth, shortcut, classes, parameters):
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=depth, shortcut=shortcut, num_labels=classes))
    assert model.num_parameters() == parameters


def test_shortcut_b_has_projections():
    a, b = (
        CifarResNetForImageClassification(CifarResNetConfig(depth=20, shortcut=shortcut, num_labels=10))
        for shortcut in "AB"
    )
    assert b.num_parameters() - a.num_parameters() == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_cosine_head_gives_scaled_cosines():
    model = CifarResNetForImageClassification(
        CifarResNetConfig(depth=8, cosine_head=True, cosine_scale=7.0, num_labels=5)
    ).eval()
    features = torch.randn(3, 64)
    logits = model.classifier(features)
    expected = 7 * torch.nn.functional.cosine_similarity(features[:, None], model.classifier.weight[None], dim=-1)
    torch.testing.assert_close(logits, expected)
    assert logits.abs().max() <= 7


def test_kaiming_initialisation():
    torch.manual_seed(0)
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=32, num_labels=100))
    convolution = model.blocks[-1].conv2.weight
    assert convolution.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_outputs():
    model = CifarResNetForImageClassification(CifarResNetConfig(depth=8, num_labels=5)).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    outputs = model(pixel_values=images, labels=labels)
    torch.testing.assert_close(outputs.loss, torch.nn.functional.cross_entropy(outputs.logits, labels))
    loss, logits = model(images, labels, return_dict=False)
    assert torch.equal(logits, outputs.logits)
    assert torch.equal(loss, outputs.loss)


@pytest.mark.slow
def test_saved_folder_loads_where_bkd_hf_is_not_installed(tmp_path):
    model = load_classifier("cifar-resnet-20", ["cat", "dog", "hen"]).eval()
    model.save_pretrained(tmp_path / "model")
    load_processor("cifar-resnet-20", image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3).save_pretrained(
        tmp_path / "model"
    )
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = f"""
import sys
sys.modules["bkd_hf"] = None  # an import of it would fail
import numpy as np, torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
model = AutoModelForImageClassification.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
torch.save(model(torch.load({str(tmp_path / "images.pt")!r})).logits, {str(tmp_path / "logits.pt")!r})
classify = pipeline("image-classification", {str(tmp_path / "model")!r}, trust_remote_code=True)
answer = classify(Image.fromarray(np.zeros((40, 50), dtype=np.uint8)))
assert sorted(a["label"] for a in answer) == ["cat", "dog", "hen"], answer
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(images).logits)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]


def test_known_to_the_auto_classes(tmp_path):
    load_classifier("cifar-resnet-8", ["a", "b"]).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CifarResNetConfig)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(loaded, CifarResNetForImageClassification)
    assert loaded.config.id2label == {0: "a", 1: "b"}


def test_head_of_a_pretrained_model_is_replaced(tmp_path):
    first = load_classifier("cifar-resnet-8", ["a", "b"])
    first.save_pretrained(tmp_path)
    other = load_classifier(str(tmp_path), ["x", "y", "z"])
    assert other.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert other.classifier.weight.shape == (3, 64)
    assert torch.equal(other.conv.weight, first.conv.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_that_were_saved_in_half_precision_are_trained_in_full(tmp_path, dtype):
    tiny_vit(0, 3).to(dtype).save_pretrained(tmp_path)
    model = load_classifier(str(tmp_path), ["a", "b", "c"])
    teacher = load_teacher(str(tmp_path))
    assert {parameter.dtype for parameter in (*model.parameters(), *teacher.parameters())} == {torch.float32}
    # Half precision remains a choice, where somebody makes it.
    chosen = load_classifier(str(tmp_path), ["a", "b", "c"], dtype=dtype)
    assert {parameter.dtype for parameter in chosen.parameters()} == {dtype}


def test_bad_names(tmp_path):
    with pytest.raises(InputError, match="There is no cifar-resnet-33: the depth must be 6n"):
        load_classifier("cifar-resnet-33", ["a", "b"])
    with pytest.raises(InputError, match=r"The model nobody/nothing cannot be loaded .*HF_HUB_OFFLINE is set"):
        load_classifier("nobody/nothing", ["a", "b"])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_processor(str(tmp_path))
    with pytest.raises(ValueError, match="depth must be"):
        CifarResNetConfig(depth=21)
    with pytest.raises(ValueError, match="shortcut must be"):
        CifarResNetConfig(shortcut="C")
