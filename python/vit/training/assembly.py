"""What a training is made of, built from its configuration: data, model, batches, optimizer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import tasks
from ..data import Source, open_source
from ..data.augment import Affine, Augment, Changes, CropFlip, Elastic, Erase
from ..data.equal import in_words, shared_with_training
from ..data.folder import describe
from ..data.loader import EpochBatches, Images, loader
from ..data.presets import PRESETS, Torchvision
from ..data.readers import WatchedLoader
from ..factory import create, settle
from ..model import VisionTransformer, list_models
from ..model.configs import get_config
from ..model.deit import VisionTransformerDistilled
from ..preprocess import Preprocess
from ..support.text import printable
from ..weights import WeightsError, read
from ..weights.infer import is_eva
from .config import AUTO, TrainConfig
from .features import begin_head
from .optim import Average, make_optimizer
from .scale import check_fp16
from .sharded import copy_into
from .teacher import Teacher, load_teacher
from .threads import choose_threads


@dataclass
class Parts:
    """A training before its first step. `info`: what model.json says of the model."""

    config: TrainConfig
    source: Source
    model: VisionTransformer
    info: dict[str, Any]
    batches: EpochBatches
    loader: WatchedLoader
    optimizer: torch.optim.Optimizer
    average: Average | None
    teacher: Teacher | None = None
    sharded: bool = False  # whether each process is to have a share of the model
    whole: VisionTransformer | None = None  # where `model` is sharded and has no average: what is evaluated

    @property
    def kept_model(self) -> Any:
        """The model whose weights are validated and kept."""
        return self.average.model if self.average else self.whole or self.model

    def gather(self) -> None:
        """Brings the parameters of a sharded model together, for validation; all processes must ask for it."""
        if self.whole:
            copy_into(self.whole, self.model.parameters())

    @property
    def backend(self) -> str:
        """The backend, or all of them if ops differ, that the plan names."""
        return "+".join(sorted(set(self.model.plan.values())))

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return len(self.batches) // self.config.accumulate


def assemble(
    config: TrainConfig, described: dict[str, Any] | None, accelerator: Any, report: Callable[[str], None]
) -> Parts:
    """Data, model and optimizer of a new training, or of one whose model.json is `described` (without its weights)."""
    source = open_data(config, report)
    _check_task(config, source)
    if described is None:
        model, info = _new_model(config, source, accelerator.device)
    else:
        model, info = _described_model(config, described, accelerator.device), described
    if config.head_init == "probe" and described is None:
        if config.task == "classification" and begin_head(model, source.splits["train"], config.batch_size or 1):
            report("the classifier begins as a linear probe of the features")
        else:
            report("--head-init probe is for one linear classifier: the head begins at random")
    if config.freeze == "backbone":
        _freeze(model)
    if config.grad_checkpoint == "yes":
        model.set_grad_checkpointing()
    sharded = config.parallel == "fsdp" and accelerator.num_processes > 1
    if sharded and config.optimizer != "adamw":
        raise ValueError(f"vit: --parallel fsdp goes with --optimizer adamw, not {config.optimizer}")
    if config.amp == "fp16":
        check_fp16(model.plan)
    teacher = _teacher(config, source, model) if config.teacher else None
    if config.threads == AUTO:
        config = dataclasses.replace(config, threads=choose_threads(model, config.batch_size or 1))
    batches, images = _training_batches(config, source, model, accelerator)
    return Parts(
        config=config,
        source=source,
        model=model,
        info=info,
        batches=batches,
        loader=images,
        optimizer=make_optimizer(
            model, config.lr or 0.0, config.weight_decay, config.beta2, config.layer_decay, config.optimizer
        ),
        average=Average(model, config.ema) if config.ema else None,
        teacher=teacher,
        whole=copy.deepcopy(model).eval().requires_grad_(False) if sharded and not config.ema else None,
        sharded=sharded,
    )


def _check_task(config: TrainConfig, source: Source) -> None:
    """ValueError where the data have other answers than the task, or an option does not go with it."""
    task, found = tasks.get(config.task), source.answers
    if task.targets != found and found == "labels":
        raise ValueError(f"vit: --task {config.task} needs {task.needs}, and {config.data} has none; give {task.data}")
    if task.targets != found:
        fitting = " or ".join(name for name in tasks.names() if tasks.get(name).targets == found)
        raise ValueError(
            f"vit: {config.data} has {found.replace('_', ' ')}, which --task {config.task} does not take; give --task "
            f"{fitting}"
        )
    if found == "labels":
        return
    given: dict[str, Any] = {"--teacher": config.teacher}
    if task.places:
        given |= {
            "--mixup": config.mixup,
            "--cutmix": config.cutmix,
            "--patch-drop-rate": config.patch_drop_rate,
            "--loss bce": config.loss == "bce",
            f"--augment {config.augment}": config.augment in ("elastic", "randaug", "trivial"),
        }
    if wrong := [name for name, value in given.items() if value]:
        why = "whose answers are places in the image" if task.places else "whose answers are no single class"
        raise ValueError(f"vit: {', '.join(wrong)}: not with --task {config.task}, {why}")


def _teacher(config: TrainConfig, source: Source, model: VisionTransformer) -> Teacher:
    """The teacher; a model with a head for it learns from it by that one."""
    if isinstance(model, VisionTransformerDistilled):
        model.set_distilled_training()
    return load_teacher(
        str(config.teacher), config.teacher_model, config.backend, model.device, model.preprocess, source.class_names
    )


def _freeze(model: VisionTransformer) -> None:
    """Leaves only the head to learn."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)  # two with a distillation token
    if (below := getattr(model, "pre_logits", None)) is not None:
        heads = *heads, below
    head = {id(parameter) for one in heads for parameter in one.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def open_data(config: TrainConfig, report: Callable[[str], None]) -> Source:
    """The data with its splits. A split that the data lacks and whose fraction is 0 is empty."""
    source = open_source(config.data, config.bad_images, config.validate, report)
    if source.skipped:
        report(f"skipped {describe(source.skipped, Path(config.data))}")
    fractions = {"val": config.val_fraction, "test": config.test_fraction}
    needed = ["train", *(name for name, fraction in fractions.items() if fraction or name in source.splits)]
    source = source.divided(config.val_fraction, config.test_fraction, config.split_seed, needed)
    if found := shared_with_training(source.splits):
        report(in_words(found))
    return source


def _new_model(config: TrainConfig, source: Source, device: Any) -> tuple[Any, dict[str, Any]]:
    """The model, and what is written of it: whatever the options and the weights change of the named one."""
    torch.manual_seed(config.seed)
    arch = {"num_classes": len(source.class_names), "drop_path_rate": config.drop_path} | config.arch
    arch = tasks.get(config.task).arch | tasks.get(config.task).head | arch
    if config.patch_drop_rate:
        arch = {"patch_drop_rate": config.patch_drop_rate} | arch
    if arch["num_classes"] != len(source.class_names):
        raise ValueError(
            f"vit: --arch num_classes={arch['num_classes']}, but {config.data} has "
            f"{len(source.class_names)} classes; leave it out"
        )
    start = None if config.weights is None else read(config.weights)
    try:
        model = create(config.model, config.backend, weights=start, device=device, **arch)
    except WeightsError as error:
        raise WeightsError(_with_fitting_models(str(error), config, start)) from error
    model.preprocess = tasks.get(config.task).prepare(model.preprocess)
    name, settings = settle(config.model, start, arch)
    named = get_config(name).arch
    info = {
        "name": name,
        "arch": {k: v for k, v in settings.items() if k in arch or k not in named or v != named[k]},
        "class_names": list(source.class_names),
        "preprocess": model.preprocess.to_dict(),
    }
    return model, info


def _with_fitting_models(text: str, config: TrainConfig, start: Any) -> str:
    """The text of a WeightsError, with the names of the models whose sizes the weights have."""
    fitting = fitting_models(start.state)
    if start.name in list_models():
        fitting = [start.name, *(name for name in fitting if name != start.name)]
    if not fitting or config.model in fitting:
        return text
    return f"vit: {printable(str(config.weights))} fits --model {' or '.join(fitting)}, not {config.model}. {text}"


def fitting_models(state: dict[str, Any]) -> list[str]:
    """The named models with the width, depth, MLP and patch size of these weights; of their image size, if any is."""
    patches = state.get("patch_embed.proj.weight")
    hidden = state.get("blocks.0.mlp.fc1.weight")
    if patches is None or patches.ndim != 4:
        return []
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    positions = state.get("pos_embed")
    found: dict[str, bool] = {}
    for name in sorted(list_models(), key=lambda name: (not name.startswith("vit_"), name)):  # DeiT has ViT's sizes
        config = get_config(name)
        arch = config.arch
        if (config.kind == "eva") != is_eva(state) or bool(arch.get("pre_norm")) != ("norm_pre.weight" in state):
            continue
        sizes = (arch.get("embed_dim", 768), arch.get("depth", 12), arch.get("patch_size", 16))
        if sizes != (patches.shape[0], depth, patches.shape[-1]):
            continue
        if hidden is not None and round(arch.get("mlp_ratio", 4.0) * sizes[0]) != hidden.shape[0]:
            continue
        side = arch.get("img_size", 224)
        grid = (side // sizes[2]) ** 2 if isinstance(side, int) else 0
        found[name] = positions is not None and positions.ndim == 3 and positions.shape[1] - grid in (0, 1, 2)
    exact = [name for name, same in found.items() if same]
    return (exact or list(found))[:4]


def _described_model(config: TrainConfig, info: dict[str, Any], device: Any) -> Any:
    """The model of a run folder's model.json; the checkpoint brings its weights."""
    torch.manual_seed(config.seed)
    model = create(info["name"], config.backend, device=device, **info["arch"])
    model.preprocess = Preprocess.from_dict(info["preprocess"])
    return model


def _training_batches(
    config: TrainConfig, source: Source, model: VisionTransformer, accelerator: Any
) -> tuple[EpochBatches, WatchedLoader]:
    samples, world, size = source.splits["train"], accelerator.num_processes, config.batch_size or 1
    batches = EpochBatches(len(samples), size, config.seed, accelerator.process_index, world, config.repeats)
    if len(batches) < config.accumulate:
        raise ValueError(
            f"vit: {len(samples)} training images do not fill one optimizer step of {size} images x "
            f"{config.accumulate} forward passes x {world} process(es); use a smaller --batch-size"
        )
    erase = Erase(config.erase) if config.erase else None
    images = Images(samples, model.preprocess, augment_of(config, model), config.seed, erase)
    on_gpu = accelerator.device.type == "cuda"
    return batches, loader(images, batches, config.workers, pin_memory=on_gpu)


def augment_of(config: TrainConfig, model: VisionTransformer) -> Augment | None:
    """The random changes of --augment, --rotate, --jitter and the like, if any."""
    base = _base_augment(config, model)
    names = ("rotate", "hflip", "vflip", "jitter", "hue", "grey")
    given = {name: value for name in names if (value := getattr(config, name))}
    if model.preprocess.in_chans == 1 and (wrong := [f"--{name}" for name in ("hue", "grey") if name in given]):
        raise ValueError(f"vit: {' and '.join(wrong)} change nothing of grey images, which {config.model} takes")
    return Changes(base, model.preprocess.img_size, **given) if given else base


def _base_augment(config: TrainConfig, model: VisionTransformer) -> Augment | None:
    if config.augment == "affine":
        return Affine()
    if config.augment == "elastic":
        return Elastic()
    if config.augment == "crop":
        return CropFlip(model.preprocess.img_size, config.crop_area)
    if config.augment in PRESETS:
        return Torchvision(config.augment, CropFlip(model.preprocess.img_size, config.crop_area))
    return None
