from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heliostat.components import cross_modal_recall, nearest_neighbors, retrieval_metrics


def brute_force(embeddings: Tensor, labels: Tensor, depths: tuple[int, ...]) -> tuple[dict[int, float], float]:
    """Recall@k and MAP@R as their definitions read, one query and one rank at a time."""
    unit = F.normalize(embeddings.double(), dim=1)
    recalls: dict[int, list[bool]] = {depth: [] for depth in depths}
    averages = []
    for i in range(len(labels)):
        relevant = sum(int(labels[j] == labels[i]) for j in range(len(labels)) if j != i)
        if not relevant:
            continue
        ranking = sorted((j for j in range(len(labels)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        hits = [bool(labels[j] == labels[i]) for j in ranking]
        for depth in depths:
            recalls[depth].append(any(hits[:depth]))
        averages.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(relevant) if hits[r]) / relevant)
    return {depth: sum(hit) / len(hit) for depth, hit in recalls.items()}, sum(averages) / len(averages)


class TestMetrics:
    @pytest.mark.filterwarnings("ignore:.*the only one of their class")
    @pytest.mark.parametrize("block_size", [1, 7, 1000])
    @pytest.mark.parametrize("classes", [2, 6, 20])
    def test_against_a_loop(self, classes: int, block_size: int) -> None:
        generator = torch.Generator().manual_seed(classes)
        labels = torch.randint(classes, (60,), generator=generator)
        centres = torch.randn(classes, 5, generator=generator)
        embeddings = 3 * (centres[labels] + torch.randn(60, 5, generator=generator))
        labels = labels * 1000 - 7  # any integers
        recall, precision = brute_force(embeddings, labels, (1, 3, 10))
        result = retrieval_metrics(embeddings, labels, (1, 3, 10), block_size=block_size)
        assert {depth: float(value) for depth, value in result.recall_at.items()} == pytest.approx(recall, abs=1e-6)
        assert float(result.map_at_r) == pytest.approx(precision, abs=1e-6)

    def test_by_hand(self) -> None:
        """Neighbours of 0 degrees, by angle: B A B A."""
        angles = torch.tensor([0.0, 10, 20, -30, -40]).deg2rad()
        embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
        labels = torch.tensor([0, 1, 0, 1, 0])
        # 0: b a b a -> (1/2) / 2.   1: 0 a, 2 a (a tie), 3 b -> 0.   2: 1 b, 0 a -> (1/2) / 2.   3: 4 a -> 0.
        # 4: 3 b, 0 a -> (1/2) / 2
        assert float(retrieval_metrics(embeddings, labels).map_at_r) == pytest.approx((0.25 + 0 + 0.25 + 0 + 0.25) / 5)
        recall = retrieval_metrics(embeddings, labels, (1, 2, 3)).recall_at
        assert [float(recall[depth]) for depth in (1, 2, 3)] == pytest.approx([0, 0.6, 1.0])

    def test_only_members_of_their_class_are_left_out_and_counted(self) -> None:
        embeddings, labels = torch.randn(12, 4), torch.tensor([0] * 5 + [1] * 4 + [2, 3, 4])
        with pytest.warns(UserWarning, match="3 of 12 rows are the only one of their class"):
            result = retrieval_metrics(embeddings, labels)
        recall, precision = brute_force(embeddings, labels, (1, 5, 10))
        assert result.num_queries == 9
        assert {depth: float(value) for depth, value in result.recall_at.items()} == pytest.approx(recall, abs=1e-6)
        assert float(result.map_at_r) == pytest.approx(precision, abs=1e-6)

    @pytest.mark.filterwarnings("ignore:.*the only one of their class")
    @pytest.mark.parametrize("rows", [0, 1, 5])
    def test_without_any_query(self, rows: int) -> None:
        result = retrieval_metrics(torch.randn(rows, 4), torch.arange(rows))
        assert result.num_queries == 0
        assert math.isnan(result.map_at_r)
        assert all(math.isnan(value) for value in result.recall_at.values())

    def test_depth_beyond_the_set(self) -> None:
        recall = retrieval_metrics(torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 1]), (5, 6, 100)).recall_at
        assert [float(value) for value in recall.values()] == [1, 1, 1]

    def test_collapsed_embeddings_gain_nothing_from_the_order_of_the_rows(self) -> None:
        """All similarities tie: every row's neighbours are the first rows, not those that stand around it."""
        labels = torch.arange(50).repeat_interleave(10)
        assert float(retrieval_metrics(torch.ones(500, 8), labels, (1,)).recall_at[1]) == pytest.approx(10 / 500)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        embeddings, labels = torch.randn(40, 6).to(dtype), torch.arange(40) % 5
        result = retrieval_metrics(embeddings, labels)
        expected = retrieval_metrics(embeddings.float(), labels)
        assert result.map_at_r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(result.map_at_r) == pytest.approx(float(expected.map_at_r), abs=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert retrieval_metrics(embeddings, labels).map_at_r == result.map_at_r

    def test_scale_does_not_matter(self) -> None:
        embeddings, labels = torch.randn(40, 6), torch.arange(40) % 5
        assert retrieval_metrics(embeddings * torch.rand(40, 1).add(0.1), labels).map_at_r == pytest.approx(
            float(retrieval_metrics(embeddings, labels).map_at_r), abs=1e-6
        )

    def test_nan_shows(self) -> None:
        embeddings = torch.randn(10, 4)
        embeddings[3, 1] = torch.nan
        result = retrieval_metrics(embeddings, torch.arange(10) % 2)
        assert result.map_at_r.isnan()
        assert result.recall_at[1].isnan()

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match=r"labels must have shape \(3,\), one a row, got \(4,\)"):
            retrieval_metrics(torch.ones(3, 2), torch.zeros(4))
        with pytest.raises(ValueError, match=r"k must hold depths >= 1, got \[0, 1\]"):
            retrieval_metrics(torch.ones(3, 2), torch.zeros(3), (0, 1))
        with pytest.raises(ValueError, match=r"k must hold depths >= 1, got \[\]"):
            retrieval_metrics(torch.ones(3, 2), torch.zeros(3), ())


class TestCrossModalRecall:
    @pytest.mark.parametrize("block_size", [1, 7, 64])
    def test_against_a_loop(self, block_size: int) -> None:
        queries, references = torch.randn(30, 4), torch.randn(20, 4)
        query_groups, reference_groups = torch.randint(6, (30,)), torch.arange(20) % 6
        recalls = cross_modal_recall(
            queries, references, query_groups, reference_groups, (1, 3, 8), block_size=block_size
        )
        cosines = F.normalize(queries.double(), dim=1) @ F.normalize(references.double(), dim=1).T
        for k, recall in recalls.items():
            hits = [
                bool((reference_groups[row.argsort(descending=True)[:k]] == group).any())
                for row, group in zip(cosines, query_groups, strict=True)
            ]
            assert recall.item() == pytest.approx(sum(hits) / len(hits))

    def test_by_hand(self) -> None:
        """Query 0 finds its group at once; query 1 (nearest: 1, 0, 2) third; query 2 in the second place."""
        references = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
        queries = torch.tensor([[2.0, 0.1], [0.1, 3], [-0.5, 0.4]])
        recalls = cross_modal_recall(queries, references, torch.tensor([5, 7, 6]), torch.tensor([5, 6, 7]), (1, 2, 3))
        assert {k: round(recall.item() * 3) for k, recall in recalls.items()} == {1: 1, 2: 2, 3: 3}

    def test_depth_beyond_the_references_is_all(self) -> None:
        recalls = cross_modal_recall(torch.randn(4, 3), torch.randn(3, 3), torch.zeros(4), torch.arange(3), (3, 50))
        assert recalls == {3: 1.0, 50: 1.0}

    def test_queries_without_a_match_are_left_out_and_counted(self) -> None:
        queries, references = torch.randn(6, 3), torch.randn(4, 3)
        groups, reference_groups = torch.tensor([0, 1, 2, 3, 9, 9]), torch.arange(4)
        with pytest.warns(UserWarning, match="2 of 6 queries have no reference of their group"):
            recalls = cross_modal_recall(queries, references, groups, reference_groups, (2,))
        assert recalls == cross_modal_recall(queries[:4], references, groups[:4], reference_groups, (2,))

    def test_without_any_query(self) -> None:
        with pytest.warns(UserWarning, match="3 of 3 queries"):
            recalls = cross_modal_recall(torch.randn(3, 2), torch.randn(2, 2), torch.ones(3), torch.zeros(2))
        assert all(recall.isnan() for recall in recalls.values())

    def test_nan_shows(self) -> None:
        queries, references = torch.randn(4, 3), torch.randn(4, 3)
        references[2, 1] = torch.nan
        assert cross_modal_recall(queries, references, torch.arange(4), torch.arange(4))[1].isnan()

    def test_errors(self) -> None:
        rows, groups = torch.randn(3, 2), torch.arange(3)
        with pytest.raises(ValueError, match=r"query_groups must have shape \(3,\), one a row, got \(2,\)"):
            cross_modal_recall(rows, rows, groups[1:], groups)
        with pytest.raises(ValueError, match=r"reference_groups must have shape \(3,\), one a row, got \(2,\)"):
            cross_modal_recall(rows, rows, groups, groups[1:])
        with pytest.raises(ValueError, match=r"k must hold depths >= 1, got \[0\]"):
            cross_modal_recall(rows, rows, groups, groups, (0,))
        with pytest.raises(ValueError, match="references must have at least one row"):
            cross_modal_recall(rows, rows[:0], groups, groups[:0])
        with pytest.raises(ValueError, match=r"got \(\(3, 2\), \(3, 4\)\)"):
            cross_modal_recall(rows, torch.randn(3, 4), groups, groups)


class TestNearestNeighbors:
    @pytest.mark.parametrize("block_size", [1, 3, 64])
    def test_among_references(self, block_size: int) -> None:
        queries, references = torch.randn(10, 4), torch.randn(30, 4)
        cosines, indices = nearest_neighbors(queries, references, 5, block_size=block_size)
        expected = F.cosine_similarity(queries[:, None], references[None], dim=2).sort(dim=1, descending=True)
        torch.testing.assert_close(cosines, expected.values[:, :5])
        assert torch.equal(indices, expected.indices[:, :5])

    @pytest.mark.parametrize("block_size", [1, 4, 64])
    def test_among_themselves_without_themselves(self, block_size: int) -> None:
        queries = torch.randn(10, 4).repeat(2, 1)  # each row has a twin, which is as near as the row itself
        cosines, indices = nearest_neighbors(queries, k=19, block_size=block_size)
        assert torch.equal(indices[:, 0], (torch.arange(20) + 10) % 20)
        assert all(sorted([*row, i]) == list(range(20)) for i, row in enumerate(indices.tolist()))
        assert (cosines.diff(dim=1) <= 0).all()

    def test_ties_go_to_the_first(self) -> None:
        references = torch.eye(3)[torch.tensor([0, 1, 1, 2, 1, 1])]
        query = torch.tensor([[0.0, 1, 0]])
        for k in range(1, 7):
            assert nearest_neighbors(query, references, k)[1].tolist() == [[1, 2, 4, 5, 0, 3][:k]]

    def test_zero_vector_is_like_nothing(self) -> None:
        cosines, _ = nearest_neighbors(torch.zeros(1, 3), torch.randn(4, 3), 4)
        assert cosines.tolist() == [[0, 0, 0, 0]]

    def test_memory_is_that_of_a_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from heliostat.components import retrieval

        seen, largest = [], retrieval._largest
        monkeypatch.setattr(retrieval, "_largest", lambda values, k: seen.append(values.shape) or largest(values, k))
        nearest_neighbors(torch.randn(10, 4), torch.randn(30, 4), 2, block_size=4)
        assert seen == [(4, 30), (4, 30), (2, 30)]

    @pytest.mark.parametrize(
        ("arguments", "pattern"),
        [
            ((torch.ones(3),), r"queries must be \(N, d\) .* got \(3,\)"),
            ((torch.ones(3, 2), torch.ones(3, 4)), r"got \(\(3, 2\), \(3, 4\)\)"),
            ((torch.ones(3, 2), None, 3), "k must be from 1 to 2, the number of rows to find, got 3"),
            ((torch.ones(3, 2), torch.ones(4, 2), 0), "k must be from 1 to 4, .* got 0"),
        ],
    )
    def test_errors(self, arguments: tuple, pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern):
            nearest_neighbors(*arguments)

    def test_wrong_block_size(self) -> None:
        with pytest.raises(ValueError, match="block_size must be >= 1, got 0"):
            nearest_neighbors(torch.ones(3, 2), block_size=0)
