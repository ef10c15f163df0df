"""The training loop. accelerate brings devices, several processes and gradient accumulation; the ops are
vit's own.

Every random number is a function of the seed and of the epoch, step or image it is for. So a training that
was interrupted anywhere and resumed gives, bit for bit, what it would have given without the interruption.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from contextlib import ExitStack, closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import tasks
from ..data import ReaderError
from ..support.extras import require
from ..support.files import said
from ..support.stop import deferred, when_stopped
from . import resume as resuming
from . import state
from .assembly import Parts, assemble
from .config import TrainConfig
from .environment import accelerator, without_options
from .evaluate import evaluate
from .interrupt import Interrupted, Signals
from .kept import keep_best
from .progress import Display, Silent
from .record import RunRecord
from .report import TrainResult, announce, draw_final, epoch_line, within_line, write_final
from .run import Run, new_folder, new_path, way_out
from .sharded import is_lost_process
from .state import Progress
from .step import Stepper, TrainError
from .trackers import Tracker

log = logging.getLogger("vit")

CHECKPOINT_SHARE = 0.05  # of the time that checkpoints may take: one of ViT-B (1.39 GB) took 5.7 s on two Zen 5 cores


class Training:
    """One training: the steps it goes through, and what is written of them."""

    def __init__(
        self, config: TrainConfig, resumed: Run | None, out: str | Path | None, name: str, display: Display
    ) -> None:
        self.held = ExitStack()  # the lock of the run folder, and the processes that read images
        self.signals = Signals()
        warnings: list[str] = []
        self.accelerator = accelerator(config, warnings.append)
        if self.accelerator.num_processes > 1:
            self.signals.launcher = os.getppid()
        self.main = bool(self.accelerator.is_main_process)
        self.display: Display = display if self.main else Silent()
        for text in warnings:
            self.display.line(text)
        self.task = tasks.get(config.task)
        try:
            self._build(config, resumed, out, name)
        except BaseException:
            self.held.close()
            raise

    def _build(self, config: TrainConfig, resumed: Run | None, out: str | Path | None, name: str) -> None:
        if resumed and self.main:
            self.held.enter_context(resumed.lock())
            self.held.enter_context(when_stopped(partial(way_out, resumed)))
        fresh = resumed is not None and resumed.is_unstarted()
        described = resumed.model if resumed and not fresh else None
        self.parts: Parts = assemble(config, described, self.accelerator, self.display.line)
        self.held.callback(self.parts.loader.close)
        self.config = self.parts.config
        if isinstance(self.config.threads, int) and self.config.threads:
            torch.set_num_threads(self.config.threads)
        self.steps = self.parts.steps
        self.progress = Progress(monitor_sums=[0.0] * len(self.task.monitored))
        if resumed:
            self.run = self._resume(resumed, fresh)
        else:
            self.run = self._create_run(out, name)
        with without_options():
            self.stepper = Stepper(self.parts, self.progress, self.task, self.accelerator, self.display, self.run.path)
        self.tracker = Tracker(self.config.logger if self.main else "none", self.run, self.done, self.display.line)
        self.held.callback(self.tracker.close)
        self.started = time.monotonic() - self.progress.seconds
        self.last_checkpoint = time.monotonic()
        self.checkpoint_cost = 0.0  # seconds that the last one took
        self.checkpoints = 0  # of this session

    def _create_run(self, out: str | Path | None, name: str) -> Run:
        """The main process chooses and makes the folder, the others learn which."""
        names = [""]
        if self.main:
            path = new_folder(out, name)
            self.held.enter_context(Run(path, self.config, self.parts.info).lock())
            new_path(out, name) if out is not None else None  # of two that start at once, the second finds files
            with deferred():  # a folder with some of its files is no run
                run = Run.create(path, self.config, self.parts.info)
                self.held.enter_context(when_stopped(partial(way_out, run)))
            names = [str(path)]
        if self.accelerator.num_processes > 1:
            require("accelerate.utils", "train").broadcast_object_list(names)
        return Run(Path(names[0]), self.config, self.parts.info)

    def _resume(self, run: Run, fresh: bool) -> Run:
        """The run folder, with the state of its checkpoint put into model and optimizer."""
        parts = self.parts
        if not fresh:
            progress, saved, tensors = state.load(run.checkpoint)
            resuming.check(run, self.config, progress, self.steps, saved, self.facts)
            if len(progress.monitor_sums) != len(self.task.monitored):
                raise ValueError(
                    f"vit: {run.checkpoint} is damaged: monitor_sums has {len(progress.monitor_sums)} entries"
                )
            resuming.report_machine(saved, self.facts, self.display.line)
            state.restore(run.checkpoint, tensors, parts.model, parts.average, parts.optimizer)
            self.progress = progress
        resuming.report_changes(run, self.config, self.display.line)
        if self.main and (fresh or run.config != self.config):
            return Run.create(run.path, self.config, parts.info) if fresh else run.with_config(self.config)
        return dataclasses.replace(run, config=self.config)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """See vit.training.resume."""
        return resuming.facts(self.config, self.parts.source.fingerprint(), self.parts, self.accelerator)

    @property
    def done(self) -> int:
        """Optimizer steps done."""
        return self.progress.epoch * self.steps + self.progress.step

    @property
    def images(self) -> int:
        """Images of an optimizer step, of all processes."""
        return self.config.accumulate * (self.config.batch_size or 0) * int(self.accelerator.num_processes)

    # ---- from the first step to the test ----

    def run_all(self) -> TrainResult:
        """What is left of the training, the test, and the notes of how it ended."""
        with self.held:
            record = RunRecord(self.run, self.parts.model.plan, self.done) if self.main else None
            outcome = "failed"
            try:
                result = self._fit()
                outcome = "finished"
            except BaseException as error:
                outcome = f"{type(error).__name__}: {error}".splitlines()[0]
                raise
            finally:
                if record:
                    try:
                        record.end(outcome, self.done)
                    except OSError as error:
                        if outcome == "finished":  # else the disk is full, and the error above says so
                            log.warning("run.json does not say how the training ended: %s", error)
            return result

    def _fit(self) -> TrainResult:
        epochs = self.config.epochs or 0
        announce(self.run, self.parts, self.accelerator.device, self.display.line)
        self.display.start(self.done, epochs * self.steps, self.images, self.config.log_seconds)
        with self.signals:
            try:
                while self.progress.epoch < epochs and not self._is_patience_over():
                    self._epoch()
                self._stop_if_asked()  # during the last validation
                self._checkpoint()
                self.display.stop()
                return self._finish()
            except Exception as error:
                self._stop_for(error)
            finally:
                self.display.stop()

    def _is_patience_over(self) -> bool:
        """Whether --patience epochs have passed since the best one."""
        progress, patience = self.progress, self.config.patience
        over = bool(patience and progress.epoch - progress.best_epoch >= patience)
        if over:
            self.display.line(f"ends after epoch {progress.epoch}: none of the last {patience} was better")
        return over

    def _stop_for(self, error: Exception) -> NoReturn:
        """Leaves a checkpoint of the last whole step, and raises the error in words that say how to go on."""
        if isinstance(error, Interrupted):
            raise error
        if self.main and self.stepper.consistent and not self.parts.sharded:  # whose parts others have
            try:
                self._checkpoint()
            except OSError as second:
                if not isinstance(error, OSError):  # a full disk has been named already
                    self.display.line(f"no checkpoint of the last steps: {second}")
        tail = f"; {words}" if (words := way_out(self.run)) else ""
        if isinstance(error, ReaderError):
            time.sleep(0.05)  # a signal to the whole process group comes to the readers and to this process
            if self.signals.stop_requested:
                raise self._interrupted() from error
            raise TrainError(f"{error}{tail}") from error
        if self.accelerator.num_processes > 1 and is_lost_process(error):
            raise TrainError(f"vit: another process of this training has ended or does not answer{tail}") from error
        if isinstance(error, OSError):
            raise OSError(f"{said(error)}{tail}") from error
        if tail and not isinstance(error, TrainError):
            self.display.line(f"stopped by an error{tail}")
        raise error

    # ---- epochs and steps ----

    def _epoch(self) -> None:
        """The rest of an epoch, its validation, and its line in the metrics."""
        config, progress, parts = self.config, self.progress, self.parts
        self.stepper.phases.clear()
        parts.batches.epoch = progress.epoch
        parts.batches.start = progress.step * config.accumulate
        if progress.step < self.steps:
            with closing(iter(parts.loader)) as passes:
                while True:
                    self._validate_within()
                    if progress.step == self.steps:
                        break
                    self.stepper.step(passes)
                    self._after_step()
        phases = self.stepper.phases
        speed = phases.steps * self.images / max(phases.total(), 1e-9)
        parts.gather()
        figures = self._validate()
        better = self._is_better(figures)
        self._keep(better)
        line = epoch_line(config, self.task, progress, self.steps, self.stepper.learning_rate(self.steps - 1), figures)
        line |= {"images_per_second": round(speed, 1), "step_ms": phases.per_step()}
        line["seconds"] = round(time.monotonic() - self.started, 3)
        written = self._log(line) if self.main else 0
        self.stepper.consistent = False
        if better:
            progress.best, progress.best_epoch, progress.best_step = figures, progress.epoch + 1, self.done
        progress.metrics_bytes = written
        progress.epoch += 1
        progress.step = progress.skipped = 0
        progress.loss_sum = progress.norm_sum = 0.0
        progress.monitor_sums = [0.0] * len(progress.monitor_sums)
        self.stepper.consistent = True
        self.display.epoch(line, config.epochs or 0)
        self.tracker.line(line)
        if self._checkpoint_due():
            self._checkpoint()

    # ---- validation and test ----

    def _is_better(self, figures: dict[str, float]) -> bool:
        """Whether weights with these validation figures are the ones to keep."""
        progress = self.progress
        return not progress.best_epoch or not figures or self.task.better(figures, progress.best)

    def _validate_within(self) -> None:
        """The validation of --val-steps, if it is due: its line, and its weights if they are the best."""
        progress, every = self.progress, self.config.val_steps
        within = every and 0 < progress.step < self.steps and progress.step % every == 0
        if not within or progress.validated == self.done or not len(self.parts.source.splits["val"]):
            return
        self.parts.gather()
        figures = self._validate()
        better = self._is_better(figures)
        if better and self.main:
            self.run.save_weights(self.parts.kept_model.state_dict())
        line = within_line(progress, self.steps, self.stepper.learning_rate(progress.step - 1), figures)
        written = self.run.log(line, progress.metrics_bytes) if self.main else 0
        self.stepper.consistent = False
        if better:
            progress.best, progress.best_epoch, progress.best_step = figures, progress.epoch + 1, self.done
        progress.metrics_bytes, progress.validated = written, self.done
        self.stepper.consistent = True
        found = self.task.describe(figures, len(self.parts.source.splits["val"]))
        self.display.line(f"step {self.done:,} (epoch {line['at']:.2f}): {found}")
        self.tracker.line(line)

    def _validate(self) -> dict[str, float]:
        """The figures of the validation images; none without such images."""
        accelerator, samples = self.accelerator, self.parts.source.splits["val"]
        if not len(samples):
            return {}
        result = evaluate(
            self.parts.kept_model,
            samples,
            self.config.batch_size or 1,
            self.config.workers,
            accelerator.process_index,
            accelerator.num_processes,
            require("accelerate.utils", "train").gather_object,
            # The question is put to all processes together, and they may have different numbers of batches.
            self._stop_if_asked if accelerator.num_processes == 1 else None,
            self.task,
        )
        return self.task.figures(result)

    def _keep(self, better: bool) -> None:
        if self.main:
            weights = self.parts.kept_model.state_dict()
            self.run.save_weights(weights, self.run.last_weights)
            if better:
                self.run.save_weights(weights)

    def _finish(self) -> TrainResult:
        """The only look at the test images: by the code and the file that `vit eval` uses."""
        self.accelerator.wait_for_everyone()
        config, progress, samples = self.config, self.progress, self.parts.source.splits["test"]
        test = model = None
        if len(samples):
            model, leave = self.run.load(), self._leave_if_asked
            test = evaluate(model, samples, config.batch_size or 1, config.workers, advance=leave, task=self.task)
        seconds = time.monotonic() - self.started
        if self.main:
            write_final(self.run, self.parts, self.task, progress, test, seconds, self.display.line)
            draw_final(self.run, self.parts, self.task, test, model, self._leave_if_asked)
            self.tracker.line(self.run.read_metrics()[-1] | {"step": self.done})
        return TrainResult(
            self.run.path, test, progress.epoch, seconds, self.parts.backend, progress.best_epoch, self.main
        )

    def _log(self, line: dict[str, Any]) -> int:
        """Writes the line of an epoch, and keeps its weights if it is one of the best; the length of the metrics."""
        written = self.run.log(line, self.progress.metrics_bytes)
        if self.config.keep != 1:
            keep_best(self.run, self.task, self.parts.kept_model.state_dict(), self.config.keep, written)
        return written

    # ---- checkpoints and interruption ----

    def _after_step(self) -> None:
        self.tracker.step(self.done, self.stepper.loss, self.stepper.learning_rate(self.progress.step - 1))
        self._stop_if_asked()
        if self._checkpoint_due():
            self._checkpoint()

    def _stop_if_asked(self) -> None:
        """Interrupted, after a checkpoint, if any process got a signal."""
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            if self.signals.stop_requested:
                accelerator.set_trigger()
            stop = accelerator.check_trigger()
        else:
            stop = self.signals.stop_requested
        if stop:
            self._checkpoint()
            self.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one leaves
            raise self._interrupted()

    def _leave_if_asked(self) -> None:
        """Interrupted, if this process got a signal; what follows the last epoch is done again as a whole."""
        if self.signals.stop_requested:
            raise self._interrupted()

    def _interrupted(self) -> Interrupted:
        progress = self.progress
        step = f"step {progress.step}/{self.steps} of epoch {progress.epoch + 1}"
        where = step if progress.epoch < (self.config.epochs or 0) else "the last epoch"
        return Interrupted(f"vit: stopped after {where}; {way_out(self.run)}", self.signals.number)

    def _checkpoint_due(self) -> bool:
        """After the first step, and when the interval is over; it is longer where a checkpoint takes long."""
        wanted = self.config.checkpoint_seconds
        interval = max(wanted, self.checkpoint_cost / CHECKPOINT_SHARE) if wanted else 0.0
        due = [not self.checkpoints or time.monotonic() - self.last_checkpoint >= interval]
        if self.parts.sharded:  # all processes make it together, when the first one says so
            require("accelerate.utils", "train").broadcast_object_list(due)
        return due[0]

    def _checkpoint(self) -> None:
        began = time.monotonic()
        self.progress.seconds = began - self.started
        parts = self.parts
        if self.main or parts.sharded:
            tensors = state.collect(parts.model, parts.average, parts.optimizer)
            if self.main:
                state.save(self.run.checkpoint, self.progress, self.facts, tensors)
        self.checkpoints += 1
        self.last_checkpoint = time.monotonic()
        self.checkpoint_cost = self.last_checkpoint - began
