"""Resizing of images as torchvision's tensors are: what transformers' image processors do where Pillow is not asked."""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("bilinear", "bicubic")


def resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[C, h, w] uint8 or float32 -> [C, *size] of the same dtype, with antialiasing.

    Bilinear in whole numbers where PyTorch has vector code for it, else rounded from float32; bicubic always in whole
    numbers: torchvision's choice (transforms/v2/functional/_geometry.py).
    """
    if tuple(image.shape[1:]) == size:
        return image
    whole = image.dtype == torch.uint8
    native = mode == "bicubic" or _has_vector_code()
    given = image if not whole or native else image.float()
    found = F.interpolate(given[None], size=size, mode=mode, align_corners=False, antialias=True)[0]
    if not whole or native:
        return found
    return found.round_().to(torch.uint8)


def _has_vector_code() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")
