"""FSDP2 and DeepSpeed, in two forked processes on the CPU, where accelerate treats gloo as a device's backend."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.state
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageClassification
from transformers.integrations import is_deepspeed_zero3_enabled

from bkd_hf import BKDConfig, BKDTrainer, TrainingDivergedError, load_classifier, sharding
from bkd_hf.errors import InputError
from bkd_hf.machine import leave_process_group
from bkd_hf.models import load_weights_strictly
from bkd_hf.teacher import load_teacher
from tests.architectures import EVERY_BUT_TIMM, examples, tiny
from tests.faults import in_two_processes
from tests.tiny_models import tiny_vit

pytestmark = pytest.mark.slow

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
COUNTS = [30, 20, 10, 5, 2]
ANY_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
ALL_SPREAD = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
SHARDS = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


class Examples(list):
    """Which look the same in each epoch, so that a teacher's answers can be kept."""

    def describe_views(self) -> dict:
        return {}


def trainer_of(folder: Path, model: Any, teacher: Any = None, **options: Any) -> BKDTrainer:
    settings = {
        "method": "ce" if teacher is None else "bkd", "num_train_epochs": 2, "learning_rate": 0.01, "logging_steps": 1,
        "per_device_train_batch_size": 32 // int(os.environ.get("WORLD_SIZE", "1")), "save_strategy": "epoch",
        "eval_strategy": "epoch", "optim": "adamw_torch", "use_cpu": True, "disable_tqdm": True,
        "max_grad_norm": 2.0, **options,
    }  # fmt: skip
    data = Examples(examples(77, 8))
    args = BKDConfig(str(folder), **settings)
    assert not is_deepspeed_zero3_enabled()  # or transformers would load a part of each model
    return BKDTrainer(model, teacher, args, train_dataset=data, eval_dataset=Examples(data[:37]), class_counts=COUNTS)


def trained(*args: Any, resume_from: Path | None = None, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Train and save a model; return its losses, and all its weights, as a user loads them."""
    trainer = trainer_of(*args, **options)
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    assert isinstance(trainer.model, FSDPModule) == ("fsdp" in options)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    told = ("loss", "ce_loss", "kd_loss", "eval_loss")
    losses = [entry[name] for entry in trainer.state.log_history for name in told if name in entry]
    model = AutoModelForImageClassification.from_pretrained(args[0])
    return losses, torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def take_gloo_for_a_device() -> None:
    accelerate.state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_XPU)
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def spread(folder: Path) -> dict[str, Any]:
    with pytest.raises(InputError, match=r"FSDP .* cannot be had here: accelerate would run MULTI_CPU"):
        trainer_of(folder / "refused", tiny_vit(1, 5), fsdp=True)
    take_gloo_for_a_device()
    fsdp: dict[str, Any] = {"fsdp": True}
    found = {"teacher": trained(folder / "teacher", tiny_vit(2, 5), **fsdp)}
    teacher = load_teacher(str(folder / "teacher"))
    found["measured"] = trainer_of(folder / "none", teacher.as_classifier(), **fsdp).evaluate()["eval_loss"]
    found["given"] = trained(folder / "given", tiny_vit(1, 5), teacher, **fsdp, **SHARDS)
    assert not (folder / "given" / "checkpoint-3" / "model.safetensors").exists()
    checkpoint = folder / "given" / "checkpoint-3"
    found["resumed"] = trained(folder / "resumed", tiny_vit(3, 5), teacher, resume_from=checkpoint, **fsdp, **SHARDS)
    cache = str(folder / "cache")
    found["cached"] = trained(folder / "cached", tiny_vit(1, 5), teacher, teacher_cache=cache,
                              teacher_cache_dtype="float32", **fsdp)  # fmt: skip
    sharding.LARGE_TEACHER = 0
    found["spread teacher"] = trained(folder / "spread", tiny_vit(1, 5), teacher, **fsdp)
    assert isinstance(teacher.model, FSDPModule)
    # Code of its own is saved with it, not torch's.
    resnet = trainer_of(folder / "resnet", load_classifier("cifar-resnet-8", list("abcde")), max_steps=1, **fsdp)
    resnet.train()
    resnet.save_model()
    statistics = resnet.accelerator.gather(resnet.model.norm.running_var[None])
    assert torch.equal(*statistics)
    assert (statistics[0] - 1).abs().max() > 1e-3
    leave_process_group()
    return found


def with_deepspeed(folder: Path) -> dict[str, Any]:
    """Train two models in one process; the file says nothing of clipping, so it is as the options say."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    take_gloo_for_a_device()
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # needs a compiler
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    found = {}
    for stage in (2, 3):
        name, zero = f"ZeRO-{stage}", {"stage": stage, **ALL_SPREAD}
        file = {"zero_optimization": zero, **ANY_OPTIMIZER, **dict.fromkeys(sizes, "auto")}
        options: dict[str, Any] = {"deepspeed": file, "use_cpu": False}
        found[f"teacher, {name}"] = trained(folder / name, tiny_vit(2, 5), **options)
        teacher = load_teacher(str(folder / name))
        found[f"measured, {name}"] = trainer_of(folder / "none", teacher.as_classifier(), **options).evaluate()[
            "eval_loss"
        ]
        found[f"given, {name}"] = trained(folder / "given", tiny_vit(1, 5), str(folder / name), **options)
        with pytest.raises(TrainingDivergedError):  # by its weights
            trained(folder / "diverged", tiny_vit(1, 5), optim="sgd", learning_rate=1e38, weight_decay=1e5,
                    max_steps=1, eval_strategy="no", **options)  # fmt: skip
    leave_process_group()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder, and what one process found, and two."""
    folder = tmp_path_factory.mktemp("fsdp")
    one = {"teacher": trained(folder / "one teacher", tiny_vit(2, 5))}
    teacher = load_teacher(str(folder / "one teacher"))
    one["measured"] = trainer_of(folder / "none", teacher.as_classifier()).evaluate()["eval_loss"]
    one["given"] = trained(folder / "one", tiny_vit(1, 5), teacher)
    two = in_two_processes(spread, folder)[0]
    return folder, one, two | (in_two_processes(with_deepspeed, folder)[0] if HAS_DEEPSPEED else {})


CASES = ["teacher", "given", "resumed", "cached", "spread teacher"]
DEEPSPEED = [f"{of}, ZeRO-{stage}" for of in ("teacher", "given") for stage in (2, 3)] if HAS_DEEPSPEED else []


@pytest.mark.parametrize("case", CASES + DEEPSPEED)
def test_losses_and_weights_are_those_of_one_process(outcomes, case):
    _, one, two = outcomes
    (losses, weights), (expected_losses, expected) = (
        two[case],
        one["teacher" if case.startswith("teacher") else "given"],
    )
    assert losses == pytest.approx(expected_losses, rel=5e-7)
    assert (weights - expected).norm() / expected.norm() < 1e-5
    if case == "resumed":
        assert torch.equal(weights, two["given"][1])


def test_a_teacher_is_measured_and_models_are_whole(outcomes):
    folder, one, two = outcomes
    for case in (case for case in two if case.startswith("measured")):
        assert two[case] == pytest.approx(one["measured"], rel=5e-7)
    model = load_classifier(str(folder / "resnet"), list("abcde"), trust_remote_code=True)
    load_weights_strictly(model, str(folder / "resnet"))
    assert model.config.architectures == ["CifarResNetForImageClassification"]
    assert model.config.auto_map["AutoConfig"] == "modeling_cifar_resnet.CifarResNetConfig"


def test_zero3_that_would_save_no_model_is_refused():
    with pytest.raises(InputError, match="save no whole model"):
        sharding.check_deepspeed(SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=3)))
    sharding.check_deepspeed(SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2)))


@pytest.mark.parametrize("name", EVERY_BUT_TIMM)
def test_blocks_of_all_architectures_are_found(name):
    model = tiny(name, 0)
    names = sharding.layers_to_wrap(model)
    inside = {id(p) for m in model.modules() if type(m).__name__ in names for p in m.parameters()}
    assert sum(p.numel() for p in model.parameters() if id(p) in inside) > 0.5 * model.num_parameters()
