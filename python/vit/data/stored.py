"""Images that stay where they are, in an array on the disk, a table or an archive, until one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class Store(Protocol):
    """Pictures by number. Readers in other processes have copies of it, so it keeps no open file position."""

    def picture(self, index: int) -> Image.Image:
        """The decoded, upright image; an error says why there is none, without its name."""

    def name(self, index: int) -> str:
        """What the image is called in error texts."""

    def digest(self) -> bytes:
        """What is other where the images are others: sizes and checksums, or the pixels."""


class Stored(Sequence[Image.Image]):
    """Some pictures of some stores, in an order of their own; a choice of them copies nothing but numbers."""

    def __init__(self, stores: Sequence[Store], store: np.ndarray, place: np.ndarray) -> None:
        self.stores, self.which, self.places = tuple(stores), store, place

    @classmethod
    def of(cls, store: Store, count: int) -> Stored:
        """All `count` pictures of a store."""
        return cls([store], np.zeros(count, np.int64), np.arange(count, dtype=np.int64))

    @classmethod
    def joined(cls, parts: Sequence[Stored]) -> Stored:
        """The pictures of all parts, one after the other."""
        stores = list(dict.fromkeys(store for part in parts for store in part.stores))
        places = [np.array([stores.index(store) for store in part.stores], np.int64)[part.which] for part in parts]
        return cls(stores, np.concatenate(places), np.concatenate([part.places for part in parts]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Image.Image:  # type: ignore[override]
        return self.stores[self.which[place]].picture(int(self.places[place]))

    def take(self, chosen: np.ndarray) -> Stored:
        """Those at the places `chosen`."""
        return Stored(self.stores, self.which[chosen], self.places[chosen])

    def name(self, place: int) -> str:
        """What the picture at a place is called."""
        return self.stores[self.which[place]].name(int(self.places[place]))

    def digest(self) -> bytes:
        """That of the stores and of the choice."""
        return b"".join(store.digest() for store in self.stores) + self.which.tobytes() + self.places.tobytes()


class Rows:
    """uint8 arrays [n, H, W] or [n, H, W, 3], in memory or mapped from a file."""

    def __init__(self, array: np.ndarray, name: str) -> None:
        self.array, self._name = array, name

    def picture(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.array[index]))

    def name(self, index: int) -> str:
        return f"image {index} of {self._name}"

    def digest(self) -> bytes:
        import hashlib

        found = hashlib.sha256()
        for start in range(0, len(self.array), 1024):  # a mapped array is larger than memory may be
            found.update(np.ascontiguousarray(self.array[start : start + 1024]).tobytes())
        return found.digest()
