"""Models sharded over processes: settings for FSDP2, checks for DeepSpeed, and gathering the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .errors import InputError
from .machine import launcher_shards

#: Bytes of weights above which a teacher is sharded too, if the student is.
LARGE_TEACHER = 1 << 30


def layers_to_wrap(model: nn.Module) -> list[str]:
    """Return the class names of the layers that FSDP gathers one at a time: the blocks of a model.

    These are the classes that transformers keeps on one device; if it names none, classes with several instances side
    by side.
    """
    there = {type(module).__name__ for module in model.modules()}
    names = {*(getattr(model, "_no_split_modules", None) or ())} & there
    if not names:
        lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        counts = Counter(type(child).__name__ for each in lists for child in each if any(child.children()))
        names = {name for name, number in counts.items() if number > 1 and not hasattr(nn, name)}
    return sorted(names)


def check_engine(args: Any, accelerator: Accelerator) -> None:
    """Check that accelerate shards a training as requested.

    Raises:
        InputError: If another engine runs than the one requested by options or launcher.
    """
    wanted = {"FSDP": args.fsdp, "DEEPSPEED": args.deepspeed}
    asked = [name for name, is_asked in wanted.items() if is_asked or launcher_shards(name)]
    runs = accelerator.distributed_type
    if asked and runs.value not in asked:
        why = "one process alone has nothing to spread"
        if runs != DistributedType.NO:
            why = f"accelerate would run {runs.value} in its place, as it does on CPUs"
        raise InputError(
            f"{' and '.join(asked)} (--fsdp, --deepspeed, or of the launcher) cannot be had here: {why}. Leave it "
            "out, or start several processes on GPUs."
        )


def start_deepspeed_anew(args: Any) -> None:
    """Let accelerate use this training's DeepSpeed settings; it would keep a process's first ones, and reject others.

    If its file does not set gradient clipping, the options do, instead of the default norm of 1.
    """
    if args.deepspeed_plugin is not None:
        AcceleratorState._reset_state()
        args.deepspeed_plugin.deepspeed_config.setdefault("gradient_clipping", args.max_grad_norm)


def check_deepspeed(args: Any) -> None:
    """Reject settings with which no model would be saved.

    Raises:
        InputError: With such settings; the message names a solution.
    """
    gathers = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    plugin = args.deepspeed_plugin
    if plugin and plugin.zero_stage == 3 and not plugin.hf_ds_config.get_value(gathers, False):
        raise InputError(f'--deepspeed: ZeRO-3 would save no whole model. Set "{gathers}" to true in its file.')


def tell_of_layers(accelerator: Accelerator, args: Any, model: nn.Module) -> None:
    """Tell accelerate how to shard a model; it would use the settings of the process's previous model."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_to_wrap(model)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    # accelerate would shard the embeddings alone, and again with their layer; some models have none.
    model.get_input_embeddings = lambda: None  # type: ignore[assignment]
    accelerator.state.fsdp_plugin = plugin


def spread_large_teacher(teacher: nn.Module, accelerator: Accelerator) -> None:
    """Shard a large frozen model over the processes, if the student is sharded too."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    if not (accelerator.is_fsdp2 and size > LARGE_TEACHER):
        return
    names = layers_to_wrap(teacher)
    for module in reversed([*teacher.modules()]):
        if type(module).__name__ in names or module is teacher:
            fully_shard(module)


def bare_type(model: nn.Module) -> type:
    """Return the class of a model, without FSDP's wrapper class."""
    kind = type(model)
    return kind.__bases__[1] if issubclass(kind, FSDPModule) else kind


@contextmanager
def in_bare_type(model: nn.Module) -> Iterator[None]:
    """Restore a model's own class while it is saved, as its name and custom code are saved too."""
    kind = type(model)
    model.__class__ = bare_type(model)
    try:
        yield
    finally:
        model.__class__ = kind


def own_part(weight: Any) -> torch.Tensor:
    """Return this process's part of a weight that may be sharded."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    part = getattr(weight, "ds_tensor", None)
    if part is None:
        return weight
    # ZeRO-3 pads the parts of the last processes with arbitrary values.
    return part[: max(0, weight.ds_numel - part.numel() * torch.distributed.get_rank(weight.ds_process_group))]


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights of a model that may be sharded. All processes must call it."""
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in model.state_dict().items()}


def forget_precision(model: nn.Module) -> None:
    """Undo what the accelerator of an earlier trainer did to a model, which would keep that trainer's precision."""
    for module in model.modules():
        module.__dict__.pop("_is_accelerate_prepared", None)
        original = module.__dict__.pop("_original_forward", None)
        if original is not None:
            del module.forward  # under autocast
            if module.forward != original:  # not that of its class: its owner has put it there
                module.forward = original
