"""Optimizers and learning-rate schedules that `transformers` lacks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import HPSearchBackend, IntervalStrategy, has_length

from .config import METHOD_OPTIONS, BKDConfig
from .errors import InputError
from .head import the_head
from .objective import Objective


class StepDecay:
    """Factor of the initial learning rate at an optimizer step: linear warm-up by epochs, then steps.

    As in the long-tail literature (Cao et al., 2019): constant within an epoch, (e + 1)/n of the rate in epoch e of n
    warm-up epochs, and given factors of the *initial* rate from given epochs on. `LambdaLR` saves the attributes of
    such an object in its state.

    Args:
        steps_per_epoch: Optimizer steps per epoch.
        warmup_epochs: n.
        step_epochs: Increasing epochs, counted from 0.
        step_factors: One factor for each of `step_epochs`.
    """

    def __init__(
        self,
        steps_per_epoch: float,
        warmup_epochs: int = 0,
        step_epochs: Sequence[int] = (),
        step_factors: Sequence[float] = (),
    ):
        self.steps_per_epoch = steps_per_epoch
        self.warmup_epochs = warmup_epochs
        self.step_epochs = list(step_epochs)
        self.step_factors = list(step_factors)

    def __call__(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        if epoch < self.warmup_epochs:
            return (epoch + 1) / self.warmup_epochs
        num_passed = bisect_right(self.step_epochs, epoch)
        return self.step_factors[num_passed - 1] if num_passed else 1.0


def with_own_rates(groups: list[dict[str, Any]], rates: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """Return an optimizer's parameter groups, split so that some parameters have their own learning rates."""
    cut = []
    for group in groups:
        # Parameters without their own rate stay separate from others that happen to have the same.
        of_rate: dict[tuple[bool, float], list[nn.Parameter]] = {(False, group["lr"]): []}
        for parameter in group["params"]:
            of_rate.setdefault((parameter in rates, rates.get(parameter, group["lr"])), []).append(parameter)
        cut += [{**group, "params": params, "lr": rate} for (_, rate), params in of_rate.items() if params]
    return cut


def layer_depths(model: nn.Module) -> dict[nn.Parameter, int]:
    """Return the depth of each parameter in blocks: 0 below the first of n, i in block i, n + 1 above the last.

    This is the numbering of BEiT's layer-wise learning-rate decay (Bao et al., 2021, arXiv 2106.08254), whose n + 1
    holds the last normalisation and the head. Blocks are the elements of a model's outermost list of blocks or, if
    these are stages with such lists themselves, the elements of those. Layers between blocks, such as patch merging,
    count to the block defined before them.

    Raises:
        InputError: If there are fewer than two blocks, or the head cannot be identified.
    """
    heads = the_head(model)
    lists = [each for each in _lists_of_blocks(model) if each[0] not in heads and "embed" not in each[0]]
    blocks = [block for path, each in lists for block in _blocks(path, each)]
    if len(blocks) < 2:
        raise InputError(
            f"--layer_decay: {type(model).__name__} has no list of blocks that would tell how deep a layer lies. "
            "Leave the option out; --head_learning_rate works with any head."
        )
    depths, depth, top = {}, 0, len(blocks) + 1
    for name, parameter in model.named_parameters():
        of_block = [i for i, block in enumerate(blocks, start=1) if name.startswith(f"{block}.")]
        depth = max(depth, *of_block) if of_block else depth
        is_in_list = any(name.startswith(f"{path}.") for path, _ in lists)
        is_above = not is_in_list and depth == len(blocks)
        is_of_head = any(name.startswith(f"{head}.") for head in heads)
        depths[parameter] = of_block[0] if of_block else top if is_above or is_of_head else depth
    return depths


def _parts(module: nn.Module) -> dict[str, nn.Module]:
    """The children that have parameters, by name."""
    return {name: child for name, child in module.named_children() if any(True for _ in child.parameters())}


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _lists_of_blocks(module: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost lists whose elements have parts themselves, by name."""
    found = []
    for name, child in _parts(module).items():
        if _is_list(child) and all(map(_parts, _parts(child).values())):
            found.append((prefix + name, child))
        else:
            found += _lists_of_blocks(child, f"{prefix}{name}.")
    return found


def _blocks(path: str, elements: nn.Module) -> list[str]:
    """Names of the blocks in a list of them, or of stages."""
    found = []
    for name, element in _parts(elements).items():
        stage = f"{path}.{name}"
        lists = [(stage, element)] if _is_list(element) else _lists_of_blocks(element, f"{stage}.")
        found += [f"{inner}.{i}" for inner, each in lists for i in _parts(each)] or [stage]
    return found


class OptimizingTrainer(Trainer):
    """A `Trainer` with the optimizers and schedules of the long-tail literature, and searches that vary any option."""

    _update_steps_per_epoch: float | None = None
    bkd_objective: Objective
    teacher_model: nn.Module | None
    _has_own_metrics = False  # whether the user gave any
    _before_search: dict[str, Any]  # options of the method, `None` where it decides

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        of_options = {"head_learning_rate": self.optimizer, "layer_decay": self.optimizer}
        for name, given in (of_options | {"lr_step_epochs": self.lr_scheduler}).items():
            if given is not None and getattr(self.args, name) is not None:
                raise InputError(f"--{name} does not change the `optimizers` that are given: leave one of them out.")

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: BKDConfig, model: PreTrainedModel | None = None) -> tuple[Any, Any]:
        """Return the optimizer class and its arguments; `momentum` goes to SGD."""
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_cls is torch.optim.SGD and args.momentum:
            kwargs["momentum"] = args.momentum
        return optimizer_cls, kwargs

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as `Trainer`; layers and the head get their own learning rates, if these are given."""
        is_new, args, rates = self.optimizer is None, self.args, {}
        optimizer = super().create_optimizer(model)
        if args.layer_decay is not None:
            depths = layer_depths(self.model)
            top = max(depths.values())
            rates = {each: args.learning_rate * args.layer_decay ** (top - depth) for each, depth in depths.items()}
        if args.head_learning_rate is not None:
            head = [parameter for module in the_head(self.model).values() for parameter in module.parameters()]
            rates |= dict.fromkeys(head, args.head_learning_rate)
        if is_new and rates:
            groups = with_own_rates(optimizer.param_groups, rates)
            if args.layer_decay is not None:  # the first group's rate is logged
                groups.sort(key=lambda group: abs(group["lr"] - args.learning_rate))
            optimizer.param_groups = groups
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Norm of the gradients; without clipping, it is only computed at logged steps."""
        if grad_norm is None and not self._logs_after(self.state.global_step + 1):
            return None
        return super()._get_grad_norm(model, grad_norm)

    def _logs_after(self, step: int) -> bool:
        args, per_epoch = self.args, self._update_steps_per_epoch
        if args.logging_strategy == IntervalStrategy.STEPS:
            return step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        if args.logging_strategy == IntervalStrategy.EPOCH:
            if per_epoch is None or not has_length(self.train_dataset):
                return True  # it is not known at which
            return step % per_epoch == 0 or step >= self.state.max_steps
        return False

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: `Trainer`'s estimate is for tokens, and iterates over all parameters at every step."""
        return 0

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that decay: all with `decay_all_parameters`, else as in `Trainer`."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the step-decay schedule if it is chosen, else `Trainer`'s."""
        if self.args.uses_step_decay and self.lr_scheduler is None:  # type: ignore[has-type]
            args = self.args
            steps_per_epoch = self._update_steps_per_epoch or math.ceil(num_training_steps / args.num_train_epochs)
            is_endless = self.train_dataset is not None and not has_length(self.train_dataset)
            if is_endless and self._update_steps_per_epoch is None:
                raise InputError(
                    "--lr_step_epochs needs epochs, and the length of this training set is not known: give the "
                    "trainer class_counts, or use another --lr_scheduler_type."
                )
            schedule = StepDecay(steps_per_epoch, args.lr_warmup_epochs, args.lr_step_epochs, args.lr_step_factors)
            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, schedule)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **kw: Any) -> Any:
        """Search as `Trainer`; without an objective and metrics of one's own, by the loss of the evaluation.

        `Trainer` would take the sum of all metrics, also of those that are added here.
        """
        if compute_objective is None and not self._has_own_metrics:
            compute_objective = _evaluation_loss
        self._before_search = self.args.method_options_given()
        return super().hyperparameter_search(hp_space, compute_objective, *args, **kw)

    def _hp_search_setup(self, trial: Any) -> None:
        """Set the options of a trial as `Trainer` does; those of the method that it does not set are as before."""
        if trial is None or self.hp_search_backend is None:
            super()._hp_search_setup(trial)
            return
        told = self.hp_space(trial) if self.hp_search_backend == HPSearchBackend.OPTUNA else trial
        # Trainer would convert "auto" to the type of the number that was there.
        of_trial = dict.fromkeys({*told} & {*METHOD_OPTIONS})
        for name, value in {**self._before_search, **of_trial}.items():
            setattr(self.args, name, value)
        super()._hp_search_setup(trial)
        self.args.set_anew({name: value for name, value in vars(self.args).items() if name in told})
        self.bkd_objective.has_teacher = self.teacher_model is not None and self.bkd_objective.distils
        self.bkd_objective.check(None)


def _evaluation_loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]
