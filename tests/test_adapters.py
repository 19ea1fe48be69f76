"""Adapters: few weights are trained, plain models are saved, and a training resumes exactly."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, TrainerCallback

from bkd_hf import BKDConfig, BKDTrainer, InputError, load_classifier
from bkd_hf.adapters import ADAPTED_WEIGHTS_NAME, add_adapter, check_adapter, merge
from bkd_hf.arguments import parse_arguments
from bkd_hf.head import head_modules
from bkd_hf.rehearsal import check_before_work
from bkd_hf.results import load_results
from tests.architectures import EVERY, IMAGE_SIZES, NAMES, examples, tiny, watched_trainer
from tests.test_cli import RECIPE, run_here  # noqa: F401
from tests.test_teachers import processor

pytest.importorskip("peft")


class LastAnswers(TrainerCallback):
    """Keeps the answers of the model that is trained, after each step."""

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.logits = answers(model)
        model.train()


@torch.no_grad()
def answers(model: nn.Module) -> torch.Tensor:
    return model.eval()(pixel_values=torch.stack([e["pixel_values"] for e in examples()])).logits


def trainer_for(folder: Path, name: str = "ViT", seed: int = 1, **options) -> BKDTrainer:
    settings = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 3}
    return watched_trainer(folder, name, seed, LastAnswers(), **settings | options)


def differing(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert state.keys() == other.keys()
    return {name for name in state if not torch.equal(state[name], other[name])}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("adapter", ["lora", "bitfit"])
def test_answers_stay_and_are_those_of_the_merged_model(name, adapter, tmp_path):
    """In float64; trained are the adapter and the head alone."""
    model, size = tiny(name, 1).double().eval(), IMAGE_SIZES.get(name, 32)
    for parameter in model.parameters():  # or a scale of 1e-6 would hide what comes before it
        nn.init.normal_(parameter, std=0.3)
    images = torch.stack([e["pixel_values"] for e in examples(4, size)]).double()
    state, before = {n: v.clone() for n, v in model.state_dict().items()}, model(pixel_values=images).logits
    heads = {f"{head}.{n}" for head, module in head_modules(model).items() for n, _ in module.named_parameters()}
    add_adapter(model, BKDConfig(str(tmp_path), adapter=adapter, adapter_rank=2 if adapter == "lora" else None))
    torch.testing.assert_close(model(pixel_values=images).logits, before, rtol=1e-9, atol=1e-9)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert heads < set(trained)
    adapted = set(trained) - heads
    if adapter == "lora":
        assert all(".lora_A." in name or ".lora_B." in name for name in adapted)
    else:
        assert all(trained[name].dim() == 1 or "bias" in name or "Grn" in name or "grn" in name for name in adapted)
    for parameter in trained.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, dtype=parameter.dtype)
    after = model(pixel_values=images).logits
    assert (after - before).abs().max() > 1e-3
    merge(model)
    torch.testing.assert_close(model(pixel_values=images).logits, after, rtol=1e-9, atol=1e-9)
    changed = differing(state, model.state_dict())  # of the same names: the plain architecture
    expected = {re.sub(r"\.lora_.*", ".weight", name) for name in adapted}
    assert changed == heads | expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViT", {"adapter": "lora"}),
        ("ResNet", {"adapter": "lora", "adapter_rank": 2}),
        ("ResNet", {"adapter": "bitfit"}),
        ("CIFAR ResNet", {"adapter": "lora", "ema_decay": 0.5}),
        ("Swin", {"adapter": "lora", "head_bias": "balanced"}),
    ],
)
def test_what_is_saved_is_plain_and_answers_the_same(tmp_path, name, options, monkeypatch):
    trainer = trainer_for(tmp_path, name, **options)
    before = tiny(name, 1).state_dict()
    trainer.train()
    trainer.save_model()
    monkeypatch.setitem(sys.modules, "peft", None)
    final = answers(trainer.model)
    if "head_bias" not in options and "ema_decay" not in options:
        torch.testing.assert_close(final, trainer.watcher.logits, rtol=0, atol=1e-5)
    for folder in (tmp_path / "checkpoint-6", tmp_path):
        assert (folder / ADAPTED_WEIGHTS_NAME).exists() == (folder != tmp_path and options["adapter"] == "lora")
        saved, info = AutoModelForImageClassification.from_pretrained(
            folder, output_loading_info=True, trust_remote_code=True
        )
        assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(answers(saved), final, rtol=0, atol=1e-5)
    changed = differing(before, trainer.model.state_dict())
    assert changed
    assert not {key for key in changed if "running" in key or "num_batches" in key}  # statistics are kept
    if options["adapter"] == "bitfit":
        assert all(".bias" in key or "norm" in key or key.startswith("classifier") for key in changed)


@pytest.mark.parametrize("name", EVERY)
def test_with_class_means_and_layer_decay_for_every_architecture(tmp_path, name):
    data, model = examples(10, IMAGE_SIZES.get(name, 32)), tiny(name, 1)
    pixels = torch.stack([example["pixel_values"] for example in data])
    for module in model.modules():  # statistics that fit weights of some size, as a pretrained model has
        module.momentum = 1.0
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    with torch.no_grad():
        model.train()(pixel_values=pixels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    args = BKDConfig(
        str(tmp_path), method="ce", adapter="lora", head_init="class_mean", layer_decay=0.5, max_steps=2,
        learning_rate=0.01, per_device_train_batch_size=5, save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = BKDTrainer(model, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert max(rates) == 0.01
    assert min(rates) <= 0.005
    saved = AutoModelForImageClassification.from_pretrained(tmp_path, trust_remote_code=True)
    head = next(iter(head_modules(saved)))
    assert {key.startswith(f"{head}.") for key in differing(before, saved.state_dict())} == {True, False}
    with torch.no_grad():
        expected, found = (each.eval()(pixel_values=pixels).logits for each in (trainer.model, saved))
    assert expected.std(dim=0).min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ViT", "ResNet"])
@pytest.mark.parametrize(
    "options", [{"adapter": "lora"}, {"adapter": "lora", "ema_decay": 0.5}, {"adapter": "bitfit"}]
)
def test_resumes_with_exactly_the_same_weights(tmp_path, name, options):
    whole, resumed = (trainer_for(tmp_path, name, seed, **options) for seed in (1, 3))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert differing(whole.model.state_dict(), resumed.model.state_dict()) == set()
    assert differing(whole.model.state_dict(), tiny(name, 1).state_dict()) != set()


def test_saving_in_between_changes_nothing(tmp_path):
    often, never = (
        trainer_for(tmp_path / strategy, adapter="lora", save_strategy=strategy, save_steps=1)
        for strategy in ("steps", "no")
    )
    for trainer in (often, never):
        trainer.train()
    assert differing(often.model.state_dict(), never.model.state_dict()) == set()


def test_the_best_checkpoint_is_loaded(tmp_path):
    trainer = trainer_for(
        tmp_path, adapter="lora", load_best_model_at_end=True, metric_for_best_model="eval_loss",
        greater_is_better=False, save_strategy="epoch",
    )  # fmt: skip
    trainer.train()  # noise that is learned: the loss of the first epoch is the lowest
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-5)


def test_a_second_training_goes_on_with_new_updates(tmp_path):
    trainer = trainer_for(tmp_path, adapter="lora", save_strategy="no")
    trainer.train()
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert any("q_proj" in name for name in differing(first, trainer.model.state_dict()))


def test_a_student_that_is_made_when_training_begins_and_starts_from_its_teacher(tmp_path):
    args = BKDConfig(str(tmp_path), method="kd", student_init="teacher", adapter="lora", max_steps=2, use_cpu=True)
    teacher = tiny("ViT", 2)
    trainer = BKDTrainer(
        None, teacher, args, train_dataset=examples(), model_init=lambda: tiny("ViT", 1), class_counts=[4, 3, 3, 3, 3]
    )
    trainer.train()
    changed = differing(trainer.model.state_dict(), teacher.state_dict())
    assert "classifier.weight" in changed
    assert "vit.embeddings.patch_embeddings.projection.weight" not in changed


def test_the_head_has_its_own_learning_rate_beside_an_adapter(tmp_path):
    trainer = trainer_for(tmp_path, adapter="lora", learning_rate=0.0, head_learning_rate=0.05, save_strategy="no")
    trainer.train()
    changed = differing(trainer.model.state_dict(), tiny("ViT", 1).state_dict())
    assert changed == {"classifier.weight", "classifier.bias"}


def test_target_modules_and_alpha_are_as_given(tmp_path):
    model = tiny("ViT", 1)
    given = {"adapter_target_modules": ["q_proj", "layers.1.attention.v_proj"], "adapter_alpha": 4.0}
    add_adapter(model, BKDConfig(str(tmp_path), adapter="lora", **given))
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    ends = sorted(name.removeprefix("vit.layers.") for name in layers)
    assert ends == ["0.attention.q_proj", "1.attention.q_proj", "1.attention.v_proj"]
    assert {layer.scaling["default"] for layer in layers.values()} == {0.5}


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.classifier = nn.Linear(16, 16), nn.Sequential(OrderedDict(proj=nn.Linear(16, 3)))

    def forward(self, x):
        return self.classifier(self.proj(x))


def test_a_layer_of_the_head_with_the_name_of_an_updated_one_is_left_alone(tmp_path):
    add_adapter(model := Projected(), BKDConfig(str(tmp_path), adapter="lora", adapter_rank=2))
    assert [name for name, module in model.named_modules() if hasattr(module, "lora_A")] == ["proj"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "prefix"}, r"--adapter must be none, lora or bitfit, got prefix\."),
        ({"adapter": "lora", "adapter_rank": 0}, r"--adapter_rank must be at least 1, got 0\."),
        ({"adapter": "lora", "adapter_alpha": 0.0}, r"--adapter_alpha must be a finite number > 0, got 0\.0\."),
        ({"adapter": "bitfit", "freeze_backbone": True}, r"--adapter must be left out with --freeze_backbone, .*"),
        ({"adapter": "lora", "fsdp": "full_shard"}, r"--adapter must be left out with FSDP and DeepSpeed: .*"),
    ],
)
def test_options_are_checked(tmp_path, options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        BKDConfig(str(tmp_path), **options)


def nameless() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 4))
    model.config = type("Config", (), {"num_labels": 5})
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            nameless(),
            {},
            "--freeze_backbone, --adapter, --layer_decay and --head_learning_rate need a model whose head",
        ),
        (nn.ModuleDict({"classifier": nn.Linear(2, 5)}), {}, "--adapter lora: ModuleDict has no linear layer, and no"),
        (
            nn.ModuleDict({"classifier": nn.Linear(2, 5)}),
            {"adapter": "bitfit"},
            "--adapter bitfit: ModuleDict has no bias",
        ),
        ("ViT", {"adapter_target_modules": ["q_proj", "foo"]}, "--adapter_target_modules foo: no layer of ViTFor"),
        ("ViT", {"adapter_target_modules": ["classifier"]}, "--adapter_target_modules classifier: no layer of ViTFor"),
        ("ViT", {"adapter_rank": 17}, "--adapter_rank 17 is no low rank for ViTForImageClassification"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(tmp_path, model, options, message):
    args = BKDConfig(str(tmp_path), **{"adapter": "lora", **options})
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        check_adapter(tiny(model, 1) if isinstance(model, str) else model, args)


def test_an_optimizer_that_does_not_know_the_updates_is_refused(tmp_path):
    model = tiny("ViT", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="leave `optimizers` out"):
        BKDTrainer(model, args=BKDConfig(str(tmp_path), adapter="lora"), train_dataset=examples(),
                   optimizers=(optimizer, None))  # fmt: skip


@pytest.mark.parametrize(("began", "goes_on"), [({}, {"adapter": "lora"}), ({"adapter": "lora"}, {})])
def test_a_checkpoint_of_the_other_kind_is_refused(tmp_path, began, goes_on):
    trainer_for(tmp_path, max_steps=3, **began).train()
    with pytest.raises(InputError, match=r"^--adapter is .*: continue as it began, or start anew\.$"):
        trainer_for(tmp_path, **goes_on).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_options_that_are_of_another_adapter_have_no_effect(tmp_path):
    with pytest.warns(UserWarning, match="--adapter_rank has no effect: it belongs to --adapter lora"):
        BKDConfig(str(tmp_path), adapter_rank=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "bitfit"], "--adapter bitfit: cifar-resnet-8 starts from fresh weights"),
        (["--method", "kd", "--teacher_adapter", "bitfit"], "--adapter bitfit: cifar-resnet-8 starts from fresh"),
        (["--adapter", "lora"], 'pip install "bkd_hf[adapters]"'),
    ],
)
def test_bad_options_are_refused_before_any_work(options, message, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    if "lora" in options:
        tiny("ViT", 1).save_pretrained(tmp_path)
        options = [*options, "--method", "ce", "--model_name_or_path", str(tmp_path)]
    with pytest.raises(InputError) as error:
        check_before_work(parse_arguments(["--dataset_name", "digits", *options], digits_recipe=RECIPE))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_run_with_an_adapter_for_the_student_alone(tmp_path, run_here):  # noqa: F811
    folder = tmp_path / "pretrained"
    load_classifier_of_vit(folder)
    output = run_here(
        "--dataset_name", "digits", "--max_train_samples", "150", "--num_threads", "1", "--disable_tqdm", "true",
        "--model_name_or_path", str(folder), "--method", "kd", "--num_train_epochs", "1", "--output_dir",
        str(tmp_path / "run"), "--adapter", "lora", "--adapter_rank", "2", "--teacher_adapter", "bitfit",
        "--layer_decay", "0.75",
    )  # fmt: skip
    results, found = load_results(tmp_path / "run"), {}
    for model, adapter in (("student", "lora"), ("teacher", "bitfit")):
        trained, total = (results[model][f"num_{kind}parameters"] for kind in ("trained_", ""))
        assert (
            f"{total:,} parameters (--adapter {adapter} trains {trained:,}, {trained / total:.2%} of that)" in output
        )
        found[model] = trained
    assert found["student"] != found["teacher"]
    card = (tmp_path / "run" / "README.md").read_text()
    for expected in (f"adapter lora of rank 2, α 4: {found['student']:,} trained", "LoRA", "2106.09685",
                     "adapter: lora", "adapter_rank: 2", "a layer's rate 0.75 times", "2106.08254"):  # fmt: skip
        assert expected in card
    saved, info = AutoModelForImageClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert results["student"]["num_parameters"] == saved.num_parameters()


def load_classifier_of_vit(folder: Path) -> None:
    tiny("ViT", seed=0).save_pretrained(folder)
    processor(32).save_pretrained(folder)
    assert load_classifier(str(folder), NAMES).new_parameters == []
