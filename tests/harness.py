"""What every method must hold, written once.

A method declares itself by subclassing a contract in its test file and filling in its inputs; pytest then collects the
contract's tests with it. `OperatorContract` is for functions and layers of `heliostat.components`: golden values and
gradients, dtypes, autocast, gradcheck, degenerate batches, error messages, two processes against one, torch.compile.
`ModuleContract` is for LightningModules (and callbacks, through a module that has them): plain Trainer, precisions,
gradient accumulation, plain checkpoints, resume equals uninterrupted, two processes against one.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(stem: str) -> dict[str, dict[str, np.ndarray]]:
    """The reference vectors of ``golden/STEM.npz``, by case."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / f"{stem}.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            case, name = key.split("/", 1)
            cases.setdefault(case, {})[name] = arrays[key]
    return cases


def relative_error(actual: Tensor, expected: Any) -> float:
    """Largest deviation, relative to the largest expected magnitude."""
    expected = torch.as_tensor(np.asarray(expected)).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    deviation = (actual.detach().double() - expected).abs().max().item()
    assert np.isfinite(deviation), "not finite"
    return deviation / max(expected.abs().max().item(), 1e-30)


def word_tokenizer(words: Sequence[str]) -> Any:
    """A transformers tokenizer with one token a word, ids from 5 on, framed by [CLS] and [SEP] as BERT's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special["mask_token"] = "[MASK]"
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


# --- processes -------------------------------------------------------------------------------------------------------


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    os.environ.update(
        LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(rank, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class ProcessPool:
    """Processes joined by gloo that stay alive between tests, because starting them costs seconds."""

    def __init__(self, world: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, *args)`` (importable by name) in every process and return the results by rank."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(180):
                raise TimeoutError(f"rank {rank} did not answer; is it waiting in a collective?")
            answers.append(pipe.recv())
        for rank, (fine, value) in enumerate(answers):
            assert fine, f"rank {rank}:\n{value}"
        return [value for _, value in answers]

    def __enter__(self) -> ProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:  # leaving a process group in good order can take longer than it is worth
            process.kill()
            process.join()


# --- functions and layers --------------------------------------------------------------------------------------------


class GoldenCase(NamedTuple):
    """One comparison with reference vectors: run ``call(inputs)`` and compare its outputs and gradients.

    ``call`` gets ``inputs`` as tensors of the tested dtype (integers stay) and returns named outputs. If ``cotangent``
    names an output and its gradient (an array, or 1 for a scalar), the gradients of ``gradients`` are compared too.
    """

    inputs: Mapping[str, np.ndarray]
    call: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    outputs: Mapping[str, np.ndarray]
    gradients: Mapping[str, np.ndarray]
    cotangent: tuple[str, Any]
    tolerance: Mapping[torch.dtype, float]


class OperatorContract:
    """Contract of a function or layer. Subclasses give `call`, `example` and the case tables."""

    differentiable: tuple[str, ...] = ()
    split: Mapping[str, int] = {}  # input -> dimension that is divided among processes; empty: rows are independent
    rank_reduction = "mean"  # how the ranks' scalars make the one-process scalar; an output of rows is summed
    half_tolerance = 5e-2  # of bf16 and fp16 inputs against float32, relative to max
    autocast_tolerance = 1e-6  # larger only for a layer with a projection, which autocast is meant to run in bf16
    compiles = True

    def call(self, **inputs: Tensor) -> Tensor:
        """The operator, with the other processes' rows where it has a distributed form."""
        raise NotImplementedError

    def example(self, rows: int = 16) -> dict[str, Tensor]:
        """A typical well-conditioned input, float32."""
        raise NotImplementedError

    def golden_cases(self) -> dict[str, GoldenCase]:
        """Comparisons with reference vectors."""
        return {}

    def degenerate_cases(self) -> dict[str, dict[str, Tensor]]:
        """Inputs at the edge that must give finite values and gradients."""
        return {}

    def error_cases(self) -> dict[str, tuple[Callable[[], object], str]]:
        """Wrong calls, with a pattern that the ValueError's message must match."""
        return {}

    def value_and_gradients(
        self, inputs: Mapping[str, Tensor], autocast: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and gradients of its sum, weighted so that no row or column drops out by symmetry."""
        inputs = {name: value.detach().clone() for name, value in inputs.items()}
        for name in self.differentiable:
            inputs[name].requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = self.call(**inputs)
        if output.ndim == 0:
            output.backward()
        else:
            (output.double() * weights_of(output)).sum().backward()
        return output.detach(), {name: inputs[name].grad for name in self.differentiable}

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    def test_matches_reference_vectors(self, golden_case: GoldenCase, dtype: torch.dtype) -> None:
        inputs = {name: torch.as_tensor(array) for name, array in golden_case.inputs.items()}
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
        for name in golden_case.gradients:
            inputs[name].requires_grad_()
        outputs = golden_case.call(inputs)
        tolerance = golden_case.tolerance[dtype]
        for name, expected in golden_case.outputs.items():
            assert relative_error(outputs[name], expected) < tolerance, name
        output, cotangent = golden_case.cotangent
        outputs[output].backward(torch.as_tensor(cotangent).to(dtype))
        for name, expected in golden_case.gradients.items():
            assert relative_error(inputs[name].grad, expected) < tolerance, f"gradient of {name}"

    def test_gradcheck(self) -> None:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in self.example(8).items()}
        names = self.differentiable

        def function(*tensors: Tensor) -> Tensor:
            return self.call(**{**inputs, **dict(zip(names, tensors, strict=True))})

        assert torch.autograd.gradcheck(function, tuple(inputs[name].requires_grad_() for name in names))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    def test_half_precision_input(self, dtype: torch.dtype) -> None:
        example = self.example()
        half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in example.items()}
        rounded = {k: v.float() if v.is_floating_point() else v for k, v in half.items()}
        value, gradients = self.value_and_gradients(half)
        expected, expected_gradients = self.value_and_gradients(rounded)
        assert relative_error(value.float(), expected) < self.half_tolerance
        for name, gradient in gradients.items():
            assert gradient.dtype == dtype
            assert relative_error(gradient.float(), expected_gradients[name]) < self.half_tolerance

    def test_autocast_leaves_the_mathematics_in_float32(self) -> None:
        example = self.example()
        expected, expected_gradients = self.value_and_gradients(example)
        value, gradients = self.value_and_gradients(example, autocast=True)
        assert relative_error(value, expected) < self.autocast_tolerance
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < self.autocast_tolerance

    def test_degenerate_input_stays_finite(self, degenerate_case: dict[str, Tensor]) -> None:
        value, gradients = self.value_and_gradients(degenerate_case)
        assert value.isfinite().all()
        for name, gradient in gradients.items():
            assert gradient.isfinite().all(), name

    def test_error_names_the_argument(self, error_case: tuple[Callable[[], object], str]) -> None:
        call, pattern = error_case
        with pytest.raises(ValueError, match=pattern):
            call()

    def test_two_processes_equal_one(self, two_processes: ProcessPool) -> None:
        if not self.split:
            pytest.skip("its rows are independent, so there is nothing to share between processes")
        example = {k: v.double() if v.is_floating_point() else v for k, v in self.example(16).items()}
        expected, expected_gradients = self.value_and_gradients(example)
        results = two_processes.run(_operator_on_rank, type(self), example)
        values, gradients = zip(*results, strict=True)
        if expected.ndim == 0:
            value = torch.stack(values).mean() if self.rank_reduction == "mean" else torch.stack(values).sum()
        else:
            value = torch.cat(values, dim=next(iter(self.split.values())))
        scale = len(values) if expected.ndim == 0 and self.rank_reduction == "mean" else 1
        assert relative_error(value, expected) < 1e-10
        for name, expected_gradient in expected_gradients.items():
            parts = [gradient[name] / scale for gradient in gradients]
            whole = torch.cat(parts, self.split[name]) if name in self.split else sum(parts)
            assert relative_error(whole, expected_gradient) < 1e-9, f"gradient of {name}"

    def test_compiled_equals_eager(self) -> None:
        if not self.compiles:
            pytest.skip("the contract says that it is not to be compiled")
        example = self.example()
        expected, expected_gradients = self.value_and_gradients(example)
        torch._dynamo.reset()
        eager, self.call = self.call, torch.compile(self.call, backend="aot_eager")  # type: ignore[method-assign]
        try:
            value, gradients = self.value_and_gradients(example)
        finally:
            self.call = eager  # type: ignore[method-assign]
        assert relative_error(value, expected) < 1e-5
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected_gradients[name]) < 1e-4


def weights_of(output: Tensor) -> Tensor:
    """Fixed, uneven weights of an output's elements, which do not depend on how rows are divided among processes."""
    return torch.sin(3 * output.detach().double() + 1)


def _operator_on_rank(
    rank: int, contract: type[OperatorContract], example: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    world = dist.get_world_size()
    local = {
        name: value.chunk(world, contract.split[name])[rank] if name in contract.split else value
        for name, value in example.items()
    }
    return contract().value_and_gradients(local)


# --- LightningModules ------------------------------------------------------------------------------------------------


def quiet_trainer(directory: Path, **settings: Any) -> Trainer:
    """A plain CPU Trainer without progress bar, for tests."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": directory,
    }
    return Trainer(**{**defaults, **settings})


class ModuleContract:
    """Contract of a LightningModule. Subclasses give `module` and `data`; both must be small and seeded."""

    steps = 6

    def module(self, *, dropout: bool = True) -> LightningModule:
        """A new module, the same at every call; without randomness in training if ``dropout`` is False."""
        raise NotImplementedError

    def data(self, directory: Path) -> LightningDataModule:
        """Its data, from files it may write into ``directory``: three batches an epoch, so that `steps` are two."""
        raise NotImplementedError

    def callbacks(self) -> list[Any]:
        """Callbacks every run of the method has; by default the one that the command line always adds."""
        from heliostat import StepSeed

        return [StepSeed()]

    def fit(self, directory: Path, ckpt_path: str | None = None, dropout: bool = True, **settings: Any) -> Trainer:
        """Train for ``settings["max_steps"]``, by default `steps`."""
        # max_epochs too: it makes Lightning count batches, which has lost a resumed loader's place before.
        settings = {"max_steps": self.steps, "max_epochs": 100, "callbacks": self.callbacks(), **settings}
        trainer = quiet_trainer(directory, **settings)
        trainer.fit(self.module(dropout=dropout), self.data(directory), ckpt_path=ckpt_path)
        return trainer

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_trains_in_a_plain_trainer(self, tmp_path: Path, precision: str) -> None:
        before = weights(self.module())
        trainer = self.fit(tmp_path, precision=precision)
        after = weights(trainer.lightning_module)
        assert all(tensor.isfinite().all() for tensor in after.values() if tensor.is_floating_point())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert trainer.callback_metrics["train/loss"].isfinite()

    def test_accumulates_gradients(self, tmp_path: Path) -> None:
        trainer = self.fit(tmp_path, max_steps=2, accumulate_grad_batches=2)
        assert trainer.global_step == 2
        assert trainer.callback_metrics["train/loss"].isfinite()

    @pytest.mark.parametrize("stop", [2, 3, 5])
    def test_killed_and_resumed_equals_uninterrupted(self, tmp_path: Path, stop: int) -> None:
        """Killed inside the first epoch, at its end, and inside the second."""
        whole = self.fit(tmp_path)
        keeper = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
        with pytest.raises(_KilledError):
            self.fit(tmp_path, callbacks=[*self.callbacks(), _Kill(stop), keeper], enable_checkpointing=True)
        path = tmp_path / "checkpoints" / f"step={stop}.ckpt"
        torch.load(path, weights_only=True)  # nothing in it but plain values and tensors
        resumed = self.fit(tmp_path, ckpt_path=str(path))
        assert resumed.global_step == whole.global_step == self.steps
        expected, actual = weights(whole.lightning_module), weights(resumed.lightning_module)
        assert not [name for name in expected if not torch.equal(expected[name], actual[name])]

    def test_two_processes_equal_one(self, tmp_path: Path, two_processes: ProcessPool) -> None:
        """In float64, where a wrong gradient cannot hide behind rounding."""
        loss, expected = _module_on_rank(0, type(self), tmp_path, 1, "auto")
        for actual_loss, actual in two_processes.run(_module_on_rank, type(self), tmp_path, 2, "ddp"):
            assert actual_loss == pytest.approx(loss, rel=1e-8)
            for name, tensor in expected.items():
                torch.testing.assert_close(actual[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def _module_on_rank(
    rank: int, contract: type[ModuleContract], directory: Path, devices: int, strategy: str
) -> tuple[float, dict[str, Tensor]]:
    trainer = contract().fit(
        directory, dropout=False, max_steps=2, precision="64-true", devices=devices, strategy=strategy
    )
    return float(trainer.callback_metrics["train/loss"]), weights(trainer.lightning_module)


class _KilledError(Exception):
    pass


class _Kill(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise _KilledError


def weights(module: LightningModule) -> dict[str, Tensor]:
    """All tensors of a module's state dict, copied."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
