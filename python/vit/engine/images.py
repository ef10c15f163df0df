"""What an engine is given, checked: images as a tensor that native code may read, tensors that it may write to."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import native

ALLOWED = "allowed are float32 (normalised; images.{}) and uint8 (0 .. 255)"


CPU = torch.device("cpu")


def as_tensor(images: Any, device: torch.device = CPU) -> Tensor:
    """A dense tensor on the CPU or the engine's device, float32 or uint8, for a tensor or NumPy array; TypeError or
    ValueError for others.

    An array is copied where PyTorch has no tensor for it: with negative strides (`bgr[..., ::-1]`), in the other byte
    order, or read-only.
    """
    if isinstance(images, np.ndarray):
        images = _of_array(images)
    if not isinstance(images, Tensor):
        raise TypeError(f"vit.Engine: images must be a tensor or a NumPy array, got {type(images).__name__}")
    if images.device.type != "cpu" and images.device != device:
        place = "on the CPU; use images.cpu()" if device == CPU else f"on {device}; use images.to({str(device)!r})"
        raise ValueError(f"vit.Engine: images are on {images.device}, the engine runs {place}")
    if images.dtype not in (torch.uint8, torch.float32):
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(f"vit.Engine: images are {kind}; {ALLOWED.format('float()')}")
    if images.layout != torch.strided or images.is_nested:
        raise ValueError(f"vit.Engine: images are a tensor of {_layout(images)}; use images.to_dense()")
    return images.detach().resolve_neg() if _negated(images) else images


def dense(images: Tensor) -> Tensor:
    """The images, contiguous."""
    return images if images.is_contiguous() else images.detach().contiguous()


def native_images(images: Tensor, layout: str) -> tuple[native.Images, Tensor]:
    """What the native call takes of a batch, and the tensor whose memory it reads."""
    if layout == "NCHW":
        batch, channels, height, width = images.shape
        # A tensor in channels_last memory is read where it lies.
        if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
            layout = "NHWC"
        else:
            images = dense(images)
    else:
        batch, height, width, channels = images.shape
        images = dense(images)
    pixels = native.PIXELS[str(images.dtype).removeprefix("torch.")]
    return native.Images(images.data_ptr(), pixels, native.LAYOUTS[layout], batch, channels, height, width), images


def check_layout(layout: str) -> None:
    """ValueError for an unknown one."""
    if layout not in LAYOUTS:
        raise ValueError(f"vit.Engine: layout {layout!r} is not one of {', '.join(LAYOUTS)}")


LAYOUTS = ("NCHW", "NHWC")


def check_sizes(images: Tensor, layout: str, size: tuple[int, int, int]) -> None:
    """ValueError unless images [B, C, H, W], or as `layout` says, have these channels, and four dimensions."""
    channels, height, width = size
    if images.ndim != 4:
        hint = "; add the batch dimension: images[None]" if images.ndim == 3 else ""
        order = f"[B, {channels}, {height}, {width}]" if layout == "NCHW" else f"[B, {height}, {width}, {channels}]"
        raise ValueError(f"vit.Engine: images must be {order}, got {list(images.shape)}{hint}")
    axis, other = (1, "NHWC") if layout == "NCHW" else (3, "NCHW")
    if images.shape[axis] != channels:
        hint = f'; the images may be {other}: pass layout="{other}"' if images.shape[4 - axis] == channels else ""
        raise ValueError(f"vit.Engine: images have {images.shape[axis]} channels, the engine takes {channels}{hint}")


def room(shape: tuple[int, ...], device: torch.device = CPU) -> Tensor:
    """A float32 tensor for an output. PyTorch's own memory: freeing that of a NumPy array asks for the GIL inside a
    C++ destructor, and a daemon thread that does so when the program ends makes the process abort."""
    return torch.empty(shape, dtype=torch.float32, device=device)


def _negated(tensor: Tensor) -> bool:
    """Tensor.is_neg(): the values are those in memory with the other sign, as in z.conj().imag."""
    return torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Negative)


def check_out(name: str, tensor: Any, shape: tuple[int, ...], device: torch.device = CPU) -> None:
    """TypeError or ValueError unless an engine on the device may write an output of that shape to the tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"vit.Engine: out for {name!r} must be a tensor, got {type(tensor).__name__}")
    dense = tensor.layout == torch.strided and not tensor.is_nested and not _negated(tensor)
    good = dense and tensor.device == device and tensor.dtype == torch.float32 and tensor.is_contiguous()
    if not good or tuple(tensor.shape) != shape:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(
            f"vit.Engine: out for {name!r} must be contiguous float32 {list(shape)} on "
            f"{'the CPU' if device == CPU else device}, got {kind} "
            f"{_sizes(tensor)} on {tensor.device}" + ("" if dense else f", a tensor of {_layout(tensor)}")
        )


def _of_array(images: np.ndarray) -> Tensor:
    kind = images.dtype.newbyteorder("=")
    if kind not in (np.float32, np.uint8):
        raise ValueError(f"vit.Engine: images are {images.dtype}; {ALLOWED.format('astype(numpy.float32)')}")
    if isinstance(images, np.ma.MaskedArray):
        raise ValueError("vit.Engine: images are a masked array; fill what is masked with images.filled(value)")
    steps_fit = all(step >= 0 and step % images.itemsize == 0 for step in images.strides)
    if not (steps_fit and images.flags.writeable and images.flags.aligned and images.dtype == kind):
        images = np.array(images, dtype=kind, order="C")
    return torch.from_numpy(np.asarray(images))


def _layout(tensor: Tensor) -> str:
    if tensor.is_nested:
        return "nested layout"
    if tensor.layout != torch.strided:
        return f"layout {str(tensor.layout).removeprefix('torch.')}"
    return "negated values"


def _sizes(tensor: Tensor) -> Any:
    return "nested" if tensor.is_nested else list(tensor.shape)
