"""A rehearsal of a training, so that errors of `transformers` and others about options appear before any work."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
)
from transformers.integrations import get_reporting_integration_callbacks

from .adapters import import_peft
from .config import BKDConfig, method_defaults
from .errors import InputError, first_line
from .given_teacher import read_label_map
from .hub import check_repo_access
from .inputs import load_tokenizer
from .machine import collect_only_new_garbage
from .metrics import LongTailEvaluation, NotFiniteError
from .modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .models import check_image_size, load_config
from .objective import check_head
from .onnx_files import import_onnx
from .options import RunArguments, options_with
from .ranges import defaults_of, explain
from .schema import check_repo_id
from .sharding import check_deepspeed
from .tasks import fresh_task
from .teacher import teacher_label_names
from .text import one_line
from .trainer import BKDTrainer

_NUM_IMAGES, _SIZE, _NUM_CLASSES = 4, 8, 2


def check_before_work(arguments: RunArguments) -> None:
    """Check the arguments as far as possible without data, the quickest checks first.

    Raises:
        InputError: If something cannot work; the message names the option.
    """
    trains_teacher = arguments.distils and (arguments.model.given_teacher is None or arguments.model.finetune_teacher)
    trained = [arguments, arguments.for_teacher()] if trains_teacher else [arguments]
    for name in ("dataset_name", "model_name_or_path", "teacher_model_name_or_path", *sorted(options_with("path"))):
        _check_name(name, arguments.options[name])
    if arguments.overwrite:
        _check_is_kept(arguments)
    if arguments.distils and arguments.training.teacher_cache not in ("off", "auto"):
        _check_cache(arguments.training)
    read_label_map(arguments.model.teacher_label_map)
    if arguments.publishing.export == "onnx":
        import_onnx()
    for options in trained:
        name = options.model.model_name_or_path
        adapter = options.training.adapter
        if (options.training.freeze_backbone or adapter) and fresh_task(name) is not None:
            option = f"--adapter {adapter}" if adapter else "--freeze_backbone"
            raise InputError(
                f"{option}: {name} starts from fresh weights, so its features would stay random. Give a trained "
                "model, or leave the option out."
            )
        if options.training.feature_cache != "off" and (options.distils and options.training.teacher_cache == "off"):
            raise InputError(
                "--feature_cache needs --teacher_cache with a teacher: the images are not read again, so its answers "
                "about them must be kept too. Use --teacher_cache auto, or --feature_cache off."
            )
        if adapter == "lora":
            import_peft()
    check_deepspeed(arguments.training)
    rehearse(arguments.training, arguments.model.task)
    if trains_teacher:
        with arguments.naming_teacher_options():
            rehearse(arguments.for_teacher().training, arguments.model.task)
    for options in trained:
        name = options.model.model_name_or_path
        if fresh_task(name) is None:
            config = load_config(name, options.training.cosine_scale, **options.model.from_pretrained_kwargs())
            if options.training.head == "linear":
                check_head(options.training, config)
            _check_image_size(options, config)
        if options.model.task == "text":
            load_tokenizer(options.model)
    if arguments.distils and arguments.model.given_teacher is not None:
        of_teacher = arguments.for_teacher()
        teacher_label_names(arguments.model.given_teacher, **of_teacher.model.from_pretrained_kwargs())
        if not trains_teacher and of_teacher.model.task == "text":
            load_tokenizer(of_teacher.model)
        if not trains_teacher and of_teacher.model.image_size is not None:
            config = load_config(of_teacher.model.model_name_or_path, **of_teacher.model.from_pretrained_kwargs())
            _check_image_size(of_teacher, config)
    _check_publishing(arguments)


def _check_image_size(options: RunArguments, config: PreTrainedConfig) -> None:
    if options.model.image_size is not None:
        check_image_size(options.model.model_name_or_path, config, options.model.image_size)


def _check_publishing(arguments: RunArguments) -> None:
    """Check the repository's name and the token."""
    if arguments.publishing.hub_dataset_id is not None:
        check_repo_id(arguments.publishing.hub_dataset_id)
    if arguments.publishing.push_to_hub and PartialState().is_main_process:
        token, private = arguments.training.hub_token or arguments.model.token, arguments.training.hub_private_repo
        check_repo_access(arguments.repo_id, token, private=private)


def _check_name(option: str, path: Any) -> None:
    """Check that a path could be a file or folder; it need not exist."""
    try:
        if path is not None and not str(path).startswith("{"):  # --deepspeed may be JSON
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"--{option} {one_line(path, 80)}: {getattr(error, 'strerror', None) or error}.") from error


def _check_is_kept(arguments: RunArguments) -> None:
    """Check that `--overwrite` deletes no model that the run starts from."""
    output_dir = Path(arguments.training.output_dir)
    for option in ("model_name_or_path", "teacher_model_name_or_path"):
        name = arguments.options[option]
        folder = Path(name or "").expanduser()
        if name is not None and folder.exists() and folder.resolve().is_relative_to(output_dir.resolve()):
            raise InputError(
                f"--{option} {name} is in --output_dir {output_dir}, whose run --overwrite would delete before it is "
                "used: name another --output_dir."
            )


def _check_cache(args: BKDConfig) -> None:
    by_accelerate: Any = args.accelerator_config
    if (
        args.sampler != "instance"
        or args.train_sampling_strategy not in ("random", "sequential")
        or by_accelerate.split_batches
        or by_accelerate.dispatch_batches
    ):
        raise InputError(
            f"--teacher_cache {args.teacher_cache} needs --sampler instance, --train_sampling_strategy random or "
            "sequential, and neither split_batches nor dispatch_batches of --accelerator_config: else an example is "
            "not drawn once an epoch, or not in a known view. Use --teacher_cache off."
        )
    folder = Path(args.teacher_cache).expanduser()
    try:
        # Nothing is left there: it may be in the output folder, which is not claimed yet.
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(
            f"--teacher_cache {folder} cannot be written: {error.strerror}. Choose another folder, or --teacher_cache "
            "off."
        ) from error


class _Examples(Dataset):
    def __init__(self, inputs: dict[str, Any]):
        self.inputs = inputs

    def __len__(self) -> int:
        return _NUM_IMAGES

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= _NUM_IMAGES:
            raise IndexError(index)  # ends a loop over the examples
        return {**self.inputs, "labels": index % _NUM_CLASSES}


def _tiny(task: str) -> tuple[PreTrainedModel, _Examples]:
    """Return a model for images, or texts, and its data."""
    if task == "text":
        size = {"hidden_size": _SIZE, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": _SIZE}
        bert = BertConfig(vocab_size=_SIZE, max_position_embeddings=_SIZE, num_labels=_NUM_CLASSES, **size)
        words = {"input_ids": [1] * _SIZE, "attention_mask": [1] * _SIZE}
        return BertForSequenceClassification(bert), _Examples(words)
    resnet = CifarResNetConfig(depth=8, image_size=_SIZE, num_labels=_NUM_CLASSES)
    return CifarResNetForImageClassification(resnet), _Examples({"pixel_values": torch.zeros(3, _SIZE, _SIZE)})


def rehearse(args: BKDConfig, task: str = "image") -> None:
    """Train a tiny model for one step with these options, and evaluate it.

    It leaves out the method's options, which are checked separately, options that need a real model, and everything
    that would leave traces. All processes must call it.

    Raises:
        InputError: If that fails; the message names the option.
    """
    if args.deepspeed:  # its file is for the batches of the real training
        return
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}

    def attempt(values: dict[str, Any]) -> None:
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            _rehearse(values, folder, task)

    try:
        with collect_only_new_garbage():
            attempt(values)
    except NotFiniteError:  # caused by the training, not by its options
        return
    except Exception as error:  # whatever a library raises
        raise explain(error, values, defaults_of(BKDConfig), attempt) from error
    if args.torch_compile:
        _check_compiler(args)


def _compiled(backend: str | None, mode: str | None) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(nn.ReLU(), backend=backend or "inductor", mode=mode)


def _check_compiler(args: BKDConfig) -> None:
    """Compile something tiny, which takes what may be missing here, such as a C++ compiler."""
    try:
        _compiled(args.torch_compile_backend, args.torch_compile_mode)(torch.zeros(2))
    except Exception as error:  # a compiler may raise any exception
        raise InputError(
            f"--torch_compile cannot work on this machine: {one_line(first_line(error), 300)}. Install what is "
            "missing, or leave it out."
        ) from error


def _rehearse(values: dict[str, Any], folder: str, task: str) -> None:
    reporting = BKDConfig(folder, report_to=values["report_to"], use_cpu=values["use_cpu"]).report_to
    for callback in get_reporting_integration_callbacks(reporting):
        callback()
    if values["torch_compile"]:  # unknown names are rejected before anything is compiled
        _compiled(values["torch_compile_backend"], values["torch_compile_mode"])
    evaluates = str(getattr(values["eval_strategy"], "value", values["eval_strategy"])) != "no"
    quiet = {
        **method_defaults("ce"), "head": None, "head_scale": None, "head_init": "random", "adapter": None,
        "teacher_cache": "off", "feature_cache": "off",
        "output_dir": folder, "report_to": "none", "push_to_hub": False, "disable_tqdm": True, "max_steps": 1,
        "per_device_train_batch_size": _NUM_CLASSES,
        "per_device_eval_batch_size": _NUM_CLASSES, "save_strategy": "no", "load_best_model_at_end": False,
        "metric_for_best_model": None, "eval_strategy": "steps" if evaluates else "no", "eval_steps": 1,
        "eval_delay": 0, "torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None,
        "dataloader_num_workers": 0, "dataloader_prefetch_factor": None, "dataloader_persistent_workers": False,
        "activation_checkpointing": None, "gradient_checkpointing": None, "auto_find_batch_size": False,
        "gradient_accumulation_steps": 1, "global_batch_size": None, "resume_from_checkpoint": None,
        "enable_jit_checkpoint": False, "dataloader_drop_last": False,
    }  # fmt: skip
    model, examples = _tiny(task)
    counts = [_NUM_IMAGES // _NUM_CLASSES] * _NUM_CLASSES
    trainer = BKDTrainer(
        model,
        args=BKDConfig(**{**values, **quiet}),
        train_dataset=examples,
        eval_dataset=examples,
        compute_metrics=LongTailEvaluation(counts),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.measure(examples)
