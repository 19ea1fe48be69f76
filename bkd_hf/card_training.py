"""The parts of a card about the method and the training of the models (see `bkd_hf.card`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ADAPTER_RANK, HEAD_SCALE, used_by
from .methods import CLASSIFICATION_LOSSES, DISTILLATION_LOSSES, Loss
from .operations import OPERATIONS
from .results import effective_batch_size, training_options
from .tasks import task_of
from .text import markdown

# Title and arXiv number of choices other than losses, which have them in their docstrings.
_SOURCES: dict[str, dict[Any, tuple[str, str]]] = {
    "class_weighting": {
        "reweight": ("class weights by the effective number of examples", "1901.05555"),
        "drw": ("deferred re-weighting", "1906.07413"),
    },
    "sampler": {"class_balanced": ("class-balanced sampling", "1910.09217")},
    "logit_standardization": {True: ("logit standardization", "2403.01427")},
    "adapter": {
        "lora": ("low-rank updates of pretrained weights (LoRA)", "2106.09685"),
        "bitfit": ("biases and normalisation layers alone (BitFit)", "2106.10199"),
    },
}
_LOSSES: dict[str, Mapping[str, Loss | None]] = {
    "classification_loss": CLASSIFICATION_LOSSES,
    "distillation_loss": DISTILLATION_LOSSES,
}


def method_options(results: dict[str, Any]) -> dict[str, Any]:
    """Options of the student's training, with its effective losses: logit adjustment with τ = 0 is cross-entropy."""
    options = training_options(results)
    is_plain = _is_plain("classification_loss", options, results["student"].get("settled_options", {}))
    return {**options, "classification_loss": "cross_entropy"} if is_plain else options


def losses_of(options: dict[str, Any]) -> list[Loss]:
    """The losses of the method; user-defined ones, which are not registered here, are left out."""
    found = [registry.get(options.get(part, "none")) for part, registry in _LOSSES.items()]
    return [loss for loss in found if loss is not None]


def sources_of(options: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Title and arXiv number of each part of the method."""
    found: list[tuple[str, str | None]] = []
    parts = ("classification_loss", "class_weighting", "sampler", "distillation_loss", "logit_standardization",
             "adapter")  # fmt: skip
    for part in parts:
        choice = options.get(part, "none")
        if loss := _LOSSES.get(part, {}).get(choice):
            found.append((loss.title, loss.source))
        elif choice in _SOURCES.get(part, {}):
            found.append(_SOURCES[part][choice])
    if options.get("layer_decay") not in (None, 1):
        found.append(("layer-wise learning-rate decay", "2106.08254"))
    return found


def _augmentation(results: dict[str, Any], model: str) -> str | None:
    """How the training images were augmented; `None` if unknown, and for texts."""
    data = results["options"]["data"]
    views = results[model].get("augmentation", data.get("train_augmentation"))
    if views is None or task_of(results["data"]).name != "image":
        return None
    if views != "none":
        views += ", mirrored half of the time" if data.get("horizontal_flip", True) else ", not mirrored"
    operations = [
        OPERATIONS[name].title if name in OPERATIONS else name for name in data.get("train_operations") or ()
    ]
    return ", ".join(operations if operations and views == "none" else [views, *operations])


def sources_of_operations(options: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Title and arXiv number of the operations on training images; user-defined ones are left out."""
    known = [OPERATIONS[name] for name in options.get("train_operations") or () if name in OPERATIONS]
    return [(operation.title, operation.source) for operation in known]


def training_rows(results: dict[str, Any]) -> dict[str, Any]:
    """The training settings: a row for each setting, a column for each model trained in this run."""
    task = task_of(results["data"]).name
    models = [model for model in ("teacher", "student") if (results.get(model) or {}).get("training")]
    rows: dict[str, list[str]] = {}
    for model in models:
        options, about = training_options(results, model), results[model]["training"]
        method = results[model].get("method") or "ce" if model == "teacher" else results.get("method") or "bkd"
        schedule = options["lr_scheduler_type"]
        if options.get("lr_step_epochs"):
            steps = zip(options["lr_step_epochs"], options["lr_step_factors"], strict=True)
            schedule = "steps: " + ", ".join(f"× {factor:g} from epoch {epoch:g}" for epoch, factor in steps)
            if options.get("lr_warmup_epochs"):
                schedule += f"; epochs of warm-up: {options['lr_warmup_epochs']:g}"
        elif options.get("warmup_steps"):
            schedule += f", warm-up {options['warmup_steps']:g}"
        ema = f", weights averaged (EMA, decay {decay:g})" if (decay := options.get("ema_decay")) else ""
        layers = f", a layer's rate {decay:g} times that above" if (decay := options.get("layer_decay")) else ""
        momentum = f" with momentum {options['momentum']:g}" if options.get("momentum") else ""
        processes, seconds = results["hardware"]["num_processes"], about["seconds"]
        minutes = f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
        scale = options.get("head_scale") or HEAD_SCALE
        head = f", cosine head with scale {scale:g}" if options.get("head") == "cosine" else ""
        if adapter := options.get("adapter"):
            trained, rank = results[model].get("num_trained_parameters"), options.get("adapter_rank") or ADAPTER_RANK
            low_rank = f" of rank {rank}, α {options.get('adapter_alpha') or 2 * rank:g}" if adapter == "lora" else ""
            head += f", adapter {adapter}{low_rank}" + (f": {trained:,} trained" if trained is not None else "")
        for title, value in {
            "model": f"{results[model]['model']} ({results[model]['num_parameters']:,} parameters){head}",
            "method": f"{method}: {_loss(options, results[model].get('settled_options', {}))}",
            "epochs, steps": f"{about['epochs']:g}, {about['steps']:,}",
            f"{task}s in a step": f"{effective_batch_size(results, model):,} = "
            f"{options['per_device_train_batch_size']} × {options['gradient_accumulation_steps']} accumulated × "
            f"{processes} process{'es' if processes > 1 else ''}",
            "optimizer": f"{options['optim']}{momentum}, learning rate {options['learning_rate']:g}, weight decay "
            f"{options['weight_decay']:g}{layers}{ema}",
            "schedule": schedule,
            "augmentation": _augmentation(results, model),
            "time": f"{f'{seconds:.0f} s' if seconds < 120 else minutes}, "
            f"{about['images_per_second']:,.0f} {task}s a second",
        }.items():
            rows.setdefault(title, []).append("–" if value is None else markdown(value))
    models = models if results.get("teacher") else ["this model"] * len(models)
    return {"models": models, "rows": {title: values for title, values in rows.items() if {*values} != {"–"}}}


def _loss(options: dict[str, Any], settled: Mapping[str, float]) -> str:
    """E.g. "cross_entropy + bkd (temperature 2, class_balance_beta 0.9999, class_balance_power 1 (measured))"."""
    terms = []
    for part in ("classification_loss", "distillation_loss"):
        if options.get(part) not in (None, "none"):
            told = {name: options.get(name) for name in used_by(part, options)}
            numbers = [
                name if value is True else f"{name} {_settled(value, settled.get(name))}"
                for name, value in told.items()
                if value is not None and value is not False
            ]
            plain = ", so it is plain cross-entropy" if _is_plain(part, options, settled) else ""
            terms.append(options[part] + (f" ({', '.join(numbers)}{plain})" if numbers else ""))
    about = {"class_weighting": "none", "sampler": "instance", "empty_classes": "error"}
    others = [f"{part} {options[part]}" for part, usual in about.items() if options.get(part) not in (None, usual)]
    return " + ".join(terms) + "".join(f", {other}" for other in others)


def _is_plain(part: str, options: Mapping[str, Any], settled: Mapping[str, float]) -> bool:
    """Whether a loss is logit adjustment with τ = 0."""
    name = "logit_adjustment_tau"
    return options.get(part) == "logit_adjustment" and settled.get(name, options.get(name)) == 0


def _settled(value: Any, number: float | None) -> str:
    """E.g. "2", or "0.71 (measured)" for a measured option."""
    if not isinstance(value, str):
        return f"{value:g}"
    return value if number is None else f"{number:.3g} ({value})"
