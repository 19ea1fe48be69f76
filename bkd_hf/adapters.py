"""Parameter-efficient fine-tuning: low-rank updates (LoRA), or biases and normalisation layers (BitFit)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .config import ADAPTER_RANK, BKDConfig
from .errors import InputError
from .head import the_head
from .publishing_trainer import PublishingTrainer
from .run_folder import check_checkpoint

#: In a checkpoint, the model with separate low-rank factors; its `model.safetensors` holds the merged weights.
ADAPTED_WEIGHTS_NAME = "adapted_weights.pt"
#: peft's name for the only adapter of a model.
_NAME = "default"


def check_adapter(model: nn.Module, args: BKDConfig) -> None:
    """Check that a model can have the requested adapter.

    Raises:
        InputError: If it has no layer for it, or none of a given name, its head cannot be identified, the rank is not
            low, or peft is missing.
    """
    if args.adapter == "lora":
        import_peft()
        _find_targets(model, args)
    elif args.adapter == "bitfit":
        _biases_and_normalisation(model)


def import_peft() -> Any:
    """Return the library for LoRA; raises an `InputError` if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise InputError(
            'The library peft, which --adapter lora needs, is not installed: pip install "bkd_hf[adapters]". '
            "--adapter bitfit needs none."
        ) from error
    return peft


def _backbone(model: nn.Module) -> dict[str, nn.Module]:
    """All modules outside the head, by name."""
    heads = the_head(model)
    of_head = {module for head in heads.values() for module in head.modules()}
    return {name: module for name, module in model.named_modules() if module not in of_head}


def _find_targets(model: nn.Module, args: BKDConfig) -> list[str]:
    """Names of the layers that get low-rank updates.

    These are the given layers; by default all linear layers or all convolutions, whichever hold more weights: a
    transformer's projections, not its patch embedding; a ResNet's convolutions, not an occasional gate. Grouped
    convolutions are left out, as their updates cannot be merged, and so are subclasses, which may compute more.
    """
    layers = {
        name: module
        for name, module in _backbone(model).items()
        if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
    }
    if not layers:
        raise InputError(
            f"--adapter lora: {type(model).__name__} has no linear layer, and no convolution without groups, below "
            "its head. Use --adapter bitfit or --freeze_backbone."
        )
    given, found = args.adapter_target_modules, []
    for target in given or ():
        matching = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not matching:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
            raise InputError(
                f"--adapter_target_modules {target}: no layer of {type(model).__name__} that LoRA can update is "
                f"called so. There are {', '.join(ends[:12])}{', …' if len(ends) > 12 else ''}."
            )
        found += matching
    if not given:
        of_kind = {kind: [name for name in layers if type(layers[name]) is kind] for kind in (nn.Linear, nn.Conv2d)}
        found = max(of_kind.values(), key=lambda names: sum(layers[name].weight.numel() for name in names))
    rank, highest = args.adapter_rank or ADAPTER_RANK, max(min(layers[name].weight.flatten(1).shape) for name in found)
    if rank > highest:
        raise InputError(
            f"--adapter_rank {rank} is no low rank for {type(model).__name__}: its largest layer has {highest}. Use "
            "less, or leave --adapter out."
        )
    return sorted(set(found))


def _biases_and_normalisation(model: nn.Module) -> list[nn.Parameter]:
    """Biases and parameters of normalisation layers (recognised by class name) in the backbone."""
    found = [
        parameter
        for module in _backbone(model).values()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("bias") or "norm" in type(module).__name__.lower()
    ]
    if not found:
        raise InputError(
            f"--adapter bitfit: {type(model).__name__} has no bias and no normalisation layer below its head. Use "
            "--adapter lora or --freeze_backbone."
        )
    return found


def add_adapter(model: nn.Module, args: BKDConfig) -> Any:
    """Leave only the head and the adapter trainable; a model's outputs do not change.

    `lora` (Hu et al., 2021, arXiv 2106.09685): W + α/r · B A in place of the weights W of a layer, with A (r × inputs)
    random, drawn by the seed, and B (outputs × r) 0. `bitfit` (Ben Zaken et al., 2021, arXiv 2106.10199): biases and
    normalisation layers.

    BatchNorm keeps the statistics of the pretrained weights. So training uses the same function that is saved, however
    batches are split, and not statistics dominated by the frequent classes. BatchNorm is then affine per channel, and
    the trained weights around it can adapt it to new data.

    Args:
        model: Changed in place.
        args: Options, with an `adapter`.

    Returns:
        Handle of the hook that keeps the statistics fixed until `remove()` is called.

    Raises:
        InputError: As [`check_adapter`].
    """
    frozen = [module for module in _backbone(model).values() if isinstance(module, _BatchNorm)]
    heads = the_head(model)
    if args.adapter == "lora":
        _add_low_rank_updates(model, args)
    else:
        chosen = _biases_and_normalisation(model)
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
    for head in heads.values():
        head.requires_grad_(True)

    def keep_statistics(model: nn.Module, _: Any) -> None:
        for module in frozen:
            module.eval()

    return model.register_forward_pre_hook(keep_statistics)


def _add_low_rank_updates(model: nn.Module, args: BKDConfig) -> None:
    peft, rank = import_peft(), args.adapter_rank or ADAPTER_RANK
    alpha = 2 * rank if args.adapter_alpha is None else args.adapter_alpha
    # A list would update "classifier.proj", too, where it names "proj".
    targets = "|".join(map(re.escape, _find_targets(model, args)))
    with torch.random.fork_rng(devices=[]):
        # The same in all processes, and after a resume.
        torch.default_generator.manual_seed(args.seed)
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model, adapter_name=_NAME
        )
    del model.peft_config
    for layer in _updated_layers(model).values():
        if isinstance(base := layer.get_base_layer(), nn.Conv2d):
            for name in ("stride", "kernel_size", "dilation", "padding"):  # MobileNet computes its padding from these
                setattr(layer, name, getattr(base, name))


def _updated_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, tuple[Any, torch.Tensor]]:
    """Add a model's low-rank updates to its weights and remove their layers; this restores the original architecture.

    Returns:
        By name, what is needed to undo this exactly: the layer, and its weights before. Empty without updates.
    """
    before = {}
    for name, layer in _updated_layers(model).items():
        base = layer.get_base_layer()
        before[name] = layer, base.weight.clone()
        base.weight.add_(layer.get_delta_weight(_NAME))
        model.set_submodule(name, base)
    return before


@contextmanager
def merged(model: nn.Module) -> Iterator[bool]:
    """Merge a model temporarily (see [`merge`]); yields whether it has updates at all."""
    before = merge(model)
    try:
        yield bool(before)
    finally:
        with torch.no_grad():
            for name, (layer, weight) in before.items():
                layer.get_base_layer().weight.copy_(weight)
                model.set_submodule(name, layer)


class AdaptingTrainer(PublishingTrainer):
    """A `Trainer` that, with `adapter`, trains only few weights of its model.

    Saved models, and the model after training, are plain models with all updates merged. A checkpoint also keeps the
    factors of the updates, for an exact resume. `ema_decay` averages these factors.
    """

    #: Parameters of the adapter and the head; `None` without an adapter.
    num_trained_parameters: int | None = None
    _kept_statistics: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.adapter == "lora" and self.optimizer is not None:
            raise InputError(
                "--adapter lora adds weights that an optimizer made before does not know: leave `optimizers` out."
            )

    def _add_adapter(self, model: nn.Module) -> None:
        """Add an adapter to a student, if the options ask for one."""
        if self.args.adapter is None or self.train_dataset is None:
            return
        self._kept_statistics = add_adapter(model, self.args)
        self.num_trained_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer`; a previously trained model gets a new adapter."""
        if self._kept_statistics is None and self.model is not None:
            self._add_adapter(self.model)
            if self.args.adapter == "lora":
                self.optimizer = None  # it holds the weights of the previous adapter
        outcome = super().train(*args, **kwargs)
        if self._kept_statistics is not None:
            merge(self.model)
            self._kept_statistics.remove()
            self._kept_statistics = None
        return outcome

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with merged(self.model) as has_updates:
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if has_updates and self.args.should_save and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            torch.save(self.model.state_dict(), folder / ADAPTED_WEIGHTS_NAME)

    def _load_pretrained_weights(self, checkpoint: str) -> bool:
        adapted, adapter = Path(checkpoint, ADAPTED_WEIGHTS_NAME), self.args.adapter
        if adapted.exists() != (adapter == "lora"):
            raise InputError(
                f"--adapter is {adapter}, but {checkpoint} was saved with{'' if adapted.exists() else 'out'} low-rank "
                "updates: continue as it began, or start anew."
            )
        if adapter != "lora":
            return super()._load_pretrained_weights(checkpoint)
        check_checkpoint(checkpoint)
        self.model.load_state_dict(torch.load(adapted, map_location="cpu", weights_only=True), strict=True)
        return True
