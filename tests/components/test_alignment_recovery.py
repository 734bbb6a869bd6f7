from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heliostat.components.alignment_recovery import (
    RestorationLog,
    eligible_parameters,
    find_blocks,
    mean_representation,
    recover_alignment,
    restore_,
    score_limit,
    select_top_gradients,
    sign_agreement_mask,
)
from tests.harness import ProcessPool, golden, relative_error

GOLDEN = golden("alignment_recovery")
SELECTIONS = [case for case in GOLDEN if case.startswith("select")]
RUNS = [case for case in GOLDEN if case.startswith("run")]


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_mapping", [True, False], ids=["dict", "list"])
@pytest.mark.parametrize("case", SELECTIONS)
def test_selection_matches_reference_vectors(case: str, as_mapping: bool) -> None:
    arrays = GOLDEN[case]
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, array in arrays.items():
        if "/" in key:
            name, kind = key.split("/")
            tensors.setdefault(name, {})[kind] = torch.tensor(array)
    eligible = {name: sign_agreement_mask(t["param"], t["target"], t["grad"]) for name, t in tensors.items()}
    for name, t in tensors.items():
        eligible[name] &= t["within"].bool() if "within" in t else True
        assert torch.equal(eligible[name], t["expected_eligible"].bool())
    count = int(arrays["count"])
    candidates = sum(int(mask.sum()) for mask in eligible.values())
    assert candidates == int(arrays["expected_n_eligible"])
    if "fraction" in arrays:
        assert count == math.ceil(float(arrays["fraction"]) * candidates)

    def pack(values: dict[str, Tensor]) -> dict[str, Tensor] | list[Tensor]:
        return values if as_mapping else list(values.values())

    grads, params, targets = ({name: t[kind] for name, t in tensors.items()} for kind in ("grad", "param", "target"))
    masks, threshold = select_top_gradients(pack(grads), pack(eligible), count)
    assert threshold == float(arrays["expected_threshold"])
    assert restore_(pack(params), pack(targets), masks) == int(arrays["expected_n_selected"])
    for name, mask in zip(tensors, masks.values() if as_mapping else masks, strict=True):
        assert torch.equal(mask, tensors[name]["expected_mask"].bool())
        assert torch.equal(params[name].double(), tensors[name]["expected_param"])


def test_selection_at_its_limits() -> None:
    grads, every = {"a": torch.tensor([1.0, -3.0, 2.0])}, {"a": torch.ones(3, dtype=torch.bool)}
    assert select_top_gradients(grads, every, 2)[0]["a"].tolist() == [False, True, False]
    assert select_top_gradients(grads, every, 2, strict=False)[0]["a"].tolist() == [False, True, True]
    assert select_top_gradients(grads, every, 9)[0]["a"].tolist() == [False, True, True]  # the lowest is the threshold
    masks, threshold = select_top_gradients(grads, every, 1)
    assert (masks["a"].tolist(), threshold) == ([False, True, False], 3.0)  # strictly it would be none
    equal = {"a": torch.tensor([2.0, -2.0, 2.0])}
    assert select_top_gradients(equal, every, 2)[0]["a"].all()
    for masks, threshold in (
        select_top_gradients(grads, {"a": torch.zeros(3)}, 2),
        select_top_gradients(grads, every, 0),
    ):
        assert not masks["a"].any()
        assert threshold == math.inf


def test_signs_do_not_underflow_and_nan_is_out() -> None:
    param = torch.tensor([1e-30, 1e-30, 1.0, 1.0])
    target = torch.tensor([0.0, 2e-30, 1.0, 0.0])
    grad = torch.tensor([1e-30, -1e-30, 5.0, math.nan])
    assert sign_agreement_mask(param, target, grad).tolist() == [True, True, False, False]
    rounded = sign_agreement_mask(param.bfloat16(), param.bfloat16().float() * (1 + 1e-4), -torch.ones(4))
    assert not rounded.any()  # a target that rounds to the weight changes nothing


@pytest.mark.parametrize("shape", [(), (6,), (4, 5), (2, 3, 4)])
def test_log_undoes_bit_by_bit(shape: tuple[int, ...]) -> None:
    params = {"a": torch.randn(shape), "b": torch.randn(5, 4).T}  # b is not contiguous
    params["a"].view(-1)[0] = -0.0
    bits = {name: p.clone() for name, p in params.items()}
    targets = {name: torch.randn(p.shape) for name, p in params.items()}
    log, after_first = RestorationLog(), None
    for step in range(3):
        masks = {name: torch.rand(p.shape) < 0.4 for name, p in params.items()}
        masks["a"].view(-1)[0] = step == 0
        grads = {name: torch.randn(p.shape) for name, p in params.items()}
        log.restore_(params, targets, masks)
        assert all(torch.equal(params[name][mask], targets[name][mask]) for name, mask in masks.items())
        log.rollback_(params, grads, 0.5)
        after_first = after_first or {name: p.clone() for name, p in params.items()}
    log.undo_(params, 1)
    assert all(torch.equal(params[name], after_first[name]) for name in params)
    assert sum(log.counts().values()) == sum(int((params[n] != bits[n]).sum()) for n in params)
    log.undo_(params)
    for name, p in params.items():
        assert torch.equal(p.contiguous().view(torch.int32), bits[name].contiguous().view(torch.int32))


# --- trajectories ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.lin, self.layernorm = nn.Linear(d, d), nn.LayerNorm(d)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.lin(self.layernorm(h)).tanh()


class Network(nn.Module):
    """The network of the reference vectors."""

    def __init__(self, d: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(d, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(layers))

    def represent(self, layer_end: int, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.layers[:layer_end]:
            h = block(h)
        return h[:, -1]


class Run:
    """A run of the reference vectors, in float64."""

    def __init__(self, case: str) -> None:
        self.arrays = GOLDEN[case]
        self.layer_end = int(self.arrays["layer_end"])
        self.model = Network(int(self.arrays["d"]), int(self.arrays["n_layers"])).double()
        self.aligned, self.broken = self.tensors("aligned"), self.tensors("broken")
        self.harmful, self.task = (
            list(torch.as_tensor(self.arrays[f"{kind}_batches"]).double()) for kind in ("harmful", "benign")
        )
        self.model.load_state_dict(self.aligned)
        self.harmful_direction = mean_representation(self.represent, self.harmful)
        self.model.load_state_dict(self.broken)
        self.params, self.num_hidden = eligible_parameters(self.model, [*self.model.layers], self.layer_end)
        self.rollback = bool(self.arrays["rollback"])
        self.rates = {name: float(self.arrays[name]) for name in ("recovery_rate", "rollback_rate")}
        self.steps = len(self.arrays["harmful_loss_before"])

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        names = [name for name in self.arrays if name.startswith(prefix + "/")]
        return {name.removeprefix(prefix + "/"): torch.tensor(self.arrays[name]).double() for name in names}

    def represent(self, batch: Tensor) -> Tensor:
        return self.model.represent(self.layer_end, batch)

    def copy(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.params.items()}

    def recover(self, score=lambda: 1.0, **settings):
        settings = {"rollback": self.rollback, "steps": self.steps, "save_every": 1, **self.rates, **settings}
        return recover_alignment(
            self.params,
            self.aligned,
            self.represent,
            self.harmful,
            self.task,
            score,
            harmful_direction=self.harmful_direction,
            num_hidden=self.num_hidden,
            **settings,
        )


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(actual[name], expected[name])]


@pytest.mark.parametrize("case", RUNS)
def test_trajectory_matches_reference_vectors(case: str) -> None:
    run = Run(case)
    assert run.num_hidden == int(run.arrays["n_hidden_params"])
    assert run.params.keys() == run.tensors("step1/param").keys()
    assert relative_error(run.harmful_direction, run.arrays["harmful_direction"]) < 1e-12
    assert relative_error(mean_representation(run.represent, run.task), run.arrays["aligned_direction"]) < 1e-12
    weights = []  # the first is before the first step

    def score() -> float:
        weights.append(run.copy())
        return 1.0

    result = run.recover(score)
    assert result.chosen_step == run.steps
    assert result.used_rollback == run.rollback
    for step, line in enumerate(result.history, start=1):
        assert_equal(weights[step], run.tensors(f"step{step}/param"))
        assert line.step == step
        assert line.restored == run.arrays["n_restored"][step - 1]
        assert line.undone == run.arrays["n_undone"][step - 1]
        assert line.loss == pytest.approx(run.arrays["harmful_loss_before"][step - 1], rel=1e-9)
        for name, before in weights[step - 1].items():  # what stays restored of this step, entry by entry
            kept = run.arrays[f"step{step}/restored/{name}"].astype(bool)
            if run.rollback:
                kept &= ~run.arrays[f"step{step}/undone/{name}"].astype(bool)
            index = result.log.steps[step - 1].get(name, (torch.tensor([], dtype=torch.int64),))[0]
            assert index.tolist() == np.flatnonzero(kept).tolist()
            assert torch.equal(weights[step][name] != before, torch.as_tensor(kept))
    assert_equal(run.copy(), run.tensors(f"step{run.steps}/param"))
    result.log.undo_(run.params)
    assert_equal(run.copy(), {name: run.broken[name] for name in run.params})


def test_first_gradient_matches_reference_vectors() -> None:
    run = Run("run0")
    loss = sum(-torch.cosine_similarity(run.represent(x).mean(0), run.harmful_direction, dim=0) for x in run.harmful)
    grads = dict(zip(run.params, torch.autograd.grad(loss, list(run.params.values())), strict=True))
    for name, grad in grads.items():
        assert relative_error(grad, run.arrays[f"grad_step1/{name}"]) < 1e-9
    masks = {name: sign_agreement_mask(p, run.aligned[name], grads[name]) for name, p in run.params.items()}
    masks, _ = select_top_gradients(grads, masks, math.ceil(run.rates["recovery_rate"] * run.num_hidden))
    for name, mask in masks.items():
        assert torch.equal(mask, torch.as_tensor(run.arrays[f"step1/restored/{name}"]).bool())


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_candidate_before_the_first_failure_is_chosen() -> None:
    run = Run("run0")
    scores = iter([1.0, 0.99, 0.96, 0.95])  # the last is at the limit, which is too much
    result = run.recover(lambda: next(scores))
    assert (result.chosen_step, result.score_limit) == (2, 0.95)
    assert [line.score for line in result.history] == [0.99, 0.96, 0.95]  # what comes after could not be chosen
    assert_equal(run.copy(), run.tensors("step2/param"))
    result.log.undo_(run.params)
    assert_equal(run.copy(), {name: run.broken[name] for name in run.params})


def test_nothing_is_restored_if_the_first_candidate_fails() -> None:
    run = Run("run1")
    scores = iter([1.0, 0.5])
    assert run.recover(lambda: next(scores), save_every=2).chosen_step == 0
    assert_equal(run.copy(), {name: run.broken[name] for name in run.params})


@pytest.mark.parametrize(("warmup_score", "rolls"), [(0.95, False), (0.94, True)])
def test_warmup_decides_on_rollback(warmup_score: float, rolls: bool) -> None:
    """0.95 is still good enough for the warm-up, and too bad to be chosen: both as in the released code."""
    rates = {name: float(GOLDEN["run1"][name]) for name in ("recovery_rate", "rollback_rate")}
    run = Run("run1")
    scores = iter([1.0, 0.9, warmup_score, *[1.0] * 9])  # the 0.9 comes before the decision
    result = run.recover(lambda: next(scores), rollback="auto", warmup_steps=2, **rates)
    assert result.used_rollback == rolls
    assert result.warmup_score == warmup_score
    if rolls:  # from the start again: the trajectory with rollback from the first step
        assert [line.step for line in result.history] == [1, 2, 3, 4]
        assert_equal(run.copy(), run.tensors("step4/param"))
    else:
        assert result.chosen_step == 0
        assert len(result.history) == 2


def test_warmup_goes_on_with_what_has_accumulated() -> None:
    run = Run("run0")
    assert not run.recover(rollback="auto", warmup_steps=2).used_rollback
    assert_equal(run.copy(), run.tensors("step4/param"))
    run = Run("run0")
    run.recover(accumulate_gradients=False)
    assert any(not torch.equal(p, run.tensors("step4/param")[name]) for name, p in run.copy().items())


def test_stops_when_nothing_is_left_to_restore() -> None:
    run = Run("run0")
    result = run.recover(recovery_rate=1.0, steps=50, save_every=40)
    assert result.chosen_step == len(result.history) < 40
    assert result.history[-1].score == 1.0
    run.model.load_state_dict(run.aligned)
    result = run.recover()
    assert (result.history, result.chosen_step) == ([], 0)


def test_flags_come_back_and_an_error_leaves_the_weights_as_they_were() -> None:
    run = Run("run0")
    run.params["layers.0.lin.weight"].requires_grad_(False)
    scores = iter([1.0, 1.0, math.nan])
    with pytest.raises(ValueError, match="task_score must return a finite number, got nan"):
        run.recover(lambda: next(scores))
    assert [name for name, p in run.params.items() if not p.requires_grad] == ["layers.0.lin.weight"]
    assert all(p.grad is None for p in run.model.parameters())
    assert_equal(run.copy(), {name: run.broken[name] for name in run.params})


@pytest.mark.parametrize(
    ("score", "mode", "limit"),
    [(0.8, "max", 0.76), (0.8, "min", 0.84), (-2.0, "max", -2.1), (-2.0, "min", -1.9), (0, "max", -0.05)],
)
def test_score_limit(score: float, mode, limit: float) -> None:
    assert score_limit(score, 0.05, mode) == pytest.approx(limit)


def test_lower_is_better() -> None:
    run = Run("run0")
    scores = iter([2.0, 1.0, 2.05, 2.2])
    assert run.recover(lambda: next(scores), mode="min").chosen_step == 2


def test_bf16_restores_exactly_and_sums_gradients_in_float32() -> None:
    run = Run("run0")
    run.model.bfloat16()
    run.params, _ = eligible_parameters(run.model, [*run.model.layers], run.layer_end)
    run.harmful, run.task = ([x.bfloat16() for x in batches] for batches in (run.harmful, run.task))
    before = run.copy()
    result = run.recover()
    assert result.chosen_step == run.steps
    assert sum(line.restored for line in result.history) == sum(result.log.counts().values()) > 0
    for name, p in run.copy().items():
        changed = p != before[name]
        assert torch.equal(p[changed], run.aligned[name].bfloat16()[changed])
    result.log.undo_(run.params)
    assert_equal(run.copy(), before)


# --- what is eligible ------------------------------------------------------------------------------------------------


class RootMeanSquareNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class MixedBlock(nn.Module):
    def __init__(self, shared: nn.Parameter | None = None) -> None:
        super().__init__()
        self.up, self.norm, self.rms = nn.Linear(4, 4), nn.GroupNorm(2, 4), RootMeanSquareNorm()
        self.lora_A = nn.Linear(4, 2)
        if shared is not None:
            self.up.weight = shared


def test_norms_adapters_and_excluded_names_are_left_out() -> None:
    model = nn.Sequential(MixedBlock(), MixedBlock(), MixedBlock())
    params, num_hidden = eligible_parameters(model, [*model], 2)
    assert [*params] == ["0.up.weight", "0.up.bias", "1.up.weight", "1.up.bias"]
    assert num_hidden == 3 * (20 + 8 + 4)  # norms and the blocks above count, adapters do not
    assert [*eligible_parameters(model, [*model], 2, exclude=["*.bias", "1.*"])[0]] == ["0.up.weight"]


def test_weights_tied_outside_the_blocks_are_left_out_with_a_warning() -> None:
    table = nn.Embedding(4, 4)
    model = nn.ModuleDict({"embed": table, "blocks": nn.ModuleList([MixedBlock(table.weight), MixedBlock()])})
    with pytest.warns(UserWarning, match="1 parameters are shared with .* not restored: embed.weight$"):
        params, _ = eligible_parameters(model, [*model["blocks"]], 2)
    assert [*params] == ["blocks.0.up.bias", "blocks.1.up.weight", "blocks.1.up.bias"]
    inside = nn.ModuleList([MixedBlock(), MixedBlock()])  # tied to each other: restored in both
    inside[1].up.weight = inside[0].up.weight
    params, num_hidden = eligible_parameters(inside, [*inside], 2)
    assert [*params] == ["0.up.weight", "0.up.bias", "1.up.bias"]
    assert num_hidden == 2 * (20 + 8 + 4) - 16


def test_blocks_are_found() -> None:
    model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "net": Network()})
    assert find_blocks(model) == "net.layers"
    with pytest.raises(ValueError, match="Linear has no list of like blocks"):
        find_blocks(nn.Linear(2, 2))


# --- wrong input -----------------------------------------------------------------------------------------------------


def test_wrong_input_is_named() -> None:
    run = Run("run0")
    for settings, message in (
        ({"recovery_rate": 0}, r"recovery_rate is a share and must lie in \(0, 1\], got 0"),
        ({"rollback_rate": 1.5}, "rollback_rate is a share"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"rollback": "never"}, "rollback must be"),
        ({"metric_drop": -1}, "metric_drop must be >= 0"),
        ({"mode": "higher"}, 'mode must be "max" or "min"'),
    ):
        with pytest.raises(ValueError, match=message):
            run.recover(**settings)
    with pytest.raises(ValueError, match="there is none"):
        mean_representation(run.represent, [])
    with pytest.raises(ValueError, match="is zero, which is no direction"):
        mean_representation(torch.zeros_like, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="is not finite"):
        mean_representation(lambda x: x / 0, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"must be a tensor \(B, d\) with B >= 1, got \(2, 3, 4\)"):
        mean_representation(lambda x: x, [torch.ones(2, 3, 4)])
    with pytest.raises(ValueError, match=r"must have one shape, got \(2,\), \(3,\) and \(2,\)"):
        sign_agreement_mask(torch.ones(2), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="count must be >= 0"):
        select_top_gradients([], [], -1)
    with pytest.raises(ValueError, match="grads and eligible must name the same"):
        select_top_gradients({"a": torch.ones(1)}, {"b": torch.ones(1)}, 1)
    with pytest.raises(ValueError, match="layer_end must lie in 1..3"):
        eligible_parameters(run.model, [*run.model.layers], 4)
    del run.aligned["layers.0.lin.bias"]
    with pytest.raises(ValueError, match=r"aligned lacks 'layers.0.lin.bias' and 0 more"):
        run.recover()
    run = Run("run0")
    represent = run.represent
    run.represent = lambda x: represent(x).detach()
    with pytest.raises(ValueError, match="has no gradient; it must not detach"):
        run.recover()


# --- several processes -----------------------------------------------------------------------------------------------


def recovered(rank: int, case: str, batches: int) -> tuple[dict[str, Tensor], list[tuple]]:
    run = Run(case)
    torch.manual_seed(1)
    run.harmful = [*run.harmful, torch.randn(3, 3, 8).double()][:batches]  # batches of unequal size, unequally shared
    run.model.load_state_dict(run.aligned)
    run.harmful_direction = mean_representation(run.represent, run.harmful)
    run.model.load_state_dict(run.broken)
    result = run.recover()
    return run.copy(), [(line.restored, line.undone, round(line.loss, 9)) for line in result.history]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("case", RUNS)
def test_two_processes_equal_one(case: str, batches: int, two_processes: ProcessPool) -> None:
    expected, history = recovered(0, case, batches)
    for weights, lines in two_processes.run(recovered, case, batches):
        assert_equal(weights, expected)
        assert lines == history


def score_by_rank(rank: int) -> tuple[int, float]:
    result = Run("run0").recover(lambda: 1.0 + rank)  # each process measures a part
    return result.chosen_step, result.initial_score


def test_processes_decide_alike(two_processes: ProcessPool) -> None:
    assert two_processes.run(score_by_rank) == [(4, 1.5), (4, 1.5)]
