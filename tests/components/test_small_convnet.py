from __future__ import annotations

import pytest
import torch
from torch import nn

from heliostat.components import SmallConvNet


def test_parts_make_the_whole_as_in_timm() -> None:
    network = SmallConvNet(in_channels=3, widths=(4, 8), num_classes=5).eval()
    pictures = torch.randn(2, 3, 9, 17)
    features = network.forward_features(pictures)
    assert features.shape == (2, network.num_features, 2, 4)
    pooled = network.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    output = network(pictures)
    assert output.shape == (2, 5)
    assert torch.equal(output, network.forward_head(features))
    assert torch.equal(output, network.get_classifier()(pooled))


def test_default_size() -> None:
    network = SmallConvNet()
    assert sum(p.numel() for p in network.parameters()) == 9 * (32 + 32 * 64 + 64 * 128) + 2 * 224 + 129 * 64
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == 3


def test_every_parameter_learns() -> None:
    network = SmallConvNet(widths=(4, 8))
    network(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"at least 8 x 8 pixels, halved by each of 3 .* got shape \(2, 1, 7, 9\)"):
        SmallConvNet()(torch.ones(2, 1, 7, 9))
    with pytest.raises(ValueError, match="widths must hold the channels of one stage or more"):
        SmallConvNet(widths=())
