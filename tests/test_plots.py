from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from bkd_hf import long_tail_metrics, shot_groups
from bkd_hf.plots import figure_names, plot_class_accuracy, plot_confusion, plot_training_curves, save_plots

ADJECTIVES = ["sweet", "wild", "aquarium", "yellow-crowned", "great", "small", "pickup", "dwarf", "red", "grey"]
NOUNS = [
    "pepper",
    "fish",
    "tractor",
    "spotted_woodpecker",
    "cup",
    "wolf",
    "lawn_mower",
    "bowl",
    "shrew",
    "willow_tree",
]
MODELS = ("teacher", "student")
FILES = ["class_accuracy.png", "training_curves.png", "confusion_student.png", "confusion_teacher.png"]


def make_results(
    num_classes: int, largest: int, smallest: int, num_tests: int = 20, epochs: int = 30
) -> dict[str, Any]:
    """A made-up run: the fewer images a class has, the worse it is learned, above all by the teacher."""
    rng = np.random.default_rng(0)
    counts = np.geomspace(largest, smallest, num_classes).round().astype(int)
    counts = rng.permutation(counts)
    names = [
        f"{ADJECTIVES[i // 10 % 10]}_{NOUNS[i % 10]}" + (f"_{i // 100}" if i > 99 else "") for i in range(num_classes)
    ]
    data = {
        "name": "made-up",
        "num_train_images": int(counts.sum()),
        "num_eval_images": num_tests * num_classes,
        "class_names": names,
        "class_counts": counts.tolist(),
        "eval_class_counts": [num_tests] * num_classes,
        "many_shot_threshold": 100,
        "few_shot_threshold": 20,
    }
    results: dict[str, Any] = {"schema_version": 1, "seed": 0, "data": data}
    labels = np.repeat(np.arange(num_classes), num_tests)
    for model, slope in zip(MODELS, (0.35, 0.2), strict=True):
        learned = 0.95 - slope * np.log10(counts.max() / counts)
        # Wrong answers are classes with many images.
        others = rng.choice(num_classes, size=labels.size, p=counts / counts.sum())
        predictions = np.where(rng.random(labels.size) < learned[labels], labels, others)
        results[model] = {
            "model": "microsoft/resnet-50",
            "num_parameters": 1_000_000,
            **describe(predictions, labels, data),
            "history": make_history(model, epochs),
        }
    return results


def describe(predictions: np.ndarray, labels: np.ndarray, data: dict[str, Any]) -> dict[str, Any]:
    """The `metrics` (those that are drawn) and `confusions`, without the logits, which are large for many classes."""
    numbers, correct = np.bincount(labels), np.bincount(labels, predictions == labels)
    accuracies = correct / numbers
    groups = shot_groups(data["class_counts"])
    metrics = {"accuracy": float(np.mean(predictions == labels)), "per_class_accuracy": accuracies.tolist()}
    metrics |= {f"{name}_accuracy": float(accuracies[group].mean()) for name, group in groups.items() if group.any()}
    wrong = np.stack([labels, predictions], axis=1)[predictions != labels]
    pairs, sizes = np.unique(wrong, axis=0, return_counts=True)
    order = np.argsort(-sizes, kind="stable")[:2000]
    return {"metrics": metrics, "confusions": np.column_stack([pairs, sizes])[order].tolist()}


def make_history(model: str, epochs: int) -> list[dict[str, Any]]:
    history = []
    for epoch in range(1, epochs + 1):
        part = 3 / epoch
        entry = {"loss": part, "learning_rate": 0.1 * 0.1 ** (3 * epoch // (epochs + 1)), "ce_loss": part}
        if model == "student":
            entry |= {"loss": 1.4 * part, "kd_loss": 0.4 * part}
        history.append(entry | {"epoch": float(epoch), "step": 10 * epoch})
        few_shot = (0.3 if model == "teacher" else 0.5) * (1 - 1 / epoch)
        metrics = {"eval_loss": part, "eval_accuracy": 0.8 - 0.7 / epoch, "eval_few_shot_accuracy": few_shot}
        history.append(metrics | {"epoch": float(epoch), "step": 10 * epoch})
    return history


@pytest.fixture
def ten() -> dict[str, Any]:
    return make_results(10, largest=130, smallest=2)


@pytest.fixture(scope="module")
def hundred() -> dict[str, Any]:
    return make_results(100, largest=500, smallest=5)


@pytest.fixture(scope="module")
def inaturalist() -> dict[str, Any]:
    return make_results(8142, largest=1000, smallest=2, num_tests=3)


def largest_first(results: dict[str, Any]) -> list[int]:
    counts = results["data"]["class_counts"]
    return sorted(range(len(counts)), key=lambda index: -counts[index])


def percents(results: dict[str, Any], model: str) -> np.ndarray:
    accuracies = results[model]["metrics"]["per_class_accuracy"]
    return 100 * np.array([accuracies[index] for index in largest_first(results)], dtype=float)


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [line for line in axes.get_lines() if line.get_label() == label]
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


def tick_names(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def shortened(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes}


# ---- Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two", "hundred", "inaturalist"])
def test_files(name, request, tmp_path):
    results = make_results(2, 900, 15, epochs=1) if name == "two" else request.getfixturevalue(name)
    before = copy.deepcopy(results)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as of a layout without room for the axes
        paths = save_plots(results, tmp_path / "new" / "figures")
    assert results == before
    assert paths == [tmp_path / "new" / "figures" / file for file in FILES]
    for path in paths:
        image = imread(path)[..., :3]
        assert image.shape[0] > 400
        assert image.shape[1] == 1200
        assert 0.01 < np.mean(image.min(axis=2) < 0.9) < 0.9
        # Nothing is cut off: the outermost pixels are background.
        assert all((edge == 1).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))


def test_results_as_they_are_written(tmp_path):
    """What `long_tail_metrics` makes of a test set without one of the classes, through JSON; and without a history."""
    counts, labels = [30, 10, 200], np.array([0, 0, 2, 2])
    logits = np.eye(3)[[0, 1, 2, 2]]
    model = {"model": "m", "metrics": long_tail_metrics(logits, labels, counts), "confusions": [[0, 1, 1]]}
    data = {"name": "d", "class_names": ["a$_x$", "b$", "c"], "class_counts": counts, "eval_class_counts": [2, 0, 2]}
    data |= {"many_shot_threshold": 100, "few_shot_threshold": 20}
    results = json.loads(json.dumps({"data": data, "teacher": model, "student": model | {"history": []}}))
    assert [path.name for path in save_plots(results, tmp_path)] == [FILES[0], *FILES[2:]]


# ---- Classes --------------------------------------------------------------------------------------------------------


def test_few_classes(ten):
    images, classes, _, _ = plot_class_accuracy(ten).axes
    counts = sorted(ten["data"]["class_counts"], reverse=True)
    assert [bar.get_height() for bar in images.containers[0]] == counts
    assert [text.get_text() for text in images.texts] == [str(count) for count in counts]
    assert images.get_yscale() == "log"
    assert images.get_ylim()[0] < 2
    assert tick_names(classes.xaxis) == [ten["data"]["class_names"][index] for index in largest_first(ten)]
    assert images.get_xlim() == classes.get_xlim()
    for model in MODELS:
        ranks, values = line(classes, model)
        np.testing.assert_array_equal(ranks, range(1, 11))
        np.testing.assert_allclose(values, percents(ten, model))


def test_groups(ten):
    ten["data"]["class_counts"] = [130, 120, 100, 50, 20, 19, 10, 5, 3, 2]
    _, classes, groups, _ = plot_class_accuracy(ten).axes
    places = {text.get_text(): text.get_position()[0] for text in classes.texts}
    assert places == {"many": 1.5, "medium": 4.0, "few": 8.0}
    assert tick_names(groups.xaxis) == ["all", "many\n> 100", "medium\n20–100", "few\n< 20"]
    for model in MODELS:
        metrics = ten[model]["metrics"]
        keys = ["accuracy", "many_shot_accuracy", "medium_shot_accuracy", "few_shot_accuracy"]
        np.testing.assert_allclose(line(groups, model)[1], [100 * metrics[key] for key in keys])


def test_groups_without_classes_or_test_images(ten):
    ten["data"]["class_counts"] = [100] * 5 + [19] * 5
    for model in MODELS:
        del ten[model]["metrics"]["few_shot_accuracy"]
    _, classes, groups, _ = plot_class_accuracy(ten).axes
    assert [text.get_text() for text in classes.texts] == ["medium", "few"]
    assert tick_names(groups.xaxis) == ["all", "medium\n20–100", "few\n< 20"]
    assert np.isnan(line(groups, "student")[1]).tolist() == [False, False, True]


def test_classes_without_test_images_leave_a_gap(ten):
    ten["data"]["eval_class_counts"][3] = 0
    for model in MODELS:
        ten[model]["metrics"]["per_class_accuracy"][3] = None
    _, classes, _, _ = plot_class_accuracy(ten).axes
    for model in MODELS:
        assert np.flatnonzero(np.isnan(line(classes, model)[1])).tolist() == [largest_first(ten).index(3)]
    assert "1 without test images" in classes.get_xlabel()


@pytest.mark.parametrize("untested", [slice(0), slice(40, 60)])
def test_many_classes(hundred, untested):
    results = copy.deepcopy(hundred)
    for index in largest_first(results)[untested]:
        results["student"]["metrics"]["per_class_accuracy"][index] = None
    images, classes, _, legend = plot_class_accuracy(results).axes
    assert set(results["data"]["class_counts"]) <= set(images.collections[0].get_paths()[0].vertices[:, 1])
    for model in MODELS:
        expected = percents(results, model)
        np.testing.assert_allclose(line(classes, model)[1], expected)
        neighbours = [expected[max(0, rank - 4) : rank + 5] for rank in range(100)]
        trend = [np.nan if np.isnan(values).all() else np.nanmean(values) for values in neighbours]
        np.testing.assert_allclose(line(classes, f"{model} trend")[1], trend)
    texts = [text.get_text() for text in legend.get_legend().get_texts()]
    assert texts == ["teacher", "student", "one class", "moving average,\n9 classes"]


def test_very_many_classes(inaturalist):
    _, classes, _, legend = plot_class_accuracy(inaturalist).axes
    expected = percents(inaturalist, "student")
    ranks, values = line(classes, "student")
    assert len(ranks) == 199
    np.testing.assert_allclose(ranks[:2], [21, 62])
    np.testing.assert_allclose(values[:2], [expected[:41].mean(), expected[41:82].mean()])
    np.testing.assert_allclose(values[-1], expected[198 * 41 :].mean())
    # The trend is where the points are, with less scatter.
    trend = line(classes, "student trend")[1]
    assert np.abs(trend - values).mean() < 8
    assert np.abs(np.diff(trend)).mean() < np.abs(np.diff(values)).mean() / 4
    assert "mean of 41 classes" in [text.get_text() for text in legend.get_legend().get_texts()]


# ---- Training -------------------------------------------------------------------------------------------------------


def test_training_curves(ten):
    axes = panels(plot_training_curves(ten))
    drawn = {
        "training loss": {
            "teacher": ("teacher", "loss"),
            "student: total": ("student", "loss"),
            "student: classification": ("student", "ce_loss"),
            "student: distillation": ("student", "kd_loss"),
        },
        "test accuracy (%)": {
            f"{model}: {label}": (model, key)
            for model in MODELS
            for label, key in (("all classes", "eval_accuracy"), ("few-shot", "eval_few_shot_accuracy"))
        },
        "learning rate": {model: (model, "learning_rate") for model in MODELS},
    }
    assert list(axes) == list(drawn)
    for name, curves in drawn.items():
        assert len(axes[name].get_lines()) == len(curves)
        for label, (model, key) in curves.items():
            epochs, values = line(axes[name], label)
            np.testing.assert_array_equal(epochs, range(1, 31))
            scale = 100 if name == "test accuracy (%)" else 1
            expected = [scale * entry[key] for entry in ten[model]["history"] if key in entry]
            np.testing.assert_allclose(values, expected)


def test_scales_of_training_curves(ten):
    assert [axes.get_yscale() for axes in plot_training_curves(ten).axes] == ["log", "linear", "log"]
    for model in MODELS:
        ten[model]["history"] = [{"epoch": 1, "loss": 2.0, "learning_rate": 0.1},
                                 {"epoch": 2, "loss": 1, "learning_rate": 0}]  # fmt: skip
    assert [axes.get_yscale() for axes in plot_training_curves(ten).axes] == ["linear", "linear"]


def test_panels_and_curves_without_data_are_left_out(ten):
    for model in MODELS:
        ten[model]["history"] = [entry for entry in ten[model]["history"] if "loss" in entry]
    assert list(panels(plot_training_curves(ten))) == ["training loss", "learning rate"]
    del ten["teacher"]["history"]  # it was given
    drawn = [line.get_label() for axes in plot_training_curves(ten).axes for line in axes.get_lines()]
    assert drawn == ["student: total", "student: classification", "student: distillation", "student"]
    # A student that was trained without a teacher's help has no parts; a loss that is no number leaves a gap.
    ten["student"]["history"] = [{"epoch": e, "loss": loss, "ce_loss": loss} for e, loss in enumerate([2.0, None, 1])]
    (axes,) = plot_training_curves(ten).axes
    np.testing.assert_array_equal(line(axes, "student: total")[1], [2, np.nan, 1])
    assert len(axes.get_lines()) == 1


@pytest.mark.parametrize("history", [None, [], [{"epoch": 1.0, "loss": None}]])
def test_no_history(ten, history):
    for model in MODELS:
        ten[model]["history"] = history
    with pytest.raises(ValueError, match="neither teacher nor student has a history"):
        plot_training_curves(ten)


@pytest.mark.parametrize("loss", ["bkd", "wsl", "dist", "ltkd"])
def test_a_weight_of_distillation_is_told(ten, loss):
    ten["options"] = {"training": {"distillation_loss": loss, "distillation_weight": 0.5}}
    axes = panels(plot_training_curves(ten))["training loss"]
    line(axes, "student: distillation\n(× 0.5 in the total)")


def test_a_model_alone_is_nobodys_student(ten):
    ten["teacher"] = None
    assert [name for name in figure_names(ten) if "confusion" in name] == ["confusion.png"]
    title = plot_confusion(ten).get_suptitle()
    assert title.startswith("Confusions: ")
    assert "student" not in title + "".join(text.get_text() for text in plot_confusion(ten).texts)
    (shown,) = plot_class_accuracy(ten).axes[3].get_legend().get_texts()
    assert shown.get_text() == "this model"


# ---- Confusions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_confusion_matrix(ten, model):
    axes = plot_confusion(ten, model).axes[0]
    shares = axes.get_images()[0].get_array()
    order = largest_first(ten)
    expected = np.diag(percents(ten, model))
    for true, predicted, number in ten[model]["confusions"]:
        expected[order.index(true), order.index(predicted)] = 100 * number / 20
    np.testing.assert_allclose(shares, expected)
    np.testing.assert_allclose(shares.sum(axis=1), 100)
    names, counts = ten["data"]["class_names"], ten["data"]["class_counts"]
    assert tick_names(axes.xaxis) == [names[index] for index in order]
    assert tick_names(axes.yaxis) == [f"{names[index]} ({counts[index]})" for index in order]
    written = {text.get_position()[::-1]: float(text.get_text()) for text in axes.texts}
    assert written == {(row, column): shares[row, column] for row, column in zip(*shares.nonzero(), strict=True)}
    assert model in axes.figure.get_suptitle()


def test_confusion_matrix_without_test_images_of_a_class(ten):
    true = largest_first(ten)[2]
    ten["data"]["eval_class_counts"][true] = 0
    ten["student"]["metrics"]["per_class_accuracy"][true] = None
    ten["student"]["confusions"] = [c for c in ten["student"]["confusions"] if c[0] != true]
    axes = plot_confusion(ten).axes[0]
    shares = axes.get_images()[0].get_array()
    assert np.flatnonzero(shares.mask.all(axis=1)).tolist() == [2]
    np.testing.assert_allclose(np.delete(shares, 2, axis=0).sum(axis=1), 100)
    assert [text.get_position()[1] for text in axes.texts if text.get_text() == "no test images"] == [2]


def test_numbers_only_where_they_can_be_read():
    axes = plot_confusion(make_results(13, 130, 2)).axes[0]
    np.testing.assert_allclose(axes.get_images()[0].get_array().sum(axis=1), 100)
    assert not axes.texts


def test_largest_confusions(hundred):
    (axes,) = plot_confusion(hundred).axes
    data, confusions = hundred["data"], hundred["student"]["confusions"]
    bars = axes.containers[0]
    expected = sorted((100 * c[2] / 20 for c in confusions), reverse=True)[:20]
    np.testing.assert_allclose([bar.get_width() for bar in bars], expected)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the largest on top
    names = [f"{shortened(n)} ({count})" for n, count in zip(data["class_names"], data["class_counts"], strict=True)]
    shares = {f"{names[true]} → {names[predicted]}": 100 * number / 20 for true, predicted, number in confusions}
    for name, bar, text in zip(tick_names(axes.yaxis), bars, axes.texts, strict=True):
        assert shares[name] == pytest.approx(bar.get_width())
        assert text.get_text() == f"{bar.get_width() / 5:.0f} of 20"


def test_largest_confusions_of_an_unbalanced_test_set(ten):
    ten["data"]["eval_class_counts"] = [1, 100, 10, *[20] * 7]
    ten["student"]["confusions"] = [[1, 0, 8], [2, 0, 8], [0, 1, 1]]
    (axes,) = plot_confusion(ten, max_classes=9).axes
    assert [text.get_text() for text in axes.texts] == ["1 of 1", "8 of 10", "8 of 100"]
    # Chosen by the number of images: that of the single test image is the first to go.
    ten["student"]["confusions"] = [[1, p, 2] for p in range(2, 10)] + [[2, p, 2] for p in range(3, 10)]
    ten["student"]["confusions"] += [[3, p, 2] for p in range(4, 9)] + [[0, 1, 1]]
    (axes,) = plot_confusion(ten, max_classes=9).axes
    assert len(axes.texts) == 20
    assert "1 of 1" not in [text.get_text() for text in axes.texts]
    assert "not drawn" not in axes.get_xlabel()
    # What is left out though it is as frequent is told.
    ten["student"]["confusions"].insert(0, [4, 5, 2])
    (axes,) = plot_confusion(ten, max_classes=9).axes
    assert "not drawn: other confusions of 2 test images each" in axes.get_xlabel()


def test_no_confusions(hundred):
    results = copy.deepcopy(hundred)
    results["student"]["confusions"] = []
    (axes,) = plot_confusion(results).axes
    assert not axes.containers[0]
    assert "every test image is classified correctly" in [text.get_text() for text in axes.texts]
