from __future__ import annotations

import copy
import io
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from heliostat.components.gaussians import ClassGaussians, class_gaussians
from heliostat.components.test_time_adaptation import TestTimeAdapter, configure_batchnorm_adaptation
from tests.harness import ProcessPool, golden, relative_error

METHODS = ["none", "batchnorm", "tent", "cafa"]
ADAPTING = ["tent", "cafa"]
OPTIMIZERS = {
    "sgd": lambda rate: lambda parameters: torch.optim.SGD(parameters, rate),
    "sgd_momentum": lambda rate: lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9),
    "adam": lambda rate: lambda parameters: torch.optim.Adam(parameters, rate),
}


class Classifier(nn.Module):
    """Linear-BN-ReLU-Linear-BN-ReLU-Linear, with dropout that must stay off."""

    def __init__(self, inputs: int = 5, hidden: int = 8, features: int = 6, classes: int = 3) -> None:
        super().__init__()
        self.fc1, self.bn1 = nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden)
        self.fc2, self.bn2 = nn.Linear(hidden, features), nn.BatchNorm1d(features)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(features, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.bn2(self.fc2(self.bn1(self.fc1(x)).relu())).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class ConvClassifier(nn.Module):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = norm(6) if norm is nn.BatchNorm2d else nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def source(seed: int = 0) -> Classifier:
    """A model with running statistics that are not the initial ones, in eval mode."""
    torch.manual_seed(seed)
    model = Classifier().double()
    model.dropout.p = 0.0
    for _ in range(3):
        model(2 * torch.randn(64, 5).double() + 1)
    model.dropout.p = 0.5
    return model.eval()


def statistics(model: nn.Module, *shape: int, classes: int = 3) -> ClassGaussians:
    x = torch.randn(90, *shape, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()).dtype)
    return class_gaussians(model.features(x).detach(), torch.arange(90) % classes, classes)


def stream(batches: int = 4, rows: int = 10, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, 5, generator=generator).double() - 1 for _ in range(batches)]


def adapter(method: str = "cafa", optimizer: str = "adam", rate: float = 1e-2, **settings: object) -> TestTimeAdapter:
    model = source()
    if method == "cafa":
        settings = {"gaussians": statistics(model, 5), **settings}
    return TestTimeAdapter(model, method, optimizer=OPTIMIZERS[optimizer](rate), **settings)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


STREAMS = {name: case for name, case in golden("cafa").items() if case["kind"] == "stream"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", STREAMS.values(), ids=list(STREAMS))
def test_stream_matches_reference_vectors(case: dict, method: str, dtype: torch.dtype) -> None:
    parameters = {name[6:]: torch.as_tensor(v).to(dtype) for name, v in case.items() if name.startswith("param/")}
    (hidden, inputs), (classes, dim) = parameters["fc1.weight"].shape, parameters["head.weight"].shape
    model = Classifier(inputs, hidden, dim, classes).to(dtype).eval()
    model.load_state_dict(parameters, strict=False)  # all but num_batches_tracked
    x, labels = (torch.as_tensor(case[f"source_{name}"]) for name in ("inputs", "labels"))
    gaussians = class_gaussians(model.features(x.to(dtype)).detach(), labels, classes)
    tolerance = {torch.float64: 1e-6 if case["optimizer"] == "adam" else 1e-8, torch.float32: 1e-4}[dtype]
    assert relative_error(model(x.to(dtype)), case["expected_source_logits_eval"]) < tolerance
    assert relative_error(gaussians.mean, case["expected_mean"]) < tolerance
    adapted = TestTimeAdapter(
        model,
        method,
        gaussians=gaussians if method == "cafa" else None,
        optimizer=OPTIMIZERS[str(case["optimizer"])](float(case["learning_rate"])),
        covariance=str(case["covariance"]),
        shrinkage=float(case["shrinkage"]),
        jitter=float(case["jitter"]),
        include_predicted_class=bool(case["include_predicted_class"]),
    )
    logits, losses = [], []
    for batch in torch.as_tensor(case["stream_inputs"]).to(dtype).split(case["batch_sizes"].tolist()):
        logits.append(adapted(batch))
        losses.append(adapted.diagnostics.get("loss"))
    key = "no_adaptation" if method == "none" else method
    assert relative_error(torch.cat(logits), case[f"expected_stream_logits_{key}"]) < tolerance
    if method in ADAPTING:
        assert relative_error(torch.tensor(losses, dtype=torch.float64), case[f"expected_losses_{method}"]) < tolerance
        prefix = f"expected_final_{method}/"
        for name in (name for name in case if name.startswith(prefix)):
            final = adapted.model.get_parameter(name.removeprefix(prefix))
            assert relative_error(final, case[name]) < tolerance, name


class TestConfigure:
    def test_batch_statistics_in_any_mode_and_only_affine_is_trained(self) -> None:
        model, x = source(), stream()[0]
        expected = copy.deepcopy(model)
        expected.bn1.train()
        expected.bn2.train()
        expected = expected(x)
        adapted = configure_batchnorm_adaptation(model)
        assert list(adapted) == ["bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapted)
        assert adapted["bn1.bias"] is model.bn1.bias
        before = tensors(model)
        torch.testing.assert_close(model(x), expected)
        model.bn1.train()
        model.eval()
        torch.testing.assert_close(model(x), expected)
        assert_equal(tensors(model), before)

    def test_norm_affine(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4), nn.Linear(4, 2))
        assert list(configure_batchnorm_adaptation(model)) == ["2.weight", "2.bias"]
        names = [f"{i}.{name}" for i in (1, 2, 3) for name in ("weight", "bias")]
        assert list(configure_batchnorm_adaptation(model, "norm_affine")) == names

    def test_errors(self) -> None:
        plain = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        with pytest.raises(ValueError, match="no BatchNorm layer with scale and shift; parameters='norm_affine'"):
            configure_batchnorm_adaptation(plain)
        with pytest.raises(ValueError, match="no BatchNorm layer with scale and shift"):
            configure_batchnorm_adaptation(nn.Sequential(nn.BatchNorm1d(4, affine=False)))
        with pytest.raises(ValueError, match="no normalisation layer with scale or shift"):
            configure_batchnorm_adaptation(nn.Linear(4, 4), "norm_affine")
        with pytest.raises(ValueError, match="parameters must be one of .*got 'all'"):
            configure_batchnorm_adaptation(plain, "all")


class TestStream:
    @pytest.mark.parametrize("method", METHODS)
    def test_source_is_left_alone_and_only_affine_moves(self, method: str) -> None:
        model = source()
        gaussians = statistics(model, 5) if method == "cafa" else None
        before = tensors(model)
        adapted = TestTimeAdapter(model, method, gaussians=gaussians)
        for batch in stream():
            adapted(batch)
        assert_equal(tensors(model), before)
        assert all(p.requires_grad for p in model.parameters())
        moved = {name for name, p in adapted.model.named_parameters() if not torch.equal(p, before[name])}
        affine = {f"{layer}.{name}" for layer in ("bn1", "bn2") for name in ("weight", "bias")}
        assert moved == (affine if method in ADAPTING else set())
        assert adapted.updates == (4 if method in ADAPTING else 0)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_callers_without_gradients(self, method: str, mode: type) -> None:
        expected = [reference(batch) for reference in [adapter(method)] for batch in stream()]
        with mode():
            adapted = adapter(method)  # a model made in inference mode, too
            actual = [adapted(batch) for batch in stream()]
            assert not torch.is_grad_enabled()
        for logits, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(logits, other, rtol=0, atol=0)
            assert not logits.requires_grad
        with torch.inference_mode():
            state = copy.deepcopy(adapted.state_dict())
            adapted.reset()
            adapted.load_state_dict(state)
            assert all(adapted(batch).isfinite().all() for batch in stream())
        adapted(stream()[0])
        adapted.reset()

    @pytest.mark.parametrize("method", ADAPTING)
    def test_nothing_of_the_graph_is_kept(self, method: str) -> None:
        adapted = adapter(method)
        x = stream()[0].requires_grad_()
        assert not adapted(x).requires_grad
        assert x.grad is None
        assert all(p.grad is None for p in adapted.parameters())
        assert all(type(value) in (int, float) for value in adapted.diagnostics.values())
        assert not any(module._forward_pre_hooks for module in adapted.modules())

    def test_diagnostics(self) -> None:
        adapted = adapter("cafa")
        x = stream()[0]
        adapted(x)
        d = adapted.diagnostics
        assert (d["samples"], d["used"]) == (10, 10)
        assert 0 < d["intra"] < d["inter"]
        assert d["loss"] < 0
        tent = adapter("tent")
        p = tent(x).softmax(1)
        assert tent.diagnostics["loss"] == pytest.approx(float(-(p * p.log()).sum(1).mean()))
        assert set(tent.diagnostics) == {"samples", "used", "dropped", "loss"}

    def test_stays_in_eval_mode(self) -> None:
        adapted, x = adapter("batchnorm"), stream()[0]
        assert not any(module.training for module in adapted.modules())
        expected = adapted(x)
        adapted.train()
        assert torch.equal(adapted(x), expected)
        assert not any(module.training for module in adapted.modules())
        adapted.model.train()  # by someone who reaches in; batch statistics do not depend on it
        adapted.model.dropout.eval()
        assert torch.equal(adapted(x), expected)

    @pytest.mark.parametrize("method", ADAPTING)
    def test_several_steps_emit_the_first_forward(self, method: str) -> None:
        twice, once = adapter(method, steps=2), adapter(method)
        x = stream()[0]
        assert torch.equal(twice(x), once(x))
        once(x)
        assert_equal(tensors(twice), tensors(once))
        assert twice.updates == 2

    @pytest.mark.parametrize("method", ADAPTING)
    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_reset_is_exact(self, method: str, optimizer: str) -> None:
        adapted = adapter(method, optimizer)
        before, first = tensors(adapted), [adapted(batch) for batch in stream()]
        assert any(not torch.equal(before[name], value) for name, value in tensors(adapted).items())
        adapted.optimizer.param_groups[0]["lr"] = 7.0  # as a schedule would
        adapted.reset()
        assert_equal(tensors(adapted), before)
        assert adapted.updates == 0
        assert not adapted.optimizer.state
        again = [adapted(batch) for batch in stream()]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("method", ADAPTING)
    def test_episodic_batches_do_not_depend_on_each_other(self, method: str) -> None:
        adapted = adapter(method, episodic=True)
        logits = [adapted(batch) for batch in stream()]
        assert torch.equal(adapted(stream()[2]), logits[2])
        online = adapter(method)
        assert not torch.equal([online(batch) for batch in stream()][2], logits[2])

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
    def test_resumed_equals_uninterrupted(self, method: str, optimizer: str) -> None:
        whole = adapter(method, optimizer)
        expected = [whole(batch) for batch in stream()]
        interrupted = adapter(method, optimizer)
        for batch in stream()[:2]:
            interrupted(batch)
        file = io.BytesIO()
        torch.save(interrupted.state_dict(), file)
        for batch in stream()[2:]:  # goes on, and must not share anything with what was saved in memory
            interrupted(batch)
        file.seek(0)
        resumed = adapter(method, optimizer)
        for batch in stream(seed=9):
            resumed(batch)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for batch, logits in zip(stream()[2:], expected[2:], strict=True):
            assert torch.equal(resumed(batch), logits)
        assert resumed.updates == whole.updates
        assert_equal(tensors(resumed), tensors(whole))
        resumed.reset()
        assert_equal(tensors(resumed), tensors(adapter(method, optimizer)))

    def test_states_in_memory_are_not_shared(self) -> None:
        first, second = adapter(), adapter()
        first(stream()[0])
        second.load_state_dict(first.state_dict())
        moment = first.optimizer.state[first.model.bn1.weight]["exp_avg"].clone()
        second(stream()[1])
        assert torch.equal(first.optimizer.state[first.model.bn1.weight]["exp_avg"], moment)

    def test_the_state_brings_its_statistics_and_settings(self) -> None:
        first = adapter()
        other = statistics(source(), 5)
        other.update(torch.randn(9, 6), torch.arange(9) % 3)
        second = adapter(gaussians=other)
        second.load_state_dict(first.state_dict())
        x = stream()[0]
        assert torch.equal(first(x), second(x))
        assert_equal(tensors(first), tensors(second))
        with pytest.raises(ValueError, match="the state is of an adapter with .*'shrinkage': 0.1.*'shrinkage': 0.5"):
            adapter(shrinkage=0.5).load_state_dict(first.state_dict())

    def test_copies_adapt_on_their_own(self) -> None:
        adapted = adapter()
        adapted(stream()[0])
        twin = copy.deepcopy(adapted)
        assert torch.equal(twin(stream()[1]), adapted(stream()[1]))
        assert_equal(tensors(twin), tensors(adapted))
        before = tensors(adapted)
        twin(stream()[2])
        assert_equal(tensors(adapted), before)
        assert any(not torch.equal(before[name], value) for name, value in tensors(twin).items())

    @pytest.mark.parametrize("method", METHODS)
    def test_autocast_and_float32(self, method: str) -> None:
        model = source().float()
        gaussians = statistics(model, 5) if method == "cafa" else None
        adapted = TestTimeAdapter(model, method, gaussians=gaussians)
        exact = TestTimeAdapter(model, method, gaussians=gaussians)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for batch in stream():
                logits, expected = adapted(batch.float()), exact(batch.float())
                assert logits.isfinite().all()
        assert relative_error(logits.float(), expected.float()) < 5e-2
        if method in ADAPTING:
            assert math.isfinite(adapted.diagnostics["loss"])

    @pytest.mark.parametrize("method", ADAPTING)
    def test_group_norm_network(self, method: str) -> None:
        model = ConvClassifier(nn.GroupNorm)
        gaussians = statistics(model, 2, 5, 5)
        with pytest.raises(ValueError, match="norm_affine"):
            TestTimeAdapter(model, method, gaussians=gaussians)
        adapted = TestTimeAdapter(model, method, gaussians=gaussians, parameters="norm_affine")
        x = torch.randn(4, 2, 5, 5)
        torch.testing.assert_close(adapted(x), model(x).detach())
        assert not torch.equal(adapted.model.norm.weight, model.norm.weight)

    @pytest.mark.parametrize("method", ADAPTING)
    def test_loss_goes_down_on_a_repeated_batch(self, method: str) -> None:
        adapted = adapter(method, "sgd", 1e-3)
        x, losses = stream()[0], []
        for _ in range(20):
            adapted(x)
            losses.append(adapted.diagnostics["loss"])
        assert losses[-1] < losses[0]


class NaNAfterBatchNorm(Classifier):
    """Adds the sixth input to the features, so that a row can be broken without breaking the batch's statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x[:, :5]) + x[:, 5:])


class TestDegenerateBatches:
    @pytest.mark.parametrize("method", ADAPTING)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_broken_samples_are_left_out_and_counted(self, method: str, value: float) -> None:
        torch.manual_seed(0)
        model = NaNAfterBatchNorm().double().eval()
        gaussians = statistics(model, 5)
        x = torch.cat([stream()[0], torch.zeros(10, 1).double()], 1)
        broken = x.clone()
        broken[[2, 7], 5] = value
        adapted = TestTimeAdapter(model, method, gaussians=gaussians, steps=2)
        with pytest.warns(UserWarning, match=r"2 of 10 samples have NaN or infinite .*\(2 so far\)"):
            logits = adapted(broken)
        assert logits[[0, 1]].isfinite().all()
        assert adapted.diagnostics["used"] == 8
        assert adapted.dropped_samples == 2
        assert adapted.updates == 2
        assert all(p.isfinite().all() for p in adapted.parameters())
        # the same loss as of the other rows, under the statistics of all rows
        adapted, other = (TestTimeAdapter(model, method, gaussians=gaussians) for _ in range(2))
        with pytest.warns(UserWarning, match="2 of 10 samples"):
            adapted(broken)
        loss = _loss_of_rows(other, x, [i for i in range(10) if i not in (2, 7)])
        assert adapted.diagnostics["loss"] == pytest.approx(loss.item(), rel=1e-12)

    @pytest.mark.parametrize("method", ADAPTING)
    def test_nothing_left_means_no_update_even_with_momentum(self, method: str) -> None:
        adapted = adapter(method)
        adapted(stream()[0])
        before = tensors(adapted)
        with pytest.warns(UserWarning, match="10 of 10 samples"):
            adapted(torch.full((10, 5), torch.nan).double())
        assert_equal(tensors(adapted), before)
        assert adapted.updates == 1

    def test_predicted_classes_without_statistics(self) -> None:
        model = source()
        g = statistics(model, 5)
        x = stream()[0]
        predicted = TestTimeAdapter(model, "batchnorm")(x).argmax(1)
        for covariance, removed in (("class", 1), ("tied", 0)):
            count = g.count.clone()
            count[predicted[0]] = removed
            gaussians = ClassGaussians(count, g.mean, g.covariance)
            with pytest.warns(UserWarning, match="gaussians: 1 of 3 classes have too few source samples"):
                adapted = TestTimeAdapter(model, "cafa", gaussians=gaussians, covariance=covariance)
            adapted(x)
            assert adapted.diagnostics["used"] == int((predicted != predicted[0]).sum())
        with torch.no_grad():
            model.head.bias[predicted[0]] += 1e3  # every sample is predicted as the class without statistics
        with pytest.warns(UserWarning, match="too few"):
            adapted = TestTimeAdapter(model, "cafa", gaussians=gaussians, covariance="tied")
        before = tensors(adapted)
        adapted(x)
        assert_equal(tensors(adapted), before)
        assert adapted.diagnostics == {"samples": 10, "used": 0, "dropped": 0}

    @pytest.mark.parametrize("method", METHODS)
    def test_one_row_without_batch_statistics_takes_the_source_s(self, method: str) -> None:
        adapted = adapter(method)
        x = stream()[0]
        if method == "none":
            adapted(x[:1])
            return
        adapted(x)
        before = tensors(adapted)
        with pytest.warns(UserWarning, match=r"one value a channel .* without an update \(1 so far\)"):
            logits = adapted(x[:1])
        assert adapted.skipped_batches == 1
        assert_equal(tensors(adapted), before)
        expected = source()
        expected.load_state_dict({**expected.state_dict(), **dict(adapted.model.named_parameters())})
        torch.testing.assert_close(logits, expected(x[:1]).detach())
        if method == "batchnorm":  # and the next batch has its own statistics again
            torch.testing.assert_close(adapted(x), TestTimeAdapter(source(), "batchnorm")(x))

    @pytest.mark.parametrize("method", ADAPTING)
    def test_one_image_has_the_statistics_of_its_map(self, method: str) -> None:
        model = ConvClassifier().eval()
        gaussians = statistics(model, 2, 5, 5)
        x = torch.randn(1, 2, 5, 5)
        expected = TestTimeAdapter(model, "batchnorm")(x)
        adapted = TestTimeAdapter(model, method, gaussians=gaussians)
        with pytest.warns(UserWarning, match=r"a batch of 1 is too small to adapt to \(min_batch_size=2\)"):
            assert torch.equal(adapted(x), expected)
        assert adapted.updates == 0
        allowed = TestTimeAdapter(model, method, gaussians=gaussians, min_batch_size=1)
        assert torch.equal(allowed(x), expected)
        assert allowed.updates == 1
        with pytest.warns(UserWarning, match="one value a channel"):  # a map of one pixel
            allowed(torch.randn(1, 2, 3, 3))
        assert allowed.updates == 1

    def test_small_last_batch(self) -> None:
        adapted, reference = adapter("tent", min_batch_size=8), adapter("batchnorm")
        x = stream()[0][:5]
        with pytest.warns(UserWarning, match=r"a batch of 5 is too small .*min_batch_size=8"):
            assert torch.equal(adapted(x), reference(x))
        assert adapted.updates == 0

    def test_gradient_that_is_not_finite_is_not_taken(self) -> None:
        adapted = adapter("tent")
        before = tensors(adapted)
        adapted.model.fc2.register_forward_hook(lambda module, args, output: _PoisonGradient.apply(output))
        with pytest.warns(UserWarning, match=r"gradient of a batch is not finite.*\(1 so far\)"):
            adapted(stream()[0])
        assert_equal(tensors(adapted), before)
        assert adapted.updates == 0


class _PoisonGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.nan


def _loss_of_rows(adapted: TestTimeAdapter, x: Tensor, rows: list[int]) -> Tensor:
    from heliostat.components.cafa import class_aware_alignment_loss
    from heliostat.components.gaussians import mahalanobis_sq

    model = adapted.model
    features = (model.features(x[:, :5]) + x[:, 5:])[rows]
    logits = model.head(features)
    if adapted.method == "tent":
        return torch.distributions.Categorical(logits=logits).entropy().mean()
    g = adapted.gaussians
    return class_aware_alignment_loss(mahalanobis_sq(features, g.mean, g.precision_factor()), logits.argmax(1))


class Timmlike(Classifier):
    """Its last Linear is not its head, but it says which is."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(6, 2)

    def get_classifier(self) -> nn.Module:
        return self.head


class TestHead:
    @pytest.mark.parametrize("head", ["head", "module", None])
    def test_is_found(self, head: str | None) -> None:
        model = Timmlike().eval()
        adapted = TestTimeAdapter(
            model, "cafa", gaussians=statistics(model, 5), head=model.head if head == "module" else head
        )
        adapted(stream()[0].float())
        assert adapted.updates == 1

    def test_output_with_logits_and_named_inputs(self) -> None:
        class Named(Classifier):
            def forward(self, pixel_values: Tensor) -> SimpleNamespace:
                return SimpleNamespace(logits=self.head(input=self.features(pixel_values)))

        model = Named().eval()
        adapted = TestTimeAdapter(model, "cafa", gaussians=statistics(model, 5))
        with torch.inference_mode():
            assert adapted(pixel_values=stream()[0].float()).shape == (10, 3)
        assert adapted.updates == 1

    def test_errors_of_construction(self) -> None:
        model = source()
        g = statistics(model, 5)
        no_linear = nn.Sequential(nn.BatchNorm1d(4))
        for call, pattern in [
            (lambda: TestTimeAdapter(model, "eata"), "method must be one of .*got 'eata'"),
            (lambda: TestTimeAdapter(model, "cafa"), "method 'cafa' needs gaussians"),
            (lambda: TestTimeAdapter(model, "tent", steps=0), "steps and min_batch_size must be >= 1, got 0 and 2"),
            (lambda: TestTimeAdapter(model, "tent", min_batch_size=0), "got 1 and 0"),
            (lambda: TestTimeAdapter(model, "cafa", gaussians=g, head="fc"), "no module 'fc'.*fc1, bn1, fc2, bn2"),
            (lambda: TestTimeAdapter(model, "cafa", gaussians=g, head=nn.Linear(6, 3)), "not part of the model"),
            (lambda: TestTimeAdapter(no_linear, "cafa", gaussians=g), "no classification head was found"),
            (
                lambda: TestTimeAdapter(
                    model, "cafa", gaussians=ClassGaussians(torch.tensor([9, 1, 0]), g.mean, g.covariance)
                ),
                "needs two with statistics, got 1 of 3",
            ),
            (lambda: TestTimeAdapter(nn.Linear(5, 3), "tent"), "no BatchNorm layer"),
        ]:
            with pytest.raises(ValueError, match=pattern):
                call()

    def test_errors_of_the_first_batch(self) -> None:
        class Twice(Classifier):
            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.features(x)) + self.head(self.features(-x))

        class Ignored(Timmlike):
            def forward(self, x: Tensor) -> Tensor:
                return self.auxiliary(self.features(x))

        class Maps(ConvClassifier):
            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.norm(self.conv(x)).movedim(1, 3)).mean((1, 2))

        class Pair(Classifier):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.head(self.features(x)), x

        x, maps = torch.randn(6, 5), torch.randn(6, 2, 5, 5)
        g = statistics(Classifier().eval(), 5)
        four = ClassGaussians(torch.full((4,), 9), torch.randn(4, 6), torch.eye(6).repeat(4, 1, 1))
        narrow = ClassGaussians(torch.full((3,), 9), torch.randn(3, 5), torch.eye(5).repeat(3, 1, 1))
        for model, gaussians, inputs, pattern in [
            (Twice(), g, x, "'head' must be called once in a forward, but was called 2 times"),
            (Ignored(), g, x, "called 0 times; name the classification head"),
            (Maps(), g, maps, r"features \(N, D\) with N = 6, got \(6, 3, 3, 6\)"),
            (Classifier(), four, x, r"C = 4 classes and D = 6 features, but the model has C = 3"),
            (Classifier(), narrow, x, r"D = 5 features, but the model has C = 3 and, before 'head', D = 6"),
            (Pair(), g, x, r"must return logits \(N, C\).*got tuple"),
        ]:
            adapted = TestTimeAdapter(model.eval(), "cafa", gaussians=gaussians)
            with pytest.raises(ValueError, match=pattern):
                adapted(inputs)
            assert not any(module._forward_pre_hooks for module in adapted.modules())


@pytest.mark.parametrize("method", ["batchnorm", *ADAPTING])
@pytest.mark.parametrize("network", ["linear", "convolution"])
@pytest.mark.parametrize("first", [5, 7], ids=["equal shards", "ragged shards"])
def test_two_processes_equal_one(two_processes: ProcessPool, method: str, network: str, first: int) -> None:
    logits, losses, state = _stream_on_rank(None, method, network, first)
    results = two_processes.run(_stream_on_rank, method, network, first)
    for step, expected in enumerate(logits):
        assert relative_error(torch.cat([result[0][step] for result in results]), expected) < 1e-9
    for _, other_losses, other_state in results:
        assert other_losses == pytest.approx(losses, rel=1e-9)
        for name, tensor in state.items():
            assert relative_error(other_state[name], tensor) < 1e-9, name
    assert all(torch.equal(results[0][2][name], results[1][2][name]) for name in state)


def _stream_on_rank(
    rank: int | None, method: str, network: str, first: int
) -> tuple[list[Tensor], list[float], dict[str, Tensor]]:
    """Four batches; in the last, the whole part of the second process is broken behind BatchNorm."""
    torch.manual_seed(0)
    model = (NaNAfterBatchNorm() if network == "linear" else ConvClassifier()).double().eval()
    shape = (5,) if network == "linear" else (2, 4, 4)
    gaussians = statistics(model, *shape)
    adapted = TestTimeAdapter(model, method, gaussians=gaussians, optimizer=OPTIMIZERS["sgd_momentum"](0.05))
    generator = torch.Generator().manual_seed(2)
    logits, losses = [], []
    for step in range(4):
        x = 3 * torch.randn(10, *shape, generator=generator).double() - 1
        if network == "linear":
            x = torch.cat([x, torch.zeros(10, 1).double()], 1)
            x[first:, 5] = torch.nan if step == 3 and method != "batchnorm" else 0.0
        own = {None: x, 0: x[:first], 1: x[first:]}[rank]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits.append(adapted(own).nan_to_num(99.0))
        losses.append(adapted.diagnostics.get("loss", 0.0))
    if method != "batchnorm":
        assert adapted.updates == 4
    return logits, losses, tensors(adapted)


@pytest.mark.gpu
@pytest.mark.parametrize("covariance", ["class", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_on_cuda_equals_cpu(method: str, covariance: str) -> None:
    model = source()
    g = statistics(model, 5)
    on_device = ClassGaussians.empty(3, 6, device="cuda")
    x = torch.randn(90, 5, generator=torch.Generator().manual_seed(1)).double()
    on_device.update(model.features(x).detach(), torch.arange(90) % 3)
    assert relative_error(on_device.covariance.cpu(), g.covariance) < 1e-12
    settings = {"covariance": covariance} if method == "cafa" else {}
    on_cpu = TestTimeAdapter(model, method, gaussians=g, **settings)
    adapted = TestTimeAdapter(model, method, gaussians=on_device, **settings).to("cuda")
    for batch in stream():
        assert relative_error(adapted(batch.to("cuda")).cpu(), on_cpu(batch)) < 1e-8
