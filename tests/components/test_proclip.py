from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat.components import (
    ContrastiveTuningLoss,
    TextAdapter,
    ema_update_,
    gather_rows,
    instance_alignment_loss,
    representation_inheritance_loss,
    structure_alignment_loss,
)
from tests.harness import GoldenCase, OperatorContract, ProcessPool, golden, relative_error

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def cases(kind: str) -> dict[str, dict]:
    return {name: case for name, case in golden("proclip").items() if case["kind"] == kind}


def rows(count: int = 16, dim: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def pair(count: int = 16, dim: int = 6) -> dict[str, Tensor]:
    return {"student": rows(count, dim), "teacher": rows(count, dim, 1)}


def degenerate() -> dict[str, dict[str, Tensor]]:
    half = rows(8)
    return {
        "one row": pair(1),
        "two rows": pair(2),
        "duplicates of the student": {"student": half.repeat(2, 1), "teacher": rows(16, seed=1)},
        "duplicates of both": {"student": half.repeat(2, 1), "teacher": rows(8, seed=1).repeat(2, 1)},
        "all equal": {"student": torch.ones(5, 6), "teacher": rows(5)},
        "zero rows": {"student": torch.zeros(4, 6), "teacher": rows(4)},
        "zero rows of the teacher": {"student": rows(4), "teacher": torch.zeros(4, 6)},
        "huge": {"student": rows() * 1e18, "teacher": rows(seed=1) * 1e-18},
        "one dimension": pair(8, 1),
    }


def errors(loss) -> dict:
    student, teacher = rows(), rows(seed=1)
    return {
        "width": (lambda: loss(student, rows(16, 5)), r"shape of student, \(16, 6\), got \(16, 5\)"),
        "count": (lambda: loss(student, teacher[1:]), r"shape of student, \(16, 6\), got \(15, 6\)"),
        "no rows": (lambda: loss(student[:0], teacher[:0]), r"B >= 1, got \(0, 6\)"),
        "one vector": (lambda: loss(student[0], teacher[0]), r"student must have shape \(B, d\) .* got \(6,\)"),
        "reduction": (lambda: loss(student, teacher, reduction="none"), "reduction must be one of .* got 'none'"),
    }


def plain_structure(student: Tensor, teacher: Tensor, squared: bool = False) -> Tensor:
    """Pair by pair, with autograd; without duplicates."""
    a, b = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    total = a.new_zeros(())
    for i in range(len(a)):
        for j in range(i + 1, len(a)):
            u = (a[i] - a[j]).norm() - (b[i] - b[j]).norm()
            total = total + (u**2 if squared else torch.where(u.abs() < 1, u**2 / 2, u.abs() - 0.5))
    return total


class TestInstance(OperatorContract):
    """With a mean, which DDP averages to that of one process."""

    differentiable = ("student",)
    split = {"student": 0, "teacher": 0}  # noqa: RUF012

    def call(self, student: Tensor, teacher: Tensor) -> Tensor:
        return instance_alignment_loss(student, teacher, reduction="mean")

    def example(self, count: int = 16) -> dict[str, Tensor]:
        return pair(count)

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in cases("stage1_variants").items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            squared = structure_alignment_loss(**inputs, penalty="squared")
            return {
                "instance_mean_over_samples": instance_alignment_loss(**inputs, reduction="mean"),
                "structure_squared_sum": squared,
                "structure_squared_mean": structure_alignment_loss(**inputs, penalty="squared", reduction="mean"),
                "structure_smooth_l1_mean": structure_alignment_loss(**inputs, reduction="mean"),
            }

        names = ("instance_mean_over_samples", "structure_squared_sum", "structure_squared_mean")
        return GoldenCase(
            inputs={name: case[name] for name in ("student", "teacher")},
            call=call,
            outputs={name: case[f"expected_{name}"] for name in (*names, "structure_smooth_l1_mean")},
            gradients={"student": case["expected_grad_student_of_structure_squared_sum"]},
            cotangent=("structure_squared_sum", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        return degenerate()

    def error_cases(self):
        return errors(instance_alignment_loss)


class TestStructure(OperatorContract):
    """Over the pairs of all processes."""

    differentiable = ("student",)
    split = {"student": 0, "teacher": 0}  # noqa: RUF012
    settings: dict = {}  # noqa: RUF012

    def call(self, student: Tensor, teacher: Tensor) -> Tensor:
        return structure_alignment_loss(student, teacher, gather=True, **self.settings)

    def example(self, count: int = 16) -> dict[str, Tensor]:
        return pair(count)

    def degenerate_cases(self):
        return degenerate()

    def error_cases(self):
        wrong = lambda: structure_alignment_loss(rows(), rows(), penalty="l1")  # noqa: E731
        return {**errors(structure_alignment_loss), "penalty": (wrong, "penalty must be one of .* got 'l1'")}

    def test_every_process_has_the_whole_value(self, two_processes: ProcessPool) -> None:
        example = self.example()
        expected = self.call(**example)
        for value in two_processes.run(_structure_on_rank, self.settings, example):
            torch.testing.assert_close(value, expected)


def _structure_on_rank(rank: int, settings: dict, example: dict[str, Tensor]) -> Tensor:
    return structure_alignment_loss(**{k: v.chunk(2)[rank] for k, v in example.items()}, gather=True, **settings)


class TestSquaredMeanStructure(TestStructure):
    settings = {"penalty": "squared", "reduction": "mean"}  # noqa: RUF012


class TestInheritance(OperatorContract):
    """Both terms, gathered, so that even sums are those of one process; with a second caption."""

    differentiable = ("student", "student_second")
    split = {"student": 0, "teacher": 0, "student_second": 0, "teacher_second": 0}  # noqa: RUF012

    def call(self, **inputs: Tensor) -> Tensor:
        return representation_inheritance_loss(**inputs, gather=True, structure_weight=0.3).total

    def example(self, count: int = 16) -> dict[str, Tensor]:
        return {**pair(count), "student_second": rows(count, seed=2), "teacher_second": rows(count, seed=3)}

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in cases("stage1").items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        students = [name for name in ("student", "student_second") if name in case]
        return GoldenCase(
            inputs={k: case[k] for k in ("student", "teacher", "student_second", "teacher_second") if k in case},
            call=lambda inputs: representation_inheritance_loss(**inputs)._asdict(),
            outputs={name: case[f"expected_{name}"] for name in ("total", "instance", "structure")},
            gradients={name: case[f"expected_grad_{name}"] for name in students},
            cotangent=("total", 1.0),
            tolerance=TOLERANCE,
        )

    def error_cases(self):
        def loss(**settings):
            return lambda: representation_inheritance_loss(**{**pair(), **settings})

        return {
            "half a second caption": (loss(student_second=rows()), "belong together: give both or neither"),
            "width of the second": (
                loss(student_second=rows(), teacher_second=rows(16, 5)),
                r"teacher_second must have the shape of student_second, \(16, 6\), got \(16, 5\)",
            ),
            "instance_weight": (loss(instance_weight=-1.0), "instance_weight must be >= 0, got -1.0"),
            "structure_weight": (loss(structure_weight=-1.0), "structure_weight must be >= 0, got -1.0"),
            **errors(representation_inheritance_loss),
        }


class TestTuning(OperatorContract):
    differentiable = ("image", "text", "log_logit_scale")
    split = {"image": 0, "text": 0, "teacher_image": 0}  # noqa: RUF012

    def call(self, image: Tensor, text: Tensor, log_logit_scale: Tensor, teacher_image: Tensor) -> Tensor:
        loss = ContrastiveTuningLoss(0.5, reduction="mean", gather=True)
        return loss(image, text, log_logit_scale.exp(), teacher_image).total

    def example(self, count: int = 16) -> dict[str, Tensor]:
        features = {"image": rows(count), "text": rows(count, seed=1), "teacher_image": rows(count, seed=2)}
        return {**features, "log_logit_scale": torch.tensor(1.5)}

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in cases("stage2").items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = ContrastiveTuningLoss(float(case["reg_weight"]))
            scale = inputs["log_logit_scale"].exp()
            return loss(inputs["image"], inputs["text"], scale, inputs["teacher_image"])._asdict()

        names = {"total": "total", "contrastive": "clip", "instance": "instance", "structure": "structure"}
        return GoldenCase(
            inputs={name: case[name] for name in ("image", "text", "teacher_image", "log_logit_scale")},
            call=call,
            outputs={ours: case[f"expected_{theirs}"] for ours, theirs in names.items()},
            gradients={name: case[f"expected_grad_{name}"] for name in ("image", "text", "log_logit_scale")},
            cotangent=("total", 1.0),
            tolerance=TOLERANCE,
        )

    def degenerate_cases(self):
        example = self.example()
        one = {name: value[:1] if value.ndim else value for name, value in example.items()}
        return {"one pair": one, "equal images": {**example, "image": torch.ones(16, 6)}}

    def error_cases(self):
        inputs = (rows(), rows(), 10.0)
        return {
            "no teacher": (lambda: ContrastiveTuningLoss()(*inputs), "teacher_image is needed for reg_weight=0.0004"),
            "teacher": (lambda: ContrastiveTuningLoss()(*inputs, rows(8)), "teacher must have the shape of student"),
            "reg_weight": (lambda: ContrastiveTuningLoss(-1.0), "reg_weight must be >= 0, got -1.0"),
            "reduction": (lambda: ContrastiveTuningLoss(reduction="none"), "reduction must be one of"),
            "penalty": (lambda: ContrastiveTuningLoss(penalty="l1"), "penalty must be one of"),
            "structure_weight": (lambda: ContrastiveTuningLoss(structure_weight=-1), "structure_weight must be >= 0"),
        }


@pytest.mark.parametrize("squared", [False, True])
def test_structure_against_a_loop(squared: bool) -> None:
    student, teacher = rows(9).double().requires_grad_(), rows(9, seed=1).double()
    student = student * torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1, 1]).double()[:, None]  # some |u| > 1
    teacher = teacher + 3  # distances of the teacher are small
    (expected,) = torch.autograd.grad(plain_structure(student, teacher, squared), student)
    value = structure_alignment_loss(student, teacher, penalty="squared" if squared else "smooth_l1")
    assert relative_error(value, plain_structure(student, teacher, squared).detach()) < 1e-12
    (gradient,) = torch.autograd.grad(value, student)
    assert relative_error(gradient, expected) < 1e-12


def test_both_branches_of_the_penalty_are_met() -> None:
    """Opposite unit vectors against equal ones: u = 2, so 3/2 and 4; a gradient of slope 1 and 4."""
    student, teacher = torch.tensor([[1.0, 0], [-1, 0]]), torch.ones(2, 2)
    for penalty, value, slope in (("smooth_l1", 1.5, 1.0), ("squared", 4.0, 4.0)):
        leaf = student.clone().requires_grad_()
        loss = structure_alignment_loss(leaf, teacher, penalty=penalty, normalize=False)
        loss.backward()
        assert loss == value
        assert leaf.grad.tolist() == [[slope, 0], [-slope, 0]]


def test_duplicates_do_not_push_each_other() -> None:
    """Rows 0 and 1 are equal; their gradient is that of the pairs with row 2, half of it each."""
    student = torch.tensor([[1.0, 2, 3], [1, 2, 3], [-2, 1, 0.5]], dtype=torch.double, requires_grad=True)
    teacher = rows(3, 3).double()
    (gradient,) = torch.autograd.grad(structure_alignment_loss(student, teacher), student)
    expected = torch.zeros_like(gradient)
    for i in (0, 1):
        chosen = student[[i, 2]].detach().requires_grad_()
        plain_structure(chosen, teacher[[i, 2]]).backward()
        expected[[i, 2]] += chosen.grad
    torch.testing.assert_close(gradient, expected)
    own, other = student[:2], teacher[:2]
    assert not torch.autograd.grad(structure_alignment_loss(own, other), student)[0].any()


def test_near_duplicates_keep_their_digits() -> None:
    """A pair 1e-6 apart, where its weight is 1e6: float32 must still agree with float64."""
    direction = F.normalize(rows(1, 64), dim=1)
    student = torch.cat([direction, direction + 1e-6 * rows(1, 64, 1), rows(6, 64, 2)])
    teacher = rows(8, 64, 3)
    gradients = []
    for dtype in (torch.float64, torch.float32):
        leaf = F.normalize(student, dim=1).to(dtype).requires_grad_()
        structure_alignment_loss(leaf, teacher.to(dtype), normalize=False).backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-6


def test_one_row_has_a_zero_on_the_graph() -> None:
    student = rows(1).requires_grad_()
    for reduction in ("sum", "mean"):
        loss = structure_alignment_loss(student, rows(1), reduction=reduction)
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, student)[0], torch.zeros(1, 6))


def test_half_precision_is_summed_in_float32() -> None:
    """The sum over the pairs of 600 opposite rows exceeds what float16 can hold."""
    student = torch.tensor([[1.0, 0], [-1, 0]]).repeat(300, 1).half()
    value = structure_alignment_loss(student, torch.ones_like(student))
    assert value.dtype == torch.float32
    assert value == 300 * 300 * 1.5


def test_invariances() -> None:
    student, teacher = rows().double(), rows(seed=1).double()
    value = structure_alignment_loss(student, teacher)
    order = torch.randperm(16)
    rotation = torch.linalg.qr(rows(6).double()).Q
    torch.testing.assert_close(structure_alignment_loss(student[order], teacher[order]), value)
    torch.testing.assert_close(structure_alignment_loss(5 * student @ rotation, teacher), value)
    for loss in (instance_alignment_loss, structure_alignment_loss):
        assert loss(student, 3 * student) < 1e-25
        torch.testing.assert_close(
            loss(student, teacher, reduction="sum", normalize=False),
            loss(F.normalize(student, dim=1) * student.norm(dim=1, keepdim=True), teacher, normalize=False),
        )
    instance = instance_alignment_loss(student, teacher)
    torch.testing.assert_close(instance, 16 * instance_alignment_loss(student, teacher, reduction="mean"))
    torch.testing.assert_close(value, 120 * structure_alignment_loss(student, teacher, reduction="mean"))


def test_no_gradient_to_the_teacher() -> None:
    student, teacher = rows().requires_grad_(), rows(seed=1).requires_grad_()
    representation_inheritance_loss(student, teacher).total.backward()
    assert student.grad is not None
    assert teacher.grad is None


def test_nan_shows() -> None:
    student = rows()
    student[3, 1] = torch.nan
    student.requires_grad_()
    loss = structure_alignment_loss(student, rows(seed=1))
    assert loss.isnan()
    loss.backward()
    assert student.grad[3].isnan().all()


def test_sums_without_gather_are_the_ranks_own(two_processes: ProcessPool) -> None:
    student, teacher = rows(), rows(seed=1)
    values = two_processes.run(_inheritance_on_rank, student, teacher)
    for rank, value in enumerate(values):
        torch.testing.assert_close(
            value, representation_inheritance_loss(student.chunk(2)[rank], teacher.chunk(2)[rank]).total
        )


def _inheritance_on_rank(rank: int, student: Tensor, teacher: Tensor) -> Tensor:
    assert len(gather_rows(student.chunk(2)[rank])) == 16
    return representation_inheritance_loss(student.chunk(2)[rank], teacher.chunk(2)[rank]).total


def test_without_regulariser_there_is_only_the_contrast() -> None:
    parts = ContrastiveTuningLoss(0.0)(rows(), rows(seed=1), 10.0)
    assert parts.total == parts.contrastive
    assert parts.instance == parts.structure == 0
    with_teacher = ContrastiveTuningLoss(1e-3)(rows(), rows(seed=1), 10.0, rows(seed=2))
    assert with_teacher.contrastive == parts.contrastive
    expected = parts.total + 1e-3 * (with_teacher.instance + with_teacher.structure)
    torch.testing.assert_close(with_teacher.total, expected)


# --- adapter ---------------------------------------------------------------------------------------------------------


def load_reference_(adapter: TextAdapter, case: dict) -> None:
    """The released code's parameters, by their names there."""
    blocks = int(case["num_blocks"])
    places = {f"{blocks}": "norm", f"{blocks + 1}": "projection"}
    for i in range(blocks):
        places |= {f"{i}.ln": f"blocks.{i}.0", f"{i}.fn.0": f"blocks.{i}.1", f"{i}.fn.3": f"blocks.{i}.4"}
    state = {}
    for key, value in case.items():
        if key.startswith("param/"):
            place, kind = key.removeprefix("param/text_adaptor.").rsplit(".", 1)
            state[f"{places[place]}.{kind}"] = torch.as_tensor(value)
    adapter.load_state_dict(state)


def reference_adapter(case: dict) -> TextAdapter:
    width, out = case["embedding"].shape[1], case["expected_output"].shape[1]
    adapter = TextAdapter(width, out, int(case["expansion_factor"]), int(case["num_blocks"]))
    load_reference_(adapter, case)
    return adapter


class TestAdapter(OperatorContract):
    differentiable = ("embeddings",)
    autocast_tolerance = 5e-2

    def call(self, embeddings: Tensor) -> Tensor:
        torch.manual_seed(0)
        return TextAdapter(6, 4, 2, 2).to(torch.promote_types(embeddings.dtype, torch.float32))(embeddings)

    def example(self, count: int = 16) -> dict[str, Tensor]:
        return {"embeddings": rows(count)}

    compiles = False  # makes its layers anew at every call

    def golden_cases(self) -> dict[str, GoldenCase]:
        return {name: self._golden(case) for name, case in cases("adapter").items()}

    @staticmethod
    def _golden(case: dict) -> GoldenCase:
        def call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            output = reference_adapter(case).to(inputs["embedding"].dtype)(inputs["embedding"])
            return {"output": output, "squares": output.square().sum()}

        return GoldenCase(
            inputs={"embedding": case["embedding"]},
            call=call,
            outputs={"output": case["expected_output"]},
            gradients={"embedding": case["expected_grad_embedding_of_sum_squares"]},
            cotangent=("squares", 1.0),
            tolerance=TOLERANCE,
        )

    def error_cases(self):
        return {
            "width": (lambda: TextAdapter(6, 4)(rows(3, 5)), r"embedding_dim = 6\), got \(3, 5\)"),
            "sizes": (lambda: TextAdapter(6, 0), "must be >= 1, got 6, 0 and 8"),
            "blocks": (lambda: TextAdapter(6, 4, num_blocks=-1), "num_blocks must be >= 0, got -1"),
            "dropout": (lambda: TextAdapter(6, 4, dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        }


def test_adapter_options() -> None:
    embeddings = rows()
    adapter = TextAdapter(6, 4)
    torch.testing.assert_close(adapter(embeddings), adapter(7 * embeddings))
    torch.testing.assert_close(adapter(embeddings.view(4, 4, 6)).view(16, 4), adapter(embeddings))
    raw = TextAdapter(6, 4, normalize_input=False)
    raw.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(raw(F.normalize(embeddings, dim=1)), adapter(embeddings))
    assert not torch.allclose(raw(embeddings), adapter(embeddings), atol=1e-3)
    assert [name for name, _ in TextAdapter(6, 4, num_blocks=0).named_parameters()] == [
        "norm.weight",
        "norm.bias",
        "projection.weight",
        "projection.bias",
    ]
    dropping = TextAdapter(6, 4, dropout=0.5)
    assert not torch.equal(dropping(embeddings), dropping(embeddings))
    assert torch.equal(dropping.eval()(embeddings), dropping(embeddings))
    assert adapter.bfloat16()(embeddings).dtype == torch.bfloat16
    assert TextAdapter(6, 4)(embeddings.half()).dtype == torch.float32


# --- moving average --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("ema").values(), ids=cases("ema"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ema_matches_reference_vectors(case: dict, dtype: torch.dtype) -> None:
    teacher, student = nn.Linear(7, 1, bias=False, dtype=dtype), nn.Linear(7, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        teacher.weight.copy_(torch.as_tensor(case["teacher0"]))
    for step, expected in zip(case["student_steps"], case["expected_teacher_steps"], strict=True):
        with torch.no_grad():
            student.weight.copy_(torch.as_tensor(step))
        ema_update_(teacher, student, float(case["momentum"]))
        assert relative_error(teacher.weight[0], expected) < TOLERANCE[dtype]


def networks() -> tuple[nn.Module, nn.Module]:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student(rows(8, 3))
    return teacher, student


def test_ema_averages_parameters_and_copies_buffers() -> None:
    teacher, student = networks()
    before = copy.deepcopy(teacher)
    ema_update_(teacher, student, 0.9)
    for name, parameter in teacher.named_parameters():
        torch.testing.assert_close(parameter, before.get_parameter(name) + 0.1)
    assert all(torch.equal(value, student.get_buffer(name)) for name, value in teacher.named_buffers())
    assert teacher[1].num_batches_tracked == 1
    assert all(parameter.grad_fn is None for parameter in teacher.parameters())


def test_ema_limits() -> None:
    teacher, student = networks()
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        student[0].bias[0] = torch.nan
    ema_update_(teacher, student, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        student[0].bias[0] = 0.3
    ema_update_(teacher, student, 0.0)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.state_dict().items())


def test_ema_of_a_bfloat16_student_is_kept_in_float32() -> None:
    teacher, student = nn.Linear(3, 1), nn.Linear(3, 1).bfloat16()
    with torch.no_grad():
        teacher.weight.fill_(1.0)
        student.weight.fill_(2.0)
    for _ in range(3):
        ema_update_(teacher, student, 0.999)
    torch.testing.assert_close(teacher.weight, torch.full((1, 3), 2 - 0.999**3))


def test_ema_errors() -> None:
    teacher, student = networks()
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.1"):
        ema_update_(teacher, student, 1.1)
    with pytest.raises(ValueError, match="the same parameters"):
        ema_update_(nn.Linear(3, 4), student, 0.9)
    with pytest.raises(ValueError, match="the same buffers"):
        ema_update_(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), student, 0.9)
    with pytest.raises(ValueError, match=r"0.weight is torch.bfloat16: .float\(\) it"):
        ema_update_(teacher.bfloat16(), student, 0.9)
