"""The CIFAR ResNet of the literature (He et al., 2016, arXiv 1512.03385, section 4.2) as a `transformers` model.

This file needs only torch and transformers: it travels with saved models, so that they load with
`trust_remote_code=True` where bkd_hf is not installed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class CifarResNetConfig(PreTrainedConfig):
    """Configuration of a [`CifarResNetForImageClassification`].

    Args:
        depth: 6n + 2 layers: 20, 32, 44, 56, 110, … (8 is the smallest).
        hidden_sizes: Channels of the three stages.
        shortcut: How a residual connection changes shape: `"A"`, subsampling and zero padding (no parameters), or
            `"B"`, a 1×1 convolution.
        cosine_head: Whether the logits are `cosine_scale · cos(features, class vector)`, as margin losses want it,
            instead of a linear map.
        cosine_scale: Scale s of the cosine head.
        num_channels: Channels of the images.
        image_size: Height and width in pixels that the model was made for (any size runs).

    Raises:
        ValueError: If the depth is not 6n + 2 or the shortcut is unknown.
    """

    model_type = "cifar_resnet"

    def __init__(
        self,
        depth: int = 32,
        hidden_sizes: tuple[int, int, int] = (16, 32, 64),
        shortcut: str = "A",
        cosine_head: bool = False,
        cosine_scale: float = 30.0,
        num_channels: int = 3,
        image_size: int = 32,
        **kwargs,
    ):
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 with n ≥ 1 (20, 32, 44, 56, 110, …), got {depth}.")
        if shortcut not in ("A", "B"):
            raise ValueError(f'shortcut must be "A" (parameter-free) or "B" (projection), got {shortcut!r}.')
        self.depth = depth
        self.hidden_sizes = list(hidden_sizes)
        self.shortcut = shortcut
        self.cosine_head = cosine_head
        self.cosine_scale = cosine_scale
        self.num_channels = num_channels
        self.image_size = image_size
        super().__init__(**kwargs)


class CifarResNetShortcut(nn.Module):
    """Identity, or where the shape changes option A or B of the paper."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: str):
        super().__init__()
        self.stride = stride
        self.added_channels = out_channels - in_channels
        changes_shape = stride != 1 or in_channels != out_channels
        self.projection: nn.Module | None = None
        if changes_shape and kind == "B":
            self.projection = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.projection is not None:
            return self.projection(hidden)
        if self.stride != 1:
            hidden = hidden[:, :, :: self.stride, :: self.stride]
        if self.added_channels:
            before = self.added_channels // 2
            hidden = F.pad(hidden, (0, 0, 0, 0, before, self.added_channels - before))
        return hidden


class CifarResNetBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = CifarResNetShortcut(in_channels, out_channels, stride, shortcut)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.norm1(self.conv1(hidden)))
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(hidden))


class CifarResNetCosineHead(nn.Module):
    """Logits `scale · cos(features, class vector)`."""

    def __init__(self, in_features: int, num_labels: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_labels, in_features))
        self.scale = scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))


class CifarResNetForImageClassification(PreTrainedModel):
    """CIFAR ResNet with a linear or cosine classification head.

    ResNet-32 with shortcut A has 464,154 parameters for 10 classes (the literature's 0.46 M), 470,004 for 100.
    """

    config_class = CifarResNetConfig
    base_model_prefix = "cifar_resnet"
    main_input_name = "pixel_values"
    _no_split_modules = ["CifarResNetBlock"]  # noqa: RUF012 (transformers' own convention)

    def __init__(self, config: CifarResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        channels = config.hidden_sizes[0]
        self.conv = nn.Conv2d(config.num_channels, channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        blocks: list[nn.Module] = []
        for stage, out_channels in enumerate(config.hidden_sizes):
            for block in range((config.depth - 2) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(CifarResNetBlock(channels, out_channels, stride, config.shortcut))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.classifier: nn.Module
        if config.cosine_head:
            self.classifier = CifarResNetCosineHead(channels, config.num_labels, config.cosine_scale)
        else:
            self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> None:
        """Return that there are none, of which FSDP of accelerate asks."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear, CifarResNetCosineHead)):
            nn.init.kaiming_normal_(module.weight)

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
        hidden = F.relu(self.norm(self.conv(pixel_values)))
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.classifier(hidden.mean(dim=(2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig, exist_ok=True)
AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification, exist_ok=True)
CifarResNetConfig.register_for_auto_class()
CifarResNetForImageClassification.register_for_auto_class("AutoModelForImageClassification")
