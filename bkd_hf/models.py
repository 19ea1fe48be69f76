"""Models and their processors by name: from the Hub, from a folder, or a fresh CIFAR ResNet or BERT."""

from __future__ import annotations

import copy
import os
import re
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import is_offline_mode
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ViTImageProcessorPil,
)
from transformers.image_utils import PILImageResampling

from .errors import InputError, first_line
from .head import answer_one_class, head_modules, shift_logits
from .modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from .modeling_cosine_head import CosineHeadConfig, CosineHeadForImageClassification
from .sharding import bare_type, whole_weights
from .tasks import DEFAULT_TASK, TASKS
from .text import normal, one_line

_HEAD_WIDTH = 64  # of a BERT
#: Default height and width of images for fresh weights.
FRESH_IMAGE_SIZE = 32
#: Default number of tokens of a text, if a model accepts as many.
MAX_LENGTH = 512
_MAX_DEPTH = 1202  # of the paper
_MANY_CLASSES = 7919  # a prime that no layer's size has by chance


def cifar_resnet_depth(name: str) -> int | None:
    """Depth in a name such as `cifar-resnet-32`; `None` for any other name.

    Raises:
        InputError: If there is no CIFAR ResNet of that depth.
    """
    match = TASKS["image"].fresh.fullmatch(name)
    if match is None:
        return None
    depth = int(match[1])
    if not 8 <= depth <= _MAX_DEPTH or (depth - 2) % 6:
        raise InputError(
            f"There is no {name}: the depth must be 6n + 2, up to {_MAX_DEPTH}, e.g. cifar-resnet-20, -32, -44, -56 "
            "or -110."
        )
    return depth


def bert_shape(name: str) -> tuple[int, int] | None:
    """Layers and width in a name such as `bert-2x128`; `None` for any other name.

    Raises:
        InputError: If there is no BERT of that shape.
    """
    match = TASKS["text"].fresh.fullmatch(name)
    if match is None:
        return None
    layers, width = int(match[1]), int(match[2])
    if not layers or not width or width % _HEAD_WIDTH:
        raise InputError(
            f"There is no {name}: expected bert-LAYERSxWIDTH with a width of {_HEAD_WIDTH} or a multiple of it, e.g. "
            "bert-2x128."
        )
    return layers, width


def load_classifier(
    name: str,
    class_names: list[str],
    image_size: int = 32,
    cosine_scale: float | None = None,
    task: str = DEFAULT_TASK,
    processor: Any = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load a model to be trained, with a head for these classes.

    Args:
        name: `cifar-resnet-20`, `-32`, `-44`, `-56`, `-110`, …, or `bert-LAYERSxWIDTH`, for fresh weights; otherwise a
            folder or a Hub id, whose head is replaced by a fresh one if it is for other classes.
        class_names: Names of the C classes, stored in the model's configuration.
        image_size: Image size of a fresh model.
        cosine_scale: Scale s of a cosine head, with logits s · cos, as needed for the margins of LDAM; `None` for the
            model's own kind of head. A model of transformers is wrapped in a [`CosineHeadForImageClassification`].
        task: What it classifies: `"image"` or `"text"`.
        processor: The model's processor; a fresh BERT gets the vocabulary of this tokenizer.
        from_pretrained_kwargs: For `from_pretrained` (`cache_dir`, `revision`, `token`, `trust_remote_code`).

    Returns:
        The model; its attribute `new_parameters` lists the names of parameters that are not from the given weights.

    Raises:
        InputError: If there is no such model, it does not accept RGB images, or it cannot have a cosine head.
    """
    overrides: dict[str, Any] = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: number for number, name in enumerate(class_names)},
    }
    cosine = {} if cosine_scale is None else {"cosine_head": True, "cosine_scale": cosine_scale}
    model = _fresh_classifier(name, image_size, processor, overrides, cosine)
    if model is not None:
        model.new_parameters = [parameter for parameter, _ in model.named_parameters()]
        return model
    config = load_config(name, cosine_scale, task, **from_pretrained_kwargs)
    if hasattr(config, "cosine_head"):
        overrides, cosine_scale = overrides | cosine, None
    try:
        model, info = TASKS[task].auto_model.from_pretrained(
            name,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **overrides,
            # The default is the file's dtype, and training in half precision loses small updates.
            **{"dtype": torch.float32, **from_pretrained_kwargs},
        )
        names = label_names(config)
    except Exception as error:  # whatever a library raises about what is in the files
        raise not_loadable(name, error, task) from error
    if getattr(model.config, "num_channels", 3) != 3:
        raise InputError(f"The model {name} takes images of {model.config.num_channels} channels; RGB is needed.")
    if task == "text" and model.config.pad_token_id is None:  # needed for batches
        model.config.pad_token_id = getattr(processor, "pad_token_id", None)
    new = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    answer_one_class(model)
    if names is not None and names != class_names:
        new |= _renew_head(model)
    model.new_parameters = sorted(new)
    return model if cosine_scale is None else _with_cosine_head(model, cosine_scale)


def _fresh_classifier(
    name: str,
    image_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    overrides: dict[str, Any],
    cosine: dict[str, Any],
) -> PreTrainedModel | None:
    """Create a model with fresh weights; `None` if the name does not ask for one."""
    if (depth := cifar_resnet_depth(name)) is not None:
        config = CifarResNetConfig(depth=depth, image_size=image_size, **overrides, **cosine)
        return CifarResNetForImageClassification(config)
    if (shape := bert_shape(name)) is None:
        return None
    if tokenizer is None:
        raise InputError(f"{name} has fresh weights: give the tokenizer whose tokens it is to know.")
    layers, width = shape
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // _HEAD_WIDTH,
            intermediate_size=4 * width,
            max_position_embeddings=max(MAX_LENGTH, 0 if is_unlimited(tokenizer) else tokenizer.model_max_length),
            pad_token_id=tokenizer.pad_token_id,
            **overrides,
        )
    )


def is_unlimited(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has no maximal length; transformers then gives it a huge one."""
    return tokenizer.model_max_length > 10**9


def load_config(
    name: str, cosine_scale: float | None = None, task: str = DEFAULT_TASK, **from_pretrained_kwargs: Any
) -> PreTrainedConfig:
    """Load the configuration of a model with weights that will be trained (arguments as [`load_classifier`]).

    Raises:
        InputError: If there is no such model, it is for another task, or it cannot have a cosine head.
    """
    try:
        config = AutoConfig.from_pretrained(name, **from_pretrained_kwargs)
    except Exception as error:  # whatever a library raises about what is in the files
        raise not_loadable(name, error, task) from error
    TASKS[task].check(name, config)
    if cosine_scale is not None and not hasattr(config, "cosine_head"):
        linear_head(config, name)
    return config


def linear_head(config: PreTrainedConfig, name: str = "") -> str:
    """Return the name of the linear layer that computes a model's logits, found with a model without weights.

    Args:
        config: The model's configuration; with very many classes, no other layer has as many outputs.
        name: Name of the model in an error.

    Raises:
        InputError: If there is no single such layer, so that no cosine head can replace it.
    """
    why, found, of_classes = "its code is not part of transformers", [], []
    if type(config).__module__.startswith("transformers.") and type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        probe = copy.deepcopy(config)
        probe.num_labels = _MANY_CLASSES
        try:
            with torch.device("meta"):
                model = AutoModelForImageClassification.from_config(probe)
        except Exception as error:  # as above
            raise not_loadable(name, error) from error
        of_classes = [key for key, tensor in model.state_dict().items() if _MANY_CLASSES in tensor.shape]
        linear = [(key, module) for key, module in model.named_modules() if type(module) is nn.Linear]
        found = [key for key, module in linear if module.out_features == _MANY_CLASSES]
        why = f"its logits are not those of one linear layer, but of {', '.join(of_classes) or 'none'}"
    if len(found) != 1 or {*of_classes} - {f"{found[0]}.weight", f"{found[0]}.bias"}:
        raise InputError(
            f"--head cosine, which --classification_loss ldam needs, cannot be had with {name} ({config.model_type}): "
            f"{why}. Use another model, or balanced_softmax or logit_adjustment, which work with any head."
        )
    return found[0]


def _with_cosine_head(model: PreTrainedModel, scale: float) -> CosineHeadForImageClassification:
    """Replace a classifier's head by a cosine head, keeping all weights except the head's bias."""
    about, head = model.config.to_dict(), linear_head(model.config)
    of_this_model = ("id2label", "label2id", "problem_type", "dtype", "_name_or_path", "transformers_version")
    config = CosineHeadConfig(
        {name: value for name, value in about.items() if name not in of_this_model}, head, scale,
        id2label=model.config.id2label, label2id=model.config.label2id,
    )  # fmt: skip
    config.name_or_path = model.config.name_or_path
    found, bias = CosineHeadForImageClassification(config).to(model.dtype), f"{head}.bias"
    found.model.load_state_dict({name: value for name, value in model.state_dict().items() if name != bias})
    found.new_parameters = [f"model.{name}" for name in model.new_parameters if name != bias]
    return found


def label_names(config: PreTrainedConfig | None) -> list[str] | None:
    """Return the names of a model's outputs; `None` if it has none, or generic ones (`LABEL_0`, …)."""
    named = getattr(config, "id2label", None) or {}
    numbered = sorted((int(number), normal(str(name))) for number, name in named.items())
    names = [name for _, name in numbered]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def why_not_alike(student: nn.Module, teacher: nn.Module) -> str | None:
    """Return why a student cannot use a teacher's weights; `None` if it can."""
    if bare_type(student) is not bare_type(teacher):
        return f"the student is a {bare_type(student).__name__}, the teacher a {bare_type(teacher).__name__}"
    of_student, of_teacher = student.state_dict(), teacher.state_dict()
    for name in sorted({*of_student, *of_teacher}):
        shapes = [tuple(state[name].shape) if name in state else None for state in (of_student, of_teacher)]
        if shapes[0] != shapes[1]:
            return f"{name} has the shape {shapes[0]} in the student, {shapes[1]} in the teacher"
    return None


@torch.no_grad()
def start_from_teacher(
    student: nn.Module, teacher: nn.Module, class_counts: np.ndarray | None = None, prior: float = 1.0
) -> None:
    """Copy a teacher's weights to a student of the same architecture (see [`why_not_alike`]).

    Args:
        student: Changed in place.
        teacher: Source of the weights.
        class_counts: C numbers of training images, to remove the class frequencies from the student's logits by the
            bias of its head, if it has one, like post-hoc logit adjustment; `None` keeps them.
        prior: κ, how much of the class frequencies the teacher's logits contain, 0 to 1.
    """
    student.load_state_dict(whole_weights(teacher), strict=True)
    if class_counts is None:
        return
    log_counts = torch.from_numpy(class_counts).clamp_min(1).double().log()
    shift_logits(student, prior * (log_counts.mean() - log_counts))


def _renew_head(model: PreTrainedModel) -> set[str]:
    """Draw fresh weights for the head, whose weights are for other classes, and return their names."""
    new = set()
    for prefix, head in head_modules(model).items():
        for module in head.modules():
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = False  # type: ignore[attr-defined]
            module._is_hf_initialized = False  # type: ignore[assignment]
            model._init_weights(module)
        new |= {f"{prefix}.{name}" for name, _ in head.named_parameters()}
    return new


def load_processor(
    name: str,
    image_size: int = 32,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    task: str = DEFAULT_TASK,
    **from_pretrained_kwargs: Any,
) -> Any:
    """Load a model's image processor or tokenizer.

    For a fresh CIFAR ResNet, it is made from the other arguments; for a fresh BERT see `fresh_tokenizer`.

    Args:
        name: As for [`load_classifier`].
        image_size: Height and width in pixels, for a fresh model.
        image_mean: Mean of each channel in [0, 1], for a fresh model; 0.5 if not given.
        image_std: Standard deviation of each channel, for a fresh model; 0.5 if not given.
        task: What the model classifies: `"image"` or `"text"`.
        from_pretrained_kwargs: For `from_pretrained` (`cache_dir`, `revision`, `token`, `trust_remote_code`).

    Raises:
        InputError: If there is no such model, or it comes without a processor.
    """
    if cifar_resnet_depth(name) is not None:
        return ViTImageProcessorPil(
            size={"height": image_size, "width": image_size},
            resample=PILImageResampling.BILINEAR,
            image_mean=image_mean or [0.5] * 3,
            image_std=image_std or [0.5] * 3,
        )
    try:
        # Always Pillow, even with torchvision installed, whose resizing gives slightly different pixels: a saved
        # teacher's would differ from those of a fresh student.
        backend = {"backend": "pil"} if task == "image" else {}
        return TASKS[task].auto_processor.from_pretrained(name, **backend, **from_pretrained_kwargs)
    except Exception as error:  # as above
        raise not_loadable(name, error, task) from error


def check_image_size(name: str, config: PreTrainedConfig, image_size: int) -> None:
    """Check that a model accepts an image size, using a model without weights.

    Raises:
        InputError: If it accepts images of its own size, but not of this one.
    """

    def why_not(size: int) -> Exception | None:
        try:
            with torch.device("meta"), torch.no_grad():
                model = AutoModelForImageClassification.from_config(copy.deepcopy(config)).eval()
                model(pixel_values=torch.zeros(1, 3, size, size))
        except Exception as error:  # whatever a model raises
            return error
        return None

    own: Any = getattr(config, "image_size", None)
    error = why_not(image_size) if isinstance(own, int) and own != image_size else None
    if error is not None and why_not(own) is None:
        raise InputError(
            f"--image_size {image_size}: {one_line(name, 80)} ({config.model_type}) takes images of {own}×{own} "
            f"pixels only, as its position embeddings are not interpolated ({one_line(first_line(error), 100)}). "
            "Leave it out, or use a model that takes any size, such as a ResNet, ConvNeXt or DINOv2."
        )


def prefer_channels_last(model: nn.Module) -> bool:
    """Store the weights of a convolutional model channels-last; return whether there are any.

    Results are the same up to rounding; on CPUs and tensor cores, convolutions become faster.
    """
    if not any(isinstance(module, nn.Conv2d) and module.kernel_size != module.stride for module in model.modules()):
        return False  # none, or patch embeddings only
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return True


def place_of(name: str) -> str:
    """Say where a model was looked for."""
    if os.path.isdir(name):
        return "a folder here"
    offline = "HF_HUB_OFFLINE is set, so the Hub was not asked, and it is not among the downloads"
    return f"no folder here; {offline if is_offline_mode() else 'on the Hub'}"


def not_loadable(name: str, error: Exception, task: str = DEFAULT_TASK) -> InputError:
    """Say in one line why a model's files cannot be used."""
    return InputError(
        f"The model {one_line(name, 80)} cannot be loaded ({place_of(name)}): {one_line(first_line(error), 300)}. "
        f"Give a Hub id, a folder written by save_pretrained, or {TASKS[task].fresh_names} for fresh weights."
    )


def load_weights_strictly(model: PreTrainedModel, checkpoint: str) -> None:
    """Load all weights from a folder by `from_pretrained`, as users will.

    Raises:
        ValueError: If names or shapes differ.
    """
    try:
        saved, info = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=model.dtype, output_loading_info=True
        )
    except RuntimeError as error:  # other shapes
        raise ValueError(f"The checkpoint {checkpoint} does not fit the model: {error}") from error
    problems = {name: keys for name, keys in info.items() if keys and name.endswith("_keys")}
    if problems:
        raise ValueError(f"The checkpoint {checkpoint} does not fit the model: {problems}.")
    model.load_state_dict(saved.state_dict(), strict=True)
