"""Which cache pages are free, whose they are, and what they hold. Pure bookkeeping: the tensors belong to the runner.

A page holds PAGE_SIZE tokens of a sequence, in every layer. A page that is full carries the hash of its tokens and of
all before them, so that a later sequence that begins with the same tokens finds it. Pages are counted by their owners;
a page without any is free, and stays findable until it is taken for something else: the least recently used page
first, of one sequence its tail before its beginning, and pages that nobody could find before all others.

The hash chain is keyed by a secret of the process, and begins with what must not be mixed: tenant, adapter, version of
the weights. So no tenant can find another's pages, nor tell by timing whether they are there.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from porcelet.config import PAGE_SIZE, EngineConfig, ModelConfig, parse_memory
from porcelet.errors import CapacityError
from porcelet.weights.memory import available_memory, total_memory

HASH_BYTES = 16


def count_pages(
    config: EngineConfig,
    model: ModelConfig,
    num_layers: int,
    value_bytes: int,
    promised: int = 0,
    memory: tuple[int, int] | None = None,
) -> int:
    """How many pages the memory given for the cache holds; `num_layers` of the model keep values of so many bytes
    there. `promised` bytes of what is available will be taken by others. `memory` is what is available and what there
    is, by default the machine's own.

    Raises:
        CapacityError: more than the machine has, or less than one page.
    """
    layer_values = model.cache_values_per_token() // model.num_hidden_layers
    page_bytes = PAGE_SIZE * num_layers * layer_values * value_bytes
    num_pages = config.cache_tokens // PAGE_SIZE
    available, total = memory or (available_memory(), total_memory())
    if config.cache_memory:
        amount = parse_memory(config.cache_memory)
        num_pages = int(amount * (available - promised if amount <= 1 else 1) // page_bytes)
    if num_pages < 1:
        raise CapacityError(f"cache_memory {config.cache_memory} is less than one page of {page_bytes} bytes; raise it")
    if num_pages * page_bytes > total:  # taken as pages fill, it would fail late, by a kill
        raise CapacityError(
            f"the cache would take {num_pages * page_bytes / 1e9:.1f} GB, and there are {total / 1e9:.1f} GB in all; "
            "lower cache_tokens or cache_memory"
        )
    return num_pages


class PageHasher:
    """The hash chain of pages, keyed by a secret that dies with the process."""

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def root(self, *context: str) -> bytes:
        """What a chain begins with: pages of different contexts never meet."""
        parts = [text.encode(errors="surrogatepass") for text in context]
        return self._hash(b"".join(len(part).to_bytes(8, "little") + part for part in parts))

    def extend(self, chain: list[bytes], root: bytes, tokens: Sequence[int], num_tokens: int) -> None:
        """Grow `chain`, one hash a page, to all full pages of the first `num_tokens` of `tokens`."""
        for page in range(len(chain), num_tokens // PAGE_SIZE):
            parent = chain[-1] if chain else root
            chain.append(self._hash(parent + array("q", tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]).tobytes()))

    def _hash(self, content: bytes) -> bytes:
        return hashlib.blake2b(content, key=self._key, digest_size=HASH_BYTES).digest()


class PagePool:
    """Hands out page numbers 0..num_pages-1, counts their owners, and takes them back."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._owners = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # the next to be taken first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.num_cached = 0  # free pages that a hash still finds

    @property
    def num_free(self) -> int:
        """Pages without an owner, findable ones included."""
        return len(self._free)

    def extend(self, pages: list[int], num_tokens: int, spare: int = 0) -> bool:
        """Grow a sequence's page list to hold `num_tokens`; False, and nothing changed, if too few are free to leave
        `spare` over."""
        needed = max(-(-num_tokens // PAGE_SIZE) - len(pages), 0)
        if needed + spare > len(self._free):
            return False
        pages.extend(self._take() for _ in range(needed))
        return True

    def find(self, chain: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `chain` that is here."""
        pages = []
        for page_hash in chain:
            page = self._page_of.get(page_hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each of `pages`, free or not."""
        for page in pages:
            self._owners[page] += 1
            if self._owners[page] == 1:
                del self._free[page]
                self.num_cached -= 1  # what is shared and has no owner was found by its hash

    def num_owners(self, page: int) -> int:
        return self._owners[page]

    def copy_on_write(self, pages: list[int], index: int) -> tuple[int, int]:
        """Replace a shared page of a sequence by a free one; (from, to) is what has to be copied."""
        source, pages[index] = pages[index], self._take()
        self._owners[source] -= 1
        return source, pages[index]

    def register(self, page: int, page_hash: bytes) -> None:
        """Make a full page findable. Of two pages with the same content the first stays."""
        if page_hash not in self._page_of and page not in self._hash_of:
            self._page_of[page_hash] = page
            self._hash_of[page] = page_hash

    def release(self, pages: list[int]) -> None:
        """Give a sequence's pages back and empty its list."""
        for page in reversed(pages):  # a beginning serves more sequences than a tail, so the tail goes first
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free[page] = None
                if page in self._hash_of:
                    self.num_cached += 1
                else:
                    self._free.move_to_end(page, last=False)
        pages.clear()

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Asserts that the owners of all pages are exactly the sequences of `tables`, and that the rest is free."""
        owners = [0] * self.num_pages
        for table in tables:
            for page in table:
                owners[page] += 1
        assert owners == self._owners, "pages are counted wrongly"
        assert sorted(self._free) == [page for page, count in enumerate(owners) if not count], "pages are lost"
        assert {page: page_hash for page_hash, page in self._page_of.items()} == self._hash_of, "hashes are lost"
        assert self.num_cached == sum(not owners[page] for page in self._hash_of), "cached pages are counted wrongly"

    def _take(self) -> int:
        page, _ = self._free.popitem(last=False)
        assert not self._owners[page]
        self._owners[page] = 1
        page_hash = self._hash_of.pop(page, None)
        if page_hash is not None:
            del self._page_of[page_hash]
            self.num_cached -= 1
        return page
