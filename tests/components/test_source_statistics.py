from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heliostat.components import SmallConvNet
from heliostat.components.gaussians import class_gaussians
from heliostat.components.source_statistics import fit_class_gaussians, weights_fingerprint
from tests.harness import ProcessPool

CLASSES = 3


class Network(nn.Module):
    """BatchNorm and dropout, which tell eval mode from training; a linear layer behind the head, to be looked past."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(5, CLASSES)
        self.auxiliary = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def network() -> Network:
    torch.manual_seed(0)
    model = Network()
    model(torch.randn(40, 6) + 1)  # running statistics that are not the initial ones
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(41, 6, generator=generator), torch.arange(41) % CLASSES


def pairs(size: int = 8) -> list[Any]:
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def assert_equal(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.count, expected.count)
    torch.testing.assert_close(actual.mean, expected.mean)
    torch.testing.assert_close(actual.covariance, expected.covariance)


@pytest.mark.parametrize("covariance", ["class", "tied"])
def test_equals_the_gaussians_of_all_features_at_once(covariance: str) -> None:
    model, (x, y) = network(), data()
    with torch.no_grad():
        expected = class_gaussians(copy.deepcopy(model).eval().body(x), y, CLASSES, covariance=covariance)
    with torch.inference_mode():
        actual = fit_class_gaussians(model, pairs(), head="head", covariance=covariance)
    assert_equal(actual, expected)
    assert not actual.mean.is_inference()
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_modes_are_restored_one_by_one() -> None:
    model = network()
    model.body[1].eval()
    fit_class_gaussians(model, pairs(), head="head")
    assert [name for name, module in model.named_modules() if not module.training] == ["body.1"]


def test_dicts_and_outputs_with_logits() -> None:
    class Transformers(Network):
        def forward(self, pixel_values: Tensor) -> Any:
            return SimpleNamespace(logits=super().forward(pixel_values))

    model = Transformers()
    model.load_state_dict(network().state_dict())
    batches = [{"pixel_values": x, "labels": y, "index": y} for x, y in pairs()]
    assert_equal(
        fit_class_gaussians(model, batches, head=model.head), fit_class_gaussians(network(), pairs(), head="head")
    )


def test_head_of_a_network_that_names_it() -> None:
    model = SmallConvNet(widths=(4, 6), num_classes=CLASSES).eval()
    pictures, labels = torch.randn(20, 1, 8, 8), torch.arange(20) % CLASSES
    features = model.forward_head(model.forward_features(pictures), pre_logits=True).detach()
    assert_equal(fit_class_gaussians(model, [(pictures, labels)]), class_gaussians(features, labels, CLASSES))


def test_samples_that_are_not_finite_are_left_out_and_counted() -> None:
    (x, y), model = data(), network()
    broken = x.clone()
    broken[3], broken[7, 0] = torch.inf, torch.nan
    kept = torch.ones(41, dtype=torch.bool)
    kept[[3, 7]] = False
    with pytest.warns(UserWarning, match="2 samples have NaN or infinite features"):
        actual = fit_class_gaussians(model, [(broken, y)], head="head")
    assert_equal(actual, fit_class_gaussians(model, [(x[kept], y[kept])], head="head"))


def _twice(model: Network) -> None:
    model.forward = lambda x: model.head(model.body(x)) + model.head(model.body(x))  # type: ignore[method-assign]


def _map(model: Network) -> None:
    model.forward = lambda x: model.head(model.body(x)[:, None])[:, 0]  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "batches", "head", "pattern"),
    [
        (None, [], "head", "batches: there is none"),
        (None, [{"labels": torch.zeros(2)}], "head", "a dict lacks pixel_values; it has labels"),
        (None, [{}], "head", "lacks pixel_values and labels; it has no key"),
        (None, [torch.zeros(2, 6)], "head", "pairs of tensors, inputs and labels; got Tensor"),
        (None, [(torch.zeros(2, 6),) * 3], "head", "got tuple of 3"),
        (None, [(torch.zeros(2, 6), torch.tensor([0, 3]))], "head", "labels must lie in 0..2, got 0..3"),
        (None, pairs(), "tail", "head: the model has no module 'tail'"),
        (None, pairs(), "auxiliary", "head must be called once in a forward, but was called 0 times"),
        (_twice, pairs(), "head", "called 2 times"),
        (_map, pairs(), "head", r"its input must be features \(N, D\) with N = 8, got \(8, 1, 5\)"),
    ],
)
def test_errors(change: Callable[[Network], None] | None, batches: list, head: str, pattern: str) -> None:
    model = network()
    if change:
        change(model)
    with pytest.raises(ValueError, match=pattern):
        fit_class_gaussians(model, batches, head=head)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_two_processes_equal_one(two_processes: ProcessPool) -> None:
    expected = fit_class_gaussians(network(), pairs(), head="head")
    for actual in two_processes.run(_fit_share):
        assert_equal(actual, expected)


def _fit_share(rank: int) -> Any:
    return fit_class_gaussians(network(), pairs()[rank::2], head="head")


class TestFingerprint:
    def test_same_weights(self) -> None:
        model = network()
        mark = weights_fingerprint(model)
        assert weights_fingerprint(network()) == mark
        assert weights_fingerprint(nn.ModuleDict({"renamed": model})) == mark
        assert weights_fingerprint(network().double()) == mark
        assert weights_fingerprint(network().eval()) == mark

    @pytest.mark.parametrize("name", list(network().state_dict()))
    def test_any_change_shows(self, name: str) -> None:
        model = network()
        value = model.state_dict()[name]
        value.view(-1)[-1] += 1 if name.endswith("tracked") else 1e-6
        assert weights_fingerprint(model) != weights_fingerprint(network())

    def test_other_shapes_and_precisions(self) -> None:
        assert weights_fingerprint(nn.Conv1d(2, 3, 1)) != weights_fingerprint(nn.Linear(2, 3))
        assert weights_fingerprint(network().bfloat16()) != weights_fingerprint(network())
        weight = torch.ones(2, 3)
        models = [nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False)]
        models[0].weight.data, models[1].weight.data = weight, weight.T
        assert weights_fingerprint(models[0]) != weights_fingerprint(models[1])
