"""vit.Engine: the fastest forward of a model on this machine."""

from __future__ import annotations

import ctypes
import json
import os
import threading
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..preprocess import Preprocess
from . import native
from .freeze import freeze

Images = Tensor | np.ndarray
Result = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """A part of the forward: its seconds per call on the first thread, its share of the call, and the floating-point
    operations all threads do in it."""

    name: str
    seconds: float
    share: float
    flops: int


class Engine:
    """A model frozen for inference: images -> logits in one native call, weights packed once.

        engine = vit.Engine(model, dtype="bfloat16")
        logits = engine(images)                                     # [B, num_classes] float32
        both = engine(images, outputs=("features", "attention.11")) # {"features": [B, C], "attention.11": [B, H, N]}
        engine.save("model.vit");  engine = vit.Engine.load("model.vit")

    dtype        "float32", "bfloat16" or "int8": the type of weights and products; sums and the residual stream are
                 float32. int8 quantizes the four linear layers of each block, weights by output channel, activations
                 by token when they are made; the rest is bfloat16, the head float32
    max_batch    a limit for which memory is taken now; None: no limit, memory grows with the batch up to a few images
                 per thread
    num_threads  None: what torch.get_num_threads() says at each call, and no more than a container's quota
    calibrate    int8: images as the model takes them, to smooth inputs before quantizing; None: the norms' own weights
                 say how large inputs become
    exclude      int8, weights: layers that stay bfloat16, such as ("blocks.0.mlp.fc2",)
    weights      bfloat16: "int8" or "int4" stores the weights of the blocks in 8 or 4 bits, with a scale for each 32,
                 for the memory; products stay bfloat16

    Results do not depend on the threads or on what else is in the batch. Any number of engines and Python threads may
    run at once; calls of one engine run one after the other. The model is copied: later changes to it have no effect.

    Raises BackendError when there is no native CPU backend or the engine cannot run the model.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: str | torch.dtype = "float32",
        max_batch: int | None = None,
        num_threads: int | None = None,
        calibrate: Tensor | None = None,
        exclude: Collection[str] = (),
        weights: str | None = None,
    ) -> None:
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in native.PRECISIONS:
            raise ValueError(f"vit.Engine: dtype {dtype!r} is not one of {', '.join(native.PRECISIONS)}")
        library = native.library()
        frozen = freeze(model, dtype, calibrate, exclude, weights)
        tensors = (native.Weight * len(frozen.tensors))(
            *[
                native.Weight(name.encode(), t.data_ptr(), t.numel(), frozen.precisions.get(name, 0))
                for name, t in frozen.tensors.items()
            ]
        )
        texts = (native.Text * len(frozen.texts))(
            *[native.Text(k.encode(), v.encode()) for k, v in frozen.texts.items()]
        )
        config = native.Config(**frozen.config)
        self._adopt(
            library,
            library.made(library.build(config, tensors, len(tensors), texts, len(texts), _limit(max_batch))),
            max_batch,
            num_threads,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], max_batch: int | None = None, num_threads: int | None = None) -> Engine:
        """An engine from the file that `save` wrote; the weights stay in the file and are mapped into memory.

        Raises FileNotFoundError, or OSError for a file that is damaged, foreign, or made for another version of vit or
        another kind of processor.
        """
        if not os.path.exists(path):
            raise FileNotFoundError(f"vit.Engine: there is no file {os.fspath(path)}")
        engine = cls.__new__(cls)
        library = native.library()
        handle = library.create(os.fsencode(path), _limit(max_batch))
        engine._adopt(library, library.made(handle), max_batch, num_threads)
        return engine

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes packed weights, sizes and preprocessing as one safetensors file; OSError when that fails.

        It runs on processors with the instruction-set level of this one (`isa`), in Python and from C.
        """
        self._library.check(self._library.save(self._handle, os.fsencode(path)))

    def __reduce__(self) -> NoReturn:
        """A copy would share the native memory and use it after the original has gone."""
        raise TypeError(
            "vit.Engine: an engine cannot be copied or pickled; engine.save(path) writes it, vit.Engine.load(path) "
            "makes another one"
        )

    def _adopt(self, library: native.Library, handle: int, max_batch: int | None, num_threads: int | None) -> None:
        self._handle = handle
        self._library = library
        weakref.finalize(self, library.destroy, handle)
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"vit.Engine: num_threads must be positive or None, got {num_threads}")
        self.max_batch = max_batch
        self.num_threads = num_threads
        self._quota = library.default_threads() if num_threads is None else 0
        self._config = native.Config()
        library.get_config(handle, self._config)
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        c = self._config
        patches = -(-c.image_height // c.patch_height) * -(-c.image_width // c.patch_width)
        self._tokens = c.prefix_tokens + patches

    # ---- what it is ----

    def _text(self, key: str) -> str | None:
        value = self._library.text(self._handle, key.encode())
        return None if value is None else value.decode(errors="replace")

    @property
    def dtype(self) -> str:
        """ "float32", "bfloat16" or "int8"."""
        return native.PRECISIONS.name(self._config.precision)

    @property
    def weights(self) -> str | None:
        """ "int8" or "int4" where the weights of the blocks are stored in fewer bits than `dtype` has, else None."""
        return self._text("weights")

    @property
    def isa(self) -> str:
        """The instruction-set level the weights are packed for."""
        return self._text("isa") or ""

    @property
    def name(self) -> str:
        """The model's name."""
        return self._text("name") or ""

    @property
    def preprocess(self) -> Preprocess:
        """The transform that makes float images from PIL images; uint8 images need its resizing only."""
        return Preprocess.from_dict(json.loads(self._text("preprocess") or "{}"))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the model has them."""
        text = self._text("class_names")
        return None if text is None else tuple(json.loads(text))

    @property
    def config(self) -> dict[str, Any]:
        """Sizes and options of the network."""
        return {field[0]: getattr(self._config, field[0]) for field in native.Config._fields_}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the packed weights and of the room for intermediate results."""
        weights, intermediate = ctypes.c_int64(), ctypes.c_int64()
        self._library.memory(self._handle, weights, intermediate)
        return {"weights": weights.value, "intermediate": intermediate.value}

    def __repr__(self) -> str:
        c = self._config
        size = f"{c.channels} x {c.image_height} x {c.image_width}"
        dtype = f"{self.dtype} from {self.weights} weights" if self.weights else self.dtype
        return f"Engine({self.name}, {dtype}, {size} -> {c.num_classes or c.embed_dim}, {self.isa})"

    # ---- forward ----

    @overload
    def __call__(
        self, images: Images, out: Tensor | None = None, outputs: str = "logits", layout: str = "NCHW"
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        images: Images,
        out: Mapping[str, Tensor] | None = None,
        outputs: tuple[str, ...] | list[str] = (),
        layout: str = "NCHW",
    ) -> dict[str, Tensor]: ...

    def __call__(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None = None,
        outputs: str | tuple[str, ...] | list[str] = "logits",
        layout: str = "NCHW",
    ) -> Result:
        """images -> logits [B, num_classes] float32, or a dict of the named outputs.

        images   [B, channels, height, width] on the CPU, contiguous or channels_last; with layout="NHWC"
                 [B, height, width, channels]. float32: normalised, as the model takes them; uint8: 0 .. 255,
                 normalised here with the mean and std of the model's preprocessing
        outputs  "logits" (features where the model has no head), "features" [B, C] after pooling and the last norm,
                 "tokens.I" [B, N, C] after block I, "attention.I" [B, H, N], the class token's attention to all tokens
                 in block I. Without pooling logits and features are those of every token: [B, N, ...]
        out      contiguous float32 tensors to write to, so that nothing is allocated: one, or a dict by name

        Raises ValueError for images or tensors that do not fit and for images with NaN or infinity; the engine can be
        used again after any error.
        """
        return self._forward(images, out, outputs, layout, self._threads())

    def submit(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None = None,
        outputs: str | tuple[str, ...] | list[str] = "logits",
        layout: str = "NCHW",
    ) -> Future[Result]:
        """As a call, in the background; submitted calls run one after the other. Do not change the images until the
        result is there."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"vit-{self.name}")
                weakref.finalize(self, self._executor.shutdown, wait=False)
        return self._executor.submit(self._forward, images, out, outputs, layout, self._threads())

    def _threads(self) -> int:
        return self.num_threads or min(torch.get_num_threads(), self._quota)

    def _forward(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None,
        outputs: str | tuple[str, ...] | list[str],
        layout: str,
        threads: int,
    ) -> Result:
        given, keep = self._images(images, layout)
        names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
        single = isinstance(outputs, str)
        places = self._places(names, given.batch, out, single)
        wanted = (native.Output * len(names))(
            *[native.Output(*self._kind(name), t.data_ptr(), t.numel()) for name, t in places.items()]
        )
        self._library.check(self._library.forward(self._handle, given, wanted, len(wanted), threads))
        del keep  # alive until here: `given` holds its address
        return places[names[0]] if single else places

    def _images(self, images: Images, layout: str) -> tuple[native.Images, Tensor]:
        if layout not in native.LAYOUTS:
            raise ValueError(f"vit.Engine: layout {layout!r} is not one of {', '.join(native.LAYOUTS)}")
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(np.require(images, requirements="W"))  # a copy of a read-only one
        if not isinstance(images, Tensor):
            raise TypeError(f"vit.Engine: images must be a tensor or a NumPy array, got {type(images).__name__}")
        if images.device.type != "cpu":
            raise ValueError(f"vit.Engine: images are on {images.device}, the engine runs on the CPU; use images.cpu()")
        if images.dtype not in (torch.uint8, torch.float32):
            kind = str(images.dtype).removeprefix("torch.")
            raise ValueError(
                f"vit.Engine: images are {kind}; allowed are float32 (normalised; images.float()) and uint8 (0 .. 255)"
            )
        c = self._config
        order = "[B, {0}, {1}, {2}]" if layout == "NCHW" else "[B, {1}, {2}, {0}]"
        if images.ndim != 4:
            hint = "; add the batch dimension: images[None]" if images.ndim == 3 else ""
            wanted = order.format(c.channels, c.image_height, c.image_width)
            raise ValueError(f"vit.Engine: images must be {wanted}, got {list(images.shape)}{hint}")
        images = images.detach()
        if layout == "NCHW":
            batch, channels, height, width = images.shape
            # A tensor in channels_last memory is read where it lies.
            if not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last):
                layout = "NHWC"
            else:
                images = images.contiguous()
        else:
            batch, height, width, channels = images.shape
            images = images.contiguous()
        if channels != c.channels:
            other = "NHWC" if layout == "NCHW" else "NCHW"
            swapped = height if layout == "NHWC" else width
            hint = f'; the images may be {other}: pass layout="{other}"' if swapped == c.channels else ""
            raise ValueError(f"vit.Engine: images have {channels} channels, the engine takes {c.channels}{hint}")
        pixels = native.PIXELS[str(images.dtype).removeprefix("torch.")]
        given = native.Images(images.data_ptr(), pixels, native.LAYOUTS[layout], batch, channels, height, width)
        return given, images

    def _kind(self, name: str) -> tuple[int, int]:
        """The kind and block of an output; ValueError for an unknown name."""
        if name in ("logits", "features"):
            return native.OUTPUTS[name], 0
        kind, _, block = name.partition(".")
        if kind in ("tokens", "attention") and block.isdigit() and int(block) < self._config.depth:
            return native.OUTPUTS[kind], int(block)
        raise ValueError(
            f"vit.Engine: unknown output {name!r}; there are logits, features, and tokens.I and attention.I for I from "
            f"0 to {self._config.depth - 1}"
        )

    def shape(self, output: str, batch: int) -> tuple[int, ...]:
        """The shape of an output for a batch of that size."""
        c = self._config
        self._kind(output)
        if output.startswith("tokens."):
            return batch, self._tokens, c.embed_dim
        if output.startswith("attention."):
            return batch, c.num_heads, self._tokens
        tokens = (self._tokens,) if c.pool == native.POOLS[""] else ()
        last = c.num_classes if output == "logits" and c.num_classes else c.embed_dim
        return batch, *tokens, last

    def _places(
        self, names: tuple[str, ...], batch: int, out: Tensor | Mapping[str, Tensor] | None, single: bool
    ) -> dict[str, Tensor]:
        """Where each output goes: the caller's tensors, checked, or new ones."""
        if not names or len(set(names)) != len(names):
            raise ValueError(f"vit.Engine: outputs must be different names, at least one; got {names}")
        if out is None:
            return {name: torch.empty(self.shape(name, batch), dtype=torch.float32) for name in names}
        if isinstance(out, Tensor) and not single:
            raise ValueError("vit.Engine: with several outputs `out` must be a dict of a tensor for each name")
        given = {names[0]: out} if isinstance(out, Tensor) else dict(out)
        if set(given) != set(names):
            raise ValueError(f"vit.Engine: out has {', '.join(given)}; wanted are {', '.join(names)}")
        for name, tensor in given.items():
            shape = self.shape(name, batch)
            good = tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
            if not good or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"vit.Engine: out for {name!r} must be contiguous float32 {list(shape)} on the CPU, got "
                    f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"
                )
        return {name: given[name] for name in names}

    # ---- time ----

    def profile(self, images: Images, calls: int = 5, layout: str = "NCHW") -> list[Phase]:
        """Where the time of a call goes: its phases in order, averaged over `calls` calls after one that warms up."""
        self(images, layout=layout)
        names = self._library.phases()
        self._library.profile(self._handle, 1)
        try:
            for _ in range(calls):
                self(images, layout=layout)
            seconds = (ctypes.c_double * len(names))()
            self._library.profile_read(self._handle, seconds)
        finally:
            self._library.profile(self._handle, 0)
        flops = self._flops(len(images))
        total = sum(seconds) or 1.0
        return [
            Phase(name, spent / calls, spent / total, flops.get(name, 0))
            for name, spent in zip(names, seconds, strict=True)
        ]

    def _flops(self, batch: int) -> dict[str, int]:
        c, N = self._config, self._tokens
        rows = 2 * batch * N * c.depth
        # Where pooling takes the class token, the last block computes only that one from its queries on.
        late = rows - (2 * batch * (N - 1) if c.pool == native.POOLS["token"] else 0)
        heads = N if c.pool == native.POOLS[""] else 1
        values = c.channels * c.patch_height * c.patch_width
        return {
            "embed": 2 * batch * (N - c.prefix_tokens) * values * c.embed_dim,
            "qkv": (2 * rows + late) * c.embed_dim**2,
            "attention": 2 * late * N * c.embed_dim,
            "proj": late * c.embed_dim**2,
            "fc1": late * c.embed_dim * c.mlp_width,
            "fc2": late * c.embed_dim * c.mlp_width,
            "head": 2 * batch * heads * c.embed_dim * c.num_classes,
        }


def _limit(max_batch: int | None) -> int:
    if max_batch is not None and max_batch < 1:
        raise ValueError(f"vit.Engine: max_batch must be positive or None, got {max_batch}")
    return max_batch or 0
