"""The training loop. accelerate brings devices, several processes and gradient accumulation; the ops are
vit's own.

Every random number is a function of the seed and of the epoch, step or image it is for. So a training that
was interrupted anywhere and resumed gives, bit for bit, what it would have given without the interruption.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import default_device, get
from ..data import Source, kind_of, open_source
from ..data.augment import Affine, Augment, CropFlip
from ..data.folder import describe
from ..data.loader import EpochBatches, Images, loader
from ..factory import create, settle
from ..model.configs import get_config
from ..preprocess import Preprocess
from ..support.extras import require
from ..version import __version__
from ..weights import read
from . import checkpoint
from .checkpoint import Progress
from .config import TrainConfig
from .evaluate import Evaluation, cpu_threads, evaluate
from .optim import Average, learning_rate, make_optimizer
from .progress import Display, Silent
from .run import Run, new_folder, new_path

log = logging.getLogger("vit")

BAD_STEPS = 10  # steps in a row without a finite gradient before the training gives up


class TrainError(RuntimeError):
    """The training cannot go on; the text says why and what is left."""


class Interrupted(Exception):
    """SIGINT or SIGTERM stopped the training after a checkpoint."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training reports."""

    run: Path
    test: Evaluation
    epochs: int
    seconds: float
    backend: str
    best_epoch: int
    is_main: bool  # whether this is the process that speaks for all


def train(
    config: TrainConfig | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    display: Display | None = None,
) -> TrainResult:
    """Trains a model as `config` says into a new run folder, or goes on with the run folder `resume`.

    The kept weights are those of the epoch with the best validation accuracy (of equal ones the smaller
    loss); the test images are looked at once, at the end. Raises ValueError for options and data that do not
    fit, Interrupted after a signal, TrainError when the gradients stop being finite, OSError when a
    checkpoint cannot be written.
    """
    for module in ("accelerate", "yaml", "matplotlib"):  # missing at the end would cost the whole training
        require(module, "train")
    run = Run.open(resume) if resume is not None else None
    config = run.config if run else config or TrainConfig()
    kind = kind_of(config.data)
    if kind != "digits":
        config = dataclasses.replace(config, data=str(Path(config.data).expanduser().resolve()))
    config = config.resolved(kind)
    name = "digits" if kind == "digits" else Path(config.data).name
    if not run:
        new_path(out, name)  # a folder in use is refused before the data are read
    with cpu_threads(config.threads):
        return _Training(config, run, lambda: new_folder(out, name), display or Silent()).fit()


class _Training:
    """One training: what it is made of, and the steps it goes through."""

    def __init__(
        self, config: TrainConfig, resumed: Run | None, new_folder: Callable[[], Path], display: Display
    ) -> None:
        self.config = config
        self.accelerator = accelerator(config)
        self.main = bool(self.accelerator.is_main_process)
        self.display: Display = display if self.main else Silent()
        self.source = self._open_source()
        self.model, info = self._resumed_model(resumed) if resumed else self._create_model()
        self.batches, self.loader = self._make_loader()
        self.steps = len(self.batches) // config.accumulate  # optimizer steps per epoch
        self.average = Average(self.model, config.ema) if config.ema else None
        self.optimizer = make_optimizer(self.model, config.lr or 0.0, config.weight_decay, config.beta2)
        self.progress = Progress()
        if resumed:
            self.run = resumed
            self._restore()
        else:
            self.run = self._create_run(new_folder, info)
        self.prepared, self.prepared_optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.started = time.monotonic() - self.progress.seconds
        self.last_checkpoint = time.monotonic()
        self.signalled = 0.0  # when the first signal came

    # ---- building ----

    def _open_source(self) -> Source:
        config = self.config
        source = open_source(config.data, config.bad_images, config.validate, self.display.line)
        if source.skipped:
            self.display.line(f"skipped {describe(source.skipped, Path(config.data))}")
        return source.divided(config.val_fraction, config.test_fraction, config.split_seed)

    def _create_model(self) -> tuple[Any, dict[str, Any]]:
        """The model, and what is written of it: whatever the options and the weights change of the named one."""
        config = self.config
        torch.manual_seed(config.seed)
        arch = {"num_classes": len(self.source.class_names), "drop_path_rate": config.drop_path} | config.arch
        if arch["num_classes"] != len(self.source.class_names):
            raise ValueError(
                f"vit: --arch num_classes={arch['num_classes']}, but {config.data} has "
                f"{len(self.source.class_names)} classes; leave it out"
            )
        start = None if config.weights is None else read(config.weights)
        model = create(config.model, config.backend, weights=start, device=self.accelerator.device, **arch)
        name, settings = settle(config.model, start, arch)
        named = get_config(name).arch
        info = {
            "name": name,
            "arch": {k: v for k, v in settings.items() if k in arch or k not in named or v != named[k]},
            "class_names": list(self.source.class_names),
            "preprocess": model.preprocess.to_dict(),
        }
        return model, info

    def _resumed_model(self, run: Run) -> tuple[Any, dict[str, Any]]:
        """The model that a run folder describes; _restore loads its weights."""
        info = run.model
        torch.manual_seed(self.config.seed)
        model = create(info["name"], self.config.backend, device=self.accelerator.device, **info["arch"])
        model.preprocess = Preprocess.from_dict(info["preprocess"])
        return model, info

    def _make_loader(self) -> tuple[EpochBatches, Any]:
        config, samples, accelerator = self.config, self.source.splits["train"], self.accelerator
        world = accelerator.num_processes
        size = config.batch_size or 1
        batches = EpochBatches(len(samples), size, config.seed, accelerator.process_index, world)
        if len(batches) < config.accumulate:
            raise ValueError(
                f"vit: {len(samples)} training images do not fill one optimizer step of {size} images x "
                f"{config.accumulate} forward passes x {world} process(es); use a smaller --batch-size"
            )
        images = Images(samples, self.model.preprocess, self._augment(), config.seed)
        return batches, loader(images, batches, config.workers, pin_memory=accelerator.device.type == "cuda")

    def _augment(self) -> Augment | None:
        if self.config.augment == "affine":
            return Affine()
        if self.config.augment == "crop":
            return CropFlip(self.model.preprocess.img_size)
        return None

    def _create_run(self, new_folder: Callable[[], Path], info: dict[str, Any]) -> Run:
        """The main process chooses and makes the folder, the others learn which."""
        names = [""]
        if self.main:
            path = new_folder()
            Run.create(path, self.config, info)
            names = [str(path)]
        if self.accelerator.num_processes > 1:
            require("accelerate.utils", "train").broadcast_object_list(names)
        return Run(Path(names[0]), self.config, info)

    # ---- training ----

    def fit(self) -> TrainResult:
        """Runs what is left of the training and then the test."""
        config = self.config
        splits = self.source.splits
        sizes = ", ".join(f"{len(splits[name]):,} {name}" for name in ("train", "val", "test"))
        self.display.line(f"run {self.run.path}: {config.model} on {self.source.name} ({sizes} images)")
        self.display.line(f"backend {self.backend} on {self.accelerator.device}, {self.steps} steps per epoch")
        done = self.progress.epoch * self.steps + self.progress.step
        self.display.start(done, (config.epochs or 0) * self.steps)
        try:
            with self._signals():
                while self.progress.epoch < (config.epochs or 0):
                    self._epoch()
                self._checkpoint()
        finally:
            self.display.stop()
        return self._finish()

    def _epoch(self) -> None:
        """The rest of an epoch, its validation, and its line in the metrics."""
        config, progress = self.config, self.progress
        began = time.monotonic()
        self.batches.epoch = progress.epoch
        self.batches.start = progress.step * config.accumulate
        first = progress.step
        if first < self.steps:
            passes = iter(self.loader)
            while progress.step < self.steps:
                self._step(passes)
                self._after_step()
        images = (self.steps - first) * config.accumulate * (config.batch_size or 0) * self.accelerator.num_processes
        speed = images / max(time.monotonic() - began, 1e-9)
        result = self._validate()
        self._keep_best(result)
        taken = max(1, self.steps - progress.skipped)
        line = {
            "epoch": progress.epoch + 1,
            "step": (progress.epoch + 1) * self.steps,
            "lr": self._learning_rate(self.steps - 1),
            "train_loss": progress.loss_sum / taken,
            "grad_norm": progress.norm_sum / taken,
            "skipped_steps": progress.skipped,
            "val_loss": result.loss,
            "val_accuracy": result.accuracy,
            "images_per_second": round(speed, 1),
            "seconds": round(time.monotonic() - self.started, 3),
        }
        if self.main:
            progress.metrics_bytes = self.run.log(line, progress.metrics_bytes)
        self.display.epoch(line, config.epochs or 0)
        progress.epoch += 1
        progress.step = progress.skipped = 0
        progress.loss_sum = progress.norm_sum = 0.0
        if self._checkpoint_due():
            self._checkpoint()

    def _step(self, passes: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step from `accumulate` batches; left out when its gradient is not finite."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        step = progress.epoch * self.steps + progress.step
        rank, world = accelerator.process_index, accelerator.num_processes
        torch.manual_seed((config.seed + 1) * 0x9E3779B97F4A7C15 + step * world + rank & 0x7FFF_FFFF_FFFF_FFFF)
        rate = self._learning_rate(progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for _ in range(config.accumulate):
            with accelerator.accumulate(self.prepared):
                images, labels = next(passes)
                loss = self._loss(images.to(accelerator.device, non_blocking=True), labels.to(accelerator.device))
                accelerator.backward(loss)
                total += float(accelerator.reduce(loss.detach(), "mean")) / config.accumulate
        norm = float(accelerator.clip_grad_norm_(self.prepared.parameters(), config.clip or math.inf))
        finite = math.isfinite(norm) and math.isfinite(total)
        if finite:
            self.prepared_optimizer.step()
            progress.loss_sum += total
            progress.norm_sum += norm
            progress.skipped_in_a_row = 0
        else:
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.display.line(f"step {step + 1}: loss {total}, gradient norm {norm}: step left out")
        bad = "" if progress.skipped_in_a_row < BAD_STEPS else self._not_finite()
        self.prepared_optimizer.zero_grad()
        if bad:
            raise TrainError(bad)
        progress.step += 1
        if self.average and finite:
            self.average.update(self.model, step + 1)
        self.display.step(f"loss {total:.4f}")

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            logits = self.prepared(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)

    def _learning_rate(self, step: int) -> float:
        """Of optimizer step `step` of the current epoch."""
        config = self.config
        warmup = round((config.warmup_epochs or 0.0) * self.steps)
        total = (config.epochs or 0) * self.steps
        return learning_rate(self.progress.epoch * self.steps + step, total, warmup, config.lr or 0.0, config.min_lr)

    def _not_finite(self) -> str:
        names = [
            name for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
        ]
        where = (
            f"not finite in the gradient of {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}; "
            if names
            else ""
        )
        return (
            f"vit: {BAD_STEPS} steps in a row without a finite gradient; stopped in epoch "
            f"{self.progress.epoch + 1}. "
            f"{where}try a smaller --lr, a longer --warmup-epochs or --amp no. "
            f"The weights of the best epoch so far are in {self.run.path}"
        )

    # ---- validation and test ----

    @property
    def kept_model(self) -> Any:
        """The model whose weights are validated and kept."""
        return self.average.model if self.average else self.model

    @property
    def backend(self) -> str:
        """The backend, or all of them if ops differ, that the plan names."""
        return "+".join(sorted(set(self.model.plan.values())))

    def _validate(self) -> Evaluation:
        accelerator = self.accelerator
        return evaluate(
            self.kept_model,
            self.source.splits["val"],
            self.config.batch_size or 1,
            self.config.workers,
            accelerator.process_index,
            accelerator.num_processes,
            require("accelerate.utils", "train").gather_object,
            # The question is put to all processes together, and they may have different numbers of batches.
            self._stop_if_asked if accelerator.num_processes == 1 else None,
        )

    def _keep_best(self, result: Evaluation) -> None:
        progress = self.progress
        if (result.accuracy, -result.loss) > (progress.best_accuracy, -progress.best_loss):
            progress.best_accuracy, progress.best_loss = result.accuracy, result.loss
            progress.best_epoch = progress.epoch + 1
            if self.main:
                self.run.save_weights(self.kept_model.state_dict())

    def _finish(self) -> TrainResult:
        """The only look at the test images: by the code and the file that `vit eval` uses."""
        from ..viz import confusion, curves

        self.accelerator.wait_for_everyone()
        progress = self.progress
        test = evaluate(self.run.load(), self.source.splits["test"], self.config.batch_size or 1, self.config.workers)
        seconds = time.monotonic() - self.started
        if self.main:
            final = {
                "final": True,
                "best_epoch": progress.best_epoch,
                "val_accuracy": progress.best_accuracy,
                "val_loss": progress.best_loss,
                "test_accuracy": test.accuracy,
                "test_loss": test.loss,
                "test_images": test.images,
                "backend": self.backend,
                "seconds": round(seconds, 3),
            }
            self.run.log(final, progress.metrics_bytes)
            curves(self.run.read_metrics(), self.run.path / "curves.png")
            confusion(test.labels, test.predictions, self.source.class_names, self.run.path / "confusion.png")
        return TrainResult(
            self.run.path, test, self.config.epochs or 0, seconds, self.backend, progress.best_epoch, self.main
        )

    # ---- interruption ----

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a checkpoint and the end; a second SIGINT does not wait for it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            now = time.monotonic()
            # A launcher passes on what the terminal has already sent: only a later Ctrl-C is a second one.
            if self.signalled and number == signal.SIGINT and now - self.signalled > 1.0:
                raise KeyboardInterrupt
            self.signalled = self.signalled or now

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _after_step(self) -> None:
        self._stop_if_asked()
        if self._checkpoint_due():
            self._checkpoint()

    def _stop_if_asked(self) -> None:
        """Interrupted, after a checkpoint, if any process got a signal."""
        accelerator = self.accelerator
        if accelerator.num_processes > 1:
            if self.signalled:
                accelerator.set_trigger()
            asked = accelerator.check_trigger()
        else:
            asked = bool(self.signalled)
        if asked:
            self._checkpoint()
            accelerator.wait_for_everyone()  # a launcher ends all processes when the first one leaves
            progress = self.progress
            raise Interrupted(
                f"vit: stopped after step {progress.step}/{self.steps} of epoch {progress.epoch + 1}; "
                f"go on with: vit train --resume {self.run.path}"
            )

    def _checkpoint_due(self) -> bool:
        return time.monotonic() - self.last_checkpoint >= self.config.checkpoint_seconds

    def _checkpoint(self) -> None:
        self.progress.seconds = time.monotonic() - self.started
        if self.main:
            checkpoint.save(self.run.checkpoint, self.progress, self.facts, self.model, self.average, self.optimizer)
        self.last_checkpoint = time.monotonic()

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a resumed training must share with the interrupted one, and what it should for equal bits."""
        return {
            "data": self.source.fingerprint(),
            "processes": self.accelerator.num_processes,
            "machine": {
                "backend": self.model.plan,
                "device": str(self.accelerator.device.type),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "vit": __version__,
                "cpu": platform.machine(),
                "isa": get("cpu").info().get("isa"),  # not vit.backends(): that loads every backend
            },
        }

    def _restore(self) -> None:
        self.progress, facts, tensors = checkpoint.load(self.run.checkpoint)
        now = self.facts
        if facts["data"] != now["data"]:
            raise ValueError(
                f"vit: {self.config.data} is not the data {self.run.path} was trained on: images, labels or classes "
                "have changed since; start a new run"
            )
        if facts["processes"] != now["processes"]:
            raise ValueError(
                f"vit: {self.run.path} was trained by {facts['processes']} process(es), not {now['processes']}; "
                "resume it with the same number"
            )
        if self.run.metrics_bytes() < self.progress.metrics_bytes:
            raise ValueError(
                f"vit: {self.run.metrics} is missing or shorter than when {self.run.checkpoint.name} was written; "
                "put it back or start a new run"
            )
        changed = [
            f"{key} {json.dumps(old)} -> {json.dumps(now['machine'].get(key))}"
            for key, old in facts["machine"].items()
            if old != now["machine"].get(key)
        ]
        if changed:
            self.display.line(f"resumed elsewhere, so the last bits may differ: {', '.join(changed)}")
        checkpoint.restore(tensors, self.model, self.average, self.optimizer)


def accelerator(config: TrainConfig) -> Any:
    """accelerate's Accelerator for the device of the configuration's backend."""
    state = require("accelerate.state", "train")
    on_cpu = default_device(config.backend).type == "cpu"
    known = state.PartialState._shared_state
    if known and known["distributed_type"] == state.DistributedType.NO and (known["device"].type == "cpu") != on_cpu:
        # accelerate keeps one device per interpreter; a second training may be for another one.
        state.AcceleratorState._reset_state(reset_partial_state=True)
    return require("accelerate", "train").Accelerator(
        cpu=on_cpu, mixed_precision="no", gradient_accumulation_steps=config.accumulate
    )


__all__ = ["Interrupted", "TrainError", "TrainResult", "train"]
