import io

import pytest
import torch
import torch.nn.functional as F

from heliostat.components import CORRUPTIONS, corrupt

RANDOM = set(CORRUPTIONS) - {
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
}


def pictures(channels, size=32, count=16):
    """Smooth fields with a few sharp bars, which noise, blur and displacement all damage."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, channels, 5, 5, generator=generator)
    x = 0.6 * F.interpolate(x, size=(size, size), mode="bicubic", align_corners=False).clamp(0, 1)
    for picture in x:
        row, column = torch.randint(size // 2, (2,), generator=generator).tolist()
        picture[:, row : row + size // 2, column] = 1
        picture[:, row, column : column + size // 2] = 0.9
    return x


def damage(images, kind, severity):
    return (corrupt(images, kind, severity) - images).square().mean().item()


@pytest.mark.parametrize("kind", CORRUPTIONS)
class TestEveryKind:
    @pytest.mark.parametrize(("channels", "size"), [(1, 32), (3, 32), (1, 20), (3, 64)])
    def test_damage_grows_with_severity(self, kind, channels, size):
        images = pictures(channels, size)
        by_severity = [damage(images, kind, severity) for severity in (1, 2, 3, 4, 5)]
        assert by_severity[0] > 0
        assert by_severity == sorted(set(by_severity))

    @pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 33, 17), (1, 2, 1, 3), (0, 1, 8, 8)])
    def test_shape_range_and_dtype(self, kind, shape):
        images = torch.rand(shape)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            result = corrupt(images.to(dtype), kind)
            assert result.shape == shape
            assert result.dtype == dtype
            assert ((result >= 0) & (result <= 1)).all()

    def test_follows_the_seed_alone(self, kind):
        images = pictures(3)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = corrupt(images, kind, seed=5)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(corrupt(images, kind, seed=5), first)
        assert torch.equal(corrupt(images, kind, seed=6), first) == (kind not in RANDOM)

    def test_stream_may_be_cut_anywhere(self, kind):
        images = pictures(1, 20)
        whole = corrupt(images, kind, 3, seed=7)
        parts = [corrupt(images[a:b], kind, 3, seed=7 + a) for a, b in ((0, 3), (3, 4), (4, 16))]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)
        order = [9, 2, 11]
        picked = corrupt(images[order], kind, 3, seed=[7 + i for i in order])
        torch.testing.assert_close(picked, whole[order], rtol=0, atol=1e-5)

    def test_equal_pictures_differ_by_their_draws(self, kind):
        twice = pictures(1)[:1].repeat(2, 1, 1, 1)
        first, second = corrupt(twice, kind)
        assert torch.equal(first, second) == (kind not in RANDOM)

    def test_autocast_changes_nothing(self, kind):
        images = pictures(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = corrupt(images, kind)
        assert torch.equal(result, corrupt(images, kind))

    def test_nan_is_not_hidden(self, kind):
        images = pictures(1)
        images[0, 0, 16, 16] = float("nan")
        if kind == "shot_noise":  # there is no Poisson distribution of rate NaN
            with pytest.raises(RuntimeError):
                corrupt(images, kind, 1)
        else:
            assert corrupt(images, kind, 1)[0].isnan().any()

    @pytest.mark.gpu
    def test_gpu_equals_cpu(self, kind):
        images = pictures(3)
        deviation = (corrupt(images.cuda(), kind).cpu() - corrupt(images, kind)).abs()
        # A value that rounds the other way (JPEG) or a pixel taken from the other neighbour may differ by more.
        assert (deviation < 1e-4).float().mean() > 0.995


def test_names_are_those_of_imagenet_c():
    assert len(CORRUPTIONS) == 15
    assert {"gaussian_noise", "glass_blur", "frost", "elastic_transform", "jpeg_compression"} <= set(CORRUPTIONS)


def test_noise_has_its_moments():
    grey = torch.full((64, 1, 32, 32), 0.5)
    noisy = corrupt(grey, "gaussian_noise", 1)
    assert noisy.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert noisy.std().item() == pytest.approx(0.08, rel=0.02)
    shot = corrupt(grey, "shot_noise", 1)
    assert shot.std().item() == pytest.approx((0.5 / 60) ** 0.5, rel=0.02)
    salt_and_pepper = corrupt(grey, "impulse_noise", 5)
    assert (salt_and_pepper == 0).float().mean().item() == pytest.approx(0.135, abs=0.01)
    assert (salt_and_pepper == 1).float().mean().item() == pytest.approx(0.135, abs=0.01)
    # neighbouring seeds give unrelated numbers
    noise = (noisy - 0.5).flatten(1)
    assert (noise[:-1] * noise[1:]).mean().abs() < 1e-4


@pytest.mark.parametrize("kind", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "elastic_transform"])
def test_a_flat_picture_has_nothing_to_blur(kind):
    flat = torch.full((2, 3, 16, 16), 0.3)
    torch.testing.assert_close(corrupt(flat, kind), flat)


def test_contrast_and_brightness():
    images = pictures(1)
    mean = images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(images, "contrast", 1), mean + 0.4 * (images - mean))
    torch.testing.assert_close(corrupt(images, "brightness", 2), (images + 0.2).clamp(max=1))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_what_pillow_does(channels):
    image = pytest.importorskip("PIL.Image")
    pixels = (pictures(channels, 40, 1)[0, :, :, :36] * 255).round().to(torch.uint8)
    for severity, quality in enumerate((25, 18, 15, 10, 7), 1):
        stream = io.BytesIO()
        array = pixels.permute(1, 2, 0).squeeze(-1).numpy()
        image.fromarray(array).save(stream, "JPEG", quality=quality, subsampling=0)
        decoded = torch.tensor(list(image.open(stream).tobytes()), dtype=torch.float32).view(40, 36, channels)
        expected = decoded.permute(2, 0, 1) / 255
        actual = corrupt(pixels[None].float() / 255, "jpeg_compression", severity)[0]
        loss = (expected - pixels / 255).abs().mean()
        assert (actual - expected).abs().mean() < 0.25 * loss  # Pillow works in integers


def test_errors():
    images = torch.rand(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"kind must be one of gaussian_noise, .*, got 'rain'"):
        corrupt(images, "rain")
    with pytest.raises(ValueError, match="severity must be 1, 2, 3, 4 or 5, got 6"):
        corrupt(images, "fog", 6)
    with pytest.raises(ValueError, match=r"floating point \(N, C, H, W\), got torch.uint8 \(4, 1, 8, 8\)"):
        corrupt(images.to(torch.uint8), "fog")
    with pytest.raises(ValueError, match=r"got torch.float32 \(1, 8, 8\)"):
        corrupt(images[0], "fog")
    with pytest.raises(ValueError, match=r"must lie in 0..1, got -1..*: corrupt first"):
        corrupt(2 * images - 1.0 - images.min() * 2, "fog")
    with pytest.raises(ValueError, match="one for each of the 4 pictures, got 3"):
        corrupt(images, "fog", seed=[1, 2, 3])
