"""Memory for large results on the CPU that keeps its pages from one call to the next.

malloc gives a large block back to the system when it is freed; the next one is mapped anew, and each of its pages is
faulted in and zeroed when a kernel first writes it: 80 000 to 150 000 faults in a training step of ViT-S/16 at batch
16, a tenth of its time. Here a freed block keeps its pages, and the next block of that size or less gets them. New
pages are huge ones where the system has them (2 MB at once take a sixth of the time).

Live blocks and free pages together are never more than the live blocks once were: before a block takes pages from the
system, as many free ones go back. A region that is found without live blocks is left to the system, should memory
become scarce.

A block of a size that was freed before, as every one of a second training step, is found by that size alone. Between
two kernels all of this runs on cold caches, ten times slower than in a loop.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

#: Smaller results are malloc's, which does not give their pages back.
LEAST_BYTES = 1 << 20

#: What is reserved at a time; addresses cost nothing until they are written.
REGION_BYTES = 64 << 20

_LINUX = sys.platform == "linux"
_NO_RESERVE = 0x4000  # MAP_NORESERVE; the mmap module names it from Python 3.13 on


class _Region:
    """Reserved addresses. `free`: start of each free extent -> (end, whether its pages are there)."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        self.advise(mmap.MADV_HUGEPAGE, 0, nbytes)
        self.view = memoryview(self.memory)
        self.free: dict[int, tuple[int, bool]] = {0: (nbytes, False)}

    def advise(self, what: int, start: int, nbytes: int) -> None:
        """A kernel without huge pages or lazy freeing refuses; nothing depends on it."""
        with contextlib.suppress(OSError):
            self.memory.madvise(what, start, nbytes)

    def take(self, start: int, nbytes: int) -> memoryview:
        """The first bytes of a free extent."""
        end, pages = self.free.pop(start)
        if end > start + nbytes:
            self.free[start + nbytes] = end, pages
        return self.view[start : start + nbytes]

    def give(self, start: int, end: int, pages: bool) -> None:
        """A free extent, joined with its neighbours of the same kind."""
        for other, (stop, kind) in list(self.free.items()):
            if kind == pages and (stop == start or other == end):
                del self.free[other]
                start, end = min(start, other), max(end, stop)
        self.free[start] = end, pages


class _Lease(weakref.ref):
    """A block in use: told when it dies (weakref.finalize takes three times as long)."""

    __slots__ = ("end", "region", "start")
    region: _Region
    start: int
    end: int


class HostMemory:
    """Where large results of the CPU's kernels live; any thread may ask."""

    def __init__(self) -> None:
        self.regions: list[_Region] = []
        self.lock = threading.Lock()
        self.leases: dict[int, _Lease] = {}  # by id: a reference hashes what it refers to
        self.returned: deque[_Lease] = deque()  # filled whenever a tensor dies, on any thread
        self.ready: dict[int, list[tuple[_Region, int]]] = {}  # size -> blocks that have died, not yet free extents

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of any content."""
        count = math.prod(shape)
        nbytes = count * dtype.itemsize
        # In a forked child the lock may be held by a thread that is not there.
        if nbytes < LEAST_BYTES or not _LINUX or not self.lock.acquire(blocking=False):
            return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch.set_default_device says
        try:
            block = self._take(-(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        finally:
            self.lock.release()
        # Not view(): autograd refuses to write into views that were made inside a Function.
        return torch.frombuffer(block, dtype=dtype, count=count).resize_(shape)

    def free_bytes(self) -> int:
        """Bytes of the pages that are kept for blocks to come."""
        with self.lock:
            self._collect()
            return sum(size for size, _, _ in self._extents(pages=True))

    def release(self) -> None:
        """Gives all free pages back to the system."""
        with self.lock:
            self._collect()
            self._drop(sys.maxsize)

    def _take(self, nbytes: int) -> memoryview:
        self._sort()
        if same := self.ready.get(nbytes):
            region, start = same.pop()
            block = region.view[start : start + nbytes]
        else:
            self._collect()
            region, start = self._find(nbytes, pages=True) or self._fresh(nbytes)
            block = region.take(start, nbytes)
        # The tensor keeps the block; when the block dies, its bytes are free.
        lease = _Lease(block, self._died)
        lease.region, lease.start, lease.end = region, start, start + nbytes
        self.leases[id(lease)] = lease
        return block

    def _died(self, lease: _Lease) -> None:
        del self.leases[id(lease)]
        self.returned.append(lease)

    def _sort(self) -> None:
        """The blocks that have died, by their size."""
        while self.returned:
            lease = self.returned.popleft()
            self.ready.setdefault(lease.end - lease.start, []).append((lease.region, lease.start))

    def _collect(self) -> None:
        """Takes back the blocks that have died."""
        self._sort()
        for nbytes, blocks in self.ready.items():
            for region, start in blocks:
                region.give(start, start + nbytes, True)
                # A part of a region would split its huge pages.
                if sum(end - start for start, (end, _) in region.free.items()) == region.nbytes:
                    region.advise(mmap.MADV_FREE, 0, region.nbytes)
        self.ready.clear()

    def _extents(self, pages: bool) -> list[tuple[int, _Region, int]]:
        """(size, region, start) of the free extents with or without pages."""
        return [(e - s, region, s) for region in self.regions for s, (e, kind) in region.free.items() if kind == pages]

    def _find(self, nbytes: int, pages: bool) -> tuple[_Region, int] | None:
        """The smallest free extent that is large enough."""
        fitting = [extent for extent in self._extents(pages) if extent[0] >= nbytes]
        return min(fitting, key=lambda extent: extent[0])[1:] if fitting else None

    def _fresh(self, nbytes: int) -> tuple[_Region, int]:
        """A free extent without pages, for which as many pages as it will get are given up."""
        self._drop(nbytes)
        found = self._find(nbytes, pages=False)
        if found is None:
            self.regions.append(_Region(max(REGION_BYTES, nbytes)))
            found = self.regions[-1], 0
        return found

    def _drop(self, nbytes: int) -> None:
        """Gives free pages back to the system, small extents first, until it is so many bytes."""
        for size, region, start in sorted(self._extents(pages=True), key=lambda extent: extent[0]):
            if nbytes <= 0:
                return
            del region.free[start]
            region.memory.madvise(mmap.MADV_DONTNEED, start, size)
            region.give(start, start + size, False)
            nbytes -= size


#: The one of this process: what one backend frees, another may use.
MEMORY = HostMemory()
