"""Many trainings in search of good options: Optuna chooses, `train` trains, a folder holds all of it.

sweep.db            Optuna's study (SQLite): every trial, its values and its validation figures
trial-0, trial-1    the run folder of each trial

A sweep that was killed anywhere goes on: its unfinished trial is resumed like any training, and what comes next is a
function of the seed, the trial's number and the trials before it.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from .. import tasks
from ..factory import create
from ..support.extras import require
from ..support.files import to_json, write_text
from ..support.lock import FolderLock
from .config import TrainConfig
from .evaluate import cpu_threads
from .interrupt import Interrupted
from .progress import Silent
from .run import Run
from .start import train
from .step import TrainError
from .vary import Vary, applied

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "none")
WARM_UP_TRIALS = 4  # whole trials before the median of them ends others

STUDY = "sweep.db"


class Pruned(Interrupted):
    """A trial whose validation is worse than the median of those before it."""


@dataclass(frozen=True)
class Plan:
    """What is searched, how, and up to how many trials."""

    config: TrainConfig
    varied: Sequence[Vary]
    trials: int
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0

    def record(self) -> dict[str, Any]:
        """What must be the same for a sweep to go on; the number of trials may grow."""
        options = dataclasses.asdict(self)
        del options["trials"]
        return options


class _Reporter(Silent):
    """Tells Optuna the validation of each epoch, and ends the training where its median rule says so."""

    def __init__(self, trial: Any, known: dict[int, float], metric: str) -> None:
        self.trial, self.known, self.metric = trial, known, metric

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        value = line.get(f"val_{self.metric}")
        if value is None:
            return
        if line["epoch"] not in self.known:  # a resumed trial may do its last epoch again
            self.trial.report(value, line["epoch"])
        if line["epoch"] < epochs and self.trial.should_prune():
            raise Pruned(f"vit: pruned after epoch {line['epoch']}")


class Sweep:
    """A sweep in a folder. `say` gets a line of text for each trial."""

    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        self.optuna = require("optuna", "sweep")
        self.metric = tasks.get(plan.config.task).metric
        if not plan.config.val_fraction:
            raise ValueError("vit: a sweep compares trainings by their validation; --val-fraction must be above 0")
        if plan.sampler == "grid" and (ranges := [one.name for one in plan.varied if one.is_range]):
            raise ValueError(f"vit: a grid needs values, not a range, of {', '.join(ranges)}: {ranges[0]}=A,B,C")

    def run(self, finished: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """Trains until there are as many trials as planned; their rows. `finished` is called after each trial.

        Raises ValueError where the folder holds a sweep of other options, Interrupted after a signal.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self.folder), self._database():
            self.study = self._open()
            for trial in self._unfinished():
                self._train(trial)
                finished()
            grid = self._grid()
            while (number := self._asked()) < min(self.plan.trials, len(grid) if grid else self.plan.trials):
                self.study.sampler = self._sampler(number)
                if grid:
                    self.study.enqueue_trial(grid[number], skip_if_exists=True)
                self._train(self.study.ask())
                finished()
            return self.rows()

    @contextmanager
    def _database(self) -> Iterator[None]:
        """OSError, with the file and the reason, in the place of the classes that SQLAlchemy and Optuna have for it."""
        kinds = (require("sqlalchemy.exc", "sweep").SQLAlchemyError, self.optuna.exceptions.StorageInternalError)
        try:
            yield
        except kinds as error:
            known = error if hasattr(error, "orig") else error.__cause__
            reason = str(getattr(known, "orig", error)).partition("\n")[0]
            raise OSError(errno.EIO, f"{reason}, says SQLite", str(self.folder / STUDY)) from error

    def _open(self) -> Any:
        """The study of the folder, new or as it was left."""
        optuna = self.optuna
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pruner = optuna.pruners.NopPruner()
        if self.plan.pruner == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=WARM_UP_TRIALS, n_warmup_steps=1)
        study = optuna.create_study(
            storage=f"sqlite:///{(self.folder / STUDY).resolve()}",
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
            sampler=self._sampler(0),
            pruner=pruner,
        )
        now = to_json(self.plan.record())
        before = study.user_attrs.get("plan", now)
        if before != now:
            raise ValueError(
                f"vit: {self.folder} holds a sweep of other options; give it the options it had, or another --out. "
                f"It had {before}"
            )
        study.set_user_attr("plan", now)
        return study

    def _sampler(self, number: int) -> Any:
        """That of a trial: its draws depend on no sampler's past, which a killed sweep would have lost."""
        samplers, seed = self.optuna.samplers, self.plan.seed
        seed = (seed * 1_000_003 + number) % 2**32
        return samplers.TPESampler(seed=seed) if self.plan.sampler == "tpe" else samplers.RandomSampler(seed)

    def _grid(self) -> list[dict[str, Any]]:
        """Every combination of the values, in order; nothing where another sampler chooses."""
        if self.plan.sampler != "grid":
            return []
        names = [one.name for one in self.plan.varied]
        return [dict(zip(names, values, strict=True)) for values in product(*(one.choices for one in self.plan.varied))]

    def _asked(self) -> int:
        """How many trials have their values; one that a kill left in the queue has none yet."""
        waiting = self.optuna.trial.TrialState.WAITING
        return sum(trial.state != waiting for trial in self.study.trials)

    def _unfinished(self) -> list[Any]:
        """The trials that a kill or a signal left open."""
        optuna = self.optuna
        return [
            optuna.trial.Trial(self.study, trial._trial_id)
            for trial in self.study.trials
            if trial.state == optuna.trial.TrialState.RUNNING
        ]

    # ---- one trial ----

    def _train(self, trial: Any) -> None:
        """Trains a trial, or what is left of it, and tells Optuna how it ended."""
        plan, states = self.plan, self.optuna.trial.TrialState
        values = {one.name: one.suggest(trial) for one in plan.varied}
        where = self.folder / f"trial-{trial.number}"
        known = dict(self.study.trials[trial.number].intermediate_values)
        state, value = states.FAIL, None
        try:
            config = applied(plan.config, plan.varied, values)
            train(config, where, "auto", _Reporter(trial, known, self.metric))
            state, value = states.COMPLETE, self._note(trial, where)
        except Pruned:
            state = states.PRUNED
            self._note(trial, where)
        except Interrupted:
            raise
        except (ValueError, TrainError, RuntimeError) as error:  # values that do not fit together, or diverge
            trial.set_user_attr("error", str(error).partition("\n")[0].removeprefix("vit: "))
        self.study.tell(trial.number, value, state)
        self._tell(trial.number)

    def _note(self, trial: Any, where: Path) -> float:
        """Keeps the figures of a trial beside it; the validation figure of its kept epoch."""
        from .overview import summary

        row = summary(where)
        size, latency = cost(Run.open(where))
        for name in (f"test_{self.metric}", "val_loss", "best_epoch", "epochs", "seconds"):
            trial.set_user_attr(name, row[name])
        trial.set_user_attr("parameters", size)
        trial.set_user_attr("latency_ms", latency)
        trial.set_user_attr(f"val_{self.metric}", row[f"val_{self.metric}"])
        return float(row[f"val_{self.metric}"])

    def _tell(self, number: int) -> None:
        row = self.rows()[number]
        values = " ".join(f"{one.name}={_short(row[one.name])}" for one in self.plan.varied)
        found = row[self.metric]
        outcome = row["error"] or (f"{self.metric} {100 * found:.2f} %" if found is not None else "no epoch")
        self.say(f"trial {number} {row['state']}: {values}  {outcome}")

    # ---- the table ----

    def rows(self) -> list[dict[str, Any]]:
        """Per trial its values and figures; `metric` is the validation's, by which the trials are compared."""
        names = [one.name for one in self.plan.varied]
        return [
            {
                "trial": trial.number,
                "state": {"fail": "failed"}.get(trial.state.name.lower(), trial.state.name.lower()),
                **{name: trial.params.get(name) for name in names},
                self.metric: trial.user_attrs.get(f"val_{self.metric}"),
                f"test_{self.metric}": trial.user_attrs.get(f"test_{self.metric}"),
                **{key: trial.user_attrs.get(key) for key in ("parameters", "latency_ms", "epochs", "seconds")},
                "run": str(self.folder / f"trial-{trial.number}"),
                "error": trial.user_attrs.get("error"),
            }
            for trial in self.study.trials
        ]

    def best(self) -> dict[str, Any] | None:
        """The row of the whole trial with the best validation; None while there is none."""
        whole = [row for row in self.rows() if row["state"] == "complete"]
        return max(whole, key=lambda row: row[self.metric], default=None)

    def write_csv(self, path: Path) -> None:
        """Replaces the table of all trials."""
        text = io.StringIO()
        rows = self.rows()
        table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(path, text.getvalue())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def cost(run: Run) -> tuple[int, float]:
    """Parameters of a run's kept model, and the median milliseconds of a forward of one image."""
    model = create(weights=run.path, backend=run.config.backend, training=False)
    image = torch.zeros(1, model.preprocess.in_chans, *model.preprocess.img_size, device=model.device)
    times = []
    with cpu_threads(run.config.threads), torch.inference_mode():
        for _ in range(20):
            began = time.perf_counter()
            model(image).cpu()  # waits for a GPU
            times.append(time.perf_counter() - began)
    return sum(p.numel() for p in model.parameters()), round(1000 * statistics.median(times[5:]), 4)
