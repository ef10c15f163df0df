"""vit.Engine: the fastest forward of a model on this machine."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar, NoReturn, overload

import numpy as np
import torch
from torch import Tensor, nn

from ..preprocess import Preprocess, arguments
from ..support.records import Record, RecordError, parse_json
from ..support.text import printable
from . import native
from .freeze import Frozen, freeze
from .grids import Grids, by_size, of_each, takes_any_size
from .images import CPU, as_tensor, check_layout, check_sizes, native_images
from .outputs import kind_of, places, shape_of
from .profile import Phase, flops, patches_of, phases, timed
from .shutdown import calls as running

Images = Tensor | np.ndarray | list[Any] | tuple[Any, ...]
Result = Tensor | dict[str, Tensor]


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
    num_threads  None: at each call what torch.get_num_threads() says, no more than a container's quota, and fewer where
                 other work keeps cores busy
    calibrate    int8: images as the model takes them, to smooth inputs before quantizing and to correct biases; None:
                 one image of noise that the package makes
    exclude      int8, weights: layers that stay bfloat16, such as ("blocks.0.mlp.fc2",)
    weights      bfloat16: "int8" or "int4" stores the weights of the blocks in 8 or 4 bits, with a scale for each 32,
                 for the memory; products stay bfloat16
    device       "cpu"; or "cuda", "cuda:1", ...: the model's forward on the CUDA kernels, one graph for each size of
                 batch, in "float32", "bfloat16" or "float16" as a whole. max_batch is a limit there, whose graph is
                 made now; the other options are the CPU's. docs/engine.md

    Results do not depend on the threads or on what else is in the batch. Any number of engines and Python threads may
    run at once; calls of one engine run one after the other. A forked child may go on using it, with one thread. The
    model is copied: later changes to it have no effect.

    Raises BackendError when there is no native backend for the device or the engine cannot run the model.
    """

    #: The classes of other devices than the CPU, by their type.
    _kinds: ClassVar[dict[str, type[Engine]]] = {}
    #: Where results are.
    device = CPU
    #: Positions of images of other sizes; None where there is one size.
    _grids: Grids | None = None

    def __init_subclass__(cls, device: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        if device:
            Engine._kinds[device] = cls

    def __new__(cls, *arguments: Any, device: str | torch.device = "cpu", **options: Any) -> Engine:
        """The engine of that device."""
        kind = torch.device(device).type
        if cls is Engine and kind not in ("cpu", *cls._kinds):
            raise ValueError(f"vit.Engine: device {str(device)!r} is not one of cpu, {', '.join(cls._kinds)}")
        return object.__new__(cls._kinds.get(kind, cls) if cls is Engine else cls)

    def __init__(
        self,
        model: nn.Module,
        dtype: str | torch.dtype = "float32",
        max_batch: int | None = None,
        num_threads: int | None = None,
        calibrate: Tensor | None = None,
        exclude: Collection[str] = (),
        weights: str | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        dtype = str(dtype).removeprefix("torch.")
        if dtype not in native.PRECISIONS:
            raise ValueError(f"vit.Engine: dtype {dtype!r} is not one of {', '.join(native.PRECISIONS)}")
        limit = native.count("max_batch", max_batch, 63)
        native.count("num_threads", num_threads, 31)
        with running:  # for its tensors, as a call
            handle = self._build(freeze(model, dtype, calibrate, exclude, weights), limit)
        self._adopt(native.library(), handle, max_batch, num_threads, "the model")
        self._grids = Grids(model) if takes_any_size(model) else None

    @staticmethod
    def _build(frozen: Frozen, limit: int) -> int:
        library = native.library()
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
        return library.made(library.build(config, tensors, len(tensors), texts, len(texts), limit))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        max_batch: int | None = None,
        num_threads: int | None = None,
        mmap: bool = False,
    ) -> Engine:
        """An engine from the file that `save` wrote; the checksums of all weights are compared.

        The weights are read into memory, so that the file may be changed or removed later. With `mmap` they stay in the
        file, and processes that load it share them; the caller promises that it does not change meanwhile: an
        overwritten file gives other results, a shortened one kills the process. `save` and `mv` replace a file and
        change nothing in the old one.

        Raises FileNotFoundError, or OSError for a file that is damaged, foreign, or made for another version of vit or
        another kind of processor.
        """
        name = native.file_name(path)
        if not os.path.exists(path):
            raise FileNotFoundError(f"vit.Engine: there is no file {os.fspath(path)}")
        engine = cls.__new__(cls)
        library = native.library()
        handle = (library.map if mmap else library.create)(name, native.count("max_batch", max_batch, 63))
        engine._adopt(library, library.made(handle), max_batch, num_threads, str(os.fspath(path)))
        return engine

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes packed weights, sizes and preprocessing as one safetensors file; OSError when that fails.

        It runs on processors with the instruction-set level of this one (`isa`), in Python and from C. After any error,
        and whatever else writes there, the path has the old file or a whole new one. A symbolic link is refused.
        """
        self._library.check(self._library.save(self._handle, native.file_name(path)))

    def __reduce__(self) -> NoReturn:
        """A copy would share the native memory and use it after the original has gone."""
        raise TypeError(
            "vit.Engine: an engine cannot be copied or pickled; engine.save(path) writes it, vit.Engine.load(path) "
            "makes another one"
        )

    def _adopt(
        self, library: native.Library, handle: int, max_batch: int | None, num_threads: int | None, source: str
    ) -> None:
        self._handle = handle
        self._library = library
        # Not at exit: daemon threads may be inside a call, and functions of atexit may still use the engine.
        weakref.finalize(self, library.destroy, handle).atexit = False
        native.count("num_threads", num_threads, 31)
        self.max_batch = max_batch
        self.num_threads = num_threads
        self._config = native.Config()
        library.check(library.get_config(handle, self._config))
        self._executors: dict[int, ThreadPoolExecutor] = {}  # by process: a forked child has none of these threads
        self._read_texts(source)
        self._tokens = self._config.prefix_tokens + patches_of(self._config)

    # ---- what it is ----

    def _text(self, key: str) -> str | None:
        value = self._library.text(self._handle, key.encode())
        return None if value is None else value.decode(errors="replace")

    @property
    def dtype(self) -> str:
        """ "float32", "bfloat16" or "int8"."""
        return native.PRECISIONS.name(self._config.precision)

    def _read_texts(self, source: str) -> None:
        """What the texts kept with the weights say; OSError for one that cannot be meant."""
        where = f"{printable(source)}, an engine file"
        try:
            self._weights = self._text("weights")
            if self._weights is not None and self._weights not in native.STORED:
                raise RecordError(f"vit: {where}: weights is {self._weights!r}, not one of {', '.join(native.STORED)}")
            self._isa, self._name = self._text("isa") or "", self._text("name") or ""
            texts = {key: self._text(key) for key in ("preprocess", "class_names")}
            values = {key: parse_json(text, f"{where}: {key}") for key, text in texts.items() if text is not None}
            names, record = "class_names", Record(values, where)
            self._class_names = record.texts(names) if names in record else None
            self._preprocess = None  # a C program may have built it without
            if "preprocess" in record:
                given = record.record("preprocess").values
                self._preprocess = Preprocess(**arguments(given, f"{where}: preprocess"))
        except (ValueError, TypeError, OverflowError, LookupError) as error:
            about = "" if isinstance(error, RecordError) else f"vit: {where}: preprocess: "
            raise OSError(f"{about}{error}") from error

    @property
    def weights(self) -> str | None:
        """ "int8" or "int4" where the weights of the blocks are stored in fewer bits than `dtype` has, else None."""
        return self._weights

    @property
    def isa(self) -> str:
        """The instruction-set level the weights are packed for."""
        return self._isa

    @property
    def name(self) -> str:
        """The model's name."""
        return self._name

    @property
    def preprocess(self) -> Preprocess:
        """The transform that makes float images from PIL images; uint8 images need its resizing only."""
        if self._preprocess is None:
            raise ValueError("vit.Engine: this engine was built without preprocess; it knows the size of images only")
        return self._preprocess

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, where the model has them."""
        return self._class_names

    @property
    def config(self) -> dict[str, Any]:
        """Sizes and options of the network."""
        return {field[0]: getattr(self._config, field[0]) for field in native.Config._fields_}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the packed weights and of the room for intermediate results."""
        weights, intermediate = ctypes.c_int64(), ctypes.c_int64()
        self._library.check(self._library.memory(self._handle, weights, intermediate))
        return {"weights": weights.value, "intermediate": intermediate.value}

    def __repr__(self) -> str:
        c = self._config
        size = f"{c.channels} x {c.image_height} x {c.image_width}"
        dtype = f"{self.dtype} from {self.weights} weights" if self.weights else self.dtype
        return f"Engine({printable(self.name)}, {dtype}, {size} -> {c.num_classes or c.embed_dim}, {self.isa})"

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
                 normalised here with the mean and std of the model's preprocessing. Of the size of the engine's
                 images, of any where the model computes positions for each (dynamic_img_size, NaFlexVit), and then
                 also a list of images [channels, height, width] of several sizes
        outputs  "logits" (features where the model has no head), "features" [B, C] after pooling and the last norm,
                 "tokens.I" [B, N, C] after block I, "attention.I" [B, H, N], the class token's attention to all tokens
                 in block I. Without pooling logits and features are those of every token: [B, N, ...]. Of a list
                 of images what has N is a list, of an entry for each image
        out      contiguous float32 tensors to write to, so that nothing is allocated: one, or a dict by name

        Raises ValueError for images or tensors that do not fit and for images with NaN or infinity; the engine can be
        used again after any error.
        """
        return self._forward(images, out, outputs, layout, self._here())

    def submit(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None = None,
        outputs: str | tuple[str, ...] | list[str] = "logits",
        layout: str = "NCHW",
    ) -> Future[Result]:
        """As a call, in the background; submitted calls run one after the other. Do not change the images until the
        result is there."""
        process = os.getpid()
        executor = self._executors.get(process)
        if executor is None:  # one of two that come here at once keeps its executor, which has no thread yet
            new = ThreadPoolExecutor(1, thread_name_prefix=f"vit-{self.name}")
            executor = self._executors.setdefault(process, new)
        return running.submit(executor, self._forward, images, out, outputs, layout, self._here())

    def _here(self) -> Any:
        """What a call takes from the thread it is made in: how many threads it may use."""
        return self.num_threads or min(torch.get_num_threads(), self._library.default_threads())

    def _forward(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None,
        outputs: str | tuple[str, ...] | list[str],
        layout: str,
        here: Any,
    ) -> Result:
        with running:
            check_layout(layout)
            names, single = (outputs,) if isinstance(outputs, str) else tuple(outputs), isinstance(outputs, str)
            if isinstance(images, (list, tuple)):
                found = self._each(images, out, names, layout, here)
            else:
                found = self._batch(images, out, names, single, layout, here)
            return found[names[0]] if single else found

    def _batch(
        self,
        images: Tensor | np.ndarray,
        out: Tensor | Mapping[str, Tensor] | None,
        names: tuple[str, ...],
        single: bool,
        layout: str,
        here: Any,
    ) -> dict[str, Tensor]:
        """The outputs of a batch of images of one size."""
        c, images = self._config, as_tensor(images)
        check_sizes(images, layout, (c.channels, c.image_height, c.image_width))
        given, images = native_images(images, layout)
        own = (given.height, given.width) == (c.image_height, c.image_width)
        grid = None if own or self._grids is None else self._grids.of(given.height, given.width)
        tokens = self._tokens if grid is None else c.prefix_tokens + grid[0].num_positions // c.embed_dim
        placed = places(names, out, single, lambda name: shape_of(c, name, given.batch, tokens), self.device)
        wanted = (native.Output * len(names))(
            *[native.Output(*self._kind(name), t.data_ptr(), t.numel()) for name, t in placed.items()]
        )
        if grid is None:
            status = self._library.forward(self._handle, given, wanted, len(wanted), here)
        else:
            status = self._library.forward_grid(self._handle, given, grid[0], wanted, len(wanted), here)
        self._library.check(status)
        del images, grid  # alive until here: the native call reads their memory
        return placed

    def _each(self, images: Any, out: Any, names: tuple[str, ...], layout: str, here: Any) -> dict[str, Any]:
        """The outputs of a list of images, those of one size as a batch."""
        c = self._config
        if out is not None:
            raise ValueError("vit.Engine: out goes with a batch of images, not with a list")
        groups = by_size(images)
        for (_, *size), (which, _) in groups.items():
            height, width = size[1:] if layout == "NCHW" else size[:2]
            if self._grids is None and (height, width) != (c.image_height, c.image_width):
                raise ValueError(
                    f"vit.Engine: images[{which[0]}] is {height} x {width}, the engine takes {c.image_height} x "
                    f"{c.image_width}; one that vit.Engine makes of a model with dynamic_img_size=True, or of a "
                    "NaFlexVit, takes any size"
                )
        results = [self._batch(batch, None, names, False, layout, here) for _, batch in groups.values()]
        pooled = c.pool != native.POOLS[""]
        whole = {name: pooled and name in ("logits", "features") for name in names}
        return of_each([which for which, _ in groups.values()], results, whole)

    def _kind(self, name: str) -> tuple[int, int]:
        """The kind and block of an output; ValueError for an unknown name."""
        kind, block = kind_of(name, self._config.depth)
        return native.OUTPUTS[kind], block

    def shape(self, output: str, batch: int) -> tuple[int, ...]:
        """The shape of an output for a batch of that size, of images of the engine's own size."""
        return shape_of(self._config, output, batch, self._tokens)

    # ---- time ----

    def profile(self, images: Images, calls: int = 5, layout: str = "NCHW") -> list[Phase]:
        """Where the time of a call goes: its phases in order, averaged over `calls` calls after one that warms up."""
        if isinstance(images, (list, tuple)):
            raise ValueError("vit.Engine: profile takes a batch of images of one size, not a list")
        c = native.Config.from_buffer_copy(self._config)
        self(images, layout=layout)
        c.image_height, c.image_width = images.shape[2:] if layout == "NCHW" else images.shape[1:3]
        with timed(self._library, self._handle) as seconds:
            for _ in range(calls):
                self(images, layout=layout)
        return phases(seconds, calls, flops(c, len(images)))
