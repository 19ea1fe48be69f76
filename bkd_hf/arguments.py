"""The command line of `bkd-hf run`: groups of options, and a YAML file below them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from .config import BKDConfig
from .errors import InputError
from .machine import PRECISIONS, default_precision, launcher_compiler, launcher_precision, launcher_shards
from .methods import RECOMMENDED
from .options import (
    NOT_FOR_TEACHER,
    OPTIONS,
    DataArguments,
    ModelArguments,
    PublishingArguments,
    RunArguments,
)
from .program import program
from .reading import read_option_file
from .run_folder import precision_begun_in
from .sources import DEMOS
from .tasks import fresh_task
from .text import one_line, suggestion

#: The recipes of the package, by their names for --config.
RECIPES = {path.stem: path for path in sorted(Path(__file__).with_name("recipes").glob("*.yaml"))}
DIGITS_RECIPE = RECIPES["digits"]

_TEACHER_PREFIX = "--teacher_"
_NULL = "tag:yaml.org,2002:null"
#: Options of `TrainingArguments` in --help; --help_all shows all.
_COMMON_TRAINING_OPTIONS = {
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim",
    "max_grad_norm", "label_smoothing_factor", "bf16", "fp16", "torch_compile", "activation_checkpointing", "seed",
    "data_seed", "logging_strategy", "logging_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps",
    "save_total_limit", "enable_jit_checkpoint", "dataloader_num_workers", "disable_tqdm", "report_to", "use_cpu",
    "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token", "hub_revision",
}  # fmt: skip
#: By task: transformers' defaults are for fine-tuning; with fresh weights, models learn almost nothing with them.
_FRESH_WEIGHTS_DEFAULTS = {
    "image": {
        "optim": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 2e-4, "decay_all_parameters": True,
        "max_grad_norm": 0.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.025, "num_train_epochs": 200.0,
        "per_device_train_batch_size": 128, "per_device_eval_batch_size": 500,
    },
    "text": {
        "learning_rate": 2e-3, "weight_decay": 0.01, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
        "num_train_epochs": 20.0, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 200,
    },
}  # fmt: skip
_SCHEDULE = ("lr_scheduler_type", "warmup_steps")
_FRESH_TEXT_MODEL = "bert-2x128"
#: Number of workers that stands for "not given": the images and the machine decide.
CHOOSE_WORKERS = -1
#: Defaults of the script that differ from TrainingArguments': a run reports its progress, and can be continued.
SCRIPT_DEFAULTS = {
    "logging_strategy": "epoch", "logging_nan_inf_filter": False, "save_strategy": "epoch", "save_total_limit": 1,
    "hub_strategy": "end", "dataloader_persistent_workers": True, "method": RECOMMENDED,
    "enable_jit_checkpoint": True,
}  # fmt: skip
_OWN_HELP = {
    "output_dir": "Where everything is written; outputs/DATASET_MODEL_seedSEED if not given.",
    "push_to_hub": "Publish the finished student: weights, figures, results and a model card.",
    "hub_model_id": "Repository on the Hub, USER/NAME; the name of OUTPUT_DIR if not given.",
    "hub_token": "Token with write access, if not stored by `hf auth login` or in HF_TOKEN.",
    "hub_revision": "Branch to push to.",
    "hub_private_repo": "Make the repository private.",
    "enable_jit_checkpoint": "At SIGTERM (SLURM: --signal=TERM@120; Kubernetes: terminationGracePeriodSeconds) save a "
    "checkpoint after the step, or at once where there is none, and end with exit code 75 (accelerate launch and "
    "torchrun then: 1): the same command continues. From Python it is off by default, as it ends the process.",
    "dataloader_num_workers": "Processes that prepare the batches; 0: none, -1: as many as speed it up.",
    "use_cpu": "Use the CPU even if there is a GPU; set where there is none.",
}
_EPILOG = """\
Options for the teacher's training alone are written --teacher_OPTION, for any training option above, e.g.
--teacher_num_train_epochs 100 --teacher_learning_rate 0.05; not given, the teacher is trained as the student.

A YAML file given by --config holds the same options, one `name: value` a line, and those of the teacher in a section
`teacher:`. The command line wins over the file. Without --dataset_name and --config, the digits recipe runs, or with
--task text the text recipe, on docstrings. Where neither the file nor the command line has --optim, cifar-resnet-…
models are trained by SGD (rate 0.1, cosine, 200 epochs, batch 128), and bert-… by AdamW (rate 2e-3, cosine, 20 epochs,
batch 32); of texts the default model is bert-2x128. If only one of student and teacher has fresh weights, each gets
the defaults of its kind, unless --optim or --learning_rate is given for both.
"""


def parse_arguments(argv: Sequence[str] | None = None, digits_recipe: Path | None = None) -> RunArguments:
    """Parse a command line, and the YAML file that it names.

    Args:
        argv: The command line without the program; `sys.argv[1:]` if not given.
        digits_recipe: YAML file for the embedded digits if `--config` is not given.

    Raises:
        InputError: If an option is unknown, or a value has the wrong type or is out of its range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):  # it would join the last list of a recipe
        raise InputError(f"{argv[0]}: options begin with --. A recipe, a YAML file, is given by --config FILE.")
    parser = _build_parser(show_all="--help_all" in argv)
    if "--help_all" in argv:
        parser.print_help()
        raise SystemExit(0)
    command_line, for_teacher = _split_off_teacher(parser, argv)
    first_look = parser.parse_known_args(command_line)[0]
    config = first_look.config and _find_recipe(first_look.config)
    if config is None and "dataset_name" not in _names(parser, command_line) and first_look.task == "text":
        config = RECIPES["text"]
    elif config is None and first_look.dataset_name in DEMOS:
        config = {"digits": digits_recipe, "docstrings": RECIPES["text"]}[first_look.dataset_name]
    from_file: list[str] = []
    from_file_for_teacher: list[str] = []
    if config is not None:
        from_file, from_file_for_teacher = _split_off_teacher(parser, _read_config(parser, config))
    of_file, of_line = _names(parser, from_file), _names(parser, command_line)
    if parser.parse_known_args([*from_file, *command_line])[0].task == "text":
        parser.set_defaults(model_name_or_path=_FRESH_TEXT_MODEL, dataset_name="docstrings")
    look = parser.parse_known_args([*from_file, *command_line])[0]
    given = of_file | of_line
    defaults_of_teacher = _defaults_of_teacher(parser, look, given)
    task = fresh_task(look.model_name_or_path)
    if task is not None and "optim" not in given:
        has_steps = "lr_step_epochs" in given  # a schedule of its own, beside which there is no other
        defaults = {n: v for n, v in _FRESH_WEIGHTS_DEFAULTS[task].items() if not (has_steps and n in _SCHEDULE)}
        parser.set_defaults(**defaults)

    namespace = parser.parse_args([*from_file, *command_line])
    if namespace.output_dir is not None:
        namespace.output_dir = os.path.expanduser(namespace.output_dir)  # "--output_dir=~/x", as the shell leaves it
    is_pretrained = fresh_task(namespace.model_name_or_path) is None
    if is_pretrained and first_look.config is None and first_look.image_size is None:
        namespace.image_size = None  # from the default recipe; a model with weights has its own size
    if namespace.output_dir is None:
        model, dataset = (Path(name).name for name in (namespace.model_name_or_path, namespace.dataset_name))
        namespace.output_dir = f"outputs/{dataset}_{model}_seed{namespace.seed}"
    measures_precision, precision_rates = _choose_precision(namespace, of_file, of_line)
    of_file_for_teacher, of_line_for_teacher = _names(parser, from_file_for_teacher), _names(parser, for_teacher)
    overlay = vars(parser.parse_args([*from_file_for_teacher, *for_teacher]))
    own = {name: value for name, value in overlay.items() if name in of_file_for_teacher | of_line_for_teacher}
    if "optim" in own:
        defaults_of_teacher = {}
    arguments = RunArguments(
        vars(namespace),
        {**defaults_of_teacher, **own},
        overwrite=namespace.overwrite,
        command_line=tuple(argv),
        measures_precision=measures_precision,
        precision_rates=precision_rates,
        from_recipe=frozenset(
            of_file - of_line
            | {f"teacher_{name}" for name in {*of_file_for_teacher, *defaults_of_teacher} - of_line_for_teacher}
        ),
    )
    if arguments.distils:
        arguments.for_teacher()  # reports errors in the teacher's options early
    return arguments


def _defaults_of_teacher(parser: _Parser, look: argparse.Namespace, given: set[str]) -> dict[str, Any]:
    """Return the training defaults of a teacher of the other kind: it has fresh weights, or the student has.

    Args:
        parser: With the defaults of a model with weights.
        look: Options of the run.
        given: Names of the options that were given, which hold for the teacher as well.
    """
    student, teacher = look.model_name_or_path, look.teacher_model_name_or_path or look.model_name_or_path
    task_of_student, task_of_teacher = fresh_task(student), fresh_task(teacher)
    if task_of_student == task_of_teacher or {"optim", "learning_rate"} & given:
        return {}
    if task_of_teacher is not None:
        defaults = _FRESH_WEIGHTS_DEFAULTS[task_of_teacher]
    else:
        defaults = {name: parser.get_default(name) for name in _FRESH_WEIGHTS_DEFAULTS[str(task_of_student)]}
    return {name: value for name, value in defaults.items() if name not in given}


def _names(parser: _Parser, tokens: Sequence[str]) -> set[str]:
    """Return the options among tokens."""
    options = (token.partition("=")[0] for token in tokens)
    return {parser._option_string_actions[name].dest for name in options if name in parser._option_string_actions}


def _choose_precision(
    namespace: argparse.Namespace, of_file: set[str], of_line: set[str]
) -> tuple[bool, dict[str, float] | None]:
    """Set bf16 and fp16 from --precision; if given themselves, they override auto and a file's precision.

    The launcher's precision and compiler apply if the options do not set them. On a CPU, a resumed run keeps its
    precision.

    Args:
        namespace: All options.
        of_file: Options given in a file.
        of_line: Options given on the command line.

    Returns:
        Whether a measurement is to decide about bf16, and the result of one made when the run began.
    """
    given = of_file | of_line
    if (backend := launcher_compiler()) and not given & {"torch_compile", "torch_compile_backend"}:
        namespace.torch_compile, namespace.torch_compile_backend = True, backend
    flags = {"bf16", "fp16"} & (of_line if "precision" in of_line else given)  # the command line wins over a file
    overrides_file = flags & of_line and "precision" not in of_line
    if overrides_file or (flags and namespace.precision == "auto"):
        return False, None
    precision, is_measured, rates = namespace.precision, False, None
    if precision == "auto":
        precision, is_on_cpu = launcher_precision(), namespace.use_cpu or not torch.accelerator.is_available()
        if precision is None and is_on_cpu and not namespace.overwrite:
            precision, rates = precision_begun_in(namespace.output_dir)
        if precision is None:
            precision = default_precision(namespace.use_cpu)
            needs_it = namespace.bf16_full_eval or namespace.deepspeed or namespace.fsdp or launcher_shards()
            is_measured = is_on_cpu and precision == "bf16" and not needs_it
        if precision not in PRECISIONS:
            raise InputError(f"The launcher asks for mixed_precision {precision}: give --precision, which wins.")
    for name in sorted(flags):
        if getattr(namespace, name) != (name == precision):
            raise InputError(f"--precision {precision} and --{name} contradict each other: leave one out.")
    namespace.bf16, namespace.fp16 = precision == "bf16", precision == "fp16"
    return is_measured, rates


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
        message, hint = re.sub(r"(\S{60})\S{20,}", r"\1…", " ".join(message.split())), ""
        if match := re.search(r"unrecognized arguments: --(\w+)", message):
            known = [option.removeprefix("--") for option in self._option_string_actions]
            hint = suggestion(match[1], known).replace("mean ", "mean --")
            if match[1].startswith("resume"):
                hint = " The same command continues an interrupted run by itself."
        raise InputError(f"{message} (--help lists the options).{hint}")


class _YamlLoader(yaml.SafeLoader):
    """Reads values in a dictionary, which have no option's type, as JSON does: off is a word, and 2e-4 a number."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        _entries(node)
        return super().construct_mapping(node, deep)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|false|True|False",
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?",
}.items():
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$"), None)


def _entries(node: Any) -> dict[str, yaml.Node]:
    """Return the values of a YAML mapping by name; raises a `YAMLError` if a name is repeated or not a name."""
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.YAMLError(f"{line}: expected a name")
        if key.value in entries:
            raise yaml.YAMLError(f"{line}: {key.value} is given twice")
        entries[key.value] = value
    return entries


def _build_parser(show_all: bool = False) -> _Parser:
    parser = _Parser(
        [ModelArguments, DataArguments, PublishingArguments, BKDConfig],
        description="Train a balanced student on long-tailed images, or texts, by Balanced Knowledge Distillation.",
        epilog=_EPILOG,
        usage=f"{' '.join(program('run', ['accelerate', 'launch']))} [--config RECIPE] [--OPTION VALUE …]",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    run = parser.add_argument_group("run")
    run.add_argument("--config", metavar="RECIPE", help=f"YAML file with options, or one of {', '.join(RECIPES)}.")
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
    for action in parser._actions:
        if any(option.startswith("--no_") for option in action.option_strings):
            action.help = argparse.SUPPRESS  # the negation of a shown option, with the same text
    return parser


def _split_off_teacher(parser: _Parser, tokens: list[str]) -> tuple[list[str], list[str]]:
    """Separate `--teacher_OPTION value…` from the rest, as `--OPTION value…`."""
    rest: list[str] = []
    teacher: list[str] = []
    target = rest
    for token in tokens:
        if token.startswith("--"):
            option = token.split("=")[0]
            is_teacher = option not in parser._option_string_actions and re.match("--teacher[_-]", option)
            target = teacher if is_teacher else rest
            if is_teacher:
                _check_teacher_option(parser, option[len(_TEACHER_PREFIX) :], option)
                token = "--" + token[len(_TEACHER_PREFIX) :]
        target.append(token)
    return rest, teacher


def _check_teacher_option(parser: _Parser, name: str, shown: str) -> None:
    action = parser._option_string_actions.get(f"--{name}")
    if action is None or action.dest not in OPTIONS:
        known = sorted(OPTIONS - NOT_FOR_TEACHER)
        raise InputError(f"{shown}: there is no training option --{name}.{suggestion(name, known)}")
    if action.dest in NOT_FOR_TEACHER:
        raise InputError(f"{shown}: --{name} cannot be set for the teacher alone.")


def _find_recipe(config: str) -> str | Path:
    """Return the file named by --config: a path, or the name of a recipe of the package."""
    if os.path.isfile(config) or (config not in RECIPES and os.path.exists(config)):
        return config
    if config in RECIPES:
        return RECIPES[config]
    raise InputError(
        f"--config {one_line(config, 80)} cannot be read: there is no such file, and no such recipe among "
        f"{', '.join(RECIPES)}.{suggestion(Path(config).stem, list(RECIPES))}"
    )


def _read_config(parser: _Parser, path: str | Path) -> list[str]:
    """Return the options in a YAML file as command-line tokens.

    So the same parser sets the types of all values, in a file or on the command line.
    """
    try:
        node = yaml.compose(read_option_file("config", path), Loader=_YamlLoader)
        if not isinstance(node, yaml.MappingNode):
            raise InputError(f"--config {path}: expected lines of the form `option: value`.")
        entries = _entries(node)
        teacher = entries.pop("teacher", None)
        if teacher is None or teacher.tag == _NULL:
            of_teacher = {}
        elif isinstance(teacher, yaml.MappingNode):
            of_teacher = _entries(teacher)
        else:
            raise InputError(f"--config {path}: the section `teacher:` must hold lines of the form `option: value`.")
        tokens, seen = [], set()
        for name, value in entries.items():
            tokens += _tokens(parser, path, name, value)
            dest = parser._option_string_actions[f"--{name}"].dest
            if dest in seen:
                raise InputError(f"--config {path}: {dest} is given twice, once as {name}.")
            seen.add(dest)
        for name, value in of_teacher.items():
            if name != "model_name_or_path":
                _check_teacher_option(parser, name, f"--config {path}, section teacher, {name}")
            given = _tokens(parser, path, name, value)
            dest = "teacher_" + parser._option_string_actions[f"--{name}"].dest
            if dest in seen:
                raise InputError(f"--config {path}: {dest} is given twice, once as {name} in the section `teacher:`.")
            seen.add(dest)
            if given:
                tokens += [_TEACHER_PREFIX + given[0].removeprefix("--"), *given[1:]]
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"--config {path} is no YAML: {one_line(error, 200)}.") from error
    return tokens


def _tokens(parser: _Parser, path: str | Path, name: str, node: yaml.Node) -> list[str]:
    action = parser._option_string_actions.get(f"--{name}")
    if name in ("config", "help", "help_all", "overwrite"):
        raise InputError(f"--config {path}: {name} belongs on the command line, as --{name}.")
    if action is None:
        known = [option.removeprefix("--") for option in parser._option_string_actions]
        of_teacher = name.removeprefix("teacher_")
        if of_teacher != name and of_teacher in known:
            raise InputError(f"--config {path}: write {name} as {of_teacher} into a section `teacher:`.")
        raise InputError(f"--config {path}: unknown option {name!r}.{suggestion(name, known)}")
    if node.tag == _NULL:
        return []
    is_list_option = action.nargs in ("+", "*")
    nodes = node.value if isinstance(node, yaml.SequenceNode) and is_list_option else [node]
    shown = one_line(repr(value := _YamlLoader("").construct_document(node)), 80)
    if isinstance(node, yaml.MappingNode) and name in BKDConfig._VALID_DICT_FIELDS:
        tokens = [json.dumps(value)]
    elif all(isinstance(each, yaml.ScalarNode) for each in nodes):
        # The original text, which the option's type interprets (off is a name for one option, and false for another).
        tokens = [each.value for each in nodes]
    else:
        raise InputError(f"--config {path}: {name} takes a single value, got {shown}.")
    if action.type is string_to_bool:
        tokens = [{"on": "true", "off": "false"}.get(token.lower(), token) for token in tokens]
    try:
        # "--name=value", so that a value may begin with a dash.
        words = [f"--{name}", *tokens] if is_list_option else [f"--{name}={tokens[0]}"]
        parser.parse_known_args(words)
    except InputError as error:
        raise InputError(f"--config {path}: {name}: {shown} is not valid there: {error}") from error
    return words
