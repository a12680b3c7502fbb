"""Which cache pages are free. Pure bookkeeping: the tensors belong to the runner.

A page holds PAGE_SIZE tokens of one sequence, in every layer. Shared prefixes and reference counts are left out so far.
"""

from __future__ import annotations

from collections import deque

from porcelet.config import PAGE_SIZE


class PagePool:
    """Hands out page numbers 0..num_pages-1 and takes them back."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def extend(self, pages: list[int], num_tokens: int) -> bool:
        """Grow a sequence's page list to hold `num_tokens`; False, and nothing changed, if too few are free."""
        needed = -(-num_tokens // PAGE_SIZE) - len(pages)
        if needed > len(self._free):
            return False
        pages.extend(self._free.popleft() for _ in range(needed))
        return True

    def release(self, pages: list[int]) -> None:
        """Take a sequence's pages back and empty its list."""
        self._free.extend(pages)
        pages.clear()

    def check_idle(self) -> None:
        """When no sequence is left, every page is free exactly once."""
        assert sorted(self._free) == list(range(self.num_pages)), (
            f"{len(self._free)} of {self.num_pages} pages are free"
        )
