from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heliostat.components import UNPGHead, margin_logits, unified_negatives, unpg_loss
from tests.harness import GoldenCase, OperatorContract, golden

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
CLASSES, DIM = 6, 12
HEADS = ("arcface", "cosface")


def batch(rows: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings that lean to their class's centre, labels, and class weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(CLASSES, DIM, generator=generator)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    embeddings = 0.7 * weight[labels] + torch.randn(rows, DIM, generator=generator)
    return embeddings, labels, weight


def cosines_of(embeddings: Tensor, weight: Tensor) -> Tensor:
    return F.normalize(embeddings, dim=1) @ F.normalize(weight, dim=1).T


def naive_loss(logits: Tensor, embeddings: Tensor, labels: Tensor, scale: float, whisker: float) -> Tensor:
    """The definition: one N x (C + K) matrix of logits, and pairs collected in a loop."""
    f = F.normalize(embeddings, dim=1)
    n = len(f)
    values = [f[i] @ f[j] for i in range(n) for j in range(i + 1, n) if labels[i] != labels[j]]
    ordered = sorted(value.item() for value in values)
    q1, q3 = ordered[math.floor(0.25 * len(ordered))], ordered[math.floor(0.75 * len(ordered))]
    lower, upper = q1 - whisker * (q3 - q1), q3 + whisker * (q3 - q1)
    kept = torch.stack([value for value in values if lower <= value.item() <= upper])
    return F.cross_entropy(scale * torch.cat([logits, kept.expand(n, -1)], dim=1), labels)


class TestLoss(OperatorContract):
    """The loss as a function of two free inputs, margin logits and embeddings."""

    differentiable = ("logits", "embeddings")
    split = {"logits": 0, "embeddings": 0, "labels": 0}  # noqa: RUF012

    def call(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        return unpg_loss(logits, embeddings, labels, scale=8.0, whisker=0.5)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        embeddings, labels, weight = batch(rows)
        logits = margin_logits(cosines_of(embeddings, weight), labels, head="cosface", margin=0.3)
        return {"logits": logits, "embeddings": embeddings, "labels": labels}

    def degenerate_cases(self):
        e = self.example()
        one_class = e | {"labels": torch.zeros_like(e["labels"])}
        return {
            "one row": {name: value[:1] for name, value in e.items()},
            "one class": one_class,
            "one pair": {name: value[:2] for name, value in e.items()} | {"labels": torch.tensor([0, 3])},
            "all classes distinct": {name: value[:CLASSES] for name, value in e.items()}
            | {"labels": torch.arange(CLASSES)},
            "all embeddings equal": e | {"embeddings": torch.ones(16, DIM)},
            "zero embeddings": e | {"embeddings": torch.zeros(16, DIM)},
            "huge embeddings": e | {"embeddings": e["embeddings"] * 1e17},
            "logits at both ends": e | {"logits": e["logits"].sign()},
        }

    def error_cases(self):
        e = self.example()
        z, x, y = e["logits"], e["embeddings"], e["labels"]
        return {
            "embeddings": (lambda: unpg_loss(z, x[0], y), r"embeddings must have shape \(N, d\).*got \(12,\)"),
            "empty": (lambda: unpg_loss(z[:0], x[:0], y[:0]), "N >= 1"),
            "labels": (lambda: unpg_loss(z, x, y[1:]), r"labels must have shape \(N,\) .* = 16, got \(15,\)"),
            "logits": (lambda: unpg_loss(z[:, 0], x, y), r"margin_logits must have shape \(N, C\).*got \(16,\)"),
            "logits of other rows": (lambda: unpg_loss(z[1:], x, y), r"N = margin_logits.shape\[0\] = 15, got \(16,\)"),
            "label too large": (lambda: unpg_loss(z[:, :3], x, y), r"labels must lie in 0..2, .*got 0..5"),
            "label negative": (lambda: unpg_loss(z, x, y - 1), r"labels must lie in 0..5, .*got -1..4"),
            "label dtype": (lambda: unpg_loss(z, x, y.float()), "labels must be integers, got torch.float32"),
            "scale": (lambda: unpg_loss(z, x, y, scale=0.0), "scale must be > 0 and finite, got 0.0"),
            "whisker": (lambda: unpg_loss(z, x, y, whisker=-1.0), "whisker must be >= 0, or None .*got -1.0"),
            "whisker nan": (lambda: unpg_loss(z, x, y, whisker=math.nan), "whisker must be >= 0"),
            "reduction": (lambda: unpg_loss(z, x, y, reduction="max"), "reduction must be one of .*'max'"),
            "negatives' labels": (lambda: unified_negatives(x, y[1:]), r"labels must have shape \(N,\)"),
            "negatives' whisker": (lambda: unified_negatives(x, y, -0.5), "whisker must be >= 0"),
            "margin head": (lambda: margin_logits(z, y, head="sphereface", margin=0.5), "head must be one of"),
            "margin": (lambda: margin_logits(z, y, margin=-0.5), "margin must be >= 0 and finite, got -0.5"),
            "margin labels": (
                lambda: margin_logits(z, y + 1, margin=0.5),
                "labels must lie in 0..5, the classes of cos",
            ),
        }


class TestLossOfRows(TestLoss):
    """The same, one value a row: the processes' rows follow each other."""

    def call(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        return unpg_loss(logits, embeddings, labels, scale=8.0, whisker=0.5, reduction="none")

    def error_cases(self):
        return {}


class TestSummedLoss(TestLoss):
    """The same, summed: the ranks' sums add up."""

    rank_reduction = "sum"

    def call(self, logits: Tensor, embeddings: Tensor, labels: Tensor) -> Tensor:
        return unpg_loss(logits, embeddings, labels, scale=8.0, whisker=None, reduction="sum")

    def error_cases(self):
        return {}


HEAD = UNPGHead(DIM, CLASSES, scale=8.0, whisker=0.5)


class TestHead(OperatorContract):
    """Head and loss together, with the class weights as an input."""

    differentiable = ("embeddings", "weight")
    split = {"embeddings": 0, "labels": 0}  # noqa: RUF012

    def call(self, embeddings: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(HEAD, {"weight": weight}, (embeddings, labels))

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        embeddings, labels, weight = batch(rows)
        return {"embeddings": embeddings, "labels": labels, "weight": weight}

    def golden_cases(self) -> dict[str, GoldenCase]:
        cases = {}
        for name, case in golden("unpg").items():
            cases[name] = self._golden_case(case)
            cases[f"{name}, plain head"] = self._golden_base_case(case)
        return cases

    @staticmethod
    def _golden_case(case: dict[str, np.ndarray]) -> GoldenCase:
        kind, scale, margin, whisker = _settings(case)

        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x, y, weight = inputs["embeddings"], inputs["labels"], inputs["class_weights"]
            head = UNPGHead(x.shape[1], len(weight), head=kind, scale=scale, margin=margin, whisker=whisker)
            loss = torch.func.functional_call(head, {"weight": weight}, (x, y))
            logits = margin_logits(cosines_of(x, weight), y, head=kind, margin=margin)
            per_sample = unpg_loss(logits, x, y, scale=scale, whisker=whisker, reduction="none")
            negatives = unified_negatives(x, y, whisker)
            auxiliary = (scale * negatives.values[negatives.keep_mask]).logsumexp(0)
            info = {key: getattr(negatives.info, key) for key in ("kept", "total", "lower", "upper", "q1", "q3")}
            return {"loss": loss, "per_sample": per_sample, "aux_logsumexp": auxiliary, **info}

        names = ["loss", "per_sample", "kept", "total"]
        if case["total"]:  # without negatives there is no quartile
            names += ["lower", "upper", "q1", "q3", "aux_logsumexp"]
        return GoldenCase(
            inputs={key: case[key] for key in ("embeddings", "labels", "class_weights")},
            call=call,
            outputs={key: case[key] for key in names},
            gradients={key: case[f"grad_{key}"] for key in ("embeddings", "class_weights")},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    @staticmethod
    def _golden_base_case(case: dict[str, np.ndarray]) -> GoldenCase:
        kind, scale, margin, _ = _settings(case)

        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x, weight = inputs["embeddings"], inputs["class_weights"]
            head = UNPGHead(x.shape[1], len(weight), head=kind, scale=scale, margin=margin, use_unpg=False)
            loss = torch.func.functional_call(head, {"weight": weight}, (x, inputs["labels"]))
            assert head.diagnostics == {}
            return {"loss": loss}

        return GoldenCase(
            inputs={key: case[key] for key in ("embeddings", "labels", "class_weights")},
            call=call,
            outputs={"loss": case["base_loss"]},
            gradients={"embeddings": case["base_grad_embeddings"]},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        e = self.example()
        x, y, weight = e["embeddings"], e["labels"], e["weight"]
        return {
            "one row": {"embeddings": x[:1], "labels": y[:1], "weight": weight},
            "one class": e | {"labels": torch.full_like(y, 2)},
            "embeddings on their centres": e | {"embeddings": weight[y]},
            "embeddings opposite to their centres": e | {"embeddings": -weight[y]},
            "zero embedding": e | {"embeddings": x.index_fill(0, torch.tensor([3]), 0.0)},
            "zero centre": e | {"weight": weight.index_fill(0, torch.tensor([3]), 0.0)},
        }

    def error_cases(self):
        x, y, _ = batch()
        return {
            "head": (lambda: UNPGHead(DIM, CLASSES, head="sphereface"), "head must be one of .*'sphereface'"),
            "scale": (lambda: UNPGHead(DIM, CLASSES, scale=-1.0), "scale must be > 0"),
            "margin": (lambda: UNPGHead(DIM, CLASSES, margin=math.inf), "margin must be >= 0 and finite, got inf"),
            "whisker": (lambda: UNPGHead(DIM, CLASSES, whisker=-1.0), "whisker must be >= 0"),
            "sizes": (lambda: UNPGHead(DIM, 0), "in_features and num_classes must be >= 1, got 12 and 0"),
            "columns": (lambda: HEAD(x[:, 1:], y), "in_features = 12 columns, got 11"),
            "rows": (lambda: HEAD(x, y[1:]), r"labels must have shape \(N,\)"),
            "label": (lambda: HEAD(x, y + 1), "labels must lie in 0..5"),
        }


def _settings(case: dict[str, np.ndarray]) -> tuple[str, float, float, float]:
    return case["head"].item().decode(), float(case["scale"]), float(case["margin"]), float(case["whisker"])


class TestMarginLogits(OperatorContract):
    """ArcFace's margin; CosFace's is a subtraction."""

    differentiable = ("cosines",)

    def call(self, cosines: Tensor, labels: Tensor) -> Tensor:
        return margin_logits(cosines, labels, margin=0.5)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        embeddings, labels, weight = batch(rows)
        return {"cosines": cosines_of(embeddings, weight), "labels": labels}

    @pytest.mark.parametrize("head", HEADS)
    def test_only_the_true_class_changes(self, head: str) -> None:
        cosines, labels = self.example().values()
        logits = margin_logits(cosines, labels, head=head, margin=0.4)
        true = F.one_hot(labels, CLASSES).bool()
        assert torch.equal(logits[~true], cosines[~true])
        expected = cosines[true] - 0.4 if head == "cosface" else (cosines[true].acos() + 0.4).cos()
        torch.testing.assert_close(logits[true], expected)
        torch.testing.assert_close(margin_logits(cosines, labels, head=head, margin=0.0), cosines)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_cosines_of_one_are_exact_with_finite_gradient(self, dtype: torch.dtype) -> None:
        ends = [1.0, -1.0, 1 + torch.finfo(dtype).eps, 1 - torch.finfo(dtype).eps, -1 + torch.finfo(dtype).eps]
        cosines = torch.tensor(ends, dtype=dtype)[:, None].requires_grad_()
        logits = margin_logits(cosines, torch.zeros(5, dtype=torch.int64), margin=0.5)
        expected = (cosines.detach().double().clamp(-1, 1).acos() + 0.5).cos().to(dtype)
        torch.testing.assert_close(logits, expected)
        logits.sum().backward()
        assert cosines.grad.isfinite().all()

    def test_gradient_is_the_ratio_of_sines(self) -> None:
        theta = torch.linspace(1e-3, math.pi - 1e-3, 50, dtype=torch.float64)
        cosines = theta.cos()[:, None].requires_grad_()
        margin_logits(cosines, torch.zeros(50, dtype=torch.int64), margin=0.5).sum().backward()
        torch.testing.assert_close(cosines.grad[:, 0], (theta + 0.5).sin() / theta.sin())

    def test_nan_propagates(self) -> None:
        assert margin_logits(torch.full((1, 1), math.nan), torch.tensor([0]), margin=0.5).isnan().all()


class TestUnifiedNegatives:
    def test_values_are_the_pairs_of_different_labels_once(self) -> None:
        embeddings, labels, _ = batch()
        values, keep, info = unified_negatives(embeddings, labels)
        f = F.normalize(embeddings, dim=1)
        expected = [f[i] @ f[j] for i in range(16) for j in range(i + 1, 16) if labels[i] != labels[j]]
        torch.testing.assert_close(values, torch.stack(expected))
        assert info.total == len(values) == len(keep)
        assert info.kept == keep.sum()

    @pytest.mark.parametrize("rows", range(2, 10))
    def test_quartiles_are_order_statistics(self, rows: int) -> None:
        embeddings, _, _ = batch(rows)
        values, _, info = unified_negatives(embeddings, torch.arange(rows))
        ordered = values.sort().values
        assert info.q1 == ordered[math.floor(0.25 * len(values))]
        assert info.q3 == ordered[math.floor(0.75 * len(values))]

    @pytest.mark.parametrize("whisker", [None, math.inf])
    def test_no_filter(self, whisker: float | None) -> None:
        embeddings, labels, _ = batch()
        values, keep, info = unified_negatives(embeddings, labels, whisker)
        assert keep.all()
        assert (info.lower, info.upper) == (-math.inf, math.inf)
        assert info.max_kept == values.max()
        assert info.max_removed.isnan()

    def test_whisker_zero_keeps_the_quartiles_and_what_lies_between(self) -> None:
        embeddings, labels, _ = batch()
        values, keep, info = unified_negatives(embeddings, labels, 0.0)
        assert torch.equal(keep, (values >= info.q1) & (values <= info.q3))
        assert (info.q1 == values[keep].min()) & (info.q3 == values[keep].max())
        assert info.max_removed == values.max()
        assert 0 < info.kept < info.total

    def test_ties_at_the_ends_are_all_kept(self) -> None:
        embeddings = torch.eye(4)[torch.arange(16) % 4]  # every similarity is 0, or 1 in a quarter of the pairs
        values, keep, info = unified_negatives(embeddings, torch.arange(16))
        assert info.q1 == info.q3 == 0
        assert torch.equal(keep, values == 0)

    def test_a_duplicate_with_another_label_is_removed(self) -> None:
        embeddings = torch.randn(12, 64)
        embeddings[7] = 2 * embeddings[2]
        values, keep, info = unified_negatives(embeddings, torch.arange(12))
        assert values[~keep].max() == info.max_removed == pytest.approx(1)
        assert info.max_kept < 0.6

    def test_both_tails_are_removed(self) -> None:
        embeddings = torch.randn(12, 64)
        embeddings[7], embeddings[8] = embeddings[2], -embeddings[3]
        values, keep, _ = unified_negatives(embeddings, torch.arange(12))
        assert values[~keep].min() == pytest.approx(-1)
        assert values[~keep].max() == pytest.approx(1)

    @pytest.mark.parametrize("rows", [1, 5])
    def test_no_negatives(self, rows: int) -> None:
        values, keep, info = unified_negatives(torch.randn(rows, 4), torch.full((rows,), -3))
        assert len(values) == len(keep) == info.total == info.kept == 0
        assert torch.stack(info[2:]).isnan().all()

    @pytest.mark.parametrize("rows", range(1, 10))
    def test_sorting_and_selecting_agree(self, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
        embeddings, labels = torch.randn(rows, DIM), 2 * torch.arange(rows) // 3
        selected = unified_negatives(embeddings, labels).info
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        info = unified_negatives(embeddings, labels).info
        torch.testing.assert_close(info, selected, rtol=0, atol=0, equal_nan=True)

    def test_gradient_flows_to_embeddings(self) -> None:
        embeddings, labels, _ = batch()
        values, keep, info = unified_negatives(embeddings.requires_grad_(), labels)
        (gradient,) = torch.autograd.grad(values[keep].sum(), embeddings)
        assert gradient.abs().sum() > 0
        assert not any(statistic.requires_grad for statistic in info)


@pytest.mark.parametrize("whisker", [0.0, 1.5, math.inf])
@pytest.mark.parametrize("head", HEADS)
def test_equals_the_concatenated_matrix(head: str, whisker: float) -> None:
    x, labels, weight = (t.double() if t.is_floating_point() else t for t in batch(20))
    results = []
    for loss in (lambda *a: unpg_loss(*a, scale=20.0, whisker=whisker), lambda *a: naive_loss(*a, 20.0, whisker)):
        embeddings, centres = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logits = margin_logits(cosines_of(embeddings, centres), labels, head=head, margin=0.4)
        value = loss(logits, embeddings, labels)
        results.append((value.detach(), *torch.autograd.grad(value, (embeddings, centres))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("whisker", [None, 1.5])
def test_compiles_in_one_graph(whisker: float | None) -> None:
    x, labels, _ = batch()
    head = UNPGHead(DIM, CLASSES, whisker=whisker)
    expected = head(x, labels)
    diagnostics = head.diagnostics
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(head, backend="aot_eager", fullgraph=True)(x, labels), expected)
    torch.testing.assert_close(head.diagnostics, diagnostics, equal_nan=True)


def test_no_tensor_is_larger_than_logits_or_similarities() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
            return output

    head = UNPGHead(DIM, 40)
    with Largest() as seen:
        head(torch.randn(64, DIM, requires_grad=True), torch.arange(64) % 40).backward()
    assert seen.numel == 64 * 64


def test_reductions() -> None:
    x, labels, weight = batch()
    logits = margin_logits(cosines_of(x, weight), labels, margin=0.5)
    rows = unpg_loss(logits, x, labels, reduction="none")
    assert rows.shape == (16,)
    torch.testing.assert_close(unpg_loss(logits, x, labels), rows.mean())
    torch.testing.assert_close(unpg_loss(logits, x, labels, reduction="sum"), rows.sum())


def test_scale_of_embeddings_and_order_of_rows_do_not_matter() -> None:
    x, labels, weight = batch()
    logits = margin_logits(cosines_of(x, weight), labels, margin=0.5)
    expected = unpg_loss(logits, x, labels, reduction="none")
    order = torch.randperm(16)
    torch.testing.assert_close(unpg_loss(logits, x * torch.rand(16, 1), labels, reduction="none"), expected)
    shuffled = unpg_loss(logits[order], x[order], labels[order], reduction="none")
    torch.testing.assert_close(shuffled, expected[order])


def test_without_negatives_it_is_the_plain_head_to_the_last_bit() -> None:
    x, _, weight = batch()
    labels = torch.full((16,), 3)
    results = []
    for use_unpg in (True, False):
        head = UNPGHead(DIM, CLASSES, use_unpg=use_unpg)
        embeddings, centres = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = torch.func.functional_call(head, {"weight": centres}, (embeddings, labels))
        results.append((loss, *torch.autograd.grad(loss, (embeddings, centres))))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


def test_duplicates_within_the_whiskers_repel_and_beyond_them_do_not() -> None:
    x, labels, weight = torch.randn(12, 64), torch.arange(12), torch.randn(12, 64)
    x[7] = x[2]
    logits = margin_logits(cosines_of(x, weight), labels, margin=0.5)
    filtered, unfiltered = (unpg_loss(logits, x, labels, whisker=whisker) for whisker in (1.5, None))
    assert unfiltered > filtered + 10  # e^64 stands in every denominator


@pytest.mark.parametrize("place", ["logits", "embeddings"])
def test_nan_propagates(place: str) -> None:
    x, labels, weight = batch()
    logits = margin_logits(cosines_of(x, weight), labels, margin=0.5)
    (logits if place == "logits" else x)[3, 0] = math.nan
    assert unpg_loss(logits, x, labels).isnan()
    assert unpg_loss(logits, x, labels, whisker=None).isnan()


def test_scale_64_survives_float16_input() -> None:
    x, labels, weight = batch()
    x, logits = weight[labels].half(), cosines_of(weight[labels], weight).half()
    loss = unpg_loss(logits, x, labels, whisker=None)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


class TestUNPGHead:
    def test_weight_is_all_its_state_and_xavier_uniform(self) -> None:
        head = UNPGHead(300, 200)
        head(torch.randn(8, 300), torch.arange(8))
        assert {name: tuple(value.shape) for name, value in head.state_dict().items()} == {"weight": (200, 300)}
        bound = math.sqrt(6 / 500)
        assert head.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert head.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=1e-2)

    def test_diagnostics_are_detached_and_copyable(self) -> None:
        x, labels, _ = batch()
        head = UNPGHead(DIM, CLASSES, whisker=0.5)
        assert head.diagnostics == {}
        head(x.requires_grad_(), labels).backward()
        info = unified_negatives(x, labels, 0.5).info
        assert 0 < head.diagnostics["kept_fraction"] == info.kept / info.total < 1
        for name in ("q1", "q3", "max_kept", "max_removed"):
            assert head.diagnostics[name] == getattr(info, name)
            assert not head.diagnostics[name].requires_grad
        copy.deepcopy(head)

    def test_weight_may_be_wider_or_narrower_than_embeddings(self) -> None:
        x, labels, _ = batch()
        head = UNPGHead(DIM, CLASSES)
        expected = head(x, labels)
        assert head.double()(x, labels).dtype == torch.float64
        loss = head.bfloat16()(x, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)

    def test_separates_classes(self) -> None:
        """Trained embeddings: positive pairs above all negative pairs, the goal that the paper names."""
        labels = torch.arange(32) % 4
        embeddings = torch.nn.Parameter(torch.randn(32, 8))
        head = UNPGHead(8, 4, scale=16.0, whisker=None)
        optimizer = torch.optim.Adam([embeddings, *head.parameters()], lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            head(embeddings, labels).backward()
            optimizer.step()
        f = F.normalize(embeddings.detach(), dim=1)
        similarity, same = f @ f.T, labels[:, None] == labels
        assert similarity[same].min() > similarity[~same].max()
