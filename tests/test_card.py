"""The model card agrees with results.json."""

from __future__ import annotations

import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from scipy.stats import binomtest

from bkd_hf import InputError, load_results, shot_groups
from bkd_hf.announcer import Announcer
from bkd_hf.arguments import parse_arguments
from bkd_hf.card import build, kept_edits, repo_of, to_recipe
from bkd_hf.methods import CLASSIFICATION_LOSSES, Loss
from bkd_hf.metrics import LongTailAccumulator
from bkd_hf.results import (
    describe_command,
    describe_model,
    describe_run,
    describe_training,
    hub_id,
    recordable,
    without_folders,
)
from bkd_hf.run_folder import what_is_told
from tests.conftest import REPOSITORY

CARDS = REPOSITORY / "model_cards"
RECIPES = REPOSITORY / "scripts" / "recipes"


@pytest.fixture
def results() -> dict:
    return load_results(CARDS / "digits")


def results_with(counts: list[int], tested: list[int], names: list[str] | None = None) -> dict:
    """Results of a run on made-up data; the metrics fit each other."""
    generator, num_classes = np.random.default_rng(0), len(counts)
    results = copy.deepcopy(load_results(CARDS / "digits"))
    results["data"] |= {
        "class_names": names or [f"class {number}" for number in range(num_classes)],
        "class_counts": counts, "eval_class_counts": tested,
        "num_train_images": sum(counts), "num_eval_images": sum(tested),
    }  # fmt: skip
    for model, share in (("teacher", 0.3), ("student", 0.6)):
        correct = generator.binomial(tested, share)
        known = np.asarray(tested) > 0
        recall = np.divide(correct, tested, where=known, out=np.full(num_classes, np.nan))
        groups = {name: recall[group & known] for name, group in shot_groups(counts).items()}
        metrics = {
            "accuracy": correct.sum() / sum(tested), "balanced_accuracy": np.nanmean(recall),
            "worst_class_accuracy": np.nanmin(recall), "expected_calibration_error": 0.1,
            **{f"{name}_accuracy": values.mean() for name, values in groups.items() if values.size},
            "per_class_accuracy": [value if ok else None for value, ok in zip(recall.tolist(), known, strict=True)],
        }  # fmt: skip
        results[model] |= {"metrics": metrics, "post_hoc_metrics": None, "confusions": []}
    return results


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


def table_after(card: ModelCard, header: str) -> list[list[str]]:
    """Rows of the table with this header line."""
    lines = str(card).split(header + "\n")[1].splitlines()[1:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


# ---- Metadata


def test_metadata(results):
    results["student"]["hub_id"], results["teacher"]["hub_id"] = "google/vit", "big/teacher"
    found = metadata(build(results, "user/x", license="mit", dataset_id="uoft-cs/cifar100", tags=["mine"]))
    (entry,) = found.pop("model-index")
    assert found == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "image-classification",
        "datasets": ["uoft-cs/cifar100"], "base_model": "google/vit", "teacher_model": "big/teacher",
        "metrics": ["accuracy", "balanced_accuracy"],
        "tags": ["long-tailed", "imbalanced-data", "knowledge-distillation", "bkd", "bkd_hf", "mine"],
    }  # fmt: skip
    measured = results["student"]["metrics"]
    assert {metric["name"]: metric["value"] for metric in entry["results"][0]["metrics"]} == {
        "Accuracy, overall": pytest.approx(measured["accuracy"], abs=1e-6),
        "Accuracy, balanced (mean over classes)": pytest.approx(measured["balanced_accuracy"], abs=1e-6),
        **{
            f"Accuracy, {name}-shot": pytest.approx(measured[f"{name}_shot_accuracy"], abs=1e-6)
            for name in ("many", "medium", "few")
        },
    }


def test_unknown_is_said_to_be_unknown(results):
    found = metadata(build(results))
    assert found["license"] == "unknown"
    assert not {"datasets", "base_model", "teacher_model"} & set(found)
    assert "No licence has been chosen" in str(build(results))


# ---- Numbers


def test_table_of_teacher_and_student(results):
    rows = table_after(build(results), "| accuracy in % | teacher | student | difference |")
    teacher, student = results["teacher"]["metrics"], results["student"]["metrics"]
    few = next(row for row in rows if row[0].startswith("few-shot"))
    assert few[0] == "few-shot (< 20 training images; classes: 5)"
    assert few[1:3] == [f"{100 * teacher['few_shot_accuracy']:.1f}", f"**{100 * student['few_shot_accuracy']:.1f}**"]
    assert few[3] == f"{100 * (student['few_shot_accuracy'] - teacher['few_shot_accuracy']):+.1f}"


def test_differences_are_those_of_the_numbers_that_are_shown(results, capsys):
    results["teacher"]["metrics"]["accuracy"], results["student"]["metrics"]["accuracy"] = 0.84956, 0.92244
    assert "| overall | 85.0 | **92.2** | +7.2 |" in str(build(results))  # not +7.3
    Announcer().table(results)
    assert re.search(r"overall +│ +85\.0 +│ +92\.2 +│ +\+7\.2", capsys.readouterr().out)


def test_class_table_tells_how_little_five_images_say():
    results = results_with([50, 5], [40, 5])
    header = "| class | training images | test images | teacher | student | 95 % interval |"
    rows = {row[0]: row for row in table_after(build(results), header)}
    correct = round(results["student"]["metrics"]["per_class_accuracy"][1] * 5)
    interval = binomtest(correct, 5).proportion_ci(method="wilson")
    assert rows["class 1"][2] == "5"
    assert rows["class 1"][5] == f"{100 * interval.low:.0f} – {100 * interval.high:.0f}"


def test_weak_and_untested_classes_are_named():
    results = results_with([200, 50, 5, 3], [50, 50, 50, 0])
    results["student"]["metrics"]["per_class_accuracy"][2] = 0.02
    limits = str(build(results)).partition("## Limitations")[2]
    weak = "1 of 4 classes is recognised less than one time in five**: 'class 2' (2.0 %). "
    assert f"{weak}Do not rely on the model for it." in limits
    assert "1 class has no test image, so nothing is known of it: 'class 3'." in limits


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (None, "400 test images, after the last epoch"),
        ("validation", "400 test images (split `validation`), after the last epoch"),
        ("train", "400 test images, which were held out of the training data, after the last epoch"),
    ],
)
def test_which_images_the_numbers_are_of(results, split, told):
    results["data"]["eval_split"] = split
    assert told in str(build(results))
    results["options"]["training"]["load_best_model_at_end"] = True
    card = str(build(results))
    assert told.replace("after the last epoch", "of the checkpoint that was best on them") in card
    assert "which flatters them" in card


def test_all_that_the_loss_is_made_of_is_told(results):
    card = str(build(results))
    assert r"bkd: cross\_entropy + bkd (temperature 2, distillation\_weight 1, class\_balance\_beta 0.9999)" in card
    recipe = yaml.safe_load(to_recipe(results))
    assert [recipe[name] for name in ("method", "temperature", "distillation_weight", "class_balance_beta")] == [
        "bkd", 2.0, 1.0, 0.9999,
    ]  # fmt: skip
    assert not {"focal_gamma", "dkd_beta", "classification_loss"} & set(recipe)  # not looked at, or said by the method
    results["options"]["training"]["logit_standardization"] = True
    card = str(build(results))
    assert r"class\_balance\_beta 0.9999, logit\_standardization)" in card
    assert "Logit Standardization in Knowledge Distillation" in card


def test_options_that_were_left_open_are_told_as_they_came_out(results):
    results["options"]["training"] |= {
        "method": "bkd-calibrated", "classification_loss": "logit_adjustment", "class_balance_power": "measured",
        "logit_adjustment_tau": "auto",
    }  # fmt: skip
    card = str(build(results))  # of an earlier version, which did not record them
    assert r"class\_balance\_power measured" in card
    assert "Trained with Logit-adjusted cross-entropy; " in card
    results["student"]["settled_options"] = {"class_balance_power": 0.71, "logit_adjustment_tau": 0.58}
    card = str(build(results))
    assert r"logit\_adjustment\_tau 0.58 (auto)) + bkd (" in card
    assert r"class\_balance\_power 0.71 (measured))" in card
    results["student"]["settled_options"] = {"class_balance_power": 1.0, "logit_adjustment_tau": 0.0}
    card = str(build(results))
    assert "Trained with Cross-entropy; " in card
    assert "2007.07314" not in card
    assert r"logit\_adjustment\_tau 0 (auto), so it is plain cross-entropy) + bkd (" in card


def test_what_is_done_to_training_images_is_told(results):
    results["options"]["data"]["train_operations"] = ["autoaugment", "cutout", "of_a_user"]
    card = str(build(results))
    assert "cutout:" not in card  # it is no loss
    row = next(line for line in card.splitlines() if line.startswith("| augmentation | AutoAugment by the "))
    assert row.endswith(r"policy for CIFAR-10, cutout, of\_a\_user |")
    assert "1805.09501" in card
    assert "1708.04552" in card
    results["options"]["data"] |= {"train_augmentation": "auto", "train_operations": None}
    results["teacher"]["augmentation"], results["student"]["augmentation"] = "none", "pad_crop"
    assert r"| augmentation | none | pad\_crop, mirrored half of the time |" in str(build(results))
    results["options"]["data"]["horizontal_flip"] = False
    assert r"| augmentation | none | pad\_crop, not mirrored |" in str(build(results))


def test_options_without_effect_are_not_in_the_recipe(results):
    assert "horizontal_flip" not in yaml.safe_load(to_recipe(results))  # nothing is augmented
    results["options"]["data"]["train_augmentation"] = "pad_crop"
    assert yaml.safe_load(to_recipe(results))["horizontal_flip"] is True


def test_what_happened_to_the_head_and_the_targets_is_told(results):
    card = str(build(results))
    assert "bias" not in card
    assert "collapse" not in card
    results["student"]["head_bias_shift"] = [-0.5, 0.25, *[0.0] * 8]
    results["student"]["targets"] = {
        "num_images": 100, "target_agreement": 0.1, "teacher_agreement": 0.9, "mass": {}, "labels": {},
        "favoured_class": 9, "favoured_share": 0.98, "favoured_label_share": 0.01,
    }  # fmt: skip
    card = str(build(results))
    assert "balanced over the classes (--head\\_bias): from -0.50 ('0') to +0.25 ('1')." in card
    limits = card.partition("## Limitations")[2].partition("## How it was trained")[0]
    assert "98 % of the distillation targets name '9', the class of 1.0 % of the examples" in limits
    results["student"]["head_bias_shift"] = [0.0]
    with pytest.raises(InputError, match="head_bias_shift: not a number for each class"):
        build(results)


def test_an_average_of_weights_is_told(results):
    assert "EMA" not in str(build(results))
    results["options"]["training"]["ema_decay"] = 0.999
    assert ", weights averaged (EMA, decay 0.999)" in str(build(results))
    assert yaml.safe_load(to_recipe(results))["ema_decay"] == 0.999


def test_images_held_out_of_training_are_not_called_the_training_split():
    results = load_results(CARDS / "digits")
    results["data"]["eval_split"] = "train"
    card = build(results)
    assert {entry.dataset_split for entry in card.data.eval_results} == {"held out of train"}
    assert "which were held out of the training data" in str(card)


def test_a_loss_without_a_formula_leaves_no_gap(results, monkeypatch):
    def plain(logits, labels): ...

    monkeypatch.setitem(CLASSIFICATION_LOSSES, "plain", Loss(plain))
    results["options"]["training"] |= {"classification_loss": "plain", "distillation_loss": "none"}
    assert "\nTrained with plain.\nThe student" in str(build(results))


def test_two_classes():
    card = str(build(results_with([30, 3], [10, 10])))
    assert "top 5" not in card
    assert "many-shot (" not in card
    assert not re.search(r"\bnan\b", card)


def test_8142_classes_stay_readable():
    counts = np.sort(np.random.default_rng(1).integers(2, 1000, 8142))[::-1].tolist()
    card = build(results_with(counts, [1] * 8142))
    assert len(str(card)) < 30_000
    assert "The 100 classes that are weakest for certain" in str(card)
    ranks = table_after(card, "| rank | training images | teacher | student | never recognised |")
    assert len(ranks) == 20
    assert ranks[-1][0].endswith("8,142")


def test_without_a_teacher(results):
    results |= {"teacher": None, "method": "ce"}
    results["options"]["training"] |= {"method": "ce", "distillation_loss": "none"}
    card = str(build(results))
    assert "| accuracy in % | this model |" in card
    assert "frozen teacher" not in card
    assert "knowledge-distillation" not in card


def test_names_cannot_break_the_page():
    names = ["a|b", "<script>alert(1)</script>", "two\nlines", "*_x_*", "`code`", ""]
    card = build(results_with([60, 50, 40, 30, 20, 10], [20] * 6, names))
    rows = table_after(card, "| class | training images | test images | teacher | student | 95 % interval |")
    assert [len(row) for row in rows] == [6] * 6
    assert [row[0] for row in rows] == [
        r"a\|b", "&lt;script&gt;alert(1)&lt;/script&gt;", "two lines", r"\*\_x\_\*", r"\`code\`", "(no name)",
    ]  # fmt: skip


def test_results_of_earlier_versions_have_a_card_too():
    card = str(build(CARDS / "cifar100_lt_40_epochs_two_threads"))
    assert "accelerate launch -m bkd_hf run --config recipe.yaml" in card


def test_same_results_give_the_same_card_and_are_not_changed(results):
    before = copy.deepcopy(results)
    assert str(build(results)) == str(build(before))
    assert results == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"schema_version": 0}', "schema version 0"),
        (b'{"schema_version": 1}', "is not whole: it has no options, seed, data, .*. Run it anew"),
        (b"[1]", "schema version None"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
    ],
)
def test_other_files_and_schema_versions_are_refused(tmp_path, content, message):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        build(tmp_path)


def test_other_schema_version_is_refused_from_python_too(results):
    with pytest.raises(InputError, match="schema version 2"):
        build({**results, "schema_version": 2})


# ---- How to do it again


@pytest.mark.parametrize(
    "options",
    [
        ["--seed", "3"],
        ["--config", str(RECIPES / "cifar100_lt.yaml"), "--method", "dkd", "--dkd_beta", "2", "--bf16"],
        ["--config", str(RECIPES / "cifar10_lt.yaml"), "--teacher_num_train_epochs", "7", "--teacher_seed", "1"],
        ["--config", str(RECIPES / "finetune.yaml"), "--dataset_name", "user/birds"],
        # Fresh weights have other defaults than pretrained ones, for which these are the defaults.
        ["--dataset_name", "user/birds", "--optim", "adamw_torch_fused", "--learning_rate", "1e-3"],
        ["--dataset_name", "user/texts", "--task", "text", "--num_train_epochs", "3", "--weight_decay", "0"],
        ["--dataset_name", "user/birds", "--model_name_or_path", "user/vit", "--teacher_model_name_or_path",
         "cifar-resnet-32", "--teacher_optim", "adamw_torch_fused"],
        ["--dataset_name", "user/birds", "--model_name_or_path", "user/vit", "--teacher_model_name_or_path",
         "user/deit", "--teacher_image_size", "384", "--teacher_model_revision", "v2"],
    ],
)  # fmt: skip
def test_recipe_gives_the_same_options(options, results, tmp_path):
    first = parse_arguments([*options, "--output_dir", "x"], digits_recipe=RECIPES / "digits.yaml")
    results["data"]["task"] = first.model.task
    results["options"] = {
        "model": recordable(dataclasses.asdict(first.model)),
        "teacher_model": recordable(first.model_options_of_teacher),
        "data": recordable(dataclasses.asdict(first.data)),
        "training": describe_training(first.training),
        "teacher_training": describe_training(first.for_teacher().training, relative_to=first.training),
    }
    (tmp_path / "recipe.yaml").write_text(to_recipe(results))
    again = parse_arguments(["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "x"])
    assert what_is_told(again) == what_is_told(first)


def test_command_tells_nothing_of_the_machine():
    command = describe_command(
        ["--dataset_name", "/home/max/birds", "--hub_token", "hf_abc", "--token=hf_def", "--output_dir=~/runs/x",
         "--teacher_model_name_or_path", "../teachers/vit", "--config", "scripts/recipes/digits.yaml", "--alpha", "2",
         "--push_to_hub", "--hub-model-id", "max/x", "--hub_private_repo", "true", "--model_name_or_path", "max/vit",
         "--trackio_space_id", "max/secret", "--project=client",
         "--teacher_cache=cache/max", "--accelerator_config", '{"x": "/home/max/y"}', "--lr_step_epochs", "1", "2"],
        num_processes=2,
    )  # fmt: skip
    assert command == (
        "accelerate launch --num_processes 2 scripts/run_bkd.py --dataset_name birds --output_dir=x "
        "--teacher_model_name_or_path vit --config scripts/recipes/digits.yaml --alpha 2 --model_name_or_path max/vit "
        """--teacher_cache=max --accelerator_config '{"x": "y"}' --lr_step_epochs 1 2"""
    )


def test_a_command_names_the_folder_that_it_is_in(tmp_path, monkeypatch):
    (tmp_path / "birds").mkdir()
    monkeypatch.chdir(tmp_path / "birds")
    assert describe_command(["--output_dir", "."]).endswith("--output_dir birds")
    assert describe_command(["--deepspeed", '{"offload": "/tmp/x"}']).endswith("""--deepspeed '{"offload": "x"}'""")


@pytest.mark.parametrize(("folder", "is_shortened"), [("/home/max/birds", True), ("max/birds", False)])
def test_a_command_with_shortened_folders_is_said_to_be_one(results, tmp_path, folder, is_shortened):
    training = parse_arguments(["--output_dir", "x"], digits_recipe=RECIPES / "digits.yaml").training
    command = ["--dataset_name", folder, "--output_dir", "x", "--hub_token", "hf_abc"]
    told = describe_run(training, results["data"], results["student"], results["teacher"], command=command)
    assert told["command_is_shortened"] is is_shortened
    results |= {name: told[name] for name in ("command", "command_is_shortened")}
    card = str(build(results))
    assert "accelerate launch -m bkd_hf run --dataset_name " in card
    assert ("are named without the folders" in card) is is_shortened


@pytest.mark.parametrize(
    ("name", "told", "on_the_hub"),
    [
        ("user/birds", "user/birds", True),
        ("imagenet-1k", "imagenet-1k", True),
        ("gone/max/birds", "birds", False),
        ("/gone/max/birds", "birds", False),
        ("./birds", "birds", False),
        ("~max/birds", "birds", False),
        ("digits", "digits", False),
    ],
)
def test_paths_are_told_from_hub_ids(name, told, on_the_hub):
    assert without_folders(name) == told
    assert hub_id(name) == (name if on_the_hub else None)


def test_recorded_options_tell_nothing_of_the_machine():
    options = {
        "deepspeed": {"config": "/home/max/ds.json"},
        "files": ["/home/max/a"],
        "address": "https://example.org/a/b?c",
        "rate": "lr=1/2, path=/home/max/b.txt",
        "hub_token": "hf_x",
        "push_token": 1,
    }
    assert recordable(options) == {
        "deepspeed": {"config": "ds.json"},
        "files": ["a"],
        "address": "https://example.org/a/b?c",
        "rate": "lr=1/2, path=b.txt",
    }


def test_hub_model_is_told_from_a_folder(results, tmp_path):
    measured = LongTailAccumulator(results["data"]["class_counts"])
    measured.update(np.eye(10, dtype=np.float32), np.arange(10))
    about = {name: describe_model(name, torch.nn.Linear(2, 2), measured)
             for name in ("google/vit", str(tmp_path), "cifar-resnet-32")}  # fmt: skip
    assert [model["hub_id"] for model in about.values()] == ["google/vit", None, None]
    assert about[str(tmp_path)]["model"] == tmp_path.name


def test_an_edited_card_stays_and_gets_the_name_of_its_repository(tmp_path):
    path = tmp_path / "README.md"
    build(CARDS / "digits", "user/digits", "mit", dataset_id="user/digits-lt").save(path)
    assert kept_edits(path, "me/x") is None
    assert kept_edits(tmp_path / "nowhere.md", "me/x") is None
    path.write_text(path.read_text(encoding="utf-8").replace("license: mit", "license: other"), encoding="utf-8")
    edited = kept_edits(path, "me/x")
    assert "license: other" in edited
    assert 'pipeline("image-classification", "me/x"' in edited
    assert "user/digits-lt" in edited
    assert '"user/digits"' not in edited


def test_the_name_of_a_folder_is_replaced_only_where_it_is_the_models(tmp_path, results):
    """It may also be that of the data, and a word."""
    results["data"] |= {"name": "birds", "hub_id": None}
    card = str(build(results, "birds")).replace("## Limitations", "Trained on my birds.\n\n## Limitations")
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    edited = kept_edits(tmp_path / "README.md", "me/x")
    assert 'pipeline("image-classification", "me/x"' in edited
    assert edited.replace('"me/x"', '"birds"').replace("for me/x", "for birds") == card


def test_a_folder_is_no_repository(tmp_path):
    """An export, or a licence given later, names no repository: the card keeps the one that it was published to."""
    path = tmp_path / "README.md"
    assert repo_of(path, "digits") == "digits"
    build(CARDS / "digits", "anna/digits-bkd", "mit").save(path)
    assert (repo_of(path, "digits"), repo_of(path, "me/x")) == ("anna/digits-bkd", "me/x")


def test_data_without_a_tail_are_not_called_long_tailed(results):
    results["data"]["class_counts"] = [50] * len(results["data"]["class_counts"])
    card = str(build(results))
    assert "50 of each class." in card
    assert "for those who need all classes alike" in card
    for words in ("long-tailed", "imbalanced-data", "rarest"):
        assert words not in card.partition("## Each class")[0]


@pytest.mark.parametrize("name", ["b", "bkd", "hf", "birds"])
def test_an_edited_card_stays_whenever_it_is_published(tmp_path, results, name):
    path = tmp_path / "README.md"
    card = str(build(results, name)).replace("## Limitations", "Mine.\n\n## Limitations")
    path.write_text(f"{card}\nThanks to all who watch birds, by bkd_hf.\n", encoding="utf-8")
    for repo_id in ("me/x", "me/y"):
        path.write_text(kept_edits(path, repo_id), encoding="utf-8")
        assert f'pipeline("image-classification", "{repo_id}"' in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").endswith("\nThanks to all who watch birds, by bkd_hf.\n")
    path.write_text("# All mine\n", encoding="utf-8")
    assert kept_edits(path, "me/x") == "# All mine\n"


def test_rows_of_groups_tell_what_was_not_tested_and_whom_a_model_serves():
    results = results_with([300, 200, 50, 10, 5], [20, 20, 20, 20, 0])
    few = results["student"]["metrics"]["few_shot_accuracy"]
    row = next(line for line in str(build(results)).splitlines() if line.startswith("| few-shot"))
    assert "training images; classes: 2, 1 of them not tested)" in row
    assert f"**{100 * few:.1f}**" in row
    for accuracy, words in ((0.5, "need rare classes recognised too"), (0.0, "mostly meet its frequent classes")):
        results["student"]["metrics"]["few_shot_accuracy"] = accuracy
        assert words in str(build(results)).partition("**For whom:**")[2].splitlines()[0]
