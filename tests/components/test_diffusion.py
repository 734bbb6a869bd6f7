from __future__ import annotations

import math

import pytest
import torch

from heliostat.components import interpolant
from tests.harness import golden, relative_error

CASES = {name: case for name, case in golden("u_repa").items() if name.startswith("path")}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_reference_vectors(case) -> None:
    x0, noise, t, gain = (torch.as_tensor(case[k]).double() for k in ("x0", "noise", "t", "channel_gain"))
    x_t, velocity = interpolant(x0, noise, t, path=str(case["path"]))
    assert relative_error(x_t, case["x_t"]) < 1e-10
    errors = (gain[:, None, None] * x_t - velocity).square().flatten(1).mean(1)
    assert relative_error(errors, case["velocity_loss_per_sample"]) < 1e-10


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_goes_from_data_to_noise_at_its_velocity(path) -> None:
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 0.3], dtype=torch.float64)
    x_t, velocity = interpolant(x0, noise, t, path)
    torch.testing.assert_close(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], noise[1])
    step = 1e-6
    ahead, behind = (interpolant(x0, noise, t + s, path).x_t for s in (step, -step))
    torch.testing.assert_close(velocity, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-7)


def test_cosine_path_keeps_the_variance() -> None:
    x0, noise = torch.randn(2, 4, 1000, generator=torch.Generator().manual_seed(0))
    for t in (0.2, 0.5, 0.8):
        x_t, velocity = interpolant(x0, noise, torch.full((4,), t), "cosine")
        assert x_t.var().item() == pytest.approx(1, abs=0.1)
        assert velocity.var().item() == pytest.approx((math.pi / 2) ** 2, abs=0.2)


def test_errors() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"noise must have the shape of x0, \(3, 2\), got \(2, 2\)"):
        interpolant(x, x[:2], torch.zeros(3))
    with pytest.raises(ValueError, match=r"t must have shape \(B,\) with B = x0.shape\[0\] = 3, got \(2,\)"):
        interpolant(x, x, torch.zeros(2))
    with pytest.raises(ValueError, match="path must be one of .*, got 'straight'"):
        interpolant(x, x, torch.zeros(3), "straight")  # type: ignore[arg-type]
