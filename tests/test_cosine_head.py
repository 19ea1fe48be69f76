"""A cosine head for every architecture: computing, saving, publishing, and models that cannot have one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as T

from bkd_hf import BKDConfig, BKDTrainer, InputError, load_classifier, load_processor, load_results
from bkd_hf.arguments import parse_arguments
from bkd_hf.head import head_modules
from bkd_hf.hub import prepare
from bkd_hf.models import linear_head
from bkd_hf.run import run as run_here
from tests.architectures import EVERY_BUT_TIMM, IMAGE_SIZES, NAMES, tiny
from tests.conftest import WORKER_ENVIRONMENT
from tests.faults import CHEAP, RECIPE
from tests.tiny_models import tiny_vit

SCALE = 7.0


def with_cosine_head(name: str, folder: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A linear model, and what becomes of it when it is loaded with a cosine head."""
    linear = tiny(name, 1)
    linear.save_pretrained(folder)
    return linear.eval(), load_classifier(str(folder), NAMES, cosine_scale=SCALE).eval()


def pixels(name: str) -> torch.Tensor:
    size = IMAGE_SIZES.get(name, 32)
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", EVERY_BUT_TIMM)
def test_logits_are_scaled_cosines_with_the_weights_of_the_linear_model(name, tmp_path):
    linear, cosine = with_cosine_head(name, tmp_path / "linear")
    features = []
    (head,) = (m for part in head_modules(linear).values() for m in part.modules() if isinstance(m, torch.nn.Linear))
    head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    linear(pixel_values=pixels(name))
    expected = SCALE * torch.cosine_similarity(features[0][:, None], head.weight, dim=-1, eps=1e-12)
    logits = cosine(pixel_values=pixels(name)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert logits.abs().max() <= SCALE * (1 + 1e-6)

    cosine.save_pretrained(tmp_path / "cosine")
    again = load_classifier(str(tmp_path / "cosine"), NAMES).eval()
    assert again.new_parameters == []
    torch.testing.assert_close(again(pixel_values=pixels(name)).logits, logits, rtol=1e-6, atol=1e-7)
    with pytest.raises(InputError, match=f"the student's cosine head has the scale {SCALE}"):
        trainer_for(tmp_path, again, head="cosine", head_scale=8)


def test_a_head_for_other_classes_is_drawn_anew(tmp_path):
    _, cosine = with_cosine_head("ResNet", tmp_path / "linear")
    cosine.save_pretrained(tmp_path / "cosine")
    for names in (NAMES[::-1], ["x", "y"]):
        model = load_classifier(str(tmp_path / "cosine"), names)
        assert model.new_parameters == ["model.classifier.1.weight"]
        assert model(pixel_values=pixels("ResNet")).logits.shape == (3, len(names))
        assert list(model.config.id2label.values()) == names


RELOAD = """
import json, sys
sys.modules["bkd_hf"] = None  # an import of it would fail
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
for folder in sys.argv[1:]:  # never, silently, with a linear head
    try:
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("loaded without its code")
answers = {}
for folder in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(torch.load(folder + "/pixels.pt")).logits
    classify = pipeline("image-classification", folder, trust_remote_code=True, device="cpu")
    answered = classify(Image.new("RGB", (40, 50), (200, 30, 90)), top_k=5)
    assert abs(sum(answer["score"] for answer in answered) - 1) < 1e-5, answered
    answers[folder] = {"logits": logits.tolist(), "labels": sorted(answer["label"] for answer in answered)}
json.dump(answers, open("answers.json", "w"))
"""


@pytest.mark.slow
def test_saved_folders_load_where_bkd_hf_is_not_installed(tmp_path):
    expected = {}
    for name in ("ViT", "ResNet", "ConvNeXt", "Swin"):
        folder = tmp_path / f"cosine_{name}"
        _, cosine = with_cosine_head(name, tmp_path / name)
        cosine.save_pretrained(folder)
        load_processor("cifar-resnet-8").save_pretrained(folder)
        torch.save(pixels(name), folder / "pixels.pt")
        expected[str(folder)] = cosine(pixel_values=pixels(name)).logits
    environment = {**WORKER_ENVIRONMENT, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", RELOAD, *expected], check=True, cwd=tmp_path, env=environment)
    answers = json.loads((tmp_path / "answers.json").read_text())
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.tensor(answers[folder]["logits"]), logits, rtol=1e-5, atol=1e-6)
        assert answers[folder]["labels"] == NAMES


# ---- Training


def trainer_for(folder: Path, model: torch.nn.Module, **options) -> BKDTrainer:
    args = BKDConfig(str(folder), **{"method": "ce", "max_steps": 3, "use_cpu": True, "disable_tqdm": True, **options})
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images)]
    return BKDTrainer(model, args=args, train_dataset=data, class_counts=[4, 3, 3, 3, 3])


@pytest.mark.parametrize("name", ["ViT", "ResNet", "ConvNeXt", "Swin"])
def test_ldam_trains_any_architecture(name, tmp_path):
    _, cosine = with_cosine_head(name, tmp_path / "linear")
    before = {name: value.clone() for name, value in cosine.state_dict().items()}
    options = {"activation_checkpointing": True} if name == "ViT" else {}
    trainer = trainer_for(tmp_path, cosine, method="ldam-drw", ldam_scale=SCALE, ema_decay=0.5, **options)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert trainer.model.eval()(pixel_values=pixels(name)).logits.abs().max() <= SCALE * (1 + 1e-6)


def test_the_head_alone_is_trained_and_has_no_bias_to_fit(tmp_path):
    _, cosine = with_cosine_head("ResNet", tmp_path / "linear")
    before = {name: value.clone() for name, value in cosine.state_dict().items()}
    trainer = trainer_for(tmp_path, cosine, freeze_backbone=True, head="cosine", head_scale=SCALE)
    trainer.train()
    changed = [name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)]
    assert changed == ["model.classifier.1.weight"]
    with pytest.raises(InputError, match="--head_bias balanced: the head of CosineHeadForImageClassification has no"):
        trainer_for(tmp_path, cosine, head_bias="balanced", head="cosine", head_scale=SCALE)


@pytest.mark.slow
def test_a_run_trains_and_publishes_it(tmp_path, capsys):
    tiny_vit(0, num_labels=10, image_size=16).save_pretrained(tmp_path / "vit")
    load_processor("cifar-resnet-8", image_size=16).save_pretrained(tmp_path / "vit")
    argv = [*CHEAP, "--model_name_or_path", str(tmp_path / "vit"), "--head", "cosine", "--head_scale", "20"]
    argv += ["--output_dir", str(tmp_path / "run"), "--ema_decay", "0.9"]
    run_here(parse_arguments(argv, digits_recipe=RECIPE))
    results = load_results(tmp_path / "run")
    assert results["student"]["architecture"] == "CosineHeadForImageClassification"
    publication = prepare(tmp_path / "run", "user/name")
    assert publication.files["modeling_cosine_head.py"].read_text() == (
        Path(sys.modules["bkd_hf.modeling_cosine_head"].__file__).read_text()
    )
    for told in (
        "trust_remote_code=True", "the model is a classifier with a cosine head, which is not part of transformers",
        "`modeling_cosine_head.py` here", ", cosine head with scale 20", "weights averaged (EMA, decay 0.9)",
    ):  # fmt: skip
        assert told in publication.card
    # As student and teacher of another run, with the kind of head that it has.
    argv = ["--model_name_or_path", str(tmp_path / "run"), "--output_dir", str(tmp_path / "next"), *CHEAP]
    with pytest.raises(InputError, match=r"^--head linear: the student was made with a cosine head\."):
        run_here(parse_arguments([*argv, "--head", "linear"], digits_recipe=RECIPE))
    distil = ["--method", "bkd", "--force_distillation", "--force_teacher", "--num_train_epochs", "1"]
    distil += ["--teacher_model_name_or_path", str(tmp_path / "run"), "--student_init", "teacher"]
    run_here(parse_arguments([*argv, *distil], digits_recipe=RECIPE))
    assert load_results(tmp_path / "next")["student"]["started_from_teacher"]


# ---- Where it cannot be


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("LevitForImageClassificationWithTeacher", T.LevitConfig()),
        ("DeiTForImageClassificationWithTeacher", T.DeiTConfig()),
        ("SwiftFormerForImageClassification", T.SwiftFormerConfig()),
    ],
)
def test_models_with_several_heads_are_refused_before_any_work(architecture, config, tmp_path):
    config.architectures = [architecture]
    with pytest.raises(InputError, match=r"^--head cosine, .* cannot be had with a/b .*: its logits are not those"):
        linear_head(config, "a/b")
    config.save_pretrained(tmp_path)
    argv = [*CHEAP, "--model_name_or_path", str(tmp_path), "--method", "ldam", "--output_dir", str(tmp_path / "run")]
    with pytest.raises(InputError, match="balanced_softmax or logit_adjustment, which work with any head"):
        run_here(parse_arguments(argv, digits_recipe=RECIPE))


def test_the_head_is_told_from_layers_that_are_as_wide():
    with pytest.raises(InputError, match="The model a/b cannot be loaded"):
        linear_head(T.DeiTConfig(), "a/b")  # which of its two classes is not said
    assert linear_head(T.ResNetConfig()) == "classifier.1"
    assert linear_head(T.ViTConfig(num_labels=768)) == "classifier"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "round"}, r"^--head must be linear or cosine with cross_entropy, got round\."),
        ({"head": "linear", "method": "ldam"}, r"^--head must be cosine with ldam, got linear\."),
        ({"head_scale": 20, "method": "ldam"}, r"^--head_scale must be left out with ldam, whose --ldam_scale it is"),
        ({"head_scale": 0, "head": "cosine"}, r"^--head_scale must be a finite number > 0, got 0"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        BKDConfig(str(tmp_path), **{"method": "ce", **options})


def test_options_that_say_nothing_new_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="--head_scale 20 has no effect: it belongs to --head cosine"):
        assert BKDConfig(str(tmp_path), method="ce", head_scale=20).cosine_scale is None
    assert BKDConfig(str(tmp_path), method="ce", head="cosine").cosine_scale == 30
    assert BKDConfig(str(tmp_path), method="ldam", ldam_scale=9, head_scale=9).cosine_scale == 9


def test_a_linear_model_is_not_taken_for_a_cosine_one(tmp_path):
    with pytest.raises(InputError, match=r"^--head cosine needs a student whose logits are scale · cos: load it by"):
        trainer_for(tmp_path, tiny("ViT", 1), head="cosine")
