"""Loaders that every data module here uses: batches that do not depend on the number of processes, and exact resuming.

Lightning saves the state of a loader that has ``state_dict`` and ``load_state_dict`` in its checkpoints. A run that is
killed and resumed from a checkpoint then sees the batches that it would have seen without the interruption.

One kind of checkpoint Lightning 2.6 itself does not resume rightly, with any loader: under ``Trainer(max_steps=...)``,
one saved in ``on_train_epoch_end`` (where ``ModelCheckpoint`` saves when there is no validation) runs a batch too many
in the finished epoch. Use ``ModelCheckpoint(every_n_train_steps=...)`` there, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

T = TypeVar("T")


def local_batch_size(batch_size: int, world_size: int, argument: str = "batch_size") -> int:
    """Return one process's share of a global batch.

    Raises:
        ValueError: ``batch_size`` is not positive, or not a multiple of ``world_size``.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"{argument} counts the rows of all processes together, so it must be a positive multiple of their number "
            f"({world_size}), got {batch_size}"
        )
    return batch_size // world_size


def loader_arguments(num_workers: int, seed: int) -> dict[str, Any]:
    """Return what every loader is given.

    Without a generator of its own, each pass of a loader draws from the global one, and validating more often would
    change the dropout of training.
    """
    return {"num_workers": num_workers, "generator": torch.Generator().manual_seed(seed)}


def whole_batch(batch: T) -> T:
    """Collate nothing, for a data set that makes whole batches in ``__getitems__``."""
    return batch


class GlobalBatchSampler(DistributedSampler[int]):
    """Shuffle once for all processes, and give each its slice of every global batch.

    Global batch ``k`` of an epoch is ``order[k * B : (k + 1) * B]`` with ``B = batch_size``; rank ``r`` of ``W`` yields
    the rows ``r * B / W`` to ``(r + 1) * B / W`` of it. So the ranks' rows, concatenated in rank order as an all-gather
    does, are the batch of a run on one process. The last, incomplete batch of an epoch is dropped; another epoch drops
    other rows.

    It is a ``DistributedSampler``, so Lightning does not put its own in its place, and calls ``set_epoch``. Give the
    ``DataLoader`` ``sampler.local_batch_size`` as its batch size.

    Args:
        dataset: Anything with a length.
        batch_size: Rows of all processes together.
        num_replicas: Number of processes W.
        rank: This process, from 0 to W - 1.
        seed: Seed of the shuffling, together with the epoch.
        keyed: Yield pairs ``(row, key)`` instead of rows. The key is a random number that belongs to the place in the
            epoch: seed with it what is drawn for the row (augmentation), and the batch depends on neither the number
            of processes nor that of workers, nor on an interruption.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``num_replicas``, or exceeds the number of rows.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        keyed: bool = False,
    ) -> None:
        self.local_batch_size = local_batch_size(batch_size, num_replicas)
        if len(dataset) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} exceeds the {len(dataset)} rows there are: no batch can be filled"
            )
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.keyed = keyed
        self.first_batch = 0  # ResumableLoader sets it to go on in the middle of an epoch
        self.num_batches = len(dataset) // batch_size

    def order(self) -> list[int]:
        """Return the rows in the order of this epoch; a subclass may compose its batches here."""
        return torch.randperm(len(self.dataset), generator=self._generator()).tolist()  # type: ignore[arg-type]

    def _generator(self, offset: int = 0) -> torch.Generator:
        # Not seed + epoch, which would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch + offset) % 2**32)

    def __iter__(self) -> Iterator[Any]:
        order: list[Any] = self.order()
        if self.keyed:
            keys = torch.randint(2**62, (len(order),), generator=self._generator(0x9E3779B9))
            order = list(zip(order, keys.tolist(), strict=True))
        for batch in range(self.first_batch, self.num_batches):
            start = batch * self.batch_size + self.rank * self.local_batch_size
            yield from order[start : start + self.local_batch_size]

    def __len__(self) -> int:
        return self.num_batches * self.local_batch_size


class ClassBatchSampler(GlobalBatchSampler):
    """Batches of P classes with K rows each, for losses that need positives among the rows of a batch.

    The rows of a class stand together. Over an epoch every class comes up equally often, up to one, whatever its size,
    and so does every row of a class; an epoch has as many batches as if every row came once. A class with fewer than K
    rows repeats them to make K: one of a single row has only copies of itself as positives, and serves the others as a
    negative. All else is as for ``GlobalBatchSampler``.

    Args:
        labels: The class of every row.
        batch_size: P * K, over all processes together.
        samples_per_class: K.
        **kwargs: As for ``GlobalBatchSampler``.

    Raises:
        ValueError: ``batch_size`` is not a multiple of ``samples_per_class``, or there are fewer than P classes; or
            as for ``GlobalBatchSampler``.
    """

    def __init__(self, labels: Sequence[int], batch_size: int, samples_per_class: int, **kwargs: Any) -> None:
        if samples_per_class < 1 or batch_size % samples_per_class:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of samples_per_class={samples_per_class}, which must be "
                ">= 1: a batch has as many rows of every one of its classes"
            )
        super().__init__(labels, batch_size, **kwargs)
        self.samples_per_class = samples_per_class
        self.classes_per_batch = batch_size // samples_per_class
        self.rows_of: dict[int, list[int]] = {}
        for row, label in enumerate(labels):
            self.rows_of.setdefault(int(label), []).append(row)
        if len(self.rows_of) < self.classes_per_batch:
            raise ValueError(
                f"batch_size={batch_size} with samples_per_class={samples_per_class} makes batches of "
                f"{self.classes_per_batch} classes, and there are only {len(self.rows_of)}; lower batch_size"
            )
        if few := [len(rows) for rows in self.rows_of.values() if len(rows) < samples_per_class]:
            rank_zero_warn(
                f"{len(few)} of {len(self.rows_of)} classes have fewer than samples_per_class={samples_per_class} rows "
                f"({few.count(1)} of them a single one); their rows repeat within a batch"
            )

    def order(self) -> list[int]:
        """Return the rows in the order of this epoch, batch by batch and class by class."""
        generator = self._generator()
        classes = _Deck(sorted(self.rows_of), generator)
        decks = {label: _Deck(rows, generator) for label, rows in self.rows_of.items()}
        return [
            row
            for _ in range(self.num_batches)
            for label in classes.deal(self.classes_per_batch)
            for row in decks[label].deal(self.samples_per_class)
        ]


class _Deck:
    """Cards dealt in random order, every card as often as any other up to one."""

    def __init__(self, cards: list[int], generator: torch.Generator) -> None:
        self.cards, self.generator = cards, generator
        self.rest: list[int] = []

    def deal(self, number: int) -> list[int]:
        """Take ``number`` cards, no two the same unless there are fewer."""
        hand = self.cards * (number // len(self.cards))
        number %= len(self.cards)
        taken, self.rest = self.rest[:number], self.rest[number:]
        if len(taken) < number:
            order = torch.randperm(len(self.cards), generator=self.generator).tolist()
            shuffled = [self.cards[i] for i in order]
            more = [card for card in shuffled if card not in taken][: number - len(taken)]
            self.rest = [card for card in shuffled if card not in more]
            taken += more
        return hand + taken


class ResumableLoader(DataLoader[T]):
    """A ``DataLoader`` over a ``GlobalBatchSampler`` that resumes at the next batch without loading those before it.

    It takes the arguments of ``DataLoader``. Batches count when they are handed out, so what workers have prefetched is
    not lost. A position holds for the epoch in which it was saved: when the sampler has gone on to another epoch, that
    one begins at its first batch. Under a sampler of another class, which ``Trainer(overfit_batches=...)`` puts in,
    every pass begins at the first batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position = {"epoch": 0, "batches": 0}
        self._resuming = False

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        # A generator, so that nothing is read before the first batch is asked for: in a resumed run Lightning makes the
        # iterator before it tells the sampler the epoch, and workers would at once prefetch rows of the wrong one.
        if isinstance(self.sampler, GlobalBatchSampler):
            epoch = self.sampler.epoch
            first = self._position["batches"] if self._resuming and self._position["epoch"] == epoch else 0
            self.sampler.first_batch = first
            self._position = {"epoch": epoch, "batches": first}
        self._resuming = False
        for batch in super().__iter__():
            self._position["batches"] += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out: the same on all ranks."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next pass begin after the batches that ``state_dict`` counts."""
        self._position = dict(state_dict)
        self._resuming = True
        if isinstance(self.sampler, GlobalBatchSampler):
            self.sampler.set_epoch(state_dict["epoch"])


class StreamLoader(DataLoader[T]):
    """A ``DataLoader`` over a stream, which has no length and no random access, that resumes at the next batch.

    Resuming reads the interrupted epoch again from its beginning and drops the batches that were used, which is exact
    with any number of workers, and takes as long as reading them takes.

    Args:
        dataset: A stream with a method ``set_epoch(epoch)``, which chooses the order of the next pass.
        trainer: The Trainer, which knows how many batches were used: to see the end of a stream coming, Lightning takes
            a batch ahead of the one that it trains on, so counting the batches handed out would lose one. None: always
            epoch 0, no resuming.
        **kwargs: As for ``DataLoader``.
    """

    def __init__(self, dataset: IterableDataset, trainer: Trainer | None = None, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        self.trainer = trainer
        self._resume_at: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]
        epoch, first = self._resume_at or (_training_position(self.trainer)[0], 0)
        self._resume_at = None
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        yield from islice(super().__iter__(), first, None)

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches trained on: the same on all ranks."""
        epoch, batches = self._resume_at or _training_position(self.trainer)
        return {"epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next pass begin after the batches that ``state_dict`` counts."""
        self._resume_at = (state_dict["epoch"], state_dict["batches"])


def _training_position(trainer: Trainer | None) -> tuple[int, int]:
    """Return the epoch to go on with, and how many of its batches were trained on."""
    if trainer is None:
        return 0, 0
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches = trainer.fit_loop.epoch_loop.batch_progress
    if epochs.started == epochs.processed:  # between two epochs
        return epochs.processed, 0
    if batches.is_last_batch:
        return epochs.processed + 1, 0
    return epochs.processed, batches.current.ready
