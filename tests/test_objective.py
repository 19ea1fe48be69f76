"""Methods are composed of four parts, each of which works in training as its name says."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bkd_hf import (
    METHODS,
    BKDConfig,
    BKDTrainer,
    ImageDataset,
    InputError,
    class_balanced_weights,
    load_classifier,
    load_image_dataset,
    load_processor,
)
from bkd_hf import losses as L
from bkd_hf.methods import CLASSIFICATION_LOSSES, DISTILLATION_LOSSES, Loss
from bkd_hf.objective import Objective, Progress
from tests.test_trainer import COUNTS, NAMES, config, images, resnet, trainer_for

PARTS = ("classification_loss", "class_weighting", "distillation_loss", "sampler")


# ---- Presets


@pytest.mark.parametrize(
    ("method", "parts", "teacher"),
    [
        ("ce", ("cross_entropy", "none", "none", "instance"), "ce"),
        ("cb-ce", ("cross_entropy", "reweight", "none", "instance"), "ce"),
        ("focal", ("focal", "none", "none", "instance"), "ce"),
        ("ldam", ("ldam", "none", "none", "instance"), "ce"),
        ("ldam-drw", ("ldam", "drw", "none", "instance"), "ce"),
        ("balanced-softmax", ("balanced_softmax", "none", "none", "instance"), "ce"),
        ("logit-adjustment", ("logit_adjustment", "none", "none", "instance"), "ce"),
        ("resample", ("cross_entropy", "none", "none", "class_balanced"), "ce"),
        ("kd", ("cross_entropy", "none", "kd", "instance"), "ce"),
        ("bkd", ("cross_entropy", "none", "bkd", "instance"), "ce"),
        ("bkd-drw", ("cross_entropy", "none", "bkd", "instance"), "ce"),
        ("dive", ("balanced_softmax", "none", "dive", "instance"), "balanced-softmax"),
        ("dkd", ("cross_entropy", "none", "dkd", "instance"), "ce"),
        ("wsl", ("cross_entropy", "none", "wsl", "instance"), "ce"),
        ("dist", ("cross_entropy", "none", "dist", "instance"), "ce"),
        ("ltkd", ("cross_entropy", "none", "ltkd", "instance"), "ce"),
    ],
)
def test_presets(method, parts, teacher):
    args = BKDConfig(output_dir="unused", use_cpu=True, method=method, num_train_epochs=20)
    assert tuple(getattr(args, part) for part in PARTS) == parts
    assert METHODS[method].teacher == teacher
    assert args.deferred_reweighting_start == (0.8 if method == "bkd-drw" else None)
    assert args.method_label == method


def test_explicit_options_win_over_a_preset():
    args = BKDConfig(
        output_dir="unused", use_cpu=True, method="bkd-drw", deferred_reweighting_start=2, sampler="instance"
    )
    assert args.deferred_reweighting_start == 2
    args = BKDConfig(output_dir="unused", use_cpu=True, method="dkd", classification_loss="balanced_softmax")
    assert (args.classification_loss, args.distillation_loss) == ("balanced_softmax", "dkd")
    assert args.method_label == "dkd (classification_loss balanced_softmax)"
    args = BKDConfig(output_dir="unused", use_cpu=True, method="kd", temperature=4.0)
    assert args.method_label == "kd (temperature 4)"


def test_defaults_are_the_published_ones():
    args = BKDConfig(output_dir="unused", use_cpu=True)
    assert (args.method, args.class_weighting_start, args.focal_gamma) == ("bkd", 0.8, 1.0)
    assert (args.ldam_max_margin, args.ldam_scale, args.logit_adjustment_tau) == (0.5, 30.0, 1.0)
    assert (args.dive_temperature, args.dive_alpha, args.dive_power) == (2.0, 0.5, 0.5)
    assert (args.dkd_temperature, args.dkd_alpha, args.dkd_beta, args.dkd_warmup_epochs) == (4.0, 1.0, 8.0, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "bdk"}, "--method must be one of ce, cb-ce,.*got bdk"),
        ({"classification_loss": "ldma"}, "--classification_loss must be one of cross_entropy, focal"),
        ({"class_weighting": "balanced"}, "--class_weighting must be one of none, reweight, drw"),
        ({"distillation_loss": "hinton"}, "--distillation_loss must be one of none, kd, bkd, dive, dkd"),
        ({"sampler": "random"}, "--sampler must be one of instance, class_balanced"),
        ({"focal_gamma": -1.0}, "--focal_gamma"),
        ({"ldam_scale": 0.0}, "--ldam_scale"),
        ({"dive_alpha": 1.5}, r"--dive_alpha must be in \[0, 1\]"),
        ({"dkd_temperature": 0.0}, "--dkd_temperature"),
        ({"dkd_warmup_epochs": -1}, "--dkd_warmup_epochs"),
        ({"logit_adjustment_tau": float("inf")}, "--logit_adjustment_tau"),
        ({"class_weighting_start": -1.0}, "--class_weighting_start"),
        ({"method": "resample", "train_sampling_strategy": "sequential"}, "--train_sampling_strategy must be random"),
        ({"method": "ldam", "label_smoothing_factor": 0.1}, "--label_smoothing_factor must be 0 with .* ldam"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BKDConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ce", "temperature": 4.0},
        {"method": "kd", "class_balance_beta": 0.99},
        {"method": "dkd", "distillation_weight": 0.5},
        {"method": "kd", "deferred_reweighting_start": 1.0},
        {"method": "bkd", "class_weighting_start": 0.5},
        {"method": "bkd", "focal_gamma": 2.0},
        {"method": "balanced-softmax", "logit_adjustment_tau": 2.0},
        {"method": "bkd", "dkd_beta": 2.0},
        {"method": "ldam-drw", "class_weighting_start": 30.0},
        {"method": "dkd", "dkd_warmup_epochs": 4},
        {"method": "ltkd", "logit_standardization": True},
    ],
    ids=str,
)
def test_options_of_other_methods_warn(options):
    option = next(name for name in options if name != "method")
    with pytest.warns(UserWarning, match=f"--{option} .*(has no effect|never reached|longer than the training)"):
        BKDConfig(output_dir="unused", use_cpu=True, **options)


@pytest.mark.parametrize("method", METHODS)
def test_presets_do_not_warn(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        BKDConfig(output_dir="unused", use_cpu=True, method=method, num_train_epochs=20)


def test_mixture():
    def weights(epoch: float = 0.0, **options):
        return Objective(BKDConfig(output_dir="unused", use_cpu=True, **options)).mixture(epoch)

    assert weights(method="bkd", distillation_weight=0.3) == (1.0, 0.3)
    assert weights(method="dive", dive_alpha=0.3) == (0.7, 0.3)
    assert [weights(epoch, method="dkd")[1] for epoch in (0, 0.9, 1, 18, 19, 100)] == [0.05, 0.05, 0.1, 0.95, 1, 1]
    assert weights(method="dkd", dkd_warmup_epochs=0) == (1.0, 1.0)


# ---- Losses as lines of a registry


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distillation_loss_args": '{"bata": 1}'},
            "--distillation_loss dkd has no argument 'bata'; it takes temperature",
        ),
        (
            {"distillation_loss_args": {"beta": -1}},
            "--distillation_loss_args .*beta must be a finite number ≥ 0, got -1",
        ),
        ({"distillation_loss_args": {"beta": "8"}}, '--distillation_loss_args: beta of dkd must be a number, got "8"'),
        ({"distillation_loss_args": {"beta": True}}, "beta of dkd must be a number, got true"),
        ({"distillation_loss_args": "{beta: 1}"}, "--distillation_loss_args {beta: 1} is no JSON"),
        ({"classification_loss_args": {"gamma": 2}}, "--classification_loss cross_entropy has no argument 'gamma'"),
        ({"classification_loss_args": [1]}, "--classification_loss_args must be a JSON object"),
        (
            {"method": "bkd", "distillation_loss_args": {"power": 0.5}},
            "--distillation_loss_args: give 'power' of --distillation_loss bkd by --class_balance_power",
        ),
    ],
)
def test_arguments_of_losses_are_checked_against_their_signature(options, message):
    with pytest.raises(ValueError, match=message):
        BKDConfig(output_dir="unused", use_cpu=True, **{"method": "dkd", **options})


def test_arguments_of_losses_are_those_of_their_options():
    args = BKDConfig(
        output_dir="unused", use_cpu=True, method="dkd", distillation_loss_args='{"beta": 2}', dkd_alpha=3
    )
    assert args.loss_arguments("distillation_loss") == {
        "temperature": 4.0, "alpha": 3, "beta": 2, "warmup_epochs": 20
    }  # fmt: skip
    assert args.method_label == "dkd (distillation_loss_args {'beta': 2}, dkd_alpha 3)"


@pytest.mark.parametrize("registry", [CLASSIFICATION_LOSSES, DISTILLATION_LOSSES])
def test_every_loss_names_its_source(registry):
    for name, loss in registry.items():
        if loss is not None:
            assert loss.title
            assert loss.source or name == "cross_entropy"  # older than arXiv
            assert "=" in loss.formula


def test_docstrings_of_own_losses_are_read_as_they_are():
    def old(logits):
        """Old loss (Somebody, 2013, arXiv 1312.6114, eq. 1).

        OLD = z · y
              + 1
        """

    def bare(logits): ...

    def wordy(logits):
        """Wordy loss: of words alone.

        Args:
            logits: Of no use.
        """

    losses = [Loss(function) for function in (old, bare, wordy)]
    assert [(loss.title, loss.source, loss.formula) for loss in losses] == [
        ("Old loss", "1312.6114", "OLD = z · y\n+ 1"), ("bare", None, ""), ("Wordy loss: of words alone", None, ""),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["bkd", "dkd", "wsl", "dist", "ltkd"])
def test_a_teacher_of_some_classes_teaches_about_these(batch, method):
    """Logits of classes that it does not know have no influence, nor have the counts of these."""
    z_s, z_t, y = batch
    known = torch.arange(1, len(COUNTS))
    args = BKDConfig(output_dir="unused", use_cpu=True, method=method, dkd_warmup_epochs=0)
    objective = Objective(args, COUNTS, known_classes=known)
    within = Objective(args, COUNTS[1:])
    labels = torch.where(y == 0, -100, y - 1)
    expected = within(z_s[:, known], z_t[:, known], labels, Progress())["kd_loss"]
    actual = objective(*batch, Progress())["kd_loss"]
    torch.testing.assert_close(actual, torch.where(y == 0, 0.0, expected))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "kd"},
        {"method": "bkd"},
        {"method": "ltkd"},
        {"method": "kd", "logit_standardization": True},
        {"method": "bkd", "logit_standardization": True},
    ],
)
def test_targets_of_a_partial_teacher_are_those_of_its_classes(batch, options):
    known = torch.arange(len(COUNTS) - 1)
    args = BKDConfig(output_dir="unused", use_cpu=True, **options)
    z_t = batch[1].clone()
    z_t[:, -1] = -torch.inf
    targets = Objective(args, COUNTS, known_classes=known).log_targets(z_t)
    assert torch.equal(targets[:, -1].exp(), torch.zeros(len(z_t)))
    torch.testing.assert_close(targets[:, :-1], Objective(args, COUNTS[:-1]).log_targets(z_t[:, :-1]))


def test_options_that_change_change_the_objective(batch):
    args = BKDConfig(output_dir="unused", use_cpu=True, method="bkd")
    objective = Objective(args, COUNTS)
    before = objective(*batch, Progress())["kd_loss"]
    args.class_balance_beta = 0.0
    assert torch.equal(objective(*batch, Progress())["kd_loss"], L.kd_loss(*batch[:2], reduction="none"))
    args.class_balance_beta = 0.9999
    assert torch.equal(objective(*batch, Progress())["kd_loss"], before)
    args.classification_loss = "balanced_softmax"
    assert torch.equal(
        objective(*batch, Progress())["ce_loss"], L.balanced_softmax_loss(batch[0], batch[2], COUNTS, reduction="none")
    )


# ---- In training


def one_step_loss(tmp_path, **options) -> float:
    """The logged loss of one step over all examples."""
    teacher = "resnet" if options.pop("with_teacher", False) else None
    trainer = trainer_for(tmp_path, teacher=teacher, per_device_train_batch_size=40, max_steps=1, **options)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.fixture(scope="module")
def batch():
    student, teacher = resnet(1).train(), resnet(2).eval()
    pixels = torch.stack([example["pixel_values"] for example in images()])
    labels = torch.tensor([example["labels"] for example in images()])
    with torch.no_grad():
        return student(pixels).logits, teacher(pixels).logits, labels


def class_weights() -> torch.Tensor:
    return class_balanced_weights(COUNTS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "ce"}, lambda s, t, y: L.cross_entropy_loss(s, y)),
        ({"method": "cb-ce"}, lambda s, t, y: L.cross_entropy_loss(s, y, class_weights=class_weights())),
        ({"method": "focal", "focal_gamma": 2.0}, lambda s, t, y: L.focal_loss(s, y, 2.0)),
        (
            {"method": "focal", "class_weighting": "reweight"},
            lambda s, t, y: L.focal_loss(s, y, class_weights=class_weights()),
        ),
        (
            {"method": "ldam", "class_weighting": "reweight"},
            lambda s, t, y: L.ldam_loss(s, y, COUNTS, class_weights=class_weights()),
        ),
        # Deferred: in the first step without weights.
        ({"method": "ldam-drw"}, lambda s, t, y: L.ldam_loss(s, y, COUNTS)),
        ({"method": "balanced-softmax"}, lambda s, t, y: L.balanced_softmax_loss(s, y, COUNTS)),
        (
            {"method": "balanced-softmax", "label_smoothing_factor": 0.1},
            lambda s, t, y: L.balanced_softmax_loss(s, y, COUNTS, 0.1),
        ),
        (
            {"method": "logit-adjustment", "logit_adjustment_tau": 0.5},
            lambda s, t, y: L.logit_adjustment_loss(s, y, COUNTS, 0.5),
        ),
        ({"method": "kd"}, lambda s, t, y: L.bkd_loss(s, t, y, None)),
        ({"method": "bkd"}, lambda s, t, y: L.bkd_loss(s, t, y, class_weights())),
        ({"method": "bkd-drw"}, lambda s, t, y: L.bkd_loss(s, t, y, None)),
        (
            {"method": "dive", "dive_alpha": 0.3},
            lambda s, t, y: 0.7 * L.balanced_softmax_loss(s, y, COUNTS) + 0.3 * L.dive_loss(s, t),
        ),
        (
            {"method": "dkd", "dkd_warmup_epochs": 4},
            lambda s, t, y: L.cross_entropy_loss(s, y) + 0.25 * L.dkd_loss(s, t, y),
        ),
        (
            {"method": "kd", "logit_standardization": True},
            lambda s, t, y: L.cross_entropy_loss(s, y) + L.kd_loss(s, t, standardize=True),
        ),
        (
            {"method": "wsl", "temperature": 3.0, "distillation_weight": 2.5},
            lambda s, t, y: L.cross_entropy_loss(s, y) + 2.5 * L.wsl_loss(s, t, y, 3.0),
        ),
        (
            {"method": "dist", "distillation_loss_args": {"gamma": 1.0}},
            lambda s, t, y: L.cross_entropy_loss(s, y) + L.dist_loss(s, t, y, gamma=1.0),
        ),
        ({"method": "ltkd"}, lambda s, t, y: L.cross_entropy_loss(s, y) + L.ltkd_loss(s, t, y, COUNTS)),
        (
            {"method": "kd", "class_weighting": "reweight"},
            lambda s, t, y: L.cross_entropy_loss(s, y, class_weights=class_weights()) + L.kd_loss(s, t),
        ),
    ],
    ids=lambda value: "formula" if callable(value) else str(value),
)
def test_logged_loss_is_that_of_the_method(tmp_path, batch, options, expected):
    method = METHODS[options["method"]]
    model = load_classifier("cifar-resnet-8", NAMES, image_size=8) if method.classification_loss == "ldam" else None
    if model is not None:  # the same numbers as the fixture's, said to be those of a cosine head
        model.load_state_dict(resnet(1).state_dict())
        model.config.cosine_head, model.config.cosine_scale = True, 30.0
    loss = one_step_loss(tmp_path, with_teacher=method.distillation_loss != "none", model=model, **options)
    assert loss == pytest.approx(expected(*batch).item(), rel=1e-5)


def test_a_power_beyond_the_range_of_float32_is_refused(tmp_path):
    options = BKDConfig(str(tmp_path), method="bkd", class_balance_power=20.0, use_cpu=True)
    with pytest.raises(InputError, match=r"--class_balance_power 20 is too large: the class weights, 3\.0e-04 to 3"):
        Objective(options, [100_000, 1000, 1], has_teacher=True).check(None)


def test_deferred_weights_of_classification(tmp_path):
    trainer = trainer_for(tmp_path, teacher=None, method="cb-ce", class_weighting="drw", class_weighting_start=1)
    seen = []
    compute = trainer.compute_loss

    def spy(*args, **kwargs):
        seen.append(trainer.classification_weights.unique().numel() > 1)
        return compute(*args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert seen == [False, False, True, True]
    assert trainer.class_weights is None  # those of a distillation loss, which there is not


def test_a_teacherless_trainer_trains_the_classification_loss(tmp_path, batch):
    expected = L.balanced_softmax_loss(batch[0], batch[2], COUNTS).item()
    assert one_step_loss(tmp_path, method="dive", dive_alpha=0.3) == pytest.approx(expected, rel=1e-5)


def test_own_losses(tmp_path, batch):
    student, teacher, labels = batch

    def squared_error(logits, labels):
        return (logits.softmax(-1).gather(1, labels[:, None])[:, 0] - 1) ** 2

    def logit_matching(student_logits, teacher_logits, labels, class_weights):
        assert class_weights.shape == (5,)
        return ((student_logits - teacher_logits) ** 2).mean(1)

    weights = class_weights().float()[labels]
    expected = (weights * squared_error(student, labels)).sum() / weights.sum()
    expected += 0.5 * logit_matching(student, teacher, labels, class_weights()).mean()
    trainer = BKDTrainer(
        model=resnet(1),
        teacher_model=resnet(2),
        args=config(
            tmp_path, per_device_train_batch_size=40, max_steps=1, class_weighting="reweight", distillation_weight=0.5
        ),
        train_dataset=images(),
        classification_loss=squared_error,
        distillation_loss=logit_matching,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_own_loss_must_leave_the_mean_to_the_trainer(tmp_path):
    trainer = BKDTrainer(
        model=resnet(1),
        args=config(tmp_path),
        train_dataset=images(),
        classification_loss=lambda logits, labels: L.cross_entropy_loss(logits, labels),
    )
    with pytest.raises(ValueError, match=r"classification loss must return one value per example, shape \(20,\)"):
        trainer.train()


@pytest.mark.parametrize(("method", "shares"), [("resample", [0.2] * 5), ("ce", np.array(COUNTS) / 40)])
def test_sampler_decides_how_often_classes_are_seen(tmp_path, method, shares):
    trainer = trainer_for(tmp_path, teacher=None, method=method, num_train_epochs=25)
    seen, compute = [], trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.extend(inputs["labels"].tolist())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    assert len(seen) == 25 * 40
    np.testing.assert_allclose(np.bincount(seen) / len(seen), shares, atol=0.05)


def test_repeated_images_are_augmented_otherwise_each_time():
    data = load_image_dataset("digits")["train"].select(range(4))
    dataset = ImageDataset(data, load_processor("cifar-resnet-8", image_size=16), "pad_crop")
    first, again, third, *_ = (example["pixel_values"] for example in dataset.__getitems__([1, 5, 9, 13]))
    assert not torch.equal(first, again)
    assert not torch.equal(again, third)
    assert {example["labels"] for example in dataset.__getitems__([1, 5, 9, 13])} == {int(dataset.labels[1])}
    assert torch.equal(dataset[1]["pixel_values"], first)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda p: trainer_for(p, method="ce"),
            "The method .ce. has no distillation loss: the teacher would",
        ),
        (lambda p: trainer_for(p, teacher=None, method="ldam"), "cosine_scale=30"),
        (
            lambda p: trainer_for(
                p, load_classifier("cifar-resnet-8", NAMES, 8, cosine_scale=16.0), teacher=None, method="ldam"
            ),
            "--ldam_scale is 30.0, but .* scale 16.0",
        ),
        (
            lambda p: trainer_for(p, teacher=None, method="balanced-softmax", class_counts=[20, 10, 5, 3, 0]).train(),
            "no training example",
        ),
    ],
)
def test_bad_input(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path)


def test_iterable_data_cannot_be_sampled_by_class(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(images())

    trainer = trainer_for(tmp_path, teacher=None, data=Stream(), method="resample", class_counts=COUNTS, max_steps=1)
    with pytest.raises(ValueError, match="--sampler class_balanced needs"):
        trainer.train()


def test_every_part_is_used_by_a_preset():
    used = {getattr(method, part) for method in METHODS.values() for part in PARTS}
    assert set(CLASSIFICATION_LOSSES) | set(DISTILLATION_LOSSES) <= used


@pytest.mark.parametrize(("power", "largest"), [("auto", 200_000), ("measured", 300_000)])
def test_weights_that_cannot_balance_are_refused_or_told(power, largest, caplog):
    def check(counts: list[int], **options: float) -> None:
        caplog.clear()
        args = BKDConfig("unused", use_cpu=True, method="bkd", class_balance_power=power, **options)
        Objective(args, counts, look=lambda: {"power": 1.0}).check_values()

    check([9000, 9])
    assert "--beta" not in caplog.text
    with pytest.raises(InputError, match=f"--beta 0 gives all .* --class_balance_power {power} balances nothing"):
        check([9, 1], class_balance_beta=0.0)
    check([largest, 20_000, 1])  # whose weights are nearly the same for the first two
    assert "more than about 10,000 training examples" in caplog.text
    assert f"the largest has {largest:,}. Use --beta 0.9999999 to" in caplog.text  # only once in a process
    check([largest, 20_000, 1], class_balance_beta=0.9999999)
    assert "--beta" not in caplog.text
