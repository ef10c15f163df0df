"""From samples to batches. Every random choice is a function of (seed, epoch, image), never of a generator's
history.

So an epoch can be entered at any batch, by any number of workers, and gives the same numbers: nothing to
save.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..preprocess import Preprocess
from ..support.random import Stream
from .augment import Augment, generator
from .samples import ReaderError, Samples

Key = tuple[int, int]  # epoch, index of the image


class Images(Dataset[tuple[Tensor, int]]):
    """(epoch, index) -> (image [C, H, W] float32, class index).

    Without `augment` the image is `preprocess(image)`, whatever the epoch: exactly what evaluation and
    prediction use. With it, the augmentation stands between the colour mode and size on one side and the
    normalisation on the other.
    """

    def __init__(self, samples: Samples, preprocess: Preprocess, augment: Augment | None = None, seed: int = 0) -> None:
        self.samples = samples
        self.preprocess = preprocess
        self.augment = augment
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        image = self.samples.image(index)
        label = int(self.samples.labels[index])
        if self.augment is None:
            return self.preprocess(image), label
        image = self.preprocess.convert(image)
        if not self.augment.resizes:
            image = self.preprocess.resize(image)
        image = self.augment(image, generator(self.seed, epoch, index))
        return self.preprocess.normalize(image), label


class EpochBatches:
    """The training batches of one process: lists of (epoch, index), each epoch in its own order, remainders
    dropped.

    Set `epoch` and `start` (batches to leave out) before iterating. Ranks take turns at the images, so that
    together they see what one process with `world` times the batch size would.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.count // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[Key]]:
        order = Stream("order", self.seed, self.epoch).permutation(self.count)
        stride = self.batch_size * self.world
        for batch in range(self.start, len(self)):
            indices = order[batch * stride + self.rank : (batch + 1) * stride : self.world]
            yield [(self.epoch, int(i)) for i in indices]


class InOrder:
    """The evaluation batches of one process: every image once, in order; rank r of w takes images r, r + w,
    ..."""

    def __init__(self, count: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, count, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, i) for i in self.indices[start : start + self.batch_size]]


#: Seconds without a batch after which a reader counts as stuck: far above a slow disk, below a night.
READER_TIMEOUT = 300.0

_ADVICE = "Use fewer --workers (0 reads in the main process)"


def loader(
    images: Images,
    batches: EpochBatches | InOrder,
    workers: int,
    pin_memory: bool = False,
    timeout: float = READER_TIMEOUT,
) -> DataLoader[Any]:
    """A DataLoader over those batches: (images [B, C, H, W] float32, labels [B] int64).

    Iterating raises ReaderError when one of the `workers` processes dies, or none gives a batch for `timeout` seconds.
    """
    found = _Loader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=_leave_signals,
    )
    found.patience = timeout
    return found


def reader_error(error: BaseException) -> ReaderError | None:
    """The ReaderError for what PyTorch raises, wherever the main process then is, when a reader dies; else None."""
    text = str(error)
    if isinstance(error, ReaderError):
        return error
    if not isinstance(error, (RuntimeError, OSError, EOFError)) or isinstance(error, torch.cuda.OutOfMemoryError):
        return None
    if isinstance(error, RuntimeError) and "DataLoader" not in text:
        return None
    if killed := re.search(r"killed by signal: ([^.]*)", text):
        why = f"a reader process was killed by a signal ({killed[1].strip()})"
        why += "; the system does that when memory runs out" if "Killed" in killed[1] else ""
    else:
        why = "a reader process ended unexpectedly"
    return ReaderError(f"vit: {why}. {_ADVICE}")


class _Loader(DataLoader[Any]):
    """A DataLoader whose dead or stopped workers are a ReaderError, and which leaves none of them behind then."""

    patience = READER_TIMEOUT

    def __iter__(self) -> Any:
        batches = super().__iter__()
        workers = getattr(batches, "_workers", ())
        while True:
            # Not DataLoader's own timeout: it does not hold while a batch is fetched from a process that has stopped.
            stuck = threading.Event()
            timer = threading.Timer(self.patience, _end_stuck, (workers, stuck))
            timer.daemon = True
            if workers:
                timer.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                if not workers or (failure := reader_error(error)) is None:
                    raise
                if stuck.is_set():
                    failure = ReaderError(f"vit: no reader process gave a batch within {self.patience:g} s. {_ADVICE}")
                _kill(workers)
                self._iterator = None  # the next epoch, if there is one, starts new processes
                raise failure from error
            finally:
                timer.cancel()
            yield batch


def _end_stuck(workers: Iterable[Any], stuck: threading.Event) -> None:
    stuck.set()
    for worker in workers:
        worker.kill()


def _kill(workers: Iterable[Any]) -> None:
    """Ends processes that may not answer: one that is stopped takes no SIGTERM, and Python's exit would wait for it."""
    for worker in workers:
        while worker.is_alive():
            try:
                worker.kill()
                worker.join()
            except RuntimeError:  # PyTorch's handler of SIGCHLD raises, here, that a worker was killed
                continue


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach all processes of a terminal or a service; the main one decides, and its workers end when
    it says so. One that ends by itself would be an error that PyTorch raises wherever the main process then is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of every thread of this process, for they inherit it
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    """Only a signal handler in C or this wait learns who has sent a signal."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
