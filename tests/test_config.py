from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import fields

import pytest

from bkd_hf import BKDConfig


def make(**kwargs) -> BKDConfig:
    return BKDConfig(output_dir="unused", use_cpu=True, **kwargs)


def test_defaults_are_the_papers():
    args = make()
    assert (args.temperature, args.distillation_weight, args.class_balance_beta) == (2.0, 1.0, 0.9999)
    assert args.deferred_reweighting_start is None


def test_copies_keep_the_token_and_pickles_do_not():
    args = make(hub_token="hf_secret", method="kd", lr_step_epochs=[1], lr_step_factors=[0.1])
    for found in (copy.copy(args), copy.deepcopy(args)):
        assert (found.hub_token, found.to_dict()) == ("hf_secret", args.to_dict())
    assert copy.deepcopy(args).lr_step_epochs is not args.lr_step_epochs
    assert pickle.loads(pickle.dumps(args)).hub_token is None


def test_accumulation_follows_changes():
    args = make(global_batch_size=64)
    args.set_anew({"per_device_train_batch_size": 32})
    assert args.gradient_accumulation_steps == 2


def test_every_own_option_has_help():
    assert all(f.metadata.get("help") for f in fields(BKDConfig) if f.name in BKDConfig.__annotations__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "--temperature must be a finite number > 0, got 0"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"distillation_weight": -1}, "--distillation_weight must be a finite number ≥ 0, got -1"),
        ({"class_balance_beta": 1.0}, r"--class_balance_beta must be in \[0, 1\), got 1.0"),
        ({"class_balance_beta": -0.1}, "--class_balance_beta"),
        ({"label_smoothing_factor": 1.5}, r"--label_smoothing_factor must be in \[0, 1\), got 1.5"),
        ({"label_smoothing_factor": -0.1}, "--label_smoothing_factor"),
        ({"deferred_reweighting_start": -1}, "--deferred_reweighting_start"),
        ({"momentum": 1.0}, "--momentum"),
        ({"lr_step_epochs": [10, 5], "lr_step_factors": [0.1, 0.01]}, "--lr_step_epochs must be increasing"),
        ({"lr_step_epochs": [10], "lr_step_factors": [0.1, 0.01]}, "--lr_step_factors must be 1 numbers"),
        ({"lr_step_epochs": [10]}, "--lr_step_factors"),
        ({"lr_step_factors": [0.1]}, "given together with --lr_step_epochs"),
        ({"lr_warmup_epochs": 5}, "given together with --lr_step_epochs"),
        ({"lr_step_epochs": [10], "lr_step_factors": [-1.0]}, "--lr_step_factors must be finite"),
    ],
)
def test_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("given", "accumulation"),
    [
        ({}, 1),
        ({"global_batch_size": 64}, 4),
        ({"global_batch_size": 64, "gradient_accumulation_steps": 4}, 4),
        ({"global_batch_size": 64, "gradient_accumulation_steps": 2}, "needs 4 with 16 .* Leave one of them out"),
        ({"global_batch_size": 40}, r"40 is no multiple of 16 \(.*\) × 1 process = 16\. Use --global_batch_size 32 or "
         "--global_batch_size 48 or --per_device_train_batch_size 10"),
        ({"global_batch_size": 8}, "Use --global_batch_size 16 or --per_device_train_batch_size 8"),
        ({"global_batch_size": 0}, "--global_batch_size must be at least 1"),
        ({"global_batch_size": 64, "auto_find_batch_size": True}, "left out with --auto_find_batch_size"),
    ],
    ids=str,
)  # fmt: skip
def test_accumulation_makes_up_the_global_batch(given, accumulation):
    if isinstance(accumulation, int):
        assert make(per_device_train_batch_size=16, **given).gradient_accumulation_steps == accumulation
    else:
        with pytest.raises(ValueError, match=accumulation):
            make(per_device_train_batch_size=16, **given)


def test_fp16_is_refused_where_it_would_be_fp32():
    with pytest.raises(ValueError, match=r"--fp16 .* needs a GPU.* Use --precision bf16 or fp32"):
        make(fp16=True)
    assert make(bf16=True).mixed_precision == "bf16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, "--momentum 0.9 has no effect"),
        (
            {"lr_warmup_epochs": 5, "lr_step_epochs": [5, 8], "lr_step_factors": [0.1, 0.01], "num_train_epochs": 9},
            r"--lr_warmup_epochs 5 is not below the first of --lr_step_epochs \(5\)",
        ),
        ({"decay_all_parameters": True}, "--decay_all_parameters has no effect"),
        ({"deferred_reweighting_start": 3}, "is never reached"),
        ({"deferred_reweighting_start": 1, "class_balance_beta": 0.0}, "has no effect"),
        ({"lr_step_epochs": [1], "lr_step_factors": [0.1], "lr_scheduler_type": "cosine"}, "have no effect"),
        ({"lr_step_epochs": [1, 3], "lr_step_factors": [0.1, 0.01]}, "--lr_step_epochs 3 are never reached"),
    ],
)
def test_options_without_effect_warn(options, message):
    with pytest.warns(UserWarning, match=message):
        make(**options)


def test_sensible_options_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make()
        make(
            optim="sgd",
            momentum=0.9,
            weight_decay=2e-4,
            decay_all_parameters=True,
            num_train_epochs=200,
            lr_warmup_epochs=5,
            lr_step_epochs=[160, 180],
            lr_step_factors=[0.01, 0.0001],
            deferred_reweighting_start=160,
        )


def test_token_is_not_pickled():
    args = make(hub_token="hf_planted")
    assert b"hf_planted" not in pickle.dumps(args)
    assert args.hub_token == "hf_planted"
    assert pickle.loads(pickle.dumps(args)).temperature == 2.0
