"""Pictures with captions and classes for diffusion models, with what frozen models make of them computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from heliostat.components.latents import LatentScale, PosteriorEncoder
from heliostat.components.text_cache import CachedTextEmbeddings, CacheDtype
from heliostat.datamodules.captioned_pictures import CaptionedPictures, Columns, is_picture_dataset, open_captioned
from heliostat.datamodules.image_readers import Pictures
from heliostat.datamodules.loading import (
    GlobalBatchSampler,
    ResumableLoader,
    StreamLoader,
    loader_arguments,
    local_batch_size,
    whole_batch,
)
from heliostat.datamodules.pairs import (
    PARTS_OF,
    FrozenModel,
    Listed,
    PairStream,
    Part,
    PicturesOfPart,
    StreamRow,
    draw_captions,
    has_fingerprint,
    list_parts,
    positions_and_keys,
    user_cache,
)
from heliostat.datamodules.pixels import PixelPipeline
from heliostat.datamodules.precomputed import PrecomputedRows, RowWriter
from heliostat.datamodules.splits import check_fractions
from heliostat.pretrained import load_autoencoder

FrozenPart = Literal["text_encoder", "vae", "teacher"]
TextEncoder = Callable[[list[str]], Mapping[str, Tensor]]
Teacher = Callable[[Tensor], Tensor]

_FIELD = {"vae": "latents", "teacher": "teacher_features"}  # of a batch, and name of the file that holds it
_FLIPPED = "_flipped"
_NOISE = 0x9E3779B97F4A7C1  # apart from what else a key seeds


class DiffusionDataModule(LightningDataModule):
    r"""Pictures with captions and classes for training, validation and test of diffusion models.

    Each of ``pictures``, ``val_pictures`` and ``test_pictures`` is one of:

    - ``"twemoji"``: 3,778 emoji with their names, class = category (:mod:`heliostat.datamodules.sources.twemoji`;
      graphics by Twitter and other contributors, CC-BY 4.0); needs no download.
    - ``"digits"``: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, class = digit, caption = its name
      (:mod:`heliostat.datamodules.sources.digits`); needs no download. They are grey: ``channels=1``.
    - an image folder, a zip archive of one, or a list of them. Pictures in folders have the folder's name as class and
      caption; if none lies in a folder, they have neither.
    - webdataset shards, tables of paths and captions, and Hugging Face data sets, as in
      :class:`~heliostat.ImageTextDataModule`.

    Batches, float32 and int64, under the names of diffusers' pipelines:

    - ``pixel_values`` ``(B, C, size, size)`` in [-1, 1]: where there are no ``latents``, or if ``keep_pixels``.
    - ``latents`` ``(B, c, h, w)``, shifted and scaled as the VAE says: with ``vae``. In training they are drawn from
      the VAE's posterior, anew in every epoch; elsewhere they are its mean.
    - ``text`` (B strings), if there are captions: one of several, drawn in every epoch; elsewhere the first.
    - ``prompt_embeds`` ``(B, L, d)``, and ``pooled_prompt_embeds`` ``(B, p)`` if the encoder gives it: with
      ``text_encoder``.
    - ``labels`` ``(B,)``: if there are classes. A picture of unknown class has ``num_classes``, as one without
      condition.
    - ``teacher_features`` ``(B, N, D)`` of the clean picture, row by row: with ``teacher``.
    - ``index`` ``(B,)``: the position in its set, -1 in a stream. On several processes Lightning repeats some rows in
      evaluation to give each process as many; drop repeated indices.
    - validation, test, predict: also the condition of nothing, for guidance: ``negative_prompt_embeds``,
      ``negative_pooled_prompt_embeds`` (both of the empty text) and ``negative_labels`` (``num_classes``). One loader.

    Training batches depend on ``seed`` and the epoch, and on the number of neither processes nor workers, and a resumed
    run goes on at the next one (a stream's: see ``streaming``).

    Frozen models are run once before training, by one process of each machine on the Trainer's device, a batch at a
    time. What they make is kept in ``cache_dir``, in memory-mapped files that all processes share, and is found again
    as long as the model, the pictures (their places, sizes and times of change) and what is done to them are the same.
    Then the models are dropped from this object, to give their memory back. For pictures these are mean and standard
    deviation of the posterior, so that training can draw from it, and the teacher's features: of 1,000 pictures of 256
    pixels, 33 MB for the VAE of Stable Diffusion and 790 MB for DINOv2 ViT-B/14 (half of it as float16).

    A picture that cannot be read is left out at setup if pictures are kept in memory or precomputed from. Otherwise the
    next one of the set takes its place in the batch, with its caption: the first is warned of at once, and all are
    counted when the stage ends.

    Args:
        pictures: Training pictures.
        val_pictures: Validation pictures; None: a part of ``pictures``.
        test_pictures: Test pictures; None: a part of ``pictures``.
        text_encoder: Frozen model of the captions, from a list of B strings to a dict with ``prompt_embeds`` and maybe
            ``pooled_prompt_embeds``, such as `heliostat.TextTokenEncoder` or `heliostat.PipelineTextEncoder`.
        vae: Autoencoder of diffusers, such as ``AutoencoderKL``; a name is loaded by
            `heliostat.pretrained.load_autoencoder`.
        teacher: Frozen model of the pictures, from ``(B, C, size, size)`` in [-1, 1] to ``(B, N, D)``, such as
            `heliostat.PatchEncoder`.
        precompute: Run these models once: True: all that are given; or names of ``"text_encoder"``, ``"vae"``,
            ``"teacher"``. The others run on each batch, on its device.
        cache_dir: Folder of what is precomputed, and of the index of shards. None: ``heliostat`` in the user's cache
            folder (``$XDG_CACHE_HOME``, or ``~/.cache``).
        cache_dtype: ``"float32"`` or ``"float16"``: type of what is precomputed on disk.
        condition_dropout: Probability in training that a picture has no condition: the text "" and the label
            ``num_classes``, as guidance needs it.
        flip: Mirror half of the training pictures. Both ways are precomputed. Wrong for captions such as "left arrow".
        keep_pixels: Give ``pixel_values`` also where there are ``latents``.
        image_column: Column of the pictures: paths in a table, images in a Hugging Face data set. Unused for shards.
        caption_column: Column or columns of the captions, see `heliostat.ImageTextDataModule`. None: tables and data
            sets have no captions.
        label_column: Column of the classes; in shards, a key of the .json members, and samples without it have their
            class in .cls. None: no classes, but those of the sources that always have them.
        image_root: Folder that the paths of a table start from, and must not lead out of. None: that of the table.
        splits: Splits of a Hugging Face data set for ``pictures``, ``val_pictures`` and ``test_pictures``.
        encoding: Encoding of text files.
        streaming: Read the training pictures of a Hugging Face data set while training instead of before, see
            `heliostat.ImageTextDataModule`; without classes and without precomputing.
        shuffle_buffer: Rows held in memory, pictures encoded, to shuffle a stream.
        val_fraction: Share of the concepts for validation, if ``val_pictures`` is None; 0: no validation. Emoji in
            several skin tones are one concept, as are pictures with the same captions in tables, shards and data sets;
            elsewhere each picture is one.
        test_fraction: The same for test.
        split_seed: Seed of the parts. Not ``seed``, so that runs of several seeds compare on the same ones.
        size: Height and width. Other pictures are scaled by their shorter side and cropped in the middle; what is
            transparent becomes white.
        channels: 1 (grey) or 3 (RGB).
        in_memory: Decode and resize the pictures once, at setup, and keep them as uint8. None: if a set takes at most
            1 GiB.
        batch_size: Training pictures in a batch, over all processes together. The last, incomplete batch is dropped.
        eval_batch_size: Pictures in a batch of each process in validation, test and predict, and when precomputing.
        num_workers: Worker processes of each loader, and to read pictures when precomputing.
        seed: Seed of shuffling, of which conditions are dropped and which pictures mirrored, of the choice of captions,
            and of the draws from the posterior.

    Attributes:
        class_names: Name of every label, sorted. Listing the sources for it is done once, when it is first asked for.
        num_classes: Their number, which is also the label of no condition.

    Raises:
        ValueError: An argument out of range, or without effect; or, when the data are listed or read, a missing column,
            a malformed row, a path or a name that leads out of its folder or shard, a compressed shard, or too little.
        FileNotFoundError: A file, folder or data set that is not there.
        ModuleNotFoundError: Pillow, the packages of ``"twemoji"`` and ``"digits"``, or for data sets ``datasets`` is
            not installed.
    """

    def __init__(
        self,
        pictures: str | Sequence[str] = "twemoji",
        val_pictures: str | Sequence[str] | None = None,
        test_pictures: str | Sequence[str] | None = None,
        *,
        text_encoder: torch.nn.Module | TextEncoder | None = None,
        vae: torch.nn.Module | str | None = None,
        teacher: torch.nn.Module | Teacher | None = None,
        precompute: bool | Sequence[FrozenPart] = True,
        cache_dir: str | None = None,
        cache_dtype: CacheDtype = "float32",
        condition_dropout: float = 0.1,
        flip: bool = False,
        keep_pixels: bool = False,
        image_column: int | str = "image",
        caption_column: int | str | Sequence[int | str] | None = "caption",
        label_column: int | str | None = None,
        image_root: str | None = None,
        splits: tuple[str, str, str] = ("train", "validation", "test"),
        encoding: str = "utf-8",
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        size: int = 16,
        channels: int = 3,
        in_memory: bool | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_fractions(val_fraction, test_fraction)
        if not 0 <= condition_dropout < 1:
            raise ValueError(f"condition_dropout must be >= 0 and < 1, got {condition_dropout}")
        if cache_dtype not in get_args(CacheDtype):
            raise ValueError(f"cache_dtype must be one of {get_args(CacheDtype)}, got {cache_dtype!r}")
        captions = [caption_column] if isinstance(caption_column, (int, str)) else list(caption_column or ())
        if caption_column is not None and not captions:
            raise ValueError("caption_column is an empty list; name at least one column, or give None")
        self._pipeline = PixelPipeline(size, channels, 0.5, 0.5)
        encoder = None if vae is None else _posterior_encoder(vae, channels)
        given = {"text_encoder": text_encoder, "vae": encoder, "teacher": teacher}
        self._models: dict[str, Any] = {name: model for name, model in given.items() if model is not None}
        self._kept = _names_to_precompute(precompute, self._models)
        self._scale = None if encoder is None else encoder.scale
        if streaming:
            _check_streaming(pictures, label_column, self._kept)
        self._columns = Columns(image_column, captions, label_column, image_root, encoding)
        self.pictures, self.val_pictures, self.test_pictures = pictures, val_pictures, test_pictures
        self.splits, self.streaming, self.shuffle_buffer = splits, streaming, shuffle_buffer
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.cache_dir, self.cache_dtype = user_cache(cache_dir), cache_dtype
        self.condition_dropout, self.flip, self.keep_pixels = condition_dropout, flip, keep_pixels
        self.in_memory = in_memory
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._prompts: _Prompts | None = None
        self._tables: list[dict[str, PrecomputedRows]] = []  # of each source
        self._sets: dict[str, _Set] = {}

    @property
    def class_names(self) -> list[str]:
        """Name of every label; empty if there are no classes."""
        return list(self._listed.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._listed.labels)

    def prepare_data(self) -> None:
        """List the sources, and compute what the cache lacks; on one process of each machine."""
        listed = self._listed
        models = {name: model for name, model in self._models.items() if name in self._kept}
        if not models:
            return
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if encoder := models.pop("text_encoder", None):
            texts = list(dict.fromkeys([*listed.texts(), ""]))
            task = f"text_encoder: encoding those of {len(texts)} texts that {self.cache_dir} lacks"
            CachedTextEmbeddings.get_or_build(
                texts, _Flat(FrozenModel(encoder, device, task)), **self._texts_kept_as(encoder), batch_size=64
            )
            _to_cpu(encoder)
        for source in listed.sources() if models else ():
            if missing := [table for table in self._tables_of(source) if table.find() is None]:
                self._precompute(source, missing, device)
        for model in models.values():
            _to_cpu(model)

    def setup(self, stage: str) -> None:
        """Open what is precomputed, list the sources, and read what the stage needs, once."""
        if self._kept:
            self._open_kept()
            self._models = {name: model for name, model in self._models.items() if name not in self._kept}
            self._kept = frozenset()
        for name in PARTS_OF[stage]:
            if name not in self._sets and name in self._listed.parts:
                self._sets[name] = self._read(name)

    def teardown(self, stage: str) -> None:
        """Say how many pictures could not be read."""
        for name in PARTS_OF[stage]:
            if name in self._sets:
                self._sets[name].report_unreadable()

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of ``batch_size`` pictures over all processes."""
        world_size = self.trainer.world_size if self.trainer else 1
        rank = self.trainer.global_rank if self.trainer else 0
        arguments = loader_arguments(self.num_workers, self.seed)
        if self.streaming:
            stream = _Stream.open(
                str(self.pictures),
                "pictures",
                self._columns,
                self.splits[0],
                self._pipeline,
                seed=self.seed,
                shuffle_buffer=self.shuffle_buffer,
                trainer=self.trainer,
                owner="DiffusionDataModule",
                draws=self._draws,
            )
            size = local_batch_size(self.batch_size, world_size)
            return StreamLoader(
                stream, self.trainer, batch_size=size, drop_last=True, collate_fn=stream.collate, **arguments
            )
        training = self._sets["train"]
        sampler = GlobalBatchSampler(
            training, self.batch_size, num_replicas=world_size, rank=rank, seed=self.seed, keyed=True
        )
        return ResumableLoader(
            training, batch_size=sampler.local_batch_size, sampler=sampler, collate_fn=whole_batch, **arguments
        )

    def val_dataloader(self) -> DataLoader | list:
        """Validation pictures in order; no loader if there is no validation."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader | list:
        """Test pictures in order; no loader if there is no test."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader | list:
        """All of ``pictures`` in order, with every condition."""
        if self.streaming:
            raise MisconfigurationException(
                "DiffusionDataModule(streaming=True) has no order to predict in; streaming=False has"
            )
        return self._evaluation_loader("all")

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Run the models that are not precomputed, on the batch's device."""
        device = batch["index"].device
        models = {name: FrozenModel(model, device) for name, model in self._models.items()}
        seeds = batch.pop("noise_seeds", None)  # in training alone
        if "text_encoder" in models:
            nothing = [] if seeds is not None else [""]
            encoded = models["text_encoder"]([*batch["text"], *nothing])
            _check_encoded(encoded, len(batch["text"]) + len(nothing))
            for key, values in encoded.items():
                batch[key] = values[: len(batch["text"])].to(device, torch.float32)
                if nothing:
                    batch[f"negative_{key}"] = values[-1:].to(device, torch.float32).expand_as(batch[key]).clone()
        if "teacher" in models:
            batch["teacher_features"] = models["teacher"](batch["pixel_values"]).to(device, torch.float32)
        if "vae" in models:
            assert self._scale is not None
            posterior = models["vae"](batch["pixel_values"])
            batch["latents"] = _latents(posterior, self._scale, None if seeds is None else seeds.tolist())
        if "latents" in batch and not self.keep_pixels:
            batch.pop("pixel_values", None)
        return batch

    @cached_property
    def _listed(self) -> Listed:
        """What there is: the sources, the parts made of them, and the labels."""
        listed = list_parts(
            {"pictures": self.pictures, "val_pictures": self.val_pictures, "test_pictures": self.test_pictures},
            self._open,
            splits=self.splits,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            split_seed=self.split_seed,
            streaming=self.streaming,
        )
        if "text_encoder" in self._models and not all(source.captions.total for source in listed.sources()):
            raise ValueError("text_encoder has nothing to encode: there are pictures without captions; leave it out")
        return listed

    def _open(self, source: str | Sequence[str], argument: str, split: str) -> CaptionedPictures:
        return open_captioned(source, argument, self._columns, split=split, cache_dir=self.cache_dir, unsorted=True)

    @property
    def _draws(self) -> _Draws:
        return _Draws(self.condition_dropout, self.flip, needs_noise_seeds=bool(self._models))

    def _texts_kept_as(self, encoder: Any) -> dict[str, Any]:
        folder = self.cache_dir / "prompt_embeds"
        return {"folder": folder, "fingerprint": encoder.fingerprint, "dtype": self.cache_dtype}

    def _tables_of(self, source: CaptionedPictures) -> list[_Table]:
        """What is to be kept of a source: which pictures can be read, and what each model makes of them."""
        pipeline = self._pipeline
        prepared = {"pictures": source.pictures.fingerprint(), "size": pipeline.size, "channels": pipeline.channels}
        folder, count = self.cache_dir / "pictures", len(source.captions)
        tables = [_Table(folder, "readable", prepared, count, "uint8")]
        trained_on = "train" in self._listed.parts and source is self._listed.parts["train"].source
        for name in ("vae", "teacher"):
            if name in self._kept:
                for flipped in (False, True) if self.flip and trained_on else (False,):
                    model, field = self._models[name], _FIELD[name] + _FLIPPED * flipped
                    identity = {**prepared, "model": model.fingerprint, "flipped": flipped, "dtype": self.cache_dtype}
                    tables.append(_Table(folder, field, identity, count, self.cache_dtype, model, flipped))
        return tables

    def _precompute(self, source: CaptionedPictures, missing: list[_Table], device: torch.device) -> None:
        count = len(source.captions)
        models = [FrozenModel(t.model, device, f"{t.field}: computing those of {count} pictures") for t in missing]
        loader = DataLoader(
            _Decoded(source.pictures, self._pipeline, count),
            batch_size=self.eval_batch_size,
            collate_fn=whole_batch,
            **loader_arguments(self.num_workers, self.seed),
        )
        total, reason = 0, ""
        with ExitStack() as stack:
            writers = [stack.enter_context(table.writer()) for table in missing]
            for pixels, readable, error in loader:
                total, reason = total + int(readable.sum()), error or reason
                pixels = self._pipeline.normalise(pixels).to(device)
                for table, model, writer in zip(missing, models, writers, strict=True):
                    if table.model is None:
                        writer.write(readable)
                        continue
                    made = model(pixels.flip(-1) if table.flipped else pixels)
                    if not isinstance(made, Tensor) or made.ndim < 3 or len(made) != len(pixels):
                        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
                        raise ValueError(f"{table.field}: expected ({len(pixels)}, N, D) of the model, got {got}")
                    writer.write(made)
            if not total:
                raise ValueError(f"none of {count} pictures can be read; the last: {reason}")

    def _open_kept(self) -> None:
        advice = "without a Trainer, call prepare_data() first"
        if "text_encoder" in self._kept:
            encoder = self._models["text_encoder"]
            kept = self._texts_kept_as(encoder)
            try:
                cache = CachedTextEmbeddings.open(**kept)
            except ValueError as error:
                raise ValueError(f"the texts are not encoded; {advice}: {error}") from error
            encoded = FrozenModel(encoder, torch.device("cpu"))([""])
            _check_encoded(encoded, 1)
            self._prompts = _Prompts(cache, {key: tuple(encoded[key].shape[1:]) for key in sorted(encoded)})
        for source in self._listed.sources() if self._kept - {"text_encoder"} else ():
            tables = {table.field: table.find() for table in self._tables_of(source)}
            if lacking := [field for field, rows in tables.items() if rows is None]:
                raise ValueError(f"{', '.join(lacking)} are not in {self.cache_dir / 'pictures'}; {advice}")
            self._tables.append({field: rows for field, rows in tables.items() if rows is not None})

    def _read(self, name: str) -> _Set:
        """Make a data set of a part, with its pictures in memory if they are to be there."""
        source, rows = self._listed.parts[name]
        tables: dict[str, PrecomputedRows] = {}
        if self._tables:
            (tables,) = (t for s, t in zip(self._listed.sources(), self._tables, strict=True) if s is source)
            readable = tables["readable"][torch.tensor(rows)].bool()
            if not readable.any():
                raise ValueError(f"{name}: none of {len(rows)} pictures can be read")
            if unreadable := int((~readable).sum()):
                rank_zero_warn(f"{name}: left out {unreadable} of {len(rows)} pictures, which cannot be read")
                rows = [row for row, is_readable in zip(rows, readable.tolist(), strict=True) if is_readable]
        pixels_needed = "latents" not in tables or self.keep_pixels or "teacher" in self._models
        labels = self._listed.labels
        names = source.class_names
        return _Set.read(
            Part(source, rows),
            name,
            self._pipeline if pixels_needed else None,
            self.in_memory,
            labels=None if names is None or not labels else torch.tensor([labels.get(n, len(labels)) for n in names]),
            num_classes=len(labels),
            prompts=self._prompts,
            tables=tables,
            scale=self._scale,
            draws=self._draws if name == "train" else None,
        )

    def _evaluation_loader(self, name: str) -> DataLoader | list:
        if name not in self._sets:
            return []  # Lightning's word for no loader
        return DataLoader(
            self._sets[name],
            batch_size=self.eval_batch_size,
            collate_fn=whole_batch,
            **loader_arguments(self.num_workers, self.seed),
        )


@dataclass(eq=False)
class _Table:
    """Rows that are kept of a source; those without a model are which pictures can be read."""

    folder: Path
    field: str
    identity: dict[str, Any]
    count: int
    dtype: str
    model: Any = None
    flipped: bool = False

    def find(self) -> PrecomputedRows | None:
        return PrecomputedRows.find(self.folder, self.field, self.identity, self.count)

    def writer(self) -> RowWriter:
        return RowWriter(self.folder, self.field, self.identity, self.count, self.dtype)


@dataclass(eq=False)
class _Decoded(Dataset):
    """Pictures in 0..1, which of them could be read, and the last error."""

    pictures: Pictures
    pipeline: PixelPipeline
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor, str]:
        pixels = torch.zeros(len(rows), self.pipeline.channels, self.pipeline.size, self.pipeline.size)
        readable = torch.ones(len(rows), dtype=torch.uint8)
        reason = ""
        for i, row in enumerate(rows):
            try:
                pixels[i] = self.pipeline.prepare(self.pictures, row, row)
            except ValueError as error:  # noqa: PERF203 - nothing beside decoding
                readable[i], reason = 0, str(error)
        return pixels, readable, reason


@dataclass(eq=False)
class _Flat:
    """A text encoder whose output is one vector a text, as `CachedTextEmbeddings` keeps it."""

    encoder: FrozenModel

    def __call__(self, texts: list[str]) -> Tensor:
        encoded = self.encoder(texts)
        _check_encoded(encoded, len(texts))
        return torch.cat([encoded[key].flatten(1).float() for key in sorted(encoded)], dim=1)


@dataclass(eq=False)
class _Prompts:
    """Encoded texts by look-up, and the shapes that were flattened."""

    cache: CachedTextEmbeddings
    shapes: dict[str, tuple[int, ...]]

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        parts = self.cache.lookup(texts).split([torch.Size(shape).numel() for shape in self.shapes.values()], dim=1)
        return {key: part.reshape(-1, *shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}


class _Draws(NamedTuple):
    """What is drawn for a training picture; its key, which belongs to its place in the epoch, seeds it."""

    dropout: float
    flip: bool
    needs_noise_seeds: bool

    def __call__(self, keys: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which conditions are dropped, and which pictures mirrored."""
        generator = torch.Generator()
        drawn = torch.stack([torch.rand(2, generator=generator.manual_seed(key)) for key in keys])
        return drawn[:, 0] < self.dropout, (drawn[:, 1] < 0.5) & self.flip


@dataclass(eq=False, kw_only=True)
class _Set(PicturesOfPart):
    """A part as batches; an item is a position, or a pair of position and key, as the samplers yield them."""

    labels: Tensor | None  # of each row of the source
    num_classes: int
    prompts: _Prompts | None
    tables: dict[str, PrecomputedRows]
    scale: LatentScale | None
    draws: _Draws | None  # of training

    def __getitems__(self, items: list[Any]) -> dict[str, Any]:
        positions, keys = positions_and_keys(items)
        index = torch.tensor(positions)
        dropped, flipped = self.draws(keys) if self.draws else torch.zeros(2, len(keys), dtype=torch.bool)
        batch: dict[str, Any] = {}
        if self.pipeline is not None:
            pixels, index = self.pictures(index, keys)
            batch["pixel_values"] = _mirrored(self.pipeline.normalise(pixels), flipped)
        rows = self.rows[index]
        if "latents" in self.tables:
            assert self.scale is not None
            batch["latents"] = _latents(self._kept("latents", rows, flipped), self.scale, keys if self.draws else None)
        if "teacher_features" in self.tables:
            batch["teacher_features"] = self._kept("teacher_features", rows, flipped)
        if self.source.captions.total:
            captions = [self.captions(position) for position in index.tolist()]
            keys_of_captions = keys if self.draws else [0] * len(keys)
            drawn = (draw_captions(texts, key)[0] for texts, key in zip(captions, keys_of_captions, strict=True))
            batch["text"] = _dropped(drawn, dropped)
            if self.prompts is not None:
                batch |= self.prompts(batch["text"])
        if self.labels is not None:
            batch["labels"] = self.labels[rows].masked_fill(dropped, self.num_classes)
        if self.draws is None:
            batch |= self._nothing(len(keys))
        elif self.draws.needs_noise_seeds:
            batch["noise_seeds"] = torch.tensor(keys)
        return {**batch, "index": index}

    def _kept(self, name: str, rows: Tensor, flipped: Tensor) -> Tensor:
        kept = self.tables[name][rows].float()
        if flipped.any():
            kept[flipped] = self.tables[name + _FLIPPED][rows[flipped]].float()
        return kept

    def _nothing(self, count: int) -> dict[str, Tensor]:
        """The condition of nothing, ``count`` times."""
        nothing = {} if self.labels is None else {"negative_labels": torch.full((count,), self.num_classes)}
        if self.prompts is not None and self.source.captions.total:
            nothing |= {f"negative_{key}": values for key, values in self.prompts([""] * count).items()}
        return nothing


@dataclass(eq=False)
class _Stream(PairStream):
    """A stream as batches."""

    draws: _Draws

    def collate(self, rows: list[StreamRow]) -> dict[str, Any]:
        keys = [row.key for row in rows]
        dropped, flipped = self.draws(keys)
        assert self.pipeline is not None
        pixels = self.pipeline.normalise(torch.stack([row.picture for row in rows if row.picture is not None]))
        batch: dict[str, Any] = {"pixel_values": _mirrored(pixels, flipped), "index": torch.full((len(rows),), -1)}
        if self.caption_columns:
            batch["text"] = _dropped((row.texts[0] for row in rows), dropped)
        if self.draws.needs_noise_seeds:
            batch["noise_seeds"] = torch.tensor(keys)
        return batch


def _mirrored(pixels: Tensor, flipped: Tensor) -> Tensor:
    return torch.where(flipped.view(-1, 1, 1, 1), pixels.flip(-1), pixels)


def _dropped(texts: Any, dropped: Tensor) -> list[str]:
    return ["" if is_dropped else text for text, is_dropped in zip(texts, dropped.tolist(), strict=True)]


def _latents(posterior: Tensor, scale: LatentScale, keys: Sequence[int] | None) -> Tensor:
    """Latents as diffused: the mean of the posterior ``(B, 2, c, h, w)``, or what ``keys`` seed drawn from it."""
    latents = posterior[:, 0]
    if keys is not None and posterior.shape[1] == 2:
        generator = torch.Generator()
        noise = [torch.randn(latents.shape[1:], generator=generator.manual_seed(key ^ _NOISE)) for key in keys]
        latents = latents + posterior[:, 1] * torch.stack(noise).to(latents.device)
    return (latents - scale.shift.to(latents.device)) * scale.scale.to(latents.device)


def _check_encoded(encoded: Any, count: int) -> None:
    fine = isinstance(encoded, Mapping) and isinstance(encoded.get("prompt_embeds"), Tensor)
    shapes = {key: tuple(value.shape) for key, value in encoded.items()} if fine else type(encoded).__name__
    if not fine or encoded["prompt_embeds"].ndim != 3 or {len(value) for value in encoded.values()} != {count}:
        raise ValueError(
            f"text_encoder must return a dict with prompt_embeds ({count}, L, d) and maybe pooled_prompt_embeds "
            f"({count}, p) for {count} texts, got {shapes}"
        )


def _posterior_encoder(vae: Any, channels: int) -> PosteriorEncoder:
    vae = load_autoencoder(vae) if isinstance(vae, str) else vae
    if not (hasattr(vae, "encode") and hasattr(vae, "config")):
        raise ValueError(f"vae must be an autoencoder of diffusers, or the name of one, got {type(vae).__name__}")
    expected = getattr(vae.config, "in_channels", channels)
    if expected != channels:
        raise ValueError(f"channels={channels}, but the VAE takes pictures of {expected} channels")
    return PosteriorEncoder(vae)


def _names_to_precompute(precompute: bool | Sequence[str], models: Mapping[str, Any]) -> frozenset[str]:
    if isinstance(precompute, bool):
        names = list(models) if precompute else []
    else:
        names = [precompute] if isinstance(precompute, str) else list(precompute)
        if unknown := [name for name in names if name not in models]:
            raise ValueError(
                f"precompute={precompute!r}: there is no {unknown[0]!r}; the models given are: "
                f"{', '.join(models) or 'none'}"
            )
    for name in names:
        has_fingerprint(name, models[name], "leave it out of precompute")
    return frozenset(names)


def _check_streaming(pictures: Any, label_column: Any, kept: frozenset[str]) -> None:
    if not is_picture_dataset(pictures):
        raise ValueError(f"streaming=True is for Hugging Face data sets, got pictures={pictures!r:.200}")
    if label_column is not None:
        raise ValueError(f"streaming=True does not know all classes; leave out label_column={label_column!r}")
    if kept:
        raise ValueError(
            f"streaming=True does not know the pictures before training, so nothing can be computed once for "
            f"{', '.join(sorted(kept))}; give precompute=False, or streaming=False"
        )


def _to_cpu(model: Any) -> None:
    if isinstance(model, torch.nn.Module):
        model.cpu()
