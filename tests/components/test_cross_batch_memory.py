from __future__ import annotations

import pytest
import torch
from torch import Tensor

from heliostat.components import CrossBatchMemory, MultiSimilarityLoss, PairLoss, multi_similarity_loss
from tests.components.test_multi_similarity import batch
from tests.harness import ProcessPool, relative_error


def memory(size: int = 20, **settings: int) -> CrossBatchMemory:
    return CrossBatchMemory(MultiSimilarityLoss(beta=10.0), size, 6, **settings)


def test_first_batch_is_compared_with_itself_alone() -> None:
    x = batch()
    torch.testing.assert_close(memory()(**x), multi_similarity_loss(**x, beta=10.0))


@pytest.mark.parametrize("make", [MultiSimilarityLoss, lambda: PairLoss("triplet")])
def test_later_batches_are_compared_with_earlier_ones_too(make) -> None:
    loss = make()
    queue = CrossBatchMemory(loss, 100, 6)
    first, second = batch(12, seed=1), batch(12, seed=2)
    queue(**first)
    embeddings, reference = (second["embeddings"].clone().requires_grad_() for _ in range(2))
    value = queue(embeddings, second["labels"])
    expected = loss(
        reference,
        second["labels"],
        ref_embeddings=torch.cat([reference, first["embeddings"]]),
        ref_labels=torch.cat([second["labels"], first["labels"]]),
        own_index=torch.arange(12),
    )
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(embeddings.grad, reference.grad)


def test_oldest_rows_are_replaced() -> None:
    queue = memory(size=10)
    rows = torch.arange(14 * 6.0).view(14, 6)
    for part in (rows[:4], rows[4:8], rows[8:12], rows[12:]):
        queue(part, part[:, 0].long())
    assert set(queue.labels.tolist()) == set(rows[4:, 0].long().tolist())
    assert torch.equal(queue.features[:, 0].long(), queue.labels)


def test_batch_larger_than_the_memory_leaves_its_last_rows() -> None:
    queue, x = memory(size=5), batch(16)
    queue(**x)
    assert {tuple(row) for row in queue.features.tolist()} == {tuple(row) for row in x["embeddings"][-5:].tolist()}


def test_warmup_fills_but_does_not_use() -> None:
    queue, x = memory(warmup=2), batch()
    for _ in range(2):
        torch.testing.assert_close(queue(**x), multi_similarity_loss(**x, beta=10.0))
    assert not torch.allclose(queue(**x), multi_similarity_loss(**x, beta=10.0))


def test_evaluation_remembers_nothing() -> None:
    queue = memory().eval()
    queue(**batch())
    assert queue.stored == 0


def test_state_dict_holds_all_of_it() -> None:
    whole, part = memory(), memory(warmup=0)
    batches = [batch(12, seed=seed) for seed in range(4)]
    for x in batches[:2]:
        whole(**x)
    part.load_state_dict(whole.state_dict())
    for x in batches[2:]:
        assert torch.equal(whole(**x), part(**x))


def test_keeps_no_graph() -> None:
    queue, x = memory(), batch()
    queue(x["embeddings"].requires_grad_(), x["labels"])
    assert not queue.features.requires_grad


def test_two_processes_equal_one(two_processes: ProcessPool) -> None:
    batches = [{k: v.double() if k == "embeddings" else v for k, v in batch(8, seed=s).items()} for s in range(3)]
    expected_values, expected_gradients, expected_memory = _run(0, batches, world=1)
    values, gradients, memories = zip(*two_processes.run(_run, batches, 2), strict=True)
    for step, expected in enumerate(expected_values):
        torch.testing.assert_close((values[0][step] + values[1][step]) / 2, expected)
        both = torch.cat([gradients[0][step], gradients[1][step]]) / 2
        assert relative_error(both, expected_gradients[step]) < 1e-9
    assert torch.equal(memories[0], expected_memory)
    assert torch.equal(memories[1], expected_memory)


def _run(rank: int, batches: list[dict[str, Tensor]], world: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    queue = memory().double()
    values, gradients = [], []
    for x in batches:
        embeddings = x["embeddings"].chunk(world)[rank].clone().requires_grad_()
        value = queue(embeddings, x["labels"].chunk(world)[rank])
        value.backward()
        values.append(value.detach())
        gradients.append(embeddings.grad)
    return values, gradients, queue.features


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match="size and embedding_dim must be >= 1 and warmup >= 0, got 0, 6 and 0"):
        memory(size=0)
    with pytest.raises(ValueError, match=r"embeddings must have shape \(N, 6\), .* got \(4, 3\)"):
        memory()(torch.zeros(4, 3), torch.arange(4))
