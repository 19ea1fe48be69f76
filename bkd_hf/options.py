"""The options of a run and of its teacher, and their roles.

The options of the training itself are those of [`BKDConfig`].
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

from .augmentations import AUGMENTATIONS
from .compatibility import check_streaming
from .config import METHOD_OPTIONS, UNTOLD, BKDConfig, option
from .data import PROFILES
from .errors import InputError
from .images import CACHE_IMAGES
from .machine import (
    PRECISIONS,
    launcher_accumulation,
    launcher_compiler,
    launcher_precision,
    options_alone,
    precision_of,
)
from .methods import METHODS
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, check_shot_thresholds
from .models import FRESH_IMAGE_SIZE, bert_shape, cifar_resnet_depth
from .operations import OPERATIONS
from .ranges import check_choice, check_ranges, defaults_of, explain
from .tasks import DEFAULT_TASK, TASKS, check_task, fresh_task

#: The Hub's name for an unspecified licence.
UNKNOWN_LICENSE = "unknown"


# ---- The options --------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which models are trained, and from what."""

    _argument_group_name: ClassVar[str] = "models"

    model_name_or_path: str = option(
        "cifar-resnet-32",
        "Student: a Hub id, a folder, or cifar-resnet-8|20|32|44|56|110 (texts: bert-LAYERSxWIDTH) for fresh weights.",
    )
    teacher_model_name_or_path: Annotated[str | None, "student"] = option(
        None,
        "Teacher: a Hub id or a folder. Its classes are matched with those of the data by name; if it is for other "
        "classes, it is fine-tuned first. Not given, or cifar-resnet-…, bert-…: a vanilla teacher (as the student, or "
        "of that size) is trained first. A teacher trained here is kept in OUTPUT_DIR/teacher.",
    )
    teacher_label_map: Annotated[str | None, "path", "student"] = option(
        None, "JSON file for renamed classes: {name in the data: the teacher's name or number for it}."
    )
    assume_label_order: Annotated[bool, "student"] = option(
        False, "The outputs of a teacher without class names (LABEL_0, …) are in the data's order."
    )
    allow_partial_teacher: Annotated[bool, "student"] = option(
        False, "Allow a teacher that lacks some classes; these are learned from the labels alone."
    )
    force_teacher: Annotated[bool, "student"] = option(
        False, "Use a teacher that is no better than guessing on the evaluation images."
    )
    force_distillation: Annotated[bool, "permission", "student"] = option(
        False, "Distil even if the check before training finds that the targets no longer match the labels."
    )
    finetune_teacher: Annotated[bool, "student"] = option(
        False, "Train the given teacher on the data first, even if its classes match."
    )
    image_size: Annotated[int | None, "image"] = option(
        None,
        "Height and width in pixels. Not given: 32 for cifar-resnet-… models, for others the size of their image "
        "processor; other sizes are for models that accept any.",
    )
    cache_dir: Annotated[str | None, "path", "machine", "shared"] = option(None, "Where downloads are kept.")
    model_revision: str = option("main", "Revision of the student on the Hub.")
    token: Annotated[str | None, "secret"] = option(None, "Hub token, if not stored by `hf auth login`.")
    trust_remote_code: bool = option(False, "Run model code that comes with a Hub model.")
    precision: Annotated[str, "shared"] = option(
        "auto",
        "fp32, bf16, fp16 (mixed precision), or auto: bf16 on GPUs that support it, and on CPUs that support it and "
        "train the student at least a tenth faster in a short measurement; else fp32. --bf16 and --fp16 win over "
        "auto.",
    )
    num_threads: Annotated[int | None, "machine", "shared"] = option(
        None, "CPU threads per process; by default the machine's cores divided among local processes."
    )
    task: Annotated[str, "shared"] = option(DEFAULT_TASK, "What is classified: image, or text.")
    max_length: Annotated[int | None, "text"] = option(
        None, "Longer texts are cut after so many tokens. Not given: 512, or as many as the model accepts."
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("task", self.task, tuple(TASKS))
        check_choice("precision", self.precision, ("auto", *PRECISIONS))
        is_cifar_resnet = cifar_resnet_depth(self.model_name_or_path) is not None
        bert_shape(self.model_name_or_path)  # raises for an invalid shape
        if self.image_size is None and is_cifar_resnet:
            self.image_size = FRESH_IMAGE_SIZE

    @property
    def given_teacher(self) -> str | None:
        """Name of a teacher that already has weights; `None` for one trained from fresh weights."""
        name = self.teacher_model_name_or_path
        return None if name is None or fresh_task(name) is not None else name

    def from_pretrained_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for loading the model or its processor: those of `from_pretrained`, and the task."""
        names = ("cache_dir", "token", "trust_remote_code", "task")
        return {**{name: getattr(self, name) for name in names}, "revision": self.model_revision}


@dataclass
class DataArguments:
    """Which images or texts are used, and how they are processed."""

    _argument_group_name: ClassVar[str] = "data"
    _roles_of_all: ClassVar = ("shared",)  # teacher and student are trained on the same images

    dataset_name: str = option(
        "digits",
        "A Hub id, a saved data set, a folder of class folders, parquet, or digits (needs no network); CSV and JSON "
        "of texts, or docstrings.",
    )
    dataset_config_name: str | None = option(None, "Configuration of a data set that has several.")
    image_column_name: Annotated[str | None, "image"] = option(
        None, "Column of the images; found by its type if not given. A column of paths must be named."
    )
    label_column_name: str | None = option(
        None, "Column of the labels; found by its type or a usual name if not given."
    )
    train_split_name: str | None = option(None, "Split to train on; train, or the only split, if not given.")
    eval_split_name: str | None = option(
        None,
        "Split to evaluate on. Not given: the first of validation, val, test, …; without any, a fifth of each class "
        "is held out.",
    )
    max_train_samples: int | None = option(None, "Train on about so many images, in proportion to the class counts.")
    max_eval_samples: int | None = option(None, "Evaluate on about so many images, in proportion to the class counts.")
    imbalance_ratio: float | None = option(
        None,
        "Make the training set long-tailed: images of the largest class per image of the smallest. Not given: the "
        "data set is used as it is.",
    )
    imbalance_profile: str = option(
        "exp", "Shape of the tail: exp (exponential), step (half head, half tail) or pareto (α = 6)."
    )
    max_class_count: int | None = option(
        None, "With --imbalance_ratio: images of the largest class; by default as many as possible."
    )
    split_seed: int = option(
        0, "Seed of the choice of images; independent of --seed, so that all seeds share a split."
    )
    train_augmentation: Annotated[str, "image"] = option(
        "auto", f"{', '.join(AUGMENTATIONS)}; auto: pad_crop up to 64 pixels, random_resized_crop above."
    )
    train_operations: Annotated[list[str] | None, "image"] = option(
        None,
        f"Applied to the pixels of each view, in this order: {', '.join(OPERATIONS)}. Not given, or none: nothing. "
        "Long-tail recipes for CIFAR use: autoaugment cutout.",
    )
    streaming: Annotated[bool, "image"] = option(
        False,
        "Stream the training images from shards (parquet or webdataset), in a folder or on the Hub "
        "(bkd_hf/streams.py). Needs --class_counts and --max_steps; options that need random access "
        "to the images are refused.",
    )
    class_counts: Annotated[str | None, "path", "image"] = option(
        None, "With --streaming: JSON, {name or number of a class: its images}; bkd-hf split --count_only makes it."
    )
    shuffle_buffer_size: Annotated[int, "image"] = option(
        10_000,
        "With --streaming: number of undecoded images in the shuffle buffers of all processes and workers together.",
    )
    horizontal_flip: Annotated[bool, "image"] = option(
        True, "Mirror half of the training images; not for digits or letters."
    )
    cache_images: Annotated[str, "machine", "image"] = option(
        "auto",
        "Where decoded images are kept: memory, disk (one file for all processes and later runs), none, or auto "
        "(memory, or disk with several processes, if they fit). The result does not depend on it.",
    )
    reduced_decoding: Annotated[bool, "image"] = option(
        True, "Decode training JPEGs at 1/2, 1/4 or 1/8 of their size where the crop needs no more pixels."
    )
    many_shot_threshold: int = option(MANY_SHOT_THRESHOLD, "Classes with more training images are many-shot.")
    few_shot_threshold: int = option(FEW_SHOT_THRESHOLD, "Classes with fewer training images are few-shot.")
    post_hoc_tau: float = option(
        1.0, "τ of the post-hoc logit adjustment that is reported beside the plain numbers; 0: none."
    )
    text_column_name: Annotated[str | None, "text"] = option(
        None, "Column of the texts. Not given: the only text column beside the labels, or text, sentence, …"
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("imbalance_profile", self.imbalance_profile, PROFILES)
        check_choice("train_augmentation", self.train_augmentation, ("auto", *AUGMENTATIONS))
        if self.train_operations == ["none"]:  # so that a command line can override a file
            self.train_operations = None
        for name in self.train_operations or ():
            check_choice("train_operations", name, tuple(OPERATIONS))
        check_choice("cache_images", self.cache_images, CACHE_IMAGES)
        try:
            check_shot_thresholds(self.many_shot_threshold, self.few_shot_threshold)
        except ValueError as error:
            raise InputError(str(error)) from error


@dataclass
class PublishingArguments:
    """What is published beside the student, and what its card says; `--hub_model_id` names the repository."""

    _argument_group_name: ClassVar[str] = "publishing"
    _roles_of_all: ClassVar = ("publishing",)

    hub_license: str = option(UNKNOWN_LICENSE, "License of the student, as the Hub calls it: apache-2.0, mit, …")
    hub_dataset_id: str | None = option(None, "Id on the Hub of the training data, where it was read from a folder.")
    push_teacher: bool = option(False, "Also push a teacher that was trained here, to HUB_MODEL_ID-teacher.")
    export: str = option(
        "none", "onnx: the student without torch, in OUTPUT_DIR/onnx, in fp32 and int8, checked and timed on this CPU."
    )
    push_to_hub: bool = field(init=False, default=False)  # the option of TrainingArguments

    def __post_init__(self) -> None:
        check_choice("export", self.export, ("none", "onnx"))


# ---- Their roles --------------------------------------------------------------------------------------------------

# Roles of options that do more (or less) than influence the result:
#   student     has no meaning for a teacher         shared      the same for teacher and student
#   secret      never leaves this machine            path        a local path: its folders are never published
#   machine     how this machine does the work       reporting   what is printed and saved
#   publishing  what goes to the Hub, and where      permission  allows a run to continue, and changes nothing in it
#   place       where the work is done; may change the last digits, but does not matter to others
#   image, text has no meaning for another task
# bkd_hf's own options have their roles in the annotation (HfArgumentParser passes a field's metadata to argparse).
_INHERITED_ROLES = {
    "secret": "hub_token",
    "path": "output_dir run_name deepspeed",
    "machine": "output_dir dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context local_rank ddp_backend ddp_timeout",
    "reporting": "disable_tqdm log_level log_level_replica log_on_each_node report_to run_name project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id save_total_limit skip_memory_metrics debug do_eval "
    "do_train do_predict resume_from_checkpoint enable_jit_checkpoint",
    "publishing": "push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision project "
    "trackio_space_id trackio_bucket_id trackio_static_space_id",
    "place": "use_cpu accelerator_config gradient_checkpointing",
    "shared": "output_dir use_cpu bf16 fp16",
}


_KINDS = (ModelArguments, DataArguments, PublishingArguments, BKDConfig)
_DEFAULTS = {name: default for kind in _KINDS for name, default in defaults_of(kind).items()}
_ROLES: dict[str, set[str]] = {name: set() for name in _DEFAULTS}
for _kind in _KINDS:
    for _name, _hint in get_type_hints(_kind, include_extras=True).items():
        if _name in _ROLES:
            _ROLES[_name] |= {*getattr(_hint, "__metadata__", ()), *getattr(_kind, "_roles_of_all", ())}
for _role, _names in _INHERITED_ROLES.items():
    for _name in _names.split():
        _ROLES[_name].add(_role)


def options_with(*roles: str) -> set[str]:
    """Return the names of the options with one of these roles."""
    return {name for name, own in _ROLES.items() if own.intersection(roles)}


#: All options of a run.
OPTIONS = frozenset(_ROLES)
#: Options that do not influence the result; they may differ when a run is continued.
WITHOUT_INFLUENCE = options_with("secret", "machine", "reporting", "publishing", "permission")
#: Options about which teacher is used, and how; without a teacher they have no effect.
ABOUT_TEACHER = options_with("student").intersection(field.name for field in dataclasses.fields(ModelArguments))
#: Options that cannot be set separately for the teacher.
NOT_FOR_TEACHER = options_with("student", "shared", "secret", "publishing")


# ---- A run --------------------------------------------------------------------------------------------------------


@dataclass
class RunArguments:
    """All arguments of a run.

    Attributes:
        options: All options by name.
        teacher_options: Options given for the teacher alone, by name; only those that make a difference.
        overwrite: Whether an earlier run in the output folder is deleted.
        command_line: What was parsed.
        is_teacher: Whether this run trains a teacher, within the run of its student.
        measures_precision: Whether the precision is still to be measured (see `bkd_hf.precision`).
        precision_rates: Images per second in each precision, if measured.
        from_recipe: Options given only by a file, those of the teacher with `teacher_`. As one recipe serves many
            runs, there is no warning if they have no effect.
        model, data, training, publishing: The same options by group.

    Raises:
        InputError: If a value is out of its range.
    """

    options: dict[str, Any] = field(repr=False)  # may contain tokens
    teacher_options: dict[str, Any] = field(default_factory=dict)
    overwrite: bool = False
    command_line: tuple[str, ...] | None = None
    is_teacher: bool = False
    from_recipe: frozenset[str] = frozenset()
    measures_precision: bool = False
    precision_rates: dict[str, float] | None = None
    model: ModelArguments = field(init=False)
    data: DataArguments = field(init=False)
    training: BKDConfig = field(init=False)
    publishing: PublishingArguments = field(init=False)

    def __post_init__(self) -> None:
        for name, value in self.options.items():
            if value == "" and _DEFAULTS.get(name, "") != "":
                raise InputError(f"--{name} is empty: give a value, or leave it out.")
        self.model = _build(ModelArguments, self.options)
        self.data = _build(DataArguments, self.options)
        before = UNTOLD.set(self.from_recipe)
        try:
            with _recorded() as caught:
                self.training = _build_training(self.options)
        finally:
            UNTOLD.reset(before)
        self._told = {str(each.message) for each in caught}
        for each in caught:
            warnings.warn(each.message, each.category, stacklevel=4)
        self.publishing = _build(PublishingArguments, self.options)
        self.publishing.push_to_hub = self.options["push_to_hub"]
        has_cosine_head = self.training.cosine_scale is not None
        check_task(self.model.task, self.options, _DEFAULTS, options_with, has_cosine_head)
        if self.data.streaming:
            check_streaming(self.options, self.training)
        same = self._options_of_teacher()
        self.teacher_options = {name: value for name, value in self.teacher_options.items() if value != same[name]}
        self._teacher: RunArguments | None = None
        self._of_launcher = launcher_precision(), launcher_compiler(), launcher_accumulation()

    @classmethod
    def from_record(cls, record: dict[str, Any], output_dir: str) -> RunArguments:
        """Return a run's options about models and data, from the record in its folder (`bkd_run.json`)."""
        told = {**record.get("model", {}), **record.get("data", {}), "output_dir": output_dir, "use_cpu": True}
        if told.get("streaming"):
            raise InputError(f"{output_dir}: the images of this run were streamed, so they are not at hand here.")
        of_teacher = {name: value for name, value in record.get("teacher_training", {}).items() if name in told}
        return cls({**_DEFAULTS, **{name: value for name, value in told.items() if name in _DEFAULTS}}, of_teacher)

    @property
    def distils(self) -> bool:
        """Whether the method has a teacher."""
        return self.training.distillation_loss != "none"

    @property
    def repo_id(self) -> str:
        """Id of the model on the Hub."""
        return self.training.hub_model_id or Path(self.training.output_dir).absolute().name

    @property
    def with_teacher(self) -> list[RunArguments]:
        """These arguments, and those of the teacher's run if the method has one."""
        return [self, self.for_teacher()] if self.distils else [self]

    def are_told(self, *names: str) -> bool:
        """Whether the command line or its recipe gives one of these options."""
        words = {word.partition("=")[0].replace("-", "_") for word in self.command_line or ()}
        return any(name in self.from_recipe or f"__{name}" in words for name in names)

    def for_teacher(self) -> RunArguments:
        """Return the arguments of the teacher's run: the same, with its own method and the options given for it alone.

        Raises:
            InputError: If a value is out of its range, or the teacher would need a teacher itself.
        """
        if self._teacher is None:
            with self.naming_teacher_options():
                options = {**self._options_of_teacher(), **self.teacher_options}
                from_recipe = self.from_recipe | {name.removeprefix("teacher_") for name in self.from_recipe}
                self._teacher = RunArguments(options, is_teacher=True, from_recipe=from_recipe)
            if self._teacher.distils:
                method = self._teacher.training.method
                raise InputError(f"--teacher_method {method}: a teacher is trained without a teacher.")
        return self._teacher

    @contextmanager
    def naming_teacher_options(self) -> Iterator[None]:
        """Have errors and warnings about the teacher name the options that are for it alone.

        The student accepts its options. What they, or those given for the teacher, lack for it can be given for it.
        """

        def named(text: str, names: Collection[str]) -> str:
            return re.sub(r"--([a-z]\w*)", lambda found: f"--{'teacher_' * (found[1] in names)}{found[1]}", text)

        with _recorded() as caught:
            try:
                yield
            except InputError as error:
                raise InputError(named(str(error), OPTIONS - NOT_FOR_TEACHER)) from error
        for each in caught:
            if str(each.message) not in self._told:  # of the student
                warnings.warn(named(str(each.message), self.teacher_options), each.category, stacklevel=3)

    def _options_of_teacher(self) -> dict[str, Any]:
        """Options of the teacher if nothing is given for it alone."""
        options = {**self.options, **{name: _DEFAULTS[name] for name in (*options_with("student"), *METHOD_OPTIONS)}}
        if self.model.teacher_model_name_or_path is not None:
            options["model_name_or_path"] = self.model.teacher_model_name_or_path
            options["model_revision"] = _DEFAULTS["model_revision"]
            if self.model.given_teacher is not None:
                options["image_size"] = _DEFAULTS["image_size"]
        return {
            **options,
            "method": METHODS[self.training.method].teacher,
            "output_dir": f"{self.training.output_dir}/teacher",
            "run_name": self.training.run_name and f"{self.training.run_name}/teacher",
            "hub_model_id": f"{self.repo_id}-teacher",
            "push_to_hub": False,
        }

    @property
    def model_options_of_teacher(self) -> dict[str, Any]:
        """The options about models that were given for the teacher alone."""
        names = {field.name for field in dataclasses.fields(ModelArguments)}
        return {name: value for name, value in self.teacher_options.items() if name in names}

    def options_without_effect(self) -> dict[str, str]:
        """Return, by option, why a given option has no effect."""
        model, method = self.model, self.training.method
        of_given = ["teacher_label_map", "assume_label_order", "allow_partial_teacher", "force_teacher"]
        found: dict[str, str] = {}

        def add(holds: bool, names: list[str], why: str) -> None:
            found.update({name: why for name in names if holds and self.options[name] != _DEFAULTS[name]})

        precision, backend, steps = self._of_launcher
        if precision not in (None, precision_of(self.training)):
            found[f"mixed_precision {precision} of the launcher"] = f"--precision is {precision_of(self.training)}"
        if backend is not None and not self.training.torch_compile:
            found[f"dynamo_backend {backend} of the launcher"] = "--torch_compile is false"
        if steps not in (None, str(self.training.gradient_accumulation_steps)):
            found[f"gradient_accumulation_steps {steps} of the launcher"] = "give it after the name of the script"
        by_itself = "a run trains and evaluates, and continues from its last checkpoint, by itself"
        add(True, ["resume_from_checkpoint", "do_train", "do_predict"], by_itself)
        add(not self.publishing.push_to_hub, ["push_teacher"], "--push_to_hub is not given")
        tail = "it shapes a tail that is cut by --imbalance_ratio, which is not given"
        add(self.data.imbalance_ratio is None, ["imbalance_profile", "max_class_count"], tail)
        streamed = "it belongs to --streaming"
        add(not self.data.streaming, ["class_counts", "shuffle_buffer_size"], streamed)
        add(self.data.train_augmentation == "none", ["horizontal_flip"], "--train_augmentation is none")
        head = "--finetune_teacher gives the teacher a head for the classes of the data"
        add(model.finetune_teacher, of_given, head)
        given = "it is about a teacher given by --teacher_model_name_or_path"
        add(model.given_teacher is None, [*of_given, "finetune_teacher"], given)
        if not self.distils:
            no_teacher = f"--method {method} has no distillation loss"
            add(True, ["teacher_model_name_or_path"], no_teacher)
            found |= {f"teacher_{name}": no_teacher for name in self.teacher_options}
        return {name: why for name, why in found.items() if name not in self.from_recipe}


@contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    """Record all warnings, instead of showing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def _build(cls: type, options: dict[str, Any]) -> Any:
    return cls(**{f.name: options[f.name] for f in dataclasses.fields(cls) if f.init})


def _build_training(options: dict[str, Any]) -> BKDConfig:
    """Create the options of a training. They already include, or override, the launcher's settings."""

    def build(options: dict[str, Any]) -> BKDConfig:
        with options_alone():
            # A run publishes its results once, at the end; Trainer would push at every save.
            return _build(BKDConfig, {**options, "push_to_hub": False})

    try:
        return build(options)
    except Exception as error:  # transformers and accelerate may raise any exception
        raise explain(error, options, _DEFAULTS, build) from error
