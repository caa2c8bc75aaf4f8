"""How far the images are that sandboxes wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MOST = 100  # images that are told of
_LONGEST = 200  # characters


class Fetching:
    """The last words on each, by the image's name, for as long as a sandbox waits for it."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}
        self._waiting: Counter[str] = Counter()

    @contextmanager
    def of(self, image: str) -> Iterator[Callable[[str], None]]:
        """Somebody waits for it: what is to be called with words on the progress, from any thread."""

        def tell(words: str) -> None:
            if self._waiting[image]:
                self._words[image] = words[:_LONGEST]

        self._waiting[image] += 1
        try:
            yield tell
        finally:
            self._waiting[image] -= 1
            if not self._waiting[image]:
                del self._waiting[image]
                self._words.pop(image, None)

    def words(self) -> dict[str, str]:
        """By image; of some, where there are very many."""
        return dict(list(self._words.items())[:_MOST])
