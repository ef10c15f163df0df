"""Distillation: a trained model's answers as targets beside the labels (arXiv:1503.02531, DeiT: arXiv:2012.12877)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..factory import create
from ..model import list_models
from ..preprocess import Preprocess
from ..support.text import printable
from ..weights import WeightsError
from ..weights.read import HUB

KINDS = ("soft", "hard")


def distillation_loss(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """The mean over a batch, in float32: "hard": cross entropy with the teacher's class; "soft": T² KL(p || q) of
    p = softmax(teacher / T) and q = softmax(student / T).

    student, teacher: logits [B, classes]
    """
    if kind == "hard":
        return F.cross_entropy(student.float(), teacher.argmax(dim=1))
    likely, wanted = ((logits.float() / temperature).log_softmax(dim=1) for logits in (student, teacher))
    return F.kl_div(likely, wanted, reduction="batchmean", log_target=True) * temperature**2


class Teacher:
    """A model that answers the images of a training, however it wants to see them.

    preprocess: how the training's images were normalised; they are brought to the teacher's size, channels and
    normalisation. classes: the training's class names; a teacher that knows its own by name is asked in their order.
    Raises ValueError where its classes are others.
    """

    def __init__(self, model: Any, preprocess: Preprocess, classes: Sequence[str]) -> None:
        self.model, self.preprocess = model.eval().requires_grad_(False), preprocess
        self.order: Tensor | None = None
        names = model.class_names
        if model.num_classes != len(classes):
            raise ValueError(f"vit: the teacher has {model.num_classes} classes, the data {len(classes)}")
        if names and list(names) != list(classes):
            if set(names) != set(classes):
                missing = sorted(set(classes) - set(names))[:5]
                raise ValueError(f"vit: the teacher does not know the class(es) {', '.join(map(printable, missing))}")
            self.order = torch.tensor([names.index(name) for name in classes], device=model.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> the teacher's logits [B, classes], float32."""
        logits: Tensor = self.model(self._seen(images.float()).to(self.model.dtype)).float()
        return logits if self.order is None else logits[:, self.order]

    def _seen(self, images: Tensor) -> Tensor:
        """The images as the teacher's own preprocessing would normalise them."""
        mine, own = self.preprocess, self.model.preprocess
        if (mine.mean, mine.std, mine.in_chans, mine.img_size) == (own.mean, own.std, own.in_chans, own.img_size):
            return images
        images = images * _channels(mine.std, images) + _channels(mine.mean, images)
        if mine.in_chans != own.in_chans:
            grey = images if mine.in_chans == 1 else (images * _channels((0.299, 0.587, 0.114), images)).sum(1, True)
            images = grey.expand(-1, own.in_chans, -1, -1)
        if tuple(images.shape[2:]) != tuple(own.img_size):
            images = F.interpolate(images, tuple(own.img_size), mode="bicubic", antialias=True)
        return (images - _channels(own.mean, images)) / _channels(own.std, images)

    def digest(self) -> str:
        """A checksum of its weights: a training that goes on needs the same teacher."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode())
            found.update(np.ascontiguousarray(tensor.detach().cpu().view(torch.uint8).numpy()).tobytes())
        return found.hexdigest()


def _channels(values: Sequence[float], images: Tensor) -> Tensor:
    return torch.tensor(values, device=images.device, dtype=images.dtype).view(1, -1, 1, 1)


def load_teacher(
    source: str, name: str | None, backend: str, device: Any, preprocess: Preprocess, classes: Sequence[str]
) -> Teacher:
    """The teacher in `source`: a run folder, weights as vit.create takes them, or a model's name, whose published
    weights are asked of the hub. name: the model, for weights that do not know theirs. Raises ValueError as Teacher."""
    weights = source
    if not os.path.exists(source) and source.partition(".")[0] in list_models():
        weights = f"{HUB}timm/{source}"
    try:
        model = create(name, backend, weights=weights, device=device, training=False)
    except (WeightsError, FileNotFoundError) as error:
        raise WeightsError(f"vit: --teacher {printable(source)}: {str(error).removeprefix('vit: ')}") from error
    return Teacher(model, preprocess, classes)
