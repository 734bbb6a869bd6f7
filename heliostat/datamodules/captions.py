"""The captions of pictures, several of which may belong to one picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Captions:
    """The captions of every row, packed into three tensors.

    Worker processes share tensors with their parent; of a list of millions of strings each would come to own a copy.

    Args:
        rows: The captions of each row.
    """

    def __init__(self, rows: Iterable[Sequence[str]] = ()) -> None:
        content, ends, firsts = bytearray(), [0], [0]
        for row in rows:
            for text in row:
                content += text.encode()
                ends.append(len(content))
            firsts.append(len(ends) - 1)
        self._content = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        self._ends, self._firsts = torch.tensor(ends), torch.tensor(firsts)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    @property
    def total(self) -> int:
        """Number of captions of all rows together."""
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> list[str]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        first, last = self._firsts[row : row + 2].tolist()
        ends = self._ends[first : last + 1].tolist()
        return [self._content[start:end].numpy().tobytes().decode() for start, end in pairwise(ends)]

    def __iter__(self) -> Iterator[list[str]]:
        return (self[row] for row in range(len(self)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that hold the captions."""
        return {"content": self._content, "ends": self._ends, "firsts": self._firsts}

    @classmethod
    def join(cls, states: Sequence[dict[str, Tensor]]) -> Captions:
        """Make one of several ``state_dict()``, the rows of one after those of the other."""
        joined, empty = cls(), cls().state_dict()
        states = [empty, *states]
        joined._content = torch.cat([state["content"] for state in states])
        joined._ends, joined._firsts = (
            torch.cat([empty[key], *(state[key][1:] + before for state, before in _running(states, key))])
            for key in ("ends", "firsts")
        )
        return joined


def _running(states: Sequence[dict[str, Tensor]], key: str) -> Iterator[tuple[dict[str, Tensor], int]]:
    total = 0
    for state in states:
        yield state, total
        total += int(state[key][-1])


def caption_texts(values: Iterable[Any], where: str) -> list[str]:
    """Return the captions in the values of a row's columns, each once; empty ones and nulls are left out.

    Raises:
        ValueError: A value is neither text nor a list of texts; says ``where`` it stands.
    """
    texts: dict[str, None] = {}
    for value in values:
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f"{where}: a caption must be text or a list of texts, got {value!r:.200}")
            if text.strip():
                # Half of a surrogate pair, which JSON can spell, is no text that could be saved.
                texts[text.strip().encode("utf-8", "replace").decode()] = None
    return list(texts)
