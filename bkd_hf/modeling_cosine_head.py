"""Any image classifier of transformers, with a cosine head in place of its linear one, as a `transformers` model.

This file needs only torch and transformers: it travels with saved models, so that they load with
`trust_remote_code=True` where bkd_hf is not installed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class CosineHeadConfig(PreTrainedConfig):
    """Configuration of a [`CosineHeadForImageClassification`].

    Args:
        classifier_config: Configuration of the classifier, as a dictionary with its `model_type`; the classes are
            those of this configuration.
        head_name: Name of the classifier's last linear layer.
        cosine_scale: Scale s of the logits, s · cos.
    """

    model_type = "cosine_head"

    def __init__(
        self,
        classifier_config: dict[str, Any] | None = None,
        head_name: str = "classifier",
        cosine_scale: float = 30.0,
        **kwargs,
    ):
        self.classifier_config = classifier_config or {"model_type": "vit"}
        self.head_name = head_name
        self.cosine_head = True
        self.cosine_scale = cosine_scale
        self.num_channels = self.classifier_config.get("num_channels", 3)
        for derived in ("cosine_head", "num_channels"):
            kwargs.pop(derived, None)
        super().__init__(**kwargs)


class CosineHead(nn.Linear):
    """Logits `scale · cos(features, class vector)`."""

    def __init__(self, in_features: int, num_labels: int, scale: float):
        super().__init__(in_features, num_labels, bias=False)
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))


class CosineHeadForImageClassification(PreTrainedModel):
    """An image classifier of transformers whose logits are `scale · cos(features, class vector)`, without a bias."""

    config_class = CosineHeadConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: CosineHeadConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        inner = AutoConfig.for_model(**{**config.classifier_config, "num_labels": config.num_labels})
        self.model = AutoModelForImageClassification.from_config(inner)
        head = self.model.get_submodule(config.head_name)
        self.model.set_submodule(
            config.head_name, CosineHead(head.in_features, config.num_labels, config.cosine_scale), strict=True
        )
        self.supports_gradient_checkpointing = self.model.supports_gradient_checkpointing
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[torch.Tensor, ...]:
        """Classify images.

        Args:
            pixel_values: B×channels×height×width.
            labels: B class numbers; the mean cross-entropy is returned with them.
            return_dict: Whether to return a model output (the default) or a tuple.
        """
        logits = self.model(pixel_values=pixel_values).logits
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(CosineHeadConfig.model_type, CosineHeadConfig, exist_ok=True)
AutoModelForImageClassification.register(CosineHeadConfig, CosineHeadForImageClassification, exist_ok=True)
CosineHeadConfig.register_for_auto_class()
CosineHeadForImageClassification.register_for_auto_class("AutoModelForImageClassification")
