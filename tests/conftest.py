"""What every test file may use: fixed seeds, and the native backends this machine can run."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# Before torch brings OpenMP: the tests are a hundred thousand small ops, and on a machine that does anything else the
# threads that spin between them hold up the one that works. 1418 parity cases took 58 s, and 16 s so.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell's job in the background ignores Ctrl-C, and so would the commands that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import draw
import pytest
import torch
from vit.backends import NativeBackend, records
from vit.backends._host import HostBackend

NATIVE = {name: record for name, record in records().items() if isinstance(record, NativeBackend)}
USABLE = [name for name, record in NATIVE.items() if record.unavailable() is None]


#: The marker of a backend's tests, where it has one.
MARKERS = {"cuda": "gpu", "sycl": "sycl", "mojo": "mojo"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that runs over the backends bears the marker of the one that it is about."""
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        for value in parameters.values():
            if isinstance(value, str) and value in MARKERS:
                item.add_marker(MARKERS[value])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend` runs over every native backend, `host` over those on the threads of the process; one that cannot run
    here is a skip with its own reason."""
    for fixture, kind in (("backend", NativeBackend), ("host", HostBackend)):
        names = [
            pytest.param(name, id=name, marks=[] if why is None else [pytest.mark.skip(reason=why)])
            for name, record in NATIVE.items()
            if isinstance(record, kind)
            for why in (record.unavailable(),)
        ]
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the backend of a test has its tensors."""
    return NATIVE[backend].default_device()


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from one seed and leaves the number of threads as it was."""
    draw.restart()
    torch.manual_seed(0)  # whose generator gives a new model its key
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
