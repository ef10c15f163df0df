"""What a model can be trained for. Each task is one module here with TASK; `get` finds it by the module's name."""

from __future__ import annotations

import importlib
import pkgutil

from .task import Evaluation, Figures, Task

__all__ = ["Evaluation", "Figures", "Task", "get", "names"]


def names() -> list[str]:
    """The tasks there are: the modules of this folder, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "task")


def get(name: str | None) -> Task:
    """The task of that name (None: classification); ValueError names those there are."""
    name = "classification" if name is None else name
    if name not in names():
        raise ValueError(f"vit: unknown task {name!r}; known are {', '.join(names())}")
    task: Task = importlib.import_module(f"{__name__}.{name}").TASK
    return task
