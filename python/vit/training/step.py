"""One optimizer step: batches in, loss and gradients, clipping, the update of weights and average, the counters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..support.random import Stream
from ..tasks import Task
from .assembly import Parts
from .evaluate import cpu_threads
from .mix import mixed
from .optim import learning_rate as schedule
from .phases import Phases
from .progress import Display
from .scale import LossScale
from .sharded import shard, whole
from .state import Progress
from .teacher import distillation_loss

BAD_STEPS = 10  # steps in a row without a finite gradient before the training gives up


class TrainError(RuntimeError):
    """The training cannot go on; the text says why and what is left."""


class Stepper:
    """The arithmetic of a training's steps, on model, optimizer, average and progress.

    `consistent` says whether these four are of the same step: only then may a checkpoint be made of them.
    """

    def __init__(
        self, parts: Parts, progress: Progress, task: Task, accelerator: Any, display: Display, where: Path
    ) -> None:
        self.parts, self.progress, self.task = parts, progress, task
        self.config, self.steps = parts.config, parts.steps
        self.accelerator, self.display, self.where = accelerator, display, where
        if parts.sharded:
            shard(parts.model, parts.optimizer)
            self.prepared, self.prepared_optimizer = parts.model, accelerator.prepare(parts.optimizer)
        else:
            self.prepared, self.prepared_optimizer = accelerator.prepare(parts.model, parts.optimizer)
        self.phases = Phases(accelerator.device)
        self.loss = 0.0  # of the last step
        self.scale = LossScale(progress, self.config.amp == "fp16")
        self.consistent = True

    def step(self, passes: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step from `accumulate` batches; left out when its gradient is not finite."""
        config, progress, accelerator = self.config, self.progress, self.accelerator
        step = progress.epoch * self.steps + progress.step
        rank, world = accelerator.process_index, accelerator.num_processes
        self.phases.begin()
        batch = next(passes)  # before the seed: the first one starts a loader, which draws a number of PyTorch's
        self.phases.mark("data")
        torch.manual_seed((config.seed + 1) * 0x9E3779B97F4A7C15 + step * world + rank & 0x7FFF_FFFF_FFFF_FFFF)
        rate = self.learning_rate(progress.step)
        for group in self.parts.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        total, monitored = 0.0, [0.0] * len(self.task.monitored)
        for number in range(config.accumulate):
            with accelerator.accumulate(self.prepared):
                rng = Stream("mix", config.seed, step, number, rank)
                if number:
                    batch = next(passes)
                    self.phases.mark("data")
                figures = self._forward_backward(*batch, rng)
                total += figures[0] / config.accumulate
                monitored = [a + b / config.accumulate for a, b in zip(monitored, figures[1:], strict=True)]
        self.scale.unscale(self.parts.model.parameters())
        norm = self._clip()
        finite = math.isfinite(norm) and math.isfinite(total)
        spiked = finite and self._is_spike(step, total)
        overflowed = self.scale.update(finite) and math.isfinite(total)
        if overflowed:
            self.display.line(f"step {step + 1}: float16 overflowed: loss scale {self.scale.factor:g}, step left out")
        elif not finite or spiked:
            mean = f", mean {progress.loss_mean:.4f}" if spiked else ""
            self.display.line(f"step {step + 1}: loss {total}{mean}, gradient norm {norm}: step left out")
            finite = False
            if progress.skipped_in_a_row + 1 >= BAD_STEPS:
                text = self._not_finite()
                self.prepared_optimizer.zero_grad()
                raise TrainError(text)
        self.consistent = False
        if finite:
            # LAMB takes a norm of each parameter; see _clip.
            with cpu_threads(1 if config.optimizer == "lamb" and accelerator.device.type == "cpu" else 0):
                self.prepared_optimizer.step()
            if self.parts.average:
                self.parts.average.update(self.parts.model, step + 1)
            progress.loss_sum += total
            progress.loss_mean += (total - progress.loss_mean) * (0.05 if progress.loss_mean else 1.0)
            progress.norm_sum += norm
            progress.monitor_sums = [a + b for a, b in zip(progress.monitor_sums, monitored, strict=True)]
        progress.skipped += not finite
        if not overflowed:
            progress.skipped_in_a_row = 0 if finite else progress.skipped_in_a_row + 1
        progress.step += 1
        self.consistent = True
        self.prepared_optimizer.zero_grad()
        self.phases.mark("optimizer")
        self.phases.end()
        self.loss = total
        shares = "".join(
            f"  {name.removeprefix('train_')} {100 * share:.1f} %"
            for name, share in zip(self.task.monitored, monitored, strict=True)
            if name == f"train_{self.task.metric}"
        )
        self.display.step(f"loss {total:.4f}{shares}  lr {rate:.2e}")

    def _is_spike(self, step: int, loss: float) -> bool:
        """Whether the loss is far above the mean of those before it. Not in the first steps, which have no mean yet."""
        return bool(self.config.spike and step >= 20 and loss > self.config.spike * self.progress.loss_mean)

    def _forward_backward(self, images: Tensor, labels: Tensor, rng: Stream) -> list[float]:
        """Adds the gradients of one batch; its loss and the task's monitored figures, as means over all processes."""
        config, accelerator, task = self.config, self.accelerator, self.task
        images, labels = images.to(accelerator.device, non_blocking=True), labels.to(accelerator.device)
        targets = labels
        if config.mixup or config.cutmix:
            images, targets = mixed(images, labels, self.parts.model.num_classes, config.mixup, config.cutmix, rng)
        low = torch.float16 if config.amp == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, low, enabled=config.amp != "no"):
            outputs = self.prepared(images)
        # A model with a distillation token has two heads: the second one learns from the teacher.
        first, second = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        first, second = task.arrange(first, self.parts.model), task.arrange(second, self.parts.model)
        loss = task.loss(first, targets, config.label_smoothing, config.loss)
        if self.parts.teacher:
            taught = distillation_loss(second, self.parts.teacher(images), config.distill, config.distill_temperature)
            loss = torch.lerp(loss, taught, config.distill_alpha)
        self.phases.mark("forward")
        accelerator.backward(loss * self.scale.factor)
        answer = (first + second) / 2 if isinstance(outputs, tuple) else first
        figures = torch.cat([loss.detach().float()[None], task.monitor(answer, labels)])
        found: list[float] = accelerator.reduce(figures, "mean").tolist()
        self.phases.mark("backward")
        return found

    def _clip(self) -> float:
        """Clips the gradients to the largest norm allowed; their norm before. In one thread: PyTorch's sums over many
        elements depend on the number of threads in the last bits, and the bits of a training must not."""
        on_cpu = self.accelerator.device.type == "cpu"
        with cpu_threads(1 if on_cpu else 0):
            norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), self.config.clip or math.inf)
            return float(whole(norm))

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step` of the current epoch."""
        config = self.config
        warmup = round((config.warmup_epochs or 0.0) * self.steps)
        total = (config.epochs or 0) * self.steps
        return schedule(self.progress.epoch * self.steps + step, total, warmup, config.lr or 0.0, config.min_lr)

    def _not_finite(self) -> str:
        parameters = self.parts.model.named_parameters()
        names = [name for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()]
        more = ", ..." if len(names) > 5 else ""
        where = f"not finite in the gradient of {', '.join(names[:5])}{more}; " if names else ""
        best = self.progress.best_epoch
        left = f"The weights of epoch {best}, the best so far, are in {self.where}" if best else "No epoch was finished"
        return (
            f"vit: {BAD_STEPS} steps in a row without a finite gradient; stopped in epoch {self.progress.epoch + 1}. "
            f"{where}try a smaller --lr, a longer --warmup-epochs or --amp no. {left}"
        )
