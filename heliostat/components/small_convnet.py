"""A small convolutional network with BatchNorm and timm's interface, for pictures of some 8 to 64 pixels a side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class SmallConvNet(nn.Module):
    """Stages of convolution, BatchNorm, ReLU and pooling, the mean over all places, and a linear layer.

    It trains in seconds on a CPU and stands wherever a timm model can: ``num_features``, ``forward_features``,
    ``forward_head`` and ``get_classifier`` are timm's.

    Args:
        in_channels: Channels of the pictures.
        widths: Channels of each stage; each halves height and width.
        num_classes: Outputs of the linear layer: classes, or the dimension of an embedding.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (32, 64, 128), num_classes: int = 64) -> None:
        super().__init__()
        if not widths:
            raise ValueError("widths must hold the channels of one stage or more, got none")
        channels = [in_channels, *widths]
        self.stages = nn.Sequential(*(_stage(*pair) for pair in zip(channels, widths, strict=False)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels[-1]
        self.classifier = nn.Linear(self.num_features, num_classes)

    def forward_features(self, pixel_values: Tensor) -> Tensor:
        """Feature maps ``(B, num_features, H / 2^stages, W / 2^stages)`` of pictures ``(B, C, H, W)``."""
        least = 2 ** len(self.stages)
        if min(pixel_values.shape[-2:]) < least:
            raise ValueError(
                f"pixel_values must have at least {least} x {least} pixels, halved by each of {len(self.stages)} "
                f"stages, got shape {tuple(pixel_values.shape)}"
            )
        return self.stages(pixel_values)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Outputs ``(B, num_classes)`` of feature maps, or with ``pre_logits`` their means ``(B, num_features)``."""
        pooled = self.pool(features).flatten(1)
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Outputs ``(B, num_classes)`` of pictures ``(B, C, H, W)``."""
        return self.forward_head(self.forward_features(pixel_values))

    def get_classifier(self) -> nn.Linear:
        """The linear layer."""
        return self.classifier


def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
