from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heliostat.components import (
    AlignmentProjector,
    FeatureTap,
    manifold_alignment_loss,
    token_alignment_loss,
    u_repa_loss,
)
from heliostat.components.u_repa import RepresentationAligner, find_layer, output_channels
from tests.harness import GoldenCase, OperatorContract, golden, relative_error

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def cases(kind: str) -> dict[str, dict]:
    return {name: case for name, case in golden("u_repa").items() if name.startswith(kind)}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (16, 4, 6)), generator=torch.Generator().manual_seed(seed))


def pair(*shape: int) -> dict[str, Tensor]:
    return {"projected": tokens(*shape), "target": tokens(*shape, seed=1)}


def degenerate() -> dict[str, dict[str, Tensor]]:
    zero = tokens()
    zero[3, 1] = 0
    return {
        "one sample": pair(1, 4, 6),
        "one token": pair(4, 1, 6),
        "one of both": pair(1, 1, 6),
        "one dimension": pair(4, 3, 1),
        "a zero token": {"projected": zero, "target": tokens(seed=1)},
        "a zero token of the teacher": {"projected": tokens(seed=1), "target": zero},
        "all zero": {"projected": torch.zeros(2, 3, 4), "target": torch.zeros(2, 3, 4)},
        "all equal": {"projected": torch.ones(2, 3, 4), "target": tokens(2, 3, 4)},
        "huge": {"projected": tokens() * 1e15, "target": tokens(seed=1) * 1e-8},
    }


def errors(loss: Any) -> dict:
    p, y = tokens(), tokens(seed=1)
    return {
        "width": (lambda: loss(p, y[..., 1:]), r"shape of projected, \(16, 4, 6\), got \(16, 4, 5\)"),
        "tokens": (lambda: loss(p, y[:, 1:]), r"shape of projected, \(16, 4, 6\), got \(16, 3, 6\)"),
        "no rows": (lambda: loss(p[:0], y[:0]), r"\(B, N, D\), without zeros, got \(0, 4, 6\)"),
        "maps": (lambda: loss(tokens(2, 3, 4, 4), tokens(2, 3, 4, 4)), r"\(B, N, D\).* got \(2, 3, 4, 4\)"),
    }


class TestTokenLoss(OperatorContract):
    differentiable = ("projected",)
    split = {"projected": 0, "target": 0}  # noqa: RUF012

    def call(self, projected: Tensor, target: Tensor) -> Tensor:
        return token_alignment_loss(projected, target)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return pair(rows, 4, 6)

    def degenerate_cases(self):
        return degenerate()

    def error_cases(self):
        return errors(token_alignment_loss)


class TestManifoldLoss(TestTokenLoss):
    """Of the tokens of each sample; the next two of what the processes must share."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def call(self, projected: Tensor, target: Tensor) -> Tensor:
        return manifold_alignment_loss(projected, target, **self.settings)

    def error_cases(self):
        call = manifold_alignment_loss
        return {
            **errors(call),
            "relation": (lambda: call(**pair(), relation="all"), "relation must be one of .*'token'.* got 'all'"),  # type: ignore[arg-type]
            "max_tokens": (lambda: call(**pair(), max_tokens=0), "max_tokens must be >= 1, or None for all, got 0"),
            "no tokens": (lambda: call(**pair(), relation="sample", max_tokens=2), "max_tokens=2 goes with relation"),
        }


class TestManifoldLossOfSamples(TestManifoldLoss):
    settings = {"relation": "sample", "center": True}  # noqa: RUF012


class TestManifoldLossOfBatch(TestManifoldLoss):
    settings = {"relation": "batch"}  # noqa: RUF012


class TestLoss(TestTokenLoss):
    def call(self, projected: Tensor, target: Tensor) -> Tensor:
        return u_repa_loss(projected, target, relation="sample").total

    def golden_cases(self) -> dict[str, GoldenCase]:
        compared = cases("loss")
        del compared["loss3"]  # gradient and L_man are 0 but for rounding: see the test below
        return {name: self._golden(case) for name, case in compared.items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            weights = {name: float(case[name]) for name in ("align_weight", "manifold_weight")}
            parts = u_repa_loss(**inputs, **weights, relation=str(case["relation"]))  # type: ignore[arg-type]
            return {"token_loss": parts.token, "manifold_loss": parts.manifold, "total": parts.total}

        return GoldenCase(
            inputs={name: case[name] for name in ("projected", "target")},
            call=call,
            outputs={name: case[name] for name in ("token_loss", "manifold_loss", "total")},
            gradients={"projected": case["grad_projected"]},
            cotangent=("total", 1.0),
            tolerance=TOLERANCE,
        )

    def error_cases(self):
        return {
            **errors(u_repa_loss),
            "align_weight": (lambda: u_repa_loss(**pair(), align_weight=-1), "align_weight must be >= 0, got -1"),
            "manifold_weight": (
                lambda: u_repa_loss(**pair(), manifold_weight=torch.nan),
                "manifold_weight must be >= 0, got nan",
            ),
        }


def test_a_student_equal_to_its_teacher_has_no_gradient() -> None:
    case = cases("loss")["loss3"]
    p, y = (torch.as_tensor(case[name]).double() for name in ("projected", "target"))
    p.requires_grad_()
    parts = u_repa_loss(p, y)
    for name, value in parts._asdict().items():
        expected = case[name if name == "total" else f"{name}_loss"]
        torch.testing.assert_close(value, torch.tensor(float(expected)).double(), rtol=0, atol=1e-14)
    parts.total.backward()
    torch.testing.assert_close(p.grad, torch.as_tensor(case["grad_projected"]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("relation", ["token", "sample", "batch"])
def test_manifold_loss_against_a_loop(relation: Any, center: bool) -> None:
    p, y = tokens(3, 4, 5).double().requires_grad_(), tokens(3, 4, 5, seed=1).double()

    def cosines(x: Tensor) -> list[Tensor]:
        """The similarity of every pair that the relation compares, one after the other."""
        pooled = torch.stack([sample.sum(0) / 4 for sample in x])
        groups = {"token": list(x), "sample": [pooled], "batch": [x.reshape(12, 5)]}[relation]
        if center:
            groups = [group - sum(group) / len(group) for group in groups]
        return [a @ b / (a.norm() * b.norm()) for group in groups for a in group for b in group]

    expected = torch.stack([(a - b) ** 2 for a, b in zip(cosines(p), cosines(y), strict=True)]).mean()
    value = manifold_alignment_loss(p, y, relation=relation, center=center)
    assert relative_error(value, expected.detach()) < 1e-12
    gradients = [torch.autograd.grad(loss, p)[0] for loss in (value, expected)]
    assert relative_error(gradients[0], gradients[1]) < 1e-12


@pytest.mark.parametrize("relation", ["token", "sample", "batch"])
def test_manifold_loss_knows_no_rotation(relation: Any) -> None:
    p, y = tokens().double(), tokens(seed=1).double()
    value = manifold_alignment_loss(p, y, relation=relation)
    rotation = torch.linalg.qr(tokens(6, 6).double()).Q
    torch.testing.assert_close(manifold_alignment_loss(3 * p @ rotation, y, relation=relation), value)
    assert manifold_alignment_loss(p @ rotation, p, relation=relation) < 1e-28
    if relation != "sample":
        scales = tokens(16, 4, 1, seed=2).double().exp()
        torch.testing.assert_close(manifold_alignment_loss(scales * p, y, relation=relation), value)


def test_bounds_are_met() -> None:
    p = tokens(2, 3, 4).double()
    assert token_alignment_loss(p, 2 * p) == pytest.approx(-1)
    assert token_alignment_loss(p, -p) == pytest.approx(1)
    opposite, equal = torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, 1)
    assert manifold_alignment_loss(opposite, equal) == 2  # 4 at two of the four entries


def test_nothing_to_compare_is_a_zero_on_the_graph() -> None:
    for shape, relation in (((4, 1, 6), "token"), ((1, 4, 6), "sample"), ((1, 1, 6), "batch")):
        p = tokens(*shape).double().requires_grad_()
        loss = manifold_alignment_loss(p, tokens(*shape, seed=1), relation=relation)  # type: ignore[arg-type]
        assert loss.abs() < 1e-30
        assert torch.autograd.grad(loss, p)[0].abs().max() < 1e-14


def test_a_zero_token_has_cosine_zero() -> None:
    p, y = torch.tensor([[[0.0, 0], [1, 0]]]), torch.tensor([[[1.0, 0], [1, 0]]])
    assert token_alignment_loss(p, y) == -0.5
    assert manifold_alignment_loss(p, y) == 0.75  # all of the teacher's are 1; of the student's one is, its last


def test_centering_finds_what_a_common_component_hides() -> None:
    p, y = tokens().double() + 30, tokens(seed=1).double() + 30
    assert manifold_alignment_loss(p, y) < 1e-4
    value = manifold_alignment_loss(p, y, center=True)
    assert value > 0.1
    torch.testing.assert_close(manifold_alignment_loss(p + 5, y, center=True), value)


def test_a_part_of_the_tokens() -> None:
    p, y = tokens(3, 20, 6), tokens(3, 20, 6, seed=1)
    kept = torch.randperm(20, generator=torch.Generator().manual_seed(7))[:5]
    for relation in ("token", "batch"):
        drawn = torch.Generator().manual_seed(7)
        value = manifold_alignment_loss(p, y, relation=relation, max_tokens=5, generator=drawn)  # type: ignore[arg-type]
        expected = manifold_alignment_loss(p[:, kept], y[:, kept], relation=relation)  # type: ignore[arg-type]
        assert torch.equal(value, expected)
    state = torch.get_rng_state()
    assert torch.equal(manifold_alignment_loss(p, y, max_tokens=20), manifold_alignment_loss(p, y))
    assert torch.equal(torch.get_rng_state(), state)
    values = {float(manifold_alignment_loss(p, y, max_tokens=5)) for _ in range(4)}
    assert len(values) == 4
    assert float(u_repa_loss(p, y, max_tokens=5).manifold) not in values  # from the global generator too


def test_parts_and_weights() -> None:
    p, y = tokens(), tokens(seed=1)
    parts = u_repa_loss(p, y)
    assert torch.equal(parts.token, token_alignment_loss(p, y))
    assert torch.equal(parts.manifold, manifold_alignment_loss(p, y))
    torch.testing.assert_close(parts.total, 0.5 * (parts.token + 3 * parts.manifold))
    other = u_repa_loss(p, y, align_weight=0.25, manifold_weight=1.5, relation="batch", center=True)
    manifold = manifold_alignment_loss(p, y, relation="batch", center=True)
    torch.testing.assert_close(other.total, 0.25 * (parts.token + 1.5 * manifold))


def test_no_gradient_to_the_teacher_and_mixed_dtypes() -> None:
    p, y = tokens().requires_grad_(), tokens(seed=1).half().requires_grad_()
    loss = u_repa_loss(p, y).total
    assert loss.dtype == torch.float32
    loss.backward()
    assert y.grad is None
    torch.testing.assert_close(loss, u_repa_loss(p, y.float()).total)


def test_nan_shows() -> None:
    p = tokens()
    p[3, 1, 2] = torch.nan
    for relation in ("token", "sample", "batch"):
        parts = u_repa_loss(p, tokens(seed=1), relation=relation)  # type: ignore[arg-type]
        assert all(part.isnan() for part in parts)


def test_without_gather_the_rows_are_the_ranks_own(two_processes: Any) -> None:
    p, y = tokens(), tokens(seed=1)
    for rank, value in enumerate(two_processes.run(_own_rows, p, y)):
        assert torch.equal(value, manifold_alignment_loss(p.chunk(2)[rank], y.chunk(2)[rank], relation="batch"))


def _own_rows(rank: int, p: Tensor, y: Tensor) -> Tensor:
    return manifold_alignment_loss(p.chunk(2)[rank], y.chunk(2)[rank], relation="batch", gather=False)


# --- projector -------------------------------------------------------------------------------------------------------


def reference_projector(case: dict, dtype: torch.dtype, weight0: Tensor | None = None) -> AlignmentProjector:
    hidden, channels = case["weight0"].shape
    projector = AlignmentProjector(channels, len(case["bias2"]), hidden, grid=tuple(case["grid"].tolist()))
    state = {}
    for i in range(3):
        for kind in ("weight", "bias"):
            state[f"mlp.{2 * i}.{kind}"] = torch.as_tensor(case[f"{kind}{i}"])
    projector.load_state_dict(state)
    projector = projector.to(dtype)
    if weight0 is not None:
        del projector.mlp[0].weight  # type: ignore[union-attr]
        projector.mlp[0].weight = weight0  # type: ignore[assignment]
    return projector


class TestProjector(OperatorContract):
    differentiable = ("features",)
    autocast_tolerance = 5e-2
    compiles = False  # makes its layers anew at every call

    def call(self, features: Tensor) -> Tensor:
        projector = AlignmentProjector(6, 5, 8, generator=torch.Generator().manual_seed(0))
        return projector.to(torch.promote_types(features.dtype, torch.float32))(features.to(_wide(features)), 36)

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        return {"features": tokens(min(rows, 4), 6, 2, 2)}

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in cases("head").items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            projector = reference_projector(case, inputs["features"].dtype, inputs["weight0"])
            projected = projector(inputs["features"])
            parts = u_repa_loss(projected, inputs["target"])
            return {"projected": projected, **parts._asdict()}

        return GoldenCase(
            inputs={name: case[name] for name in ("features", "target", "weight0")},
            call=call,
            outputs={
                "projected": case["projected"],
                "total": case["total"],
                "manifold": case["manifold_loss"],
                "token": case["token_loss"],
            },
            gradients={"features": case["grad_features"], "weight0": case["grad_weight0"]},
            cotangent=("total", 1.0),
            tolerance=HEAD_TOLERANCE,
        )

    def degenerate_cases(self):
        return {"zeros": {"features": torch.zeros(2, 6, 2, 2)}, "one position": {"features": tokens(2, 6, 1, 1)}}

    def error_cases(self):
        make, projector = AlignmentProjector, AlignmentProjector(6, 5, 8)
        wide, of_grid = tokens(2, 6, 4, 2), AlignmentProjector(6, 5, 8, grid=(4, 4))
        return {
            "channels": (lambda: projector(tokens(2, 5, 4, 4)), r"\(2, 5, 4, 4\) have 5 channels, .*in_channels=6"),
            "width": (lambda: projector(tokens(2, 4, 5)), r"\(2, 4, 5\) have 5 channels, .*in_channels=6"),
            "vectors": (lambda: projector(tokens(2, 6)), r"\(B, C, h, w\) or \(B, n, C\), got \(2, 6\)"),
            "aspect": (lambda: projector(wide, 16), r"16 tokens of the teacher make no grid .* 4 x 2: give grid"),
            "class token": (lambda: projector(tokens(2, 6, 4, 4), 17), "17 tokens of the teacher make no grid"),
            "student tokens": (lambda: projector(tokens(2, 8, 6), 16), "8 tokens of the denoiser make no grid"),
            "other count": (lambda: of_grid(tokens(2, 6, 4, 4), 15), r"grid=\(4, 4\) has 16 tokens.* gives 15"),
            "sizes": (lambda: make(6, 0), "must be >= 1, got 6, 0 and 2048"),
            "grid": (lambda: make(6, 5, grid=(0, 4)), r"grid must be rows and columns .*got \(0, 4\)"),
            "mode": (lambda: make(6, 5, mode="area"), "mode must be one of .* got 'area'"),  # type: ignore[arg-type]
        }


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def test_projector_maps_first_and_resizes_then() -> None:
    projector, features = AlignmentProjector(6, 5, 8, grid=(4, 6)), tokens(3, 6, 2, 3)
    small = projector.mlp(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    expected = F.interpolate(small, (4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(projector(features), expected.flatten(2).mT)
    assert projector(features)[1, 7].tolist() == pytest.approx(expected[1, :, 1, 1].tolist())  # row by row


def test_projector_finds_the_grid() -> None:
    projector, features = AlignmentProjector(6, 5, 8), tokens(3, 6, 2, 3)
    as_tokens = features.flatten(2).mT
    for count, grid in ((24, (4, 6)), (54, (6, 9)), (6, (2, 3))):
        given = AlignmentProjector(6, 5, 8, grid=grid)
        given.load_state_dict(projector.state_dict())
        expected = given(features)
        assert torch.equal(projector(features, count), expected)
        assert torch.equal(given(as_tokens), expected)  # tokens take the shape of the given grid
    plain = projector.mlp(as_tokens)
    assert torch.equal(projector(features), plain)
    assert torch.equal(projector(as_tokens), plain)
    assert torch.equal(projector(as_tokens, 6), plain)
    assert torch.equal(projector(tokens(3, 4, 6), 36), projector(tokens(3, 4, 6).mT.unflatten(2, (2, 2)), 36))


def test_modes_of_the_resize() -> None:
    features = tokens(2, 6, 2, 2)
    results = {}
    for mode in ("bilinear", "bicubic", "nearest"):
        results[mode] = AlignmentProjector(6, 5, 8, (4, 4), mode, generator=torch.Generator().manual_seed(0))(features)  # type: ignore[arg-type]
    assert torch.equal(results["nearest"][:, 0], results["nearest"][:, 5])
    assert not torch.allclose(results["bilinear"], results["bicubic"], atol=1e-3)


def test_projector_is_xaviers_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    projector = AlignmentProjector(300, 200)
    assert torch.equal(torch.get_rng_state(), state)
    for i, (fan_in, fan_out) in {0: (300, 2048), 2: (2048, 2048), 4: (2048, 200)}.items():
        weight, bound = projector.mlp[i].weight, (6 / (fan_in + fan_out)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert not projector.mlp[i].bias.any()
    assert torch.equal(AlignmentProjector(300, 200).mlp[0].weight, projector.mlp[0].weight)
    torch.manual_seed(6)
    assert not torch.equal(AlignmentProjector(300, 200).mlp[0].weight, projector.mlp[0].weight)


def test_projector_dtypes() -> None:
    features = tokens(2, 6, 2, 2)
    assert AlignmentProjector(6, 5, 8).bfloat16()(features.bfloat16(), 16).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert AlignmentProjector(6, 5, 8)(features, 16).dtype == torch.float32


# --- tap -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        self.first, self.last, self.returns = nn.Linear(3, 4), nn.Linear(4, 3), returns
        self.block = Block(returns)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(self.first(x))
        return self.last(out if self.returns == "tensor" else out[0] if self.returns == "down" else out[1])


class Block(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.layer, self.returns = nn.Linear(4, 4), returns

    def forward(self, x: Tensor) -> Any:
        h = self.layer(x)
        return {"tensor": h, "down": (h, (x, h)), "joint": (x, h), "last joint": (None, h)}[self.returns]


@pytest.mark.parametrize("returns", ["tensor", "down", "joint", "last joint"])
def test_tap_reads_what_blocks_of_diffusers_return(returns: str) -> None:
    net, x = Net(returns), tokens(2, 3)
    tap = FeatureTap(net.block)
    with tap:
        net(x)
    features = tap.take()
    assert torch.equal(features, net.block.layer(net.first(x)))
    assert features.requires_grad
    with FeatureTap(net.block, lambda output: 2 * features) as other:
        net(x)
    assert torch.equal(other.take(), 2 * features)


def test_tap_keeps_one_call_of_its_window() -> None:
    net, x = Net(), tokens(2, 3)
    tap = FeatureTap(net.block)
    net(x)
    with pytest.raises(ValueError, match="was not called with gradient in this step"):
        tap.take()
    with tap:
        net(x)
        net(2 * x)
        with torch.no_grad():
            net(3 * x)  # such as a sample that training_step draws
    assert torch.equal(tap.take(), net.block.layer(net.first(2 * x)))
    with pytest.raises(ValueError, match="was not called with gradient"):
        tap.take()  # it was let go
    with torch.no_grad():
        with tap:
            net(x)
        assert torch.equal(tap.take(), net.block.layer(net.first(x)))
    with pytest.raises(RuntimeError, match="shapes"), tap:
        net(torch.cat([net(x), x], dim=1))
    assert tap._features is None
    tap.remove()
    with tap:
        net(x)
    assert tap._features is None
    assert not net.block._forward_hooks
    with FeatureTap(net.block, lambda _: {}) as tap:
        net(x)
    with pytest.raises(ValueError, match="returned dict, in which there is no tensor"):
        tap.take()


def test_tap_ignores_what_checkpointing_computes_again() -> None:
    net, x = Net(), tokens(2, 3).requires_grad_()
    tap = FeatureTap(net.block)
    with tap:
        out = checkpoint(net.block, net.first(x), use_reentrant=False)
    features = tap.take()
    (out.sum() + features.square().sum()).backward()
    assert tap._features is None
    expected = torch.autograd.grad(net.block(net.first(x)).sum() + net.block(net.first(x)).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_tap_under_compile_and_in_a_copy() -> None:
    net, x = Net(), tokens(2, 3)
    tap = FeatureTap(net.block)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    for scale in (1, 2):
        with tap:
            out = compiled(scale * x)
        features = tap.take()
        torch.testing.assert_close(features, net.block.layer(net.first(scale * x)))
        (gradient,) = torch.autograd.grad(features.sum() + out.sum(), net.first.weight)
        whole = net.block(net.first(scale * x)).sum() + net(scale * x).sum()
        torch.testing.assert_close(gradient, torch.autograd.grad(whole, net.first.weight)[0])
    compiled(x)
    assert tap._features is None
    copied = copy.deepcopy(net)  # such as an average of the weights
    with tap:
        copied(x)
    with pytest.raises(ValueError, match="was not called"):
        tap.take()


def test_finding_layers() -> None:
    net = nn.ModuleDict({"unet": nn.Module(), "ema": Net(), "net": Net()})
    unet = net["unet"]
    unet.mid_block, unet.down_blocks = None, nn.ModuleList([nn.Linear(3, 4), nn.Conv2d(4, 7, 3)])
    assert find_layer(net, "net.block") is net["net"].block
    assert find_layer(net["net"], "block") is net["net"].block
    for name in ("mid_block", "unet.mid_block"):
        assert find_layer(net, name) is unet.down_blocks[1]
    assert find_layer(unet, "mid_block") is unet.down_blocks[1]
    assert find_layer(net, "down_blocks.0") is unet.down_blocks[0]
    with pytest.raises(ValueError, match="'block' is the name of several modules .* give one of ema.block, net.block"):
        find_layer(net, "block")
    with pytest.raises(ValueError, match="'middle' is the name of no module of ModuleDict: it has unet, unet.down"):
        find_layer(net, "middle")
    with pytest.raises(ValueError, match="'ema.mid_block' is the name of no module"):
        find_layer(net, "ema.mid_block")
    assert output_channels(unet.down_blocks[1]) == 7
    assert output_channels(net["net"].block) == 4
    with pytest.raises(ValueError, match="GroupNorm returns are not to be seen .* give in_channels"):
        output_channels(nn.GroupNorm(2, 4))


# --- all together ----------------------------------------------------------------------------------------------------


def aligner(net: nn.Module, **settings: Any) -> RepresentationAligner:
    return RepresentationAligner(net, "block", 5, hidden_dim=8, **settings)


def test_aligner() -> None:
    net, x, y = Net(), tokens(4, 9, 3), tokens(4, 36, 5)
    method = aligner(net, align_weight=0.25, manifold_weight=2.0, relation="batch", center=True)
    assert {name.split(".")[0] for name in method.state_dict()} == {"projector"}
    with method.tap:
        net(x)
    loss, report = method(y)
    projected = method.projector(net.block(net.first(x)), 36)
    parts = u_repa_loss(projected, y, align_weight=0.25, manifold_weight=2.0, relation="batch", center=True)
    torch.testing.assert_close(loss, parts.total)
    assert loss.requires_grad
    assert report["cosine"] == -parts.token
    assert report["manifold"] == parts.manifold
    torch.testing.assert_close(report["shuffled_cosine"], -token_alignment_loss(projected, y[[2, 3, 0, 1]]))
    assert not any(value.requires_grad for value in report.values())
    loss.backward()
    assert net.first.weight.grad is not None
    assert net.last.weight.grad is None  # behind the layer nothing is aligned


def test_aligner_in_evaluation_draws_nothing() -> None:
    net, x, y = Net(), tokens(4, 9, 3), tokens(4, 9, 5)
    method = aligner(net, max_tokens=3).eval()
    state, reports = torch.get_rng_state(), []
    for _ in range(2):
        with torch.no_grad(), method.tap:
            net(x)
            reports.append(method(y)[1])
    assert reports[0] == reports[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_when_it_is_active() -> None:
    net = Net()
    assert aligner(net).active(10**9)
    for settings in ({"align_weight": 0.0}, {"stop_step": 0}):
        never = aligner(net, **settings)
        assert not never.active(0)
        assert not any(parameter.requires_grad for parameter in never.parameters())
        assert never.nothing() == 0
    stopping = aligner(net, stop_step=3)
    assert [stopping.active(step) for step in (0, 2, 3, 4)] == [True, True, False, False]
    stopping.nothing().backward()  # type: ignore[union-attr]
    assert all(not parameter.grad.any() for parameter in stopping.parameters())


def test_errors_of_the_aligner() -> None:
    net, x = Net(), tokens(4, 9, 3)
    for shape in ((4, 9, 6), (3, 9, 5), (4, 5)):
        method = aligner(net)
        with method.tap:
            net(x)
        with pytest.raises(ValueError, match=r"with B = 4 rows, .* D = teacher_dim = 5, got"):
            method(tokens(*shape))
    method = aligner(net, in_channels=7)
    with method.tap:
        net(x)
    with pytest.raises(ValueError, match="have 4 channels, .*in_channels=7"):
        method(tokens(4, 9, 5))
    with pytest.raises(ValueError, match="stop_step must be >= 0, or None for never, got -1"):
        aligner(net, stop_step=-1)
