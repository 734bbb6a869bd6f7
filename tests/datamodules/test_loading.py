import functools
import re
import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from heliostat.datamodules.loading import (
    ClassBatchSampler,
    GlobalBatchSampler,
    ResumableLoader,
    StreamLoader,
    local_batch_size,
)

ROWS, BATCH = 23, 4  # 5 batches and a rest of 3


def batches(sampler):
    rows = list(sampler)
    size = sampler.local_batch_size
    return [rows[i : i + size] for i in range(0, len(rows), size)]


class TestGlobalBatchSampler:
    @pytest.mark.parametrize("world_size", [2, 4])
    @pytest.mark.parametrize("epoch", [0, 3])
    def test_slices_of_the_ranks_are_the_batches_of_one_process(self, world_size, epoch):
        one = GlobalBatchSampler(range(ROWS), BATCH, seed=7)
        ranks = [
            GlobalBatchSampler(range(ROWS), BATCH, num_replicas=world_size, rank=rank, seed=7)
            for rank in range(world_size)
        ]
        for sampler in (one, *ranks):
            sampler.set_epoch(epoch)
        together = [[row for part in parts for row in part] for parts in zip(*map(batches, ranks), strict=True)]
        assert together == batches(one)
        assert {len(sampler) for sampler in ranks} == {5 * BATCH // world_size}
        assert len(one) == 20

    def test_order_changes_with_epoch_and_seed_and_repeats(self):
        def order(seed, epoch):
            sampler = GlobalBatchSampler(range(ROWS), BATCH, seed=seed)
            sampler.set_epoch(epoch)
            return list(sampler)

        orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
        assert len({tuple(rows) for rows in orders}) == 9  # in particular (0, 1) is not (1, 0)
        assert order(1, 2) == orders[5]
        assert all(len(set(rows)) == 20 for rows in orders)

    def test_lightning_keeps_it(self):
        assert isinstance(GlobalBatchSampler(range(ROWS), BATCH), torch.utils.data.DistributedSampler)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"batch_size counts .* multiple of their number \(3\), got 4"):
            GlobalBatchSampler(range(ROWS), 4, num_replicas=3)
        with pytest.raises(ValueError, match="batch_size=24 exceeds the 23 rows"):
            GlobalBatchSampler(range(ROWS), 24)
        with pytest.raises(ValueError, match="got 0"):
            local_batch_size(0, 1)

    def test_keys_belong_to_the_place(self):
        def draws(epoch=0, seed=7, **kwargs):
            sampler = GlobalBatchSampler(range(ROWS), BATCH, seed=seed, keyed=True, **kwargs)
            sampler.set_epoch(epoch)
            return batches(sampler)

        one = draws()
        plain = GlobalBatchSampler(range(ROWS), BATCH, seed=7)
        assert [row for batch in one for row, _ in batch] == list(plain)
        ranks = [draws(num_replicas=2, rank=rank) for rank in range(2)]
        assert [first + second for first, second in zip(*ranks, strict=True)] == one
        keys = [{key for batch in draws(e, s) for _, key in batch} for e, s in ((0, 7), (1, 7), (0, 8))]
        assert len(set.union(*keys)) == 3 * 20


class TestClassBatchSampler:
    LABELS = tuple(label for label, rows in enumerate([9, 4, 4, 30, 5, 7, 4]) for _ in range(rows))  # 63 rows

    def sampler(self, labels=LABELS, batch_size=12, samples_per_class=4, epoch=0, **kwargs):
        sampler = ClassBatchSampler(labels, batch_size, samples_per_class, **kwargs)
        sampler.set_epoch(epoch)
        return sampler

    @pytest.mark.parametrize("epoch", [0, 1])
    def test_composition(self, epoch):
        sampler = self.sampler(epoch=epoch)
        epoch_batches = batches(sampler)
        assert len(epoch_batches) == 63 // 12
        for batch in epoch_batches:
            classes = [self.LABELS[row] for row in batch]
            assert sorted(Counter(classes).values()) == [4, 4, 4]
            assert all(len(set(classes[i : i + 4])) == 1 for i in (0, 4, 8))  # a class stands together
            assert len(set(batch)) == 12

    @pytest.mark.parametrize("seed", range(5))
    def test_classes_and_rows_come_equally_often(self, seed):
        labels = self.LABELS * 4  # 21 batches of 3 classes: nine times each
        rows = list(self.sampler(labels, seed=seed))
        by_class = Counter(labels[row] for row in rows)
        assert set(by_class.values()) == {36}
        by_row = Counter(rows)
        for label in range(7):
            counts = [by_row[row] for row in range(len(labels)) if labels[row] == label]
            assert max(counts) - min(counts) <= 1

    def test_depends_on_seed_and_epoch_alone(self):
        orders = [list(self.sampler(seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)]
        assert len(set(map(tuple, orders))) == 9
        torch.manual_seed(5)
        assert list(self.sampler(seed=1, epoch=2)) == orders[5]

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_slices_of_the_ranks_are_the_batches_of_one_process(self, world_size):
        ranks = [batches(self.sampler(num_replicas=world_size, rank=rank)) for rank in range(world_size)]
        together = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
        assert together == batches(self.sampler())

    def test_classes_with_few_rows_repeat_them(self):
        labels = [0] * 9 + [1] * 3 + [2] + [3] * 9
        with pytest.warns(UserWarning, match=r"2 of 4 classes have fewer .*=4 rows \(1 of them a single one\)"):
            sampler = self.sampler(labels, 16, 4)
        (batch,) = batches(sampler)
        counts = Counter(batch)
        assert counts[12] == 4
        assert sorted(counts[row] for row in (9, 10, 11)) == [1, 1, 2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.sampler()

    def test_errors(self):
        with pytest.raises(ValueError, match="batch_size=10 must be a multiple of samples_per_class=4"):
            self.sampler(batch_size=10)
        with pytest.raises(ValueError, match="makes batches of 8 classes, and there are only 7"):
            self.sampler(batch_size=32)
        with pytest.raises(ValueError, match=r"multiple of their number \(5\), got 12"):
            self.sampler(num_replicas=5)


class Numbers(IterableDataset):
    """A stream: its order changes with the epoch, its rows are shared among the workers, and its length is unknown."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        yield from range(100 * self.epoch + start, 100 * self.epoch + ROWS, step)


class Recorder(pl.LightningModule):
    """Records the batches that it trains on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        # Not batch_idx: for a loader without length Lightning 2.6 goes on counting when it resumes at an epoch's end.
        self.seen.append((self.current_epoch, batch.tolist()))
        return self.layer(batch[:, None].float()).mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Data(pl.LightningDataModule):
    def __init__(self, stream, num_workers):
        super().__init__()
        self.stream, self.num_workers = stream, num_workers

    def train_dataloader(self):
        kwargs = {"batch_size": BATCH, "num_workers": self.num_workers, "generator": torch.Generator()}
        if self.stream:
            return StreamLoader(Numbers(), self.trainer, drop_last=True, **kwargs)
        return ResumableLoader(range(ROWS), sampler=GlobalBatchSampler(range(ROWS), BATCH), **kwargs)

    def val_dataloader(self):
        return DataLoader(range(3), batch_size=1)


class Kill(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise SystemExit("killed")


def fit(folder, *, stream=False, num_workers=0, ckpt_path=None, callbacks=(), save=None, **kwargs):
    module = Recorder()
    if save is not None:
        callbacks = [*callbacks, pl.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **save)]
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=save is not None,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "num_sanity_val_steps": 0} | kwargs,
    )
    trainer.fit(module, Data(stream, num_workers), ckpt_path=ckpt_path)
    return module.seen


@functools.cache
def uninterrupted(stream=False, num_workers=0, **kwargs):
    return fit(None, stream=stream, num_workers=num_workers, **kwargs)


@pytest.mark.filterwarnings("ignore:.*ModelCheckpoint", "ignore:Checkpoint directory", "ignore:.*save_last")
class TestResume:
    @pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
    @pytest.mark.parametrize("num_workers", [0, 2])
    # 5 steps an epoch: before, in, at the end of, and after the second epoch
    @pytest.mark.parametrize("step", [3, 5, 7, 10, 11])
    def test_stopped_by_max_steps(self, tmp_path, stream, num_workers, step):
        whole = uninterrupted(stream, num_workers)
        assert len(whole) == 15
        run = {"stream": stream, "num_workers": num_workers}
        first = fit(tmp_path, max_steps=step, save={"every_n_train_steps": 1}, **run)
        rest = fit(None, ckpt_path=tmp_path / f"step={step}.ckpt", **run)
        assert first + rest == whole

    @pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
    @pytest.mark.parametrize(
        ("save", "limits"),
        [
            ({"every_n_train_steps": 1}, {}),
            ({"every_n_train_steps": 1}, {"max_steps": 15}),
            ({"every_n_train_steps": 1}, {"val_check_interval": 2}),
            ({"save_on_train_epoch_end": False}, {}),
            ({"save_on_train_epoch_end": False}, {"max_steps": 15}),
            ({"save_on_train_epoch_end": False}, {"max_steps": 15, "val_check_interval": 2}),
            ({"save_on_train_epoch_end": True}, {}),
        ],
    )
    def test_killed(self, tmp_path, stream, save, limits):
        whole = uninterrupted(stream)
        with pytest.raises(SystemExit, match="killed"):
            fit(tmp_path, stream=stream, save=save, callbacks=[Kill(12)], **limits)
        checkpoints = {int(re.search(r"step=(\d+)", file.name)[1]): file for file in tmp_path.glob("*.ckpt")}
        assert len(checkpoints) >= 2
        for step in checkpoints.keys() & {5, 10} | {max(checkpoints), min(checkpoints)}:  # 5, 10: the ends of epochs
            rest = fit(None, stream=stream, ckpt_path=checkpoints[step], **limits)
            assert rest == whole[step:]

    def test_limited_epochs(self, tmp_path):
        limits = {"limit_train_batches": 3}
        whole = fit(tmp_path, save={"every_n_train_steps": 1}, **limits)
        assert len(whole) == 9
        for step in (2, 3, 4):
            rest = fit(None, ckpt_path=tmp_path / f"step={step}.ckpt", **limits)
            assert rest == whole[step:]

    @pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
    def test_state_is_plain_numbers(self, tmp_path, stream):
        fit(tmp_path, stream=stream, save={"every_n_train_steps": 1}, max_steps=7)
        checkpoint = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
        assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"epoch": 1, "batches": 2}]


class TestResumableLoader:
    def loader(self, dataset=range(ROWS), **kwargs):
        sampler = GlobalBatchSampler(dataset, BATCH)
        return ResumableLoader(dataset, batch_size=BATCH, sampler=sampler, generator=torch.Generator(), **kwargs)

    def test_skipped_rows_are_not_loaded(self):
        class Counting(list):
            loaded = 0

            def __getitem__(self, index):
                self.loaded += 1
                return super().__getitem__(index)

        data = Counting(range(ROWS))
        loader = self.loader(data)
        whole = [batch.tolist() for batch in self.loader()]
        loader.load_state_dict({"epoch": 0, "batches": 3})
        data.loaded = 0
        assert [batch.tolist() for batch in loader] == whole[3:]
        assert data.loaded == 2 * BATCH
        assert [batch.tolist() for batch in loader] == whole  # the next pass is a whole one
        assert len(loader) == 5

    def test_prefetched_batches_do_not_count(self):
        loader = self.loader(num_workers=1, prefetch_factor=2)
        iterator = iter(loader)
        next(iterator)
        assert loader.state_dict() == {"epoch": 0, "batches": 1}

    def test_position_survives_until_it_is_used(self):
        loader = self.loader()
        loader.load_state_dict({"epoch": 2, "batches": 3})
        assert loader.state_dict() == {"epoch": 2, "batches": 3}
        iter(loader)  # made and thrown away, as Lightning does
        assert len(list(loader)) == 2

    def test_position_of_another_epoch_is_left(self):
        loader = self.loader()
        loader.load_state_dict({"epoch": 0, "batches": 5})
        loader.sampler.set_epoch(1)
        assert len(list(loader)) == 5

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_global_random_state_is_left_alone(self, num_workers):
        state = torch.get_rng_state()
        list(self.loader(num_workers=num_workers))
        assert torch.equal(torch.get_rng_state(), state)

    def test_overfit_batches(self, tmp_path):
        assert fit(None, overfit_batches=2, max_epochs=2) == [
            (0, [0, 1, 2, 3]),
            (0, [4, 5, 6, 7]),
            (1, [0, 1, 2, 3]),
            (1, [4, 5, 6, 7]),
        ]


def test_stream_without_trainer():
    loader = StreamLoader(Numbers(), batch_size=BATCH, drop_last=True)
    assert [batch[0].item() for batch in loader] == [0, 4, 8, 12, 16]
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
