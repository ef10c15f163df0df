"""One case of the project's list on the emulator."""

from __future__ import annotations

from cuda_emulator import Emulated
from vit.parity import Case, backend_ops, run

from . import Launches


def failure(case: Case, record: Emulated, launches: Launches) -> str:
    """What is wrong with a case; empty when nothing is."""
    launches.fresh()
    try:
        result = run(case, backend_ops(record.name))
    except RuntimeError as error:
        return f"{case.id}\n  {error}\n  " + "\n  ".join(launches.errors)[:2000]
    if kept := record.exported.vit_stub_error():
        return f"{case.id}\n  the error {kept} was left in the runtime"
    return "" if result.ok else result.text or f"{case.id}\n  {result}"
