"""Options of the trainer."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

from transformers import TrainingArguments
from transformers.integrations import unset_hf_deepspeed_config

from .compatibility import (
    DTYPES,
    LOSSES,
    check_checkpointing,
    check_precision,
    check_together,
    find_accumulation,
    options_without_effect,
    require,
)
from .errors import InputError
from .machine import join_process_group
from .methods import (
    CLASS_WEIGHTINGS,
    CLASSIFICATION_LOSSES,
    DISTILLATION_LOSSES,
    HEAD_BIASES,
    METHODS,
    SAMPLERS,
    STUDENT_INITS,
)
from .text import one_line

_PARTS: dict[str, Collection[str]] = {
    "classification_loss": CLASSIFICATION_LOSSES,  # includes losses registered by users
    "class_weighting": CLASS_WEIGHTINGS,
    "distillation_loss": DISTILLATION_LOSSES,
    "sampler": SAMPLERS,
    "student_init": STUDENT_INITS,
    "head_bias": HEAD_BIASES,
}
#: Options that may have no effect without a warning (see `RunArguments.from_recipe`).
UNTOLD: ContextVar[frozenset[str]] = ContextVar("UNTOLD", default=frozenset())
#: Default s of a cosine head, rank of LoRA, and views of augmented images.
HEAD_SCALE, ADAPTER_RANK, DEFAULT_VIEWS = 30.0, 8, 16
#: How a global batch is split; only its total size has an influence.
BATCH_CUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Dictionary options that may name a JSON file instead.
_MAY_BE_FILES = ("accelerator_config", "fsdp_config", "deepspeed")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that is an option; metadata as `HfArgumentParser` reads it."""
    return field(default=default, metadata={"help": help, **metadata})


def _find_users() -> dict[str, dict[str, list[str]]]:
    """Which choices use an option, from the signatures of the losses; all choices use the other options."""
    users: dict[str, dict[str, list[str]]] = {
        "class_balance_beta": {"class_weighting": ["reweight", "drw"]},
        "class_weighting_start": {"class_weighting": ["drw"]},
    }
    for part, registry in LOSSES.items():
        for name, loss in registry.items():
            if loss is None:
                continue
            options = [loss.option(name, argument) for argument in loss.arguments]
            if part == "distillation_loss" and loss.needs("weight"):
                options.append("distillation_weight")
            if part == "distillation_loss" and loss.needs("class_weights"):
                options += ["class_balance_beta", "deferred_reweighting_start", "distillation_prior"]
            for used in options:
                users.setdefault(used, {}).setdefault(part, []).append(name)
    return {name: users[name] for name in BKDConfig.__annotations__ if name in users}  # own options, in their order


def option_is_used(name: str, choices: Mapping[str, Any]) -> bool:
    """Whether the losses, weights and sampler of these choices use an option."""
    return any(choices.get(part) in users for part, users in USED_BY.get(name, {}).items())


def used_by(part: str, choices: Mapping[str, Any]) -> list[str]:
    """Options used by the choice for a part of the method (such as `"distillation_loss"`)."""
    return [name for name, parts in USED_BY.items() if choices.get(part) in parts.get(part, ())]


@dataclass
class BKDConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the options of Balanced Knowledge Distillation and its competitors.

    `method` names a preset (see `bkd_hf.methods`), which sets `classification_loss`, `class_weighting`,
    `distillation_loss` and `sampler` where they are not given.

    Inherited defaults are those of `transformers`; a recipe or a script sets what differs. `lr_step_epochs` selects
    the step-decay schedule, which replaces `lr_scheduler_type`:

        rate(epoch e) = learning_rate · (e + 1) / lr_warmup_epochs      while e < lr_warmup_epochs
                        learning_rate · lr_step_factors[k]              from epoch lr_step_epochs[k] on
                        learning_rate                                   otherwise

    with whole epochs e counted from 0. Each field is described by its help text.

    With `enable_jit_checkpoint` (off by default, on in scripts), `train()` finishes its step at SIGTERM, saves a
    checkpoint and ends the process by `TrainingStopped` (exit code 75). `transformers` would return as if the training
    were finished.

    Raises:
        InputError: If a value is out of its range; the message names the option.

    Warns:
        UserWarning: If an option has no effect.
    """

    method: str = option(
        "bkd", f"Preset of the four options that follow: {', '.join(METHODS)}. Explicit options win over it."
    )
    classification_loss: str | None = option(None, f"{', '.join(CLASSIFICATION_LOSSES)}; not given: as --method says.")
    class_weighting: str | None = option(
        None,
        "Class weights in the classification loss: none, reweight (effective number), drw (deferred to "
        "class_weighting_start); not given: as --method says.",
    )
    distillation_loss: Annotated[str | None, "student"] = option(
        None, f"{', '.join(DISTILLATION_LOSSES)}; not given: as --method says."
    )
    sampler: str | None = option(
        None,
        "instance (each image once an epoch) or class_balanced (each class equally often); not given: as --method "
        "says.",
    )
    student_init: Annotated[str | None, "student"] = option(
        None,
        "Initial weights of the student: model (those of --model_name_or_path), teacher (the teacher's, whose "
        "head's bias is adjusted for the class frequencies if the method corrects for them), or auto (the teacher's "
        "if both have the same architecture and see the same pixels, head_init is random, and class_balance_power "
        "is below 1: a teacher that is less sure of its training images has more to learn); not given: as "
        "--method says.",
    )
    head_bias: Annotated[str | None, "student"] = option(
        None,
        "Bias of the trained student's head: learned, balanced (after training, the bias alone is fitted to training "
        "images that are weighted to balance the classes), or auto (balanced if there is a teacher, "
        "class_balance_power is below 1, and a class is predicted over 3 times as often as it occurs); not given: as "
        "--method says.",
    )
    classification_loss_args: str | None = option(
        None, "Arguments of the classification loss, a JSON object, e.g. '{\"gamma\": 2}' for focal."
    )
    distillation_loss_args: Annotated[str | None, "student"] = option(
        None, "Arguments of the distillation loss, a JSON object, e.g. '{\"beta\": 2}' for dkd."
    )
    temperature: Annotated[float, "student"] = option(
        2.0, "T > 0 of kd, bkd and wsl: softens both distributions; raising it also strengthens the rebalancing."
    )
    distillation_weight: Annotated[float, "student"] = option(
        1.0,
        "α ≥ 0 of kd, bkd, wsl, dist and ltkd: weight of the distillation loss beside the classification loss.",
        aliases=["--alpha"],
    )
    class_balance_beta: float = option(
        0.9999,
        "β in [0, 1) of the class weights (1-β)/(1-β^n), wherever there are any: 0 gives uniform weights, → 1 the "
        "inverse class frequency.",
        aliases=["--beta"],
    )
    empty_classes: str = option(
        "error",
        "What happens if a class has no training image, and a loss or its weights need the class counts: error, or "
        "clamp (it counts as one image).",
    )
    class_balance_power: Annotated[str | None, "student"] = option(
        None,
        "p ≥ 0 of bkd, the power of the class weights in the targets softmax(z_t/T + p·log w): a number; auto for "
        "1/T, which removes the class frequencies once; or measured, the largest from 1/T to 1 (at most 2/T) at which "
        "the targets keep 95 percent of the teacher's correct predictions on training images. Not given: as --method "
        "says, for bkd 1.",
    )
    distillation_prior: Annotated[str, "student"] = option(
        "auto",
        "Class frequencies that bkd removes from the targets: counts (those of the training images), or teacher (the "
        "part of them that the teacher's predictions on training images still contain, for a teacher trained by a "
        "method that corrects for them). auto: teacher if the teacher was trained by such a method, here or in a run "
        "of bkd_hf; else counts.",
    )
    logit_standardization: Annotated[bool, "student"] = option(
        False,
        "kd and bkd compare logits scaled to mean 0 and standard deviation 1 (Sun et al., 2024), so the student "
        "need not match the magnitude of the teacher's.",
    )
    deferred_reweighting_start: Annotated[float | None, "student"] = option(
        None,
        "Class weights in the distillation loss are uniform until this epoch (≥ 1), or this fraction of training "
        "(below 1), and class-balanced from then on. Not given: as --method says, for bkd from the first step, for "
        "bkd-drw from 0.8.",
    )
    class_weighting_start: float = option(
        0.8, "Epoch (≥ 1), or fraction of training (below 1), from which --class_weighting drw uses class weights."
    )
    focal_gamma: float = option(1.0, "γ ≥ 0 of focal.")
    ldam_max_margin: float = option(0.5, "Margin of the rarest class in ldam, a cosine.")
    ldam_scale: float = option(30.0, "s > 0 of ldam: the logits are s times a cosine.")
    logit_adjustment_tau: str | None = option(
        None,
        "τ of logit_adjustment: a number, or auto for 2 - class_balance_power·T, at least 0, so that labels and "
        "targets together ask for balanced predictions. Not given: as --method says, 1.",
    )
    dive_temperature: Annotated[float, "student"] = option(2.0, "T > 0 of dive.")
    dive_alpha: Annotated[float, "student"] = option(
        0.5, "α in [0, 1] of dive: weight of distillation; the rest is balanced softmax."
    )
    dive_power: Annotated[float, "student"] = option(0.5, "Power > 0 of the teacher's probabilities in dive.")
    dkd_temperature: Annotated[float, "student"] = option(4.0, "T > 0 of dkd.")
    dkd_alpha: Annotated[float, "student"] = option(1.0, "α ≥ 0 of dkd: weight of the target class.")
    dkd_beta: Annotated[float, "student"] = option(8.0, "β ≥ 0 of dkd: weight of the non-target classes.")
    dkd_warmup_epochs: Annotated[int, "student"] = option(
        20, "In the first n epochs, dkd has 1/n, 2/n, … of its weight."
    )
    global_batch_size: int | None = option(
        None,
        "Images in an optimizer step: per_device_train_batch_size × processes × gradient_accumulation_steps, of "
        "which the last is chosen to fit. A run can continue with another number of processes if this stays the same. "
        "Not given: the product of the three.",
    )
    momentum: float = option(0.0, "Momentum of --optim sgd (without Nesterov), in [0, 1).")
    decay_all_parameters: bool = option(
        False,
        "Apply weight_decay to all parameters, as published long-tail recipes do; without, Trainer leaves out biases "
        "and the weights of layers that are called norm or LayerNorm.",
    )
    ema_decay: float | None = option(
        None,
        "Measure, save and publish the exponential moving average of the weights, with this decay a step, e.g. 0.999 "
        "(less in the first steps), instead of the last weights; not given: no average.",
    )
    freeze_backbone: bool = option(False, "Train the head alone; everything below it keeps its weights.")
    adapter: str | None = option(
        None,
        "Train few weights of a pretrained model, and its head: lora (low-rank updates of its layers, Hu et al., "
        "2021, which are part of the weights when it is saved; needs peft), bitfit (biases and normalisation layers, "
        "Ben Zaken et al., 2021), or none. Not given: none, all weights are trained.",
    )
    adapter_rank: int | None = option(None, f"Rank r ≥ 1 of the updates of --adapter lora. Not given: {ADAPTER_RANK}.")
    adapter_alpha: float | None = option(
        None, "α > 0 of --adapter lora, whose updates are α/r · B A. Not given: twice the rank."
    )
    adapter_target_modules: list[str] | None = option(
        None,
        "Layers that --adapter lora updates, by the ends of their names, e.g. query value. Not given: all linear "
        "layers, or all convolutions without groups, whichever hold more weights; never the head.",
    )
    head_learning_rate: float | None = option(
        None, "Learning rate of the head; not given: learning_rate, as for the rest."
    )
    layer_decay: float | None = option(
        None,
        "Layer-wise learning-rate decay in (0, 1] (Bao et al., 2021): a block's rate is learning_rate times this to "
        "the power of 1 + the number of blocks above it, e.g. 0.75; embeddings lie below the first block, the head "
        "has the full rate, or its own. Not given: one rate for all.",
    )
    head: str | None = option(
        None,
        "linear, or cosine: the logits are head_scale · cos(features, class vector), without a bias. Not given: "
        "cosine for ldam, which needs it, else the model's own.",
    )
    head_scale: float | None = option(
        None, f"s > 0 of --head cosine. Not given: {HEAD_SCALE:g}, with ldam --ldam_scale."
    )
    head_init: str = option(
        "random",
        "How the head starts: random (as the model is loaded), or class_mean (the vector of a class is the "
        "normalised mean of the features of its training images; Shi et al., 2024).",
    )
    feature_cache: Annotated[str, "path"] = option(
        "off",
        "With freeze_backbone: compute the head's input features once, and train the head on them: off, the folder to "
        "keep them in, or auto (a folder beside the caches of the Hub). For images without augmentation, or with "
        "teacher_cache_views.",
    )
    teacher_cache: Annotated[str, "path", "student"] = option(
        "off",
        "Compute the teacher's logits once, and read them from then on: off, the folder to keep them in, or auto (a "
        "folder beside the caches of the Hub; off where logits cannot be cached). One process per machine writes "
        "the files and all its processes map them, so choose a local disk.",
    )
    teacher_cache_views: Annotated[int | None, "student"] = option(
        None,
        "Number of views K per image: epoch e uses the augmentation of epoch e mod K. Not given: with a cache "
        f"1 for images without augmentation and {DEFAULT_VIEWS} for others; without a cache, each epoch has its own.",
    )
    teacher_cache_dtype: Annotated[str, "student"] = option(
        "float16", f"How cached logits are stored: {' or '.join(DTYPES)}."
    )
    teacher_cache_top_k: Annotated[int | None, "student"] = option(
        None,
        "Store only the k largest logits of an image, and the total mass of the others, in teacher_cache, e.g. 32: "
        "iNaturalist 2018 takes 1 GB, not 114. For kd and bkd, which then learn how much mass the others have in the "
        "target, and not how it is divided (bkd_hf/top_k.py). Not given: all classes.",
    )
    lr_step_epochs: list[int] | None = option(
        None, "Step-decay schedule: epochs (counted from 0) from which lr_step_factors hold."
    )
    lr_step_factors: list[float] | None = option(
        None, "Step-decay schedule: factors of the *initial* learning rate, one per lr_step_epochs."
    )
    lr_warmup_epochs: int = option(
        0, "Step-decay schedule: the first n epochs run at 1/n, 2/n, … of the learning rate."
    )

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS, "classification_loss_args", "distillation_loss_args"
    ]  # fmt: skip

    def __post_init__(self) -> None:
        self._apply_method()
        self._check()
        join_process_group(self)
        is_error = str(self.metric_for_best_model).endswith("calibration_error")
        if is_error and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = False  # transformers knows this of losses alone
        super().__post_init__()
        # Under ZeRO-3 transformers would load every model sharded, teachers too; here models are whole until training.
        unset_hf_deepspeed_config()
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = find_accumulation(self)
        check_precision(self)
        check_checkpointing(self)
        for message in options_without_effect(self, method_defaults(self.method), USED_BY):
            if " has no effect" not in message or message.split(" ")[0].removeprefix("--") not in UNTOLD.get():
                warnings.warn(message, UserWarning, stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        # Trainer pickles its arguments into every checkpoint and pushes them; they must not contain the token.
        return {**self.__dict__, "hub_token": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> BKDConfig:
        found = object.__new__(type(self))  # unlike a pickled one, a copy keeps the token
        found.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return found

    def __copy__(self) -> BKDConfig:
        found = object.__new__(type(self))
        found.__dict__.update(self.__dict__)
        return found

    @property
    def method_label(self) -> str:
        """The preset, with options that differ from it in brackets: "bkd (temperature 4)"."""
        defaults = method_defaults(self.method)
        changed = [
            f"{name} {getattr(self, name)}".removesuffix(".0")
            for name in METHOD_OPTIONS
            if getattr(self, name) != defaults[name] and (name not in USED_BY or option_is_used(name, vars(self)))
        ]
        return f"{self.method} ({', '.join(changed)})" if changed else self.method

    def images_in_step(self, num_processes: int) -> int:
        """The global batch size with a number of processes."""
        per_process = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.global_batch_size or per_process * num_processes

    def loss_arguments(self, part: str) -> dict[str, Any]:
        """Option values of the chosen loss, by argument; some may still be `auto` or `measured`.

        Args:
            part: `"classification_loss"` or `"distillation_loss"`.
        """
        name, given = getattr(self, part), getattr(self, f"{part}_args") or {}
        loss = LOSSES[part][name]
        if loss is None:
            return {}
        return {
            argument: given.get(argument, getattr(self, loss.option(name, argument), default))
            for argument, default in loss.arguments.items()
        }

    @property
    def cosine_scale(self) -> float | None:
        """Scale of the cosine head that is requested, or that the classification loss needs; `None` for none."""
        if self.classification_loss == "ldam":
            return self.loss_arguments("classification_loss")["scale"]
        return (self.head_scale or HEAD_SCALE) if self.head == "cosine" else None

    @property
    def uses_step_decay(self) -> bool:
        """Whether the step-decay schedule replaces `lr_scheduler_type`."""
        return self.lr_step_epochs is not None

    def method_options_given(self) -> dict[str, Any]:
        """The options that choose a method and its losses; `None` for those that are left to the method."""
        return {name: None if name in self._left_to_method else getattr(self, name) for name in METHOD_OPTIONS}

    def set_anew(self, changes: Mapping[str, Any]) -> None:
        """Change options; those not set explicitly are taken from the method again.

        Raises:
            InputError: If a value is out of its range.
        """
        for name, value in {**dict.fromkeys(self._left_to_method), **changes}.items():
            setattr(self, name, value)
        self._apply_method()
        self._check()
        if self.global_batch_size is not None:
            self.gradient_accumulation_steps = changes.get("gradient_accumulation_steps", 1)
            self.gradient_accumulation_steps = find_accumulation(self)

    def _apply_method(self) -> None:
        """Fill in options that were not set explicitly from the preset."""
        require(self, self.method in METHODS, "method", f"one of {', '.join(METHODS)}")
        preset = METHODS[self.method].options()
        self._left_to_method = [name for name in preset if getattr(self, name) is None]
        for name in self._left_to_method:
            setattr(self, name, preset[name])
        for name, choices in _PARTS.items():
            require(self, getattr(self, name) in choices, name, f"one of {', '.join(choices)}")
        for name in ("class_balance_power", "logit_adjustment_tau"):
            with suppress(ValueError):  # a word; checked later
                setattr(self, name, float(getattr(self, name)))

    def _check(self) -> None:
        if self.adapter == "none":  # so that a command line can override a file
            self.adapter = None
        if vars(self)["fsdp"] in ("true", "True"):  # as written in a file
            self.__dict__["fsdp"] = True
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and not (name in _MAY_BE_FILES and not value.startswith("{")):
                try:
                    found = json.loads(value)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"--{name} {one_line(value, 80)} is no JSON: {one_line(error, 80)}.") from error
                require(self, isinstance(found, dict), name, "a JSON object")
                # transformers parses its own options, in which numbers may be quoted.
                setattr(self, name, value.strip() if name in TrainingArguments._VALID_DICT_FIELDS else found)
        check_together(self, method_defaults(self.method))


#: By option, which choices for which parts of the method use it; all choices use the options not listed here.
USED_BY = _find_users()
#: Options that choose a method and its losses.
METHOD_OPTIONS = ("method", *_PARTS, "classification_loss_args", "distillation_loss_args", *USED_BY)


def method_defaults(method: str) -> dict[str, Any]:
    """All options that choose a method and its losses, with their values if only `method` is given."""
    defaults = {f.name: f.default for f in fields(BKDConfig) if f.name in METHOD_OPTIONS}
    return {**defaults, **METHODS[method].options(), "method": method}


@contextmanager
def values_for_now(args: TrainingArguments, **values: Any) -> Iterator[None]:
    """Give options other values for a while, without a check."""
    before = {name: getattr(args, name) for name in values}
    try:
        vars(args).update(values)
        yield
    finally:
        vars(args).update(before)
