from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from heliostat.components import CachedContrastiveStep, contrastive, grouped_contrastive_loss, make_contrastive_groups
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
CASES = golden("m2_encoder")


def batch(rows: int = 16, dim: int = 6, scale: float = 14.0, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, dim, generator=generator)
    text = image + torch.randn(rows, dim, generator=generator)
    return {"image": image, "text": 3 * text, "logit_scale": torch.tensor(scale)}


def plain_losses(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The losses of the pairs from the whole matrix of logits, with autograd."""
    logits = logit_scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).mT
    own = torch.arange(len(image))
    return (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.mT, own, reduction="none")) / 2


def value_and_gradients(loss: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    inputs = {name: value.double().requires_grad_() for name, value in inputs.items()}
    value = loss(**inputs)
    return [value.detach(), *torch.autograd.grad(value, list(inputs.values()))]


class TestLoss(OperatorContract):
    """Over all processes' rows, the logits in one block and kept for backward."""

    differentiable = ("image", "text", "logit_scale")
    split = {"image": 0, "text": 0}  # noqa: RUF012
    column_chunk: int | None = None

    def call(self, image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        return grouped_contrastive_loss(image, text, logit_scale, column_chunk=self.column_chunk)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return batch(rows)

    def golden_cases(self):
        return {name: self._golden_case(case) for name, case in CASES.items()}

    def _golden_case(self, case: dict) -> GoldenCase:
        groups = int(case["world_size"]) // int(case["group_size"])

        def call(x: dict[str, Tensor]) -> dict[str, Tensor]:
            image, text = (x[name].reshape(groups, -1, x[name].shape[-1]) for name in ("image", "text"))
            losses = [self.call(v, t, x["log_logit_scale"].exp()) for v, t in zip(image, text, strict=True)]
            everything = self.call(image.flatten(0, 1), text.flatten(0, 1), x["log_logit_scale"].exp())
            return {"groups": torch.stack(losses), "loss": torch.stack(losses).mean(), "everything": everything}

        inputs = ("image", "text", "log_logit_scale")
        return GoldenCase(
            inputs={name: case[name] for name in inputs},
            call=call,
            outputs={
                "groups": case["expected_group_losses"],
                "loss": case["expected_loss"],
                "everything": case["expected_full_batch_loss"],
            },
            gradients={name: case[f"expected_grad_{name}"] for name in inputs},
            cotangent=("loss", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        x = batch()
        return {
            "one pair": batch(1),
            "no pairs": batch(0),
            "zero vectors": {**x, "image": torch.zeros(16, 6)},
            "all rows equal": {**x, "image": torch.ones(16, 6), "text": torch.ones(16, 6)},
            "opposites": {**x, "image": torch.ones(16, 6), "text": -torch.ones(16, 6)},
            "huge rows": {**x, "image": x["image"] * 1e15},
            "huge scale": {**x, "logit_scale": torch.tensor(1e5)},
        }

    def error_cases(self):
        v, t, s = batch().values()
        return {
            "image": (lambda: grouped_contrastive_loss(v[0], t, s), r"image must .* shape \(n, d\), .* \(6,\)"),
            "integers": (lambda: grouped_contrastive_loss(v.long(), t, s), "image must be floating .* torch.int64"),
            "rows": (lambda: grouped_contrastive_loss(v, t[1:], s), r"the shape of image, \(16, 6\), got .* \(15, 6\)"),
            "scales": (lambda: grouped_contrastive_loss(v, t, s.repeat(2)), r"one number, got shape \(2,\)"),
            "scale": (lambda: grouped_contrastive_loss(v, t, -2.0), "not its logarithm, and must be > 0, got -2.0"),
            "chunk": (lambda: grouped_contrastive_loss(v, t, s, column_chunk=0), "column_chunk must be >= 1, .* got 0"),
            "groups": (lambda: make_contrastive_groups(2), "must divide the number of processes, 1, got 2"),
            "no group": (lambda: make_contrastive_groups(0), "must divide the number of processes, 1, got 0"),
            "micro_batches": (lambda: CachedContrastiveStep(F.relu, F.relu, torch.dot, 0), "must be >= 1, got 0"),
        }


class TestLossInBlocks(TestLoss):
    """The same in blocks of five texts, the last one smaller, that are evaluated again in backward."""

    column_chunk = 5


class TestValues:
    @pytest.mark.parametrize("rows", [1, 2, 15, 16, 33])
    @pytest.mark.parametrize("elements", [4, 25, 64, 10_000])
    @pytest.mark.parametrize("kept", [0, 10_000])
    def test_blocks_of_any_size_equal_the_whole_matrix(
        self, monkeypatch: pytest.MonkeyPatch, rows: int, elements: int, kept: int
    ) -> None:
        monkeypatch.setitem(contrastive._BLOCK_ELEMENTS, "cpu", elements)
        monkeypatch.setattr(contrastive, "_KEPT_ELEMENTS", kept)
        expected = value_and_gradients(lambda **x: plain_losses(**x).mean(), batch(rows))
        for chunk in (None, 1, 3, 16, 100):
            actual = value_and_gradients(lambda **x: grouped_contrastive_loss(**x, column_chunk=chunk), batch(rows))  # noqa: B023
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)

    @pytest.mark.parametrize("wanted", [["image"], ["text"], ["logit_scale"], ["text", "logit_scale"]])
    def test_gradient_of_some_inputs_only(self, wanted: list[str]) -> None:
        _, *expected = value_and_gradients(grouped_contrastive_loss, batch())
        x = {name: value.double().requires_grad_(name in wanted) for name, value in batch().items()}
        grouped_contrastive_loss(**x).backward()
        for (name, value), gradient in zip(x.items(), expected, strict=True):
            if name in wanted:
                torch.testing.assert_close(value.grad, gradient)
            else:
                assert value.grad is None

    def test_scale_may_be_a_number_or_a_row_of_one(self) -> None:
        v, t, s = batch().values()
        expected = grouped_contrastive_loss(v, t, s)
        assert torch.equal(grouped_contrastive_loss(v, t, 14.0), expected)
        row = s.reshape(1).requires_grad_()
        loss = grouped_contrastive_loss(v, t, row)
        loss.backward()
        assert torch.equal(loss, expected)
        assert row.grad.shape == (1,)

    def test_one_pair_costs_exactly_nothing(self) -> None:
        for loss in value_and_gradients(grouped_contrastive_loss, batch(1)):
            assert not loss.any()

    def test_untrained_is_at_log_n_and_fitted_at_zero(self) -> None:
        v = batch(512, dim=256)["image"]
        unrelated = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
        assert grouped_contrastive_loss(v, unrelated, 1.0).item() == pytest.approx(math.log(512), abs=0.01)
        fitted = grouped_contrastive_loss(v, v, 100.0)
        unit = F.normalize(v.double(), dim=1)
        negatives = (100 * (unit @ unit.mT - 1)).exp().fill_diagonal_(0)  # log(1 + x) is x here
        assert fitted < 1e-20  # a log-sum-exp minus the positive would be 0
        assert fitted.item() == pytest.approx(negatives.sum().item() / 512, rel=1e-3)

    def test_does_not_depend_on_order_or_length_of_rows_and_treats_both_sides_alike(self) -> None:
        v, t, s = batch().values()
        expected = grouped_contrastive_loss(v, t, s)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(grouped_contrastive_loss(v[order], t[order], s), expected)
        torch.testing.assert_close(grouped_contrastive_loss(v * torch.rand(16, 1), 5 * t, s), expected)
        torch.testing.assert_close(grouped_contrastive_loss(t, v, s), expected)

    @pytest.mark.parametrize("name", ["image", "text", "logit_scale"])
    @pytest.mark.parametrize("rows", [1, 16])
    def test_nan_is_not_masked_away(self, name: str, rows: int) -> None:
        x = batch(rows)
        x[name].view(-1)[0] = math.nan
        value, *gradients = value_and_gradients(grouped_contrastive_loss, x)
        assert value.isnan()
        assert all(gradient.isnan().any() for gradient in gradients)

    def test_can_be_differentiated_once_but_with_a_kept_graph_again(self) -> None:
        x = {name: value.requires_grad_() for name, value in batch().items()}
        loss = grouped_contrastive_loss(**x)
        first, again = (torch.autograd.grad(loss, list(x.values()), retain_graph=True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    def test_backward_inside_autocast_stays_in_float32(self) -> None:
        _, *expected = value_and_gradients(grouped_contrastive_loss, batch())
        x = {name: value.requires_grad_() for name, value in batch().items()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grouped_contrastive_loss(**x).backward()
        for value, gradient in zip(x.values(), expected, strict=True):
            assert relative_error(value.grad, gradient) < 1e-5


@pytest.mark.parametrize("chunk", [None, 64])
def test_memory_is_linear_in_the_rows(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    """Peak bytes of a forward and backward, as the allocator reports them, far below the matrix of logits."""
    monkeypatch.setitem(contrastive._BLOCK_ELEMENTS, "cpu", 2**16)
    monkeypatch.setattr(contrastive, "_KEPT_ELEMENTS", 2**20)
    rows = 2048
    x = {name: value.requires_grad_() for name, value in batch(rows, dim=8).items()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        grouped_contrastive_loss(**x, column_chunk=chunk).backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert 0 < peak < rows * rows  # bytes: a quarter of the float32 matrix, of which a dense loss holds several


class TestSeveralProcesses:
    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if int(case["group_size"]) == 2])
    def test_each_rank_has_its_reference_loss(self, two_processes: ProcessPool, name: str) -> None:
        losses = two_processes.run(_reference_ranks, name)
        expected = torch.as_tensor(CASES[name]["expected_rank_losses"])
        torch.testing.assert_close(torch.stack(losses, dim=1).flatten(), expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("group_size", [1, 2])
    def test_groups(self, two_processes: ProcessPool, group_size: int) -> None:
        def expected_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
            shares = zip(image.chunk(2 // group_size), text.chunk(2 // group_size), strict=True)
            return torch.stack([plain_losses(v, t, logit_scale).mean() for v, t in shares]).mean()

        expected = value_and_gradients(expected_loss, batch())
        ranks = two_processes.run(_rank_of_group, group_size)
        for actual, whole in zip(_joined(ranks), expected, strict=True):
            assert relative_error(actual, whole) < 1e-10

    def test_ranks_that_weigh_their_losses_differently(self, two_processes: ProcessPool) -> None:
        weights = (0.25, -3.0)

        def expected_loss(**x: Tensor) -> Tensor:
            halves = plain_losses(**x).chunk(2)
            return torch.stack([w * half.mean() for w, half in zip(weights, halves, strict=True)]).mean()

        expected = value_and_gradients(expected_loss, batch())
        ranks = two_processes.run(_rank_of_group, 2, weights)
        for actual, whole in zip(_joined(ranks), expected, strict=True):
            assert relative_error(actual, whole) < 1e-10

    @pytest.mark.parametrize("name", ["image", "text"])
    def test_nan_of_one_rank_reaches_all(self, two_processes: ProcessPool, name: str) -> None:
        for value, *_ in two_processes.run(_rank_of_group, 2, (1.0, 1.0), name):
            assert value.isnan()

    def test_groups_that_do_not_divide_the_processes(self, two_processes: ProcessPool) -> None:
        for message in two_processes.run(_refused_groups):
            assert message == "group_size must divide the number of processes, 2, got 3"


def _joined(ranks: list[list[Tensor]]) -> list[Tensor]:
    """What DDP makes of the ranks' values and gradients."""
    values, images, texts, scales = zip(*ranks, strict=True)
    return [sum(values) / 2, torch.cat(images) / 2, torch.cat(texts) / 2, sum(scales) / 2]


def _reference_ranks(rank: int, name: str) -> Tensor:
    case = CASES[name]
    scale = torch.as_tensor(case["log_logit_scale"]).double().exp()
    image, text = (torch.as_tensor(case[side]).double().flatten(1, 2) for side in ("image", "text"))
    groups = range(rank, len(image), 2)
    return torch.stack([grouped_contrastive_loss(image[r], text[r], scale) for r in groups])


def _rank_of_group(
    rank: int, group_size: int, weights: tuple[float, float] = (1.0, 1.0), poisoned: str | None = None
) -> list[Tensor]:
    x = batch()
    if poisoned is not None:
        x[poisoned][0, 0] = math.nan
    group = make_contrastive_groups(group_size)
    assert group_size != 1 or group.size() == 1
    local = {name: value.chunk(2)[rank] if value.ndim else value for name, value in x.items()}
    return value_and_gradients(
        lambda **y: weights[rank] * grouped_contrastive_loss(**y, group=group, column_chunk=3), local
    )


def _refused_groups(rank: int) -> str:
    with pytest.raises(ValueError, match="group_size") as refusal:
        make_contrastive_groups(3)
    return str(refusal.value)


def test_one_process_needs_no_group() -> None:
    assert make_contrastive_groups(1) is None


class Towers(nn.Module):
    """Two small encoders with dropout, and the loss with its logit scale."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.Linear(8, 4))
        self.text = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(2.0))
        for parameter in [*self.image.parameters(), *self.text.parameters()]:
            parameter.data.normal_(generator=generator)
        self.double()

    def encode_text(self, inputs: Any) -> Tensor:
        return self.text(inputs["x"] if isinstance(inputs, dict) else inputs)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return grouped_contrastive_loss(image, text, self.log_scale.exp())

    def step(self, micro_batches: int) -> CachedContrastiveStep:
        return CachedContrastiveStep(self.image, self.encode_text, self.loss, micro_batches)

    def gradients(self) -> dict[str, Tensor]:
        return {name: parameter.grad for name, parameter in self.named_parameters()}


def pairs(rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, 5, generator=generator).double(),
        torch.randn(rows, 3, generator=generator).double(),
    )


class TestCachedStep:
    @pytest.mark.parametrize(("rows", "micro_batches"), [(12, 1), (12, 3), (13, 4), (4, 4)])
    def test_equals_one_step_that_keeps_all_activations(self, rows: int, micro_batches: int) -> None:
        images, texts = pairs(rows)
        bounds = [rows * k // micro_batches for k in range(micro_batches + 1)]
        expected, actual = Towers(), Towers()
        torch.manual_seed(7)
        features = [(expected.image(images[a:b]), expected.text(texts[a:b])) for a, b in pairwise(bounds)]
        loss = expected.loss(*(torch.cat(side) for side in zip(*features, strict=True)))
        loss.backward()
        after = torch.rand(1)
        torch.manual_seed(7)
        value = actual.step(micro_batches)(images, texts)
        assert torch.equal(torch.rand(1), after)  # random numbers go on as after one forward
        assert not value.requires_grad
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(actual.gradients(), expected.gradients(), rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("kind", ["dict", "list"])
    def test_inputs_of_other_kinds(self, kind: str) -> None:
        images, texts = pairs()
        expected, actual = Towers(0.0), Towers(0.0)
        expected.step(3)(images, texts)
        if kind == "dict":
            actual.step(3)(images, {"x": texts})
        else:
            step = CachedContrastiveStep(actual.image, lambda rows: actual.text(torch.stack(rows)), actual.loss, 3)
            step(images, list(texts))
        torch.testing.assert_close(actual.gradients(), expected.gradients())

    def test_adds_to_gradients_and_lets_backward_scale_them(self) -> None:
        expected, actual = Towers(0.0), Towers(0.0)
        expected.step(1)(*pairs())
        calls = []

        def backward(loss: Tensor) -> None:
            calls.append(loss)
            (2 * loss).backward()

        for _ in range(2):
            actual.step(3)(*pairs(), backward=backward)
        assert len(calls) == 6
        torch.testing.assert_close(
            actual.gradients(), {name: 4 * gradient for name, gradient in expected.gradients().items()}
        )

    def test_autocast(self) -> None:
        """Its cache of weights, filled without gradient, must not cut the graph."""
        expected, actual = Towers(0.0).float(), Towers(0.0).float()
        for towers, micro_batches in ((expected, 1), (actual, 3)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                towers.step(micro_batches)(*(x.float() for x in pairs()))
        for name, gradient in expected.gradients().items():
            assert relative_error(actual.gradients()[name], gradient) < 0.05, name

    @pytest.mark.parametrize("frozen", [["image"], ["text"], ["image", "text"]])
    def test_frozen_towers(self, frozen: list[str]) -> None:
        expected, actual = Towers(0.0), Towers(0.0)
        expected.step(1)(*pairs())
        for name in frozen:
            getattr(actual, name).requires_grad_(False)
        actual.step(3)(*pairs())
        for name, gradient in actual.gradients().items():
            if name.split(".")[0] in frozen:
                assert gradient is None
            else:
                torch.testing.assert_close(gradient, expected.gradients()[name])

    def test_batch_norm_in_training_mode_is_refused(self) -> None:
        towers = Towers(0.0)
        towers.image.append(nn.BatchNorm1d(4).double())
        with pytest.raises(ValueError, match="BatchNorm1d in training mode .* set it to eval"):
            towers.step(3)(*pairs())
        assert not towers.image[-1].num_batches_tracked
        towers.image[-1].eval()
        towers.step(3)(*pairs())
        towers.train().image(pairs()[0])  # nothing of the refusal is left behind

    def test_wrong_calls(self) -> None:
        towers = Towers()
        images, texts = pairs()
        with pytest.raises(ValueError, match=r"same number of rows, .* got \[11, 12\] for micro_batches=3"):
            towers.step(3)(images, texts[1:])
        with pytest.raises(ValueError, match=r"at least one a micro-batch, got \[12\] for micro_batches=13"):
            towers.step(13)(images, texts)
        with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(12,\)"):
            CachedContrastiveStep(towers.image, towers.text, lambda v, t: (v * t).sum(1), 3)(images, texts)

    def test_two_processes_under_ddp_equal_one(self, two_processes: ProcessPool) -> None:
        expected = Towers(0.0)
        loss = expected.step(1)(*pairs())
        for values in two_processes.run(_cached_step_on_rank):
            value, gradients, exchanges = values
            torch.testing.assert_close(value, loss)
            torch.testing.assert_close(gradients, expected.gradients(), rtol=1e-10, atol=1e-12)
            assert exchanges == 1


class _Selected(nn.Module):
    """Both towers behind one forward, as DDP wants it."""

    def __init__(self, towers: Towers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.towers.image(pair[0]), self.towers.text(pair[1])


def _cached_step_on_rank(rank: int) -> tuple[Tensor, dict[str, Tensor], int]:
    towers = Towers(0.0)
    images, texts = (x.chunk(2)[rank] for x in pairs())
    ddp = DistributedDataParallel(_Selected(towers))
    exchanges = []

    def counted(state, bucket):  # DDP reads annotations, and not as strings
        exchanges.append(bucket)
        reduced = dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return reduced.then(lambda future: future.value()[0])

    ddp.register_comm_hook(None, counted)
    features: list[Tensor] = []

    def encode_image(x: Tensor) -> Tensor:  # the one forward gives both sides
        image, text = ddp((x[:, :5], x[:, 5:]))
        features.append(text)
        return image

    step = CachedContrastiveStep(encode_image, lambda x: features.pop(), towers.loss, 3)
    loss = step(torch.cat([images, texts], 1), texts, no_sync=ddp.no_sync)
    dist.all_reduce(loss)
    return loss / 2, towers.gradients(), len(exchanges)
