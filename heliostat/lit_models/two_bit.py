"""A sentence encoder in two to five bits a weight (after arXiv 2311.16442): which mix of bits, and what it costs.

Quantises a pretrained encoder in several ways, ranks sentence pairs by each, takes one, and tunes its biases and norms
towards the encoder as it was. The format is that of `heliostat.components.two_bit`; the tuning is ours.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.functional.regression import spearman_corrcoef

from heliostat._extras import require
from heliostat.components.pooling import Pooling, pool_tokens
from heliostat.components.two_bit import TwoBitLinear, quantize_model
from heliostat.components.two_bit_networks import packed_names, prepare_two_bit
from heliostat.lit_models._evaluation import gather_once
from heliostat.lit_models._hparams import save_plain_hyperparameters
from heliostat.lit_models._optimization import Schedule, configure_optimizers
from heliostat.pretrained import load_text_encoder, load_tokenizer

WEIGHTS, SETTINGS = "two_bit.safetensors", "two_bit.json"  # in the directory of save_pretrained

_MIXES: Mapping[str, Mapping[str, float]] = {
    "2-bit": {"four_bit_fraction": 0.0, "outlier_fraction": 0.0},
    "2/4/16-bit": {"four_bit_fraction": 0.125, "outlier_fraction": 0.0025},
    "4-bit": {"four_bit_fraction": 1.0, "outlier_fraction": 0.0},
}
_METHODS = {"rtn": "to nearest", "gptq": "compensated"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    f"{mix}, {name}": {**fractions, "error_compensation": method}
    for mix, fractions in _MIXES.items()
    for method, name in _METHODS.items()
}
FLOAT32 = "float32"


class VariantResult(NamedTuple):
    """One line of `TwoBitEncoder.results`."""

    average_bits: float
    """Of the weights that are quantised."""
    megabytes: float
    """Of the whole encoder: packed weights, and all else in float16; of float32, everything in float32."""
    spearman: float
    """Rank correlation of cosine and score on the validation pairs."""
    cosine: float
    """Mean cosine of the sentences' embeddings with those of the float32 encoder."""


class TwoBitEncoder(LightningModule):
    """A sentence encoder whose linear layers are held in two bits: compared, chosen, tuned, saved small.

    A new module holds the encoder quantised to nearest. ``fit`` quantises it in all ``variants``, by the first training
    batches where errors are compensated. The validation before training (``num_sanity_val_steps: -1``) ranks sentence
    pairs by each of them and by the float32 encoder; ``results`` has what came out. The encoder then is the variant
    asked for, and training tunes its biases and norms, the parameters of one dimension, by 1 - cosine of its sentence
    embeddings and those of the float32 encoder; sentences need no labels. A learning rate of 0 leaves it as quantised.

    Batches are those of `heliostat.TextDataModule`: ``input_ids`` and ``attention_mask`` for training; for evaluation
    two such dicts, ``first`` and ``second``, with ``score`` in [0, 1] and the pair's ``index``. Logged are
    ``train/loss``; for ``val`` and ``test`` ``spearman`` and ``cosine`` (with the float32 embeddings), and in test
    ``test/spearman_float32``.

    Checkpoints hold packed weights, and load into a new module whatever the variant. `save_pretrained` writes a smaller
    directory, whose path is an ``encoder`` too; without the float32 encoder it predicts, embeds and is evaluated, but
    not trained.

    Args:
        encoder: A transformers encoder: ``"minilm"`` (packaged, no download), a local directory, a hub id, or a module
            whose outputs have ``last_hidden_state``; or a directory that `save_pretrained` wrote.
        tokenizer: Directory, hub id or tokenizer object; default: the encoder's own, if the encoder is a name.
        num_layers: Keep only the first layers of an encoder given by name.
        pooling: Which vector stands for the sentence: ``"cls"``, ``"mean"`` or ``"last"``.
        variants: By name, ``four_bit_fraction``, ``outlier_fraction`` and ``error_compensation`` (``"rtn"`` or
            ``"gptq"``) of each; see `heliostat.components.quantize_two_bit`. Default: ``VARIANTS`` of this module.
        variant: Name of the one to take; ``"auto"``: of those whose ``spearman`` is at most ``max_drop`` below that of
            the float32 encoder, the one of fewest bits; if there is none, the best.
        max_drop: Of ``"auto"``, > 0.
        include: Patterns of layers' names, see `heliostat.components.quantize_model`.
        exclude: Patterns of layers to leave in float32.
        calibration_batches: Training batches, of all processes, that compensated variants see.
        optimizer: Makes the optimizer from the parameters that are tuned.
        lr_scheduler: ``"linear"`` (to zero), ``"cosine"``, ``"constant"``, or a callable.

    Attributes:
        encoder: The quantised encoder.
        results: `VariantResult` by variant, ``"float32"`` first; once trained, also of ``"VARIANT, tuned"``.
        chosen: Name of the variant that was taken, or None before.

    Raises:
        ValueError: Settings out of range, or an unknown variant.
        MisconfigurationException: In fit, if the encoder is quantised already; ``variant="auto"`` without validation
            before training.
    """

    calibrated: Tensor

    def __init__(
        self,
        encoder: str | nn.Module,
        tokenizer: Any = None,
        *,
        num_layers: int | None = None,
        pooling: Pooling = "mean",
        variants: dict[str, dict[str, Any]] | None = None,
        variant: str = "auto",
        max_drop: float = 0.01,
        include: str | Sequence[str] = "*",
        exclude: str | Sequence[str] = (),
        calibration_batches: int = 8,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        lr_scheduler: Schedule | LRSchedulerCallable = "linear",
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        self.variants: dict[str, Mapping[str, Any]] = dict(VARIANTS if variants is None else variants)
        if variant != "auto" and variant not in self.variants:
            raise ValueError(f"variant must be 'auto' or one of {list(self.variants)}, got {variant!r}")
        for name, value in (("max_drop", max_drop), ("calibration_batches", calibration_batches)):
            if not value > 0:
                raise ValueError(f"{name} must be > 0, got {value}")
        network: Any = encoder
        if isinstance(encoder, str):
            network, own_tokenizer, pooling = _load(encoder, num_layers, pooling)
            tokenizer = own_tokenizer if tokenizer is None else tokenizer
        elif num_layers is not None:
            raise ValueError("num_layers cuts an encoder given by name; build a module with the layers you want")
        if pooling not in ("cls", "mean", "last"):
            raise ValueError(f"pooling must be 'cls', 'mean' or 'last', got {pooling!r}")
        self.tokenizer: Any = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.pooling: Pooling = pooling
        self.variant, self.max_drop, self.calibration_batches = variant, max_drop, calibration_batches
        self._layers: dict[str, Any] = {"include": include, "exclude": exclude}
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

        network = network.eval()
        packed = any(isinstance(module, TwoBitLinear) for module in network.modules())
        self._original: list[Any] = [] if packed else [network.requires_grad_(False)]  # a list: in no checkpoint
        self.encoder: Any = network if packed else self._quantized(self.variants.get(variant, _MIXES["2/4/16-bit"]))
        for parameter in self.encoder.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        self.register_buffer("calibrated", torch.tensor(packed))
        self.results: dict[str, VariantResult] = {}
        self.chosen: str | None = None
        self._compared: dict[str, Any] = {}
        self._rows: list[tuple[Tensor, ...]] = []
        self._ddp_params_and_buffers_to_ignore = packed_names(self)  # equal on all processes, and large

    def _quantized(self, options: Mapping[str, Any], batches: Sequence[Any] | None = None) -> Any:
        network = copy.deepcopy(self._float32())
        if batches is None:
            options = {**options, "error_compensation": "rtn"}
        quantize_model(network, calibration=batches, **self._layers, **options)
        return network

    def _float32(self) -> Any:
        """The encoder as it was, on this module's device and in its precision."""
        if not self._original:
            raise MisconfigurationException(
                "TwoBitEncoder: the encoder is quantised already, and there is nothing to tune it towards: give the "
                "encoder as it was before"
            )
        return self._original[0].to(self.device, self.dtype)

    def average_bits(self) -> float:
        """Bits of a quantised weight, exact."""
        return _size(self.encoder)[0]

    # --- embeddings ---

    def forward(self, **tokens: Tensor) -> Tensor:
        """Sentence embeddings ``(B, d)`` of ``input_ids``, ``attention_mask`` and whatever else the tokenizer made."""
        return self._embed(self.encoder, tokens)

    def _embed(self, network: Any, tokens: Mapping[str, Tensor]) -> Tensor:
        return pool_tokens((network(**tokens).last_hidden_state,), tokens["attention_mask"], self.pooling)

    @torch.no_grad()
    def encode(self, sentences: str | Sequence[str], *, batch_size: int = 64, max_length: int = 256) -> Tensor:
        """Embed sentences.

        Args:
            sentences: One sentence or several.
            batch_size: Sentences at a time, sorted by length.
            max_length: Cut to this many tokens.

        Returns:
            ``(n, d)`` float32 on the CPU, in the order given; ``(d,)`` for a single string.
        """
        if isinstance(sentences, str):
            return self.encode([sentences], max_length=max_length)[0]
        if self.tokenizer is None:
            raise ValueError("encode needs a tokenizer: pass tokenizer= with the encoder")
        embeddings = torch.empty(len(sentences), self.encoder.config.hidden_size)
        by_length = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            texts = [sentences[i] for i in rows]
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            embeddings[rows] = self(**tokens.to(self.device)).float().cpu()
        return embeddings

    # --- quantising ---

    def on_fit_start(self) -> None:
        """Quantise in all ways that are to be compared, unless this run is a resumed one."""
        if self.calibrated:
            self._float32()
            return
        wanted = self.variants if self._compares() else {self.variant: self.variants.get(self.variant)}
        if None in wanted.values():
            raise MisconfigurationException(
                "TwoBitEncoder(variant='auto') compares by the validation before training: set the trainer's "
                "num_sanity_val_steps to -1 and give validation pairs, or name a variant: "
                f"{', '.join(map(repr, self.variants))}"
            )
        batches = self._calibration()
        for name, options in wanted.items():
            assert options is not None
            compensated = options.get("error_compensation", "gptq") != "rtn"
            rank_zero_info(f"quantising: {name}")
            self._compared[name] = self._quantized(options, batches if compensated else None)

    def _compares(self) -> bool:
        return self.trainer.num_sanity_val_steps == float("inf") and self.trainer.enable_validation

    def _calibration(self) -> list[dict[str, Tensor]]:
        """The first training batches, of a loader of their own: that of the training goes on as without it."""
        with isolate_rng():
            loader = self.trainer.fit_loop._data_source.dataloader()
            return list(itertools.islice(loader, self.calibration_batches))

    def on_train_start(self) -> None:
        """Take one of the variants."""
        if self.calibrated:
            return
        chosen = self._choose() if self.variant == "auto" else self.variant
        rank_zero_info(f"the encoder is taken in {chosen}")
        self.encoder.load_state_dict(self._compared[chosen].state_dict())
        self.chosen = chosen
        self.calibrated.fill_(True)
        self._compared.clear()

    def _choose(self) -> str:
        least = self.results[FLOAT32].spearman - self.max_drop
        quantized = {name: result for name, result in self.results.items() if name in self._compared}
        good = [name for name, result in quantized.items() if result.spearman >= least]
        if good:
            return min(good, key=lambda name: (quantized[name].average_bits, -quantized[name].cosine))
        return max(quantized, key=lambda name: quantized[name].spearman)

    # --- training ---

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """1 - cosine of the embeddings and those of the float32 encoder."""
        with torch.no_grad():
            target = self._embed(self._float32(), batch)
        loss = (1 - _cosine(self(**batch), target)).mean()
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(target))
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer and schedule given to ``__init__``."""
        return configure_optimizers(self, self.optimizer, self.lr_scheduler)

    # --- evaluation ---

    def _networks(self) -> Iterator[tuple[str, Any]]:
        """What is evaluated now, float32 first."""
        if self._original:
            yield FLOAT32, self._float32()
        yield from self._compared.items() if self._compared else [("", self.encoder)]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compare graded pairs by all networks that there are."""
        tokens, place = _distinct(batch["first"], batch["second"])
        columns: list[Tensor] = []
        reference: Tensor | None = None
        for _, network in self._networks():
            pair = self._embed(network, tokens)[place]  # (2, B, d)
            reference = pair if reference is None else reference
            columns += [_cosine(pair[0], pair[1]), _cosine(pair, reference).mean(0)]
        self._rows.append((batch["index"], batch["score"], *columns))

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        measured = self._measure()
        if self._compared and self._compares():
            networks = dict(self._networks())
            self.results = {n: VariantResult(*_size(networks[n]), *values) for n, values in measured.items()}
        elif self.chosen in self.results:
            self.results[f"{self.chosen}, tuned"] = VariantResult(*_size(self.encoder), *measured[""])
        shown = measured.get("") or measured[self.variant if self.variant in measured else FLOAT32]
        self.log_dict({"val/spearman": shown[0], "val/cosine": shown[1]}, prog_bar=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Compare graded pairs."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        measured = self._measure()
        self.log_dict({"test/spearman": measured[""][0], "test/cosine": measured[""][1]})
        if FLOAT32 in measured:
            self.log("test/spearman_float32", measured[FLOAT32][0])

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Sentence embeddings."""
        return self(**batch)

    def _measure(self) -> dict[str, tuple[float, float]]:
        """Spearman and cosine of each network, over all processes."""
        rows, self._rows = self._rows, []
        score, *columns = gather_once(*map(torch.cat, zip(*rows, strict=True)))
        names = [name for name, _ in self._networks()]
        return {
            name: (float(spearman_corrcoef(similarity, score)), float(kept.mean()))
            for name, similarity, kept in zip(names, columns[::2], columns[1::2], strict=True)
        }

    # --- saving ---

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what was compared."""
        checkpoint["two_bit"] = {
            "chosen": self.chosen,
            "results": {name: list(result) for name, result in self.results.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what was compared."""
        saved = checkpoint.get("two_bit", {"chosen": None, "results": {}})
        self.chosen = saved["chosen"]
        self.results = {name: VariantResult(*values) for name, values in saved["results"].items()}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the quantised encoder with its tokenizer: packed weights, and all else in float16.

        ``TwoBitEncoder(directory)`` loads it.

        Args:
            directory: Where to write; made if missing.

        Raises:
            ValueError: If there is no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError("save_pretrained needs a tokenizer: pass tokenizer= with the encoder")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        self.encoder.config.save_pretrained(directory)
        state = {name: value.cpu().contiguous() for name, value in _small(self.encoder).items()}
        require("safetensors.torch", "save_pretrained").save_file(state, directory / WEIGHTS)
        settings = {"pooling": self.pooling, "variant": self.chosen}
        (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _load(name: str, num_layers: int | None, pooling: Pooling) -> tuple[Any, Any, Pooling]:
    """An encoder by name, and its tokenizer; of a directory of ours the pooling too."""
    folder = Path(name)
    if not (folder / WEIGHTS).is_file():
        return *load_text_encoder(name, num_layers=num_layers), pooling
    if num_layers is not None:
        raise ValueError(f"num_layers={num_layers}: the encoder in {name!r} is quantised, and is taken as a whole")
    transformers = require("transformers", f"Loading the text encoder {name!r}")
    state = require("safetensors.torch", f"Loading {WEIGHTS}").load_file(folder / WEIGHTS)
    config = transformers.AutoConfig.from_pretrained(name)
    network = transformers.AutoModel.from_config(config)
    if hasattr(network, "pooler") and not any(key.startswith("pooler.") for key in state):
        network.pooler = None
    prepare_two_bit(network, state)
    network.load_state_dict(state)
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return network.float(), load_tokenizer(name), settings["pooling"]


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        return F.cosine_similarity(first.to(wide), second.to(wide), dim=-1)


def _distinct(*sides: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The rows of several token batches, equal ones once since pairs share sentences, and their places ``(k, B)``."""
    longest = max(side["input_ids"].shape[1] for side in sides)
    padded = [{name: F.pad(t, (0, longest - t.shape[1])) for name, t in side.items()} for side in sides]
    table = torch.stack([torch.stack([side[name] for side in padded]).flatten(0, 1) for name in padded[0]], 1)
    rows, place = table.unique(dim=0, return_inverse=True)
    return dict(zip(padded[0], rows.unbind(1), strict=True)), place.view(len(sides), -1)


def _small(network: nn.Module) -> dict[str, Tensor]:
    """Its state, floating-point tensors in float16."""
    state = network.state_dict()
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def _size(network: nn.Module) -> tuple[float, float]:
    """Average bits of the quantised weights, and megabytes of the whole."""
    layers = [module.packed_weight for module in network.modules() if isinstance(module, TwoBitLinear)]
    state = _small(network) if layers else network.state_dict()
    megabytes = sum(value.numel() * value.element_size() for value in state.values()) / 1e6
    if not layers:
        return 32.0, megabytes
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return sum(layer.total_bits() for layer in layers) / weights, megabytes
