"""Beam search on a small language model whose probabilities are written down."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mg3d.models.finetune.beam_search import SearchOptions, beam_search

CPU = torch.device("cpu")


class TableModel:
    """Next-token log-probabilities that depend on the image and the last token."""

    def __init__(self, table_BVV: Tensor, beams: int) -> None:
        self.table = table_BVV.log_softmax(dim=-1)
        self.beams = beams
        self.orders: list[Tensor] = []

    def step(self, ids_NT: Tensor) -> Tensor:
        image = torch.arange(len(ids_NT)) // self.beams
        return self.table[image, ids_NT[:, -1]].clone()

    def reorder(self, rows_N: Tensor) -> None:
        self.orders.append(rows_N)


def search(table: Tensor, **options: object) -> tuple[list[list[int]], list[float]]:
    chosen = SearchOptions(**options)
    found = beam_search(TableModel(table, chosen.beams), len(table), chosen, CPU)
    return found.ids.tolist(), found.scores.tolist()


def words_of(ids: list[int]) -> list[int]:
    return ids[: ids.index(0)] if 0 in ids else ids


def score_of(table: Tensor, image: int, words: list[int], *, end: bool = True) -> float:
    logp = table.log_softmax(dim=-1)[image]
    path = [0, *words, *([0] if end else [])]
    return float(sum(logp[a, b] for a, b in itertools.pairwise(path)))


def random_table(seed: int, images: int = 3, ids: int = 6) -> Tensor:
    return 2.0 * torch.randn(images, ids, ids, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_one_beam_is_greedy(seed: int) -> None:
    table = random_table(seed)
    found, scores = search(table, beams=1, max_words=12)
    for image, (ids, score) in enumerate(zip(found, scores, strict=True)):
        greedy, last = [], 0
        while len(greedy) < 12 and (last := int(table[image, last].argmax())) != 0:
            greedy.append(last)
        assert words_of(ids) == greedy
        assert score == pytest.approx(score_of(table, image, greedy, end=len(greedy) < 12), abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_many_beams_find_the_best_report_of_all(seed: int) -> None:
    table = random_table(seed, ids=4)
    found, scores = search(table, beams=64, max_words=3)
    for image in range(3):
        every = [list(words) for n in range(3) for words in itertools.product((1, 2, 3), repeat=n)]
        ended = [score_of(table, image, words) for words in every]
        cut = [score_of(table, image, list(w), end=False) for w in itertools.product((1, 2, 3), repeat=3)]
        assert scores[image] == pytest.approx(max(ended + cut), abs=1e-4)
        assert len(words_of(found[image])) <= 3


def test_images_do_not_disturb_each_other() -> None:
    table = random_table(7, images=4)
    together = search(table, beams=3, max_words=10)
    for image in range(4):
        ids, scores = search(table[image : image + 1], beams=3, max_words=10)
        assert words_of(ids[0]) == words_of(together[0][image])
        assert scores[0] == pytest.approx(together[1][image], abs=1e-5)


def test_beams_follow_their_own_past() -> None:
    model = TableModel(random_table(3, images=2), 3)
    beam_search(model, 2, SearchOptions(beams=3, max_words=8), CPU)
    assert model.orders
    for rows in model.orders:
        assert rows.tolist() == [row for row in rows.tolist() if 0 <= row < 6]
        assert (rows // 3).tolist() == [0, 0, 0, 1, 1, 1]


def loop_table() -> Tensor:
    """A model that says 1 2 3 1 2 3 ... for ever; 4 and the end are less likely."""
    table = torch.full((1, 5, 5), -6.0)
    for a, b in ((0, 1), (1, 2), (2, 3), (3, 1)):
        table[0, a, b] = 3.0
    table[0, :, 4] = 0.0
    table[0, :, 0] = -1.0
    return table


def trigrams(words: list[int]) -> list[tuple[int, ...]]:
    return list(itertools.pairwise(itertools.pairwise(words)))


@pytest.mark.parametrize("beams", [1, 3])
def test_no_trigram_twice_when_blocking(beams: int) -> None:
    free = words_of(search(loop_table(), beams=beams, max_words=20, min_words=20)[0][0])
    blocked = words_of(search(loop_table(), beams=beams, max_words=20, min_words=20, block_trigrams=True)[0][0])
    assert len(set(trigrams(free))) < len(trigrams(free))
    assert len(set(trigrams(blocked))) == len(trigrams(blocked))
    assert len(blocked) == 20


def test_the_end_is_allowed_when_every_word_is_blocked() -> None:
    table = torch.full((1, 2, 2), -2.0)
    table[0, :, 1] = 2.0
    ids, _ = search(table, beams=1, max_words=10, min_words=10, block_trigrams=True)
    assert words_of(ids[0]) == [1, 1, 1]


def test_length_control() -> None:
    table = torch.zeros(1, 3, 3)
    table[0, :, 0] = 3.0
    assert words_of(search(table, beams=3, max_words=8)[0][0]) == []
    assert len(words_of(search(table, beams=3, max_words=8, min_words=5)[0][0])) == 5
    table[0, :, 0], table[0, :, 1] = -1.0, 3.0
    assert len(words_of(search(table, beams=3, max_words=8)[0][0])) == 8


def test_a_length_penalty_prefers_longer_reports() -> None:
    table = torch.zeros(1, 3, 3)
    table[0, :, 1] = 1.5
    table[0, :, 0] = 1.0
    lengths = [len(words_of(search(table, beams=4, max_words=9, length_penalty=p)[0][0])) for p in (0.0, 1.0)]
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"max_words": 0}, {"min_words": 9, "max_words": 5}])
def test_impossible_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SearchOptions(**wrong)
    with pytest.raises(ValueError, match="length_penalty"):
        SearchOptions(length_penalty=-1.0)
