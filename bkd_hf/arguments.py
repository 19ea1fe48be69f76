"""The command line of `scripts/run_bkd.py`: three groups of options, and a YAML file below them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from .config import METHOD_OPTIONS, BKDConfig
from .data import PROFILES
from .errors import InputError
from .images import AUGMENTATIONS, CACHE_IMAGES
from .machine import PRECISIONS, default_precision
from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, check_shot_thresholds
from .models import cifar_resnet_depth
from .objective import METHODS, RECOMMENDED

#: The Hub's name for a licence that nobody has chosen.
UNKNOWN_LICENSE = "unknown"


@dataclass
class ModelArguments:
    """Which models are trained, and from what."""

    _argument_group_name: ClassVar[str] = "models"

    model_name_or_path: str = field(
        default="cifar-resnet-32",
        metadata={
            "help": "Student: a Hub id, a folder, or cifar-resnet-20|32|44|56|110 for fresh weights.",
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Teacher: a Hub id or a folder. Its classes are matched with those of the data by name; if it is "
            "for other classes, it is fine-tuned first. Not given, or cifar-resnet-…: a vanilla teacher (as the "
            "student, or of that depth) is trained first. A teacher trained here is kept in OUTPUT_DIR/teacher."
        },
    )
    teacher_label_map: str | None = field(
        default=None,
        metadata={"help": "JSON file for renamed classes: {name in the data: the teacher's name or number for it}."},
    )
    assume_label_order: bool = field(
        default=False,
        metadata={"help": "The outputs of a teacher without class names (LABEL_0, …) are in the data's order."},
    )
    allow_partial_teacher: bool = field(
        default=False, metadata={"help": "Go on if the teacher lacks some classes: these are not distilled."}
    )
    force_teacher: bool = field(
        default=False, metadata={"help": "Use a teacher that is no better than guessing on the evaluation images."}
    )
    force_distillation: bool = field(
        default=False,
        metadata={"help": "Distil even if the targets know the labels no more (they are looked at before training)."},
    )
    finetune_teacher: bool = field(
        default=False, metadata={"help": "Train the given teacher on the data first, whatever its head is for."}
    )
    image_size: int = field(default=32, metadata={"help": "Height and width in pixels for cifar-resnet-… models."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Revision of the student on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Hub token, if not stored by `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes with a Hub model."})
    precision: str = field(
        default="auto",
        metadata={
            "help": "fp32, bf16, fp16 (mixed precision), or auto: bf16 where the processor computes in it, else fp32. "
            "--bf16 and --fp16 win over auto."
        },
    )
    num_threads: int | None = field(
        default=None,
        metadata={"help": "CPU threads per process; by default the machine's cores divided among local processes."},
    )

    def __post_init__(self) -> None:
        if self.image_size < 8:
            raise InputError(f"--image_size must be at least 8, got {self.image_size}.")
        _check_choice("precision", self.precision, ("auto", *PRECISIONS))
        if self.num_threads is not None and self.num_threads < 1:
            raise InputError(f"--num_threads must be at least 1, got {self.num_threads}.")

    def read_teacher_label_map(self) -> dict[str, str | int]:
        """Content of `--teacher_label_map`; empty if it is not given."""
        if self.teacher_label_map is None:
            return {}
        path = self.teacher_label_map
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"--teacher_label_map {path} cannot be read: {error.strerror}.") from error
        except json.JSONDecodeError as error:
            raise InputError(f"--teacher_label_map {path} is no JSON: {error}.") from error
        if not isinstance(content, dict) or not all(type(value) in (str, int) for value in content.values()):
            raise InputError(
                f'--teacher_label_map {path}: expected {{"name in the data": "name (or number) of the teacher", …}}.'
            )
        return content

    def from_pretrained_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained` of teacher and student."""
        return {"cache_dir": self.cache_dir, "token": self.token, "trust_remote_code": self.trust_remote_code}


@dataclass
class DataArguments:
    """Which images are trained on, and how they are seen."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "A Hub id, a saved data set, a folder of class folders, parquet, or digits (needs no network)."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Found by its type if not given; a column of paths has to be named."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Found by its type or a usual name if not given."}
    )
    train_split_name: str | None = field(default=None, metadata={"help": "train, or the only split, if not given."})
    eval_split_name: str | None = field(
        default=None,
        metadata={
            "help": "Not given: the first of validation, val, test, …; without any, a fifth of each class is taken."
        },
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on about so many images, in proportion to the class counts."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on about so many images, in proportion to the class counts."}
    )
    imbalance_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Cut a long tail: images of the largest class per image of the smallest. Not given: the data set "
            "is used as it is."
        },
    )
    imbalance_profile: str = field(
        default="exp",
        metadata={"help": "Shape of the tail: exp (exponential), step (half head, half tail) or pareto (α = 6)."},
    )
    max_class_count: int | None = field(
        default=None, metadata={"help": "Images of the largest class of a cut tail; by default as many as possible."}
    )
    split_seed: int = field(
        default=0, metadata={"help": "Which images are kept; independent of --seed, so that seeds share a split."}
    )
    train_augmentation: str = field(
        default="auto",
        metadata={
            "help": f"{', '.join(AUGMENTATIONS)}; auto: pad_crop up to 64 pixels, random_resized_crop above.",
        },
    )
    horizontal_flip: bool = field(
        default=True, metadata={"help": "Mirror half of the training images; not for digits or letters."}
    )
    cache_images: str = field(
        default="auto",
        metadata={
            "help": "Keep decoded images: in memory, on disk (one file for all processes and later runs), none, or "
            "auto (in memory, or with several processes on disk, if they fit). Views are the same."
        },
    )
    reduced_decoding: bool = field(
        default=True,
        metadata={
            "help": "Decode JPEGs of the training at 1/2, 1/4 or 1/8 of their size where the crop needs no more."
        },
    )
    many_shot_threshold: int = field(
        default=MANY_SHOT_THRESHOLD, metadata={"help": "Classes with more training images are many-shot."}
    )
    few_shot_threshold: int = field(
        default=FEW_SHOT_THRESHOLD, metadata={"help": "Classes with fewer training images are few-shot."}
    )
    post_hoc_tau: float = field(
        default=1.0,
        metadata={"help": "τ of the post-hoc logit adjustment that is reported beside the plain numbers; 0: none."},
    )

    def __post_init__(self) -> None:
        ratio = self.imbalance_ratio
        if ratio is not None and not 1 <= ratio < float("inf"):
            raise InputError(f"--imbalance_ratio must be a finite number ≥ 1, got {ratio}.")
        _check_choice("imbalance_profile", self.imbalance_profile, PROFILES)
        _check_choice("train_augmentation", self.train_augmentation, ("auto", *AUGMENTATIONS))
        _check_choice("cache_images", self.cache_images, CACHE_IMAGES)
        for name in ("max_train_samples", "max_eval_samples", "max_class_count"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} must be at least 1, got {value}.")
        if not math.isfinite(self.post_hoc_tau):
            raise InputError(f"--post_hoc_tau must be a finite number, got {self.post_hoc_tau}.")
        check_shot_thresholds(self.many_shot_threshold, self.few_shot_threshold)


@dataclass
class PublishingArguments:
    """What goes to the Hub beside the student, and what its page says; where to is said by `--hub_model_id`."""

    _argument_group_name: ClassVar[str] = "publishing"

    hub_license: str = field(
        default=UNKNOWN_LICENSE, metadata={"help": "License of the student, as the Hub calls it: apache-2.0, mit, …"}
    )
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Id on the Hub of the training data, where it was read from a folder."}
    )
    push_teacher: bool = field(
        default=False,
        metadata={"help": "Also push a teacher that was trained here, to HUB_MODEL_ID-teacher."},
    )
    push_to_hub: bool = field(init=False, default=False)  # the option of TrainingArguments


@dataclass
class RunArguments:
    """Everything that a run is told.

    Attributes:
        model: Models.
        data: Data.
        training: Training of the student.
        teacher_training: Training of the teacher, where one is trained.
        publishing: What is published, and as what.
        overwrite: Whether an earlier run in the output folder is deleted.
        command_line: What was parsed.
    """

    model: ModelArguments
    data: DataArguments
    training: BKDConfig
    teacher_training: BKDConfig
    publishing: PublishingArguments = field(default_factory=PublishingArguments)
    overwrite: bool = False
    command_line: tuple[str, ...] | None = None


_TEACHER_PREFIX = "--teacher_"
_TEACHER_CACHE_OPTIONS = ("teacher_cache", "teacher_cache_views", "teacher_cache_dtype")
#: Options that the teacher's training shares with the student's, or that mean nothing to it.
NOT_FOR_TEACHER = {
    "output_dir", "bf16", "fp16", "use_cpu", "push_to_hub", "distillation_loss", "temperature", "distillation_weight",
    "deferred_reweighting_start", "class_balance_power", "student_init", "dive_temperature", "dive_alpha",
    "dive_power", "dkd_temperature", "dkd_alpha", "dkd_beta", "dkd_warmup_epochs", *_TEACHER_CACHE_OPTIONS,
}  # fmt: skip
#: Options of `TrainingArguments` that --help shows; --help_all shows the rest too.
_COMMON_TRAINING_OPTIONS = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "torch_compile", "activation_checkpointing", "seed",
    "data_seed", "logging_strategy", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "dataloader_num_workers", "disable_tqdm", "report_to", "use_cpu", "push_to_hub",
    "hub_model_id", "hub_private_repo", "hub_token", "hub_revision",
}  # fmt: skip
#: transformers' defaults are made for fine-tuning; from fresh weights they learn next to nothing.
_FRESH_WEIGHTS_DEFAULTS = {
    "optim": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 2e-4, "decay_all_parameters": True,
    "max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.025, "num_train_epochs": 200.0,
    "per_device_train_batch_size": 128, "per_device_eval_batch_size": 500,
}  # fmt: skip
#: As a number of workers: not said, so to be chosen by the images and the machine.
CHOOSE_WORKERS = -1
#: Where the script's policy differs from TrainingArguments': a run says what it does, and can be continued.
SCRIPT_DEFAULTS = {
    "logging_strategy": "epoch", "logging_nan_inf_filter": False, "save_strategy": "epoch", "save_total_limit": 1,
    "hub_strategy": "end", "dataloader_persistent_workers": True, "method": RECOMMENDED,
}  # fmt: skip
_OWN_HELP = {
    "output_dir": "Where everything is written; outputs/DATASET_MODEL_seedSEED if not given.",
    "push_to_hub": "Publish the finished student: weights, figures, results and a model card.",
    "hub_model_id": "Repository on the Hub, USER/NAME; the name of OUTPUT_DIR if not given.",
    "hub_token": "Token with write access, if not stored by `hf auth login` or in HF_TOKEN.",
    "hub_revision": "Branch to push to.",
    "hub_private_repo": "Make the repository private.",
    "dataloader_num_workers": "Processes that prepare the batches; 0: none, -1: as many as pay.",
    "use_cpu": "Use the CPU even if there is a GPU; set where there is none.",
}
_EPILOG = """\
Options for the teacher's training alone are written --teacher_OPTION, for any training option above, e.g.
--teacher_num_train_epochs 100 --teacher_learning_rate 0.05; not given, the teacher is trained as the student.

A YAML file given by --config holds the same options, one `name: value` a line, and those of the teacher in a section
`teacher:`. The command line wins over the file. Without --dataset_name and --config, the digits recipe runs. Without
--config and --optim, cifar-resnet-… models are trained by SGD (rate 0.1, cosine, 200 epochs, batch 128).
"""


def parse_arguments(argv: Sequence[str] | None = None, digits_recipe: Path | None = None) -> RunArguments:
    """Parse a command line, and the YAML file that it names.

    Args:
        argv: The command line without the program; `sys.argv[1:]` if not given.
        digits_recipe: YAML file to use for the embedded digits where `--config` is not given.

    Raises:
        InputError: If an option is unknown, or a value has the wrong type or is out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _build_parser(show_all="--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    command_line, command_line_teacher = _split_off_teacher(parser, argv)
    first_look = parser.parse_known_args(command_line)[0]
    config = first_look.config or (digits_recipe if first_look.dataset_name == "digits" else None)
    from_file, from_file_teacher = _read_config(parser, config) if config else ([], [])
    if (
        not config
        and first_look.optim == parser.get_default("optim")
        and cifar_resnet_depth(first_look.model_name_or_path)
    ):
        parser.set_defaults(**_FRESH_WEIGHTS_DEFAULTS)

    student = [*from_file, *command_line]
    namespace = parser.parse_args(student)
    _choose_precision(namespace, from_file, command_line)
    teacher_namespace = argparse.Namespace(**vars(namespace))
    for name in ("push_to_hub", "hub_model_id", *_TEACHER_CACHE_OPTIONS, *METHOD_OPTIONS):
        setattr(teacher_namespace, name, parser.get_default(name))
    teacher_namespace.method = METHODS[namespace.method].teacher if namespace.method in METHODS else "ce"
    parser.parse_args([*from_file_teacher, *command_line_teacher], namespace=teacher_namespace)
    if namespace.output_dir is None:
        model, dataset = (Path(name).name for name in (namespace.model_name_or_path, namespace.dataset_name))
        namespace.output_dir = f"outputs/{dataset}_{model}_seed{namespace.seed}"
    teacher_namespace.output_dir = f"{namespace.output_dir}/teacher"
    if teacher_namespace.method in METHODS and METHODS[teacher_namespace.method].distillation_loss != "none":
        raise InputError(f"--teacher_method {teacher_namespace.method}: a teacher is trained without a teacher.")
    publishing = _build(PublishingArguments, namespace)
    # A run publishes what it has measured, at its end; Trainer would at every save.
    publishing.push_to_hub, namespace.push_to_hub = namespace.push_to_hub, False
    try:
        return RunArguments(
            model=_build(ModelArguments, namespace),
            data=_build(DataArguments, namespace),
            training=_build(BKDConfig, namespace),
            teacher_training=_build(BKDConfig, teacher_namespace),
            publishing=publishing,
            overwrite=namespace.overwrite,
            command_line=tuple(argv),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _choose_precision(namespace: argparse.Namespace, from_file: Sequence[str], command_line: Sequence[str]) -> None:
    """Set bf16 and fp16 as --precision says; given themselves, they win over auto and over a file's precision."""

    def told(names: Sequence[str], tokens: Sequence[str]) -> list[str]:
        return [name for name in names if any(re.fullmatch(f"--{name}(=.*)?", token) for token in tokens)]

    flags = ("bf16", "fp16")
    overrides_file = told(flags, command_line) and not told(["precision"], command_line)
    given = told(flags, [*from_file, *command_line])
    if overrides_file or (given and namespace.precision == "auto"):
        return
    precision = default_precision(namespace.use_cpu) if namespace.precision == "auto" else namespace.precision
    for name in given:
        if getattr(namespace, name) != (name == precision):
            raise InputError(f"--precision {precision} and --{name} contradict each other: leave one out.")
    namespace.bf16, namespace.fp16 = precision == "bf16", precision == "fp16"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=40, width=118)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS) or action.nargs == 0:
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # One spelling; argparse would repeat the type for --a_b, --a-b and each alias.
        options = [option for option in action.option_strings if "-" not in option.lstrip("-")]
        value = "" if action.nargs == 0 else " " + self._format_args(action, _type_name(action))
        return ", ".join(options or action.option_strings) + value


def _type_name(action: argparse.Action) -> str:
    name = getattr(action.type, "__name__", "str")
    return {"string_to_bool": "BOOL", "<lambda>": "NAME"}.get(name, name.upper())


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        suggestion = ""
        if match := re.search(r"unrecognized arguments: --(\w+)", message):
            known = [option.removeprefix("--") for option in self._option_string_actions]
            suggestion = _suggestion(match[1], known).replace("mean ", "mean --")
        raise InputError(f"{message} (--help lists the options).{suggestion}")


class _YamlLoader(yaml.SafeLoader):
    """Reads 2e-4 as a number, which PyYAML, by the rules of YAML 1.1, takes for a string."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _build_parser(show_all: bool = False) -> _Parser:
    parser = _Parser(
        [ModelArguments, DataArguments, PublishingArguments, BKDConfig],
        description="Train a balanced student on long-tailed images by Balanced Knowledge Distillation.",
        epilog=_EPILOG,
        usage="accelerate launch scripts/run_bkd.py [--config FILE] [--OPTION VALUE …]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--config", help="YAML file with options.")
    run.add_argument("--overwrite", action="store_true", help="Delete an earlier run in OUTPUT_DIR and start anew.")
    run.add_argument("-h", "--help", action="help", help="Show the usual options.")
    run.add_argument("--help_all", action="store_true", help="Show all options of TrainingArguments too.")
    parser.set_defaults(
        output_dir=None,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_num_workers=CHOOSE_WORKERS,
        **SCRIPT_DEFAULTS,
    )
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    own_group = parser.add_argument_group("method and optimisation")
    training_group = parser.add_argument_group("training (transformers.TrainingArguments)")
    own_fields = {f.name for f in dataclasses.fields(BKDConfig)} - inherited
    for action in parser._optionals._group_actions:
        if action.choices is not None and len(",".join(map(str, action.choices))) > 40:
            action.metavar = "NAME"
        action.help = _OWN_HELP.get(action.dest, action.help)
        if action.dest in own_fields:
            own_group._group_actions.append(action)
        elif action.dest in inherited:
            if not (show_all or action.dest in _COMMON_TRAINING_OPTIONS):
                action.help = argparse.SUPPRESS
            training_group._group_actions.append(action)
    parser._optionals._group_actions.clear()
    return parser


def _build(cls: type, namespace: argparse.Namespace) -> Any:
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    return cls(**{name: value for name, value in vars(namespace).items() if name in names})


def _split_off_teacher(parser: _Parser, argv: list[str]) -> tuple[list[str], list[str]]:
    """Separate `--teacher_OPTION value…` from the rest, as `--OPTION value…`."""
    rest: list[str] = []
    teacher: list[str] = []
    target = rest
    for token in argv:
        if token.startswith("--"):
            option = token.split("=")[0]
            is_teacher = (
                option.replace("-", "_").startswith(_TEACHER_PREFIX.replace("-", "_"))
                and option not in parser._option_string_actions
            )
            target = teacher if is_teacher else rest
            if is_teacher:
                _check_teacher_option(parser, option[len(_TEACHER_PREFIX) :], option)
                token = "--" + token[len(_TEACHER_PREFIX) :]
        target.append(token)
    return rest, teacher


def _check_teacher_option(parser: _Parser, name: str, shown: str) -> None:
    action = parser._option_string_actions.get(f"--{name}")
    training_options = {f.name for f in dataclasses.fields(BKDConfig)}
    if action is None or action.dest not in training_options:
        raise InputError(
            f"{shown}: there is no training option --{name}.{_suggestion(name, sorted(training_options))}"
        )
    if action.dest in NOT_FOR_TEACHER:
        raise InputError(f"{shown}: --{name} cannot be set for the teacher alone.")


def _read_config(parser: _Parser, path: str | Path) -> tuple[list[str], list[str]]:
    """Return the options in a YAML file as command-line tokens, of the student and of the teacher.

    So one parser gives every value its type, whether it was written in a file or on the command line.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_YamlLoader)
    except OSError as error:
        raise InputError(f"--config {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected lines of the form `option: value`.")
    content = dict(content)
    teacher = content.pop("teacher", None) or {}
    if not isinstance(teacher, dict):
        raise InputError(f"--config {path}: the section `teacher:` must hold lines of the form `option: value`.")
    model = teacher.pop("model_name_or_path", None)
    if model is not None:
        content["teacher_model_name_or_path"] = model
    for name in teacher:
        _check_teacher_option(parser, name, f"--config {path}, section teacher, {name}")
    return (
        [token for name, value in content.items() for token in _tokens(parser, path, name, value)],
        [token for name, value in teacher.items() for token in _tokens(parser, path, name, value)],
    )


def _tokens(parser: _Parser, path: str | Path, name: Any, value: Any) -> list[str]:
    action = parser._option_string_actions.get(f"--{name}")
    if action is None or name in ("config", "help", "help_all", "overwrite"):
        known = [option.removeprefix("--") for option in parser._option_string_actions]
        raise InputError(f"--config {path}: unknown option {name!r}.{_suggestion(str(name), known)}")
    if value is None:
        return []
    is_list_option = action.nargs in ("+", "*")
    if isinstance(value, (list, dict)) and not (isinstance(value, list) and is_list_option):
        if not (isinstance(value, dict) and name in BKDConfig._VALID_DICT_FIELDS):
            raise InputError(f"--config {path}: {name} takes a single value, got {value!r}.")
        value = json.dumps(value)
    values = value if isinstance(value, list) else [value]
    tokens = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    try:
        # "--name=value", so that a value may begin with a dash.
        parser.parse_known_args([f"--{name}", *tokens] if is_list_option else [f"--{name}={tokens[0]}"])
    except InputError as error:
        raise InputError(f"--config {path}: {name}: {value!r} is not valid there: {error}") from error
    return [f"--{name}", *tokens] if is_list_option else [f"--{name}={tokens[0]}"]


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"--{name} must be one of {', '.join(choices)}, got {value!r}.")
