"""vit.Engine(device="cuda"): a model's own forward on the CUDA kernels, replayed as graphs."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules import module as everywhere

from ..backends import BackendError, get
from ..backends.cuda import tf32_allowed
from ..model.rows import attention_rows_of
from ..model.torch_layers import call
from ..model.vision_transformer import VisionTransformer
from ..support.text import printable
from . import native
from .engine import Engine, Images, Result
from .graphs import Cache, Captured, CudaGpu, Gpu, Results
from .images import as_tensor, check_layout, check_sizes
from .outputs import kind_of, places
from .profile import Phase
from .shutdown import calls as running

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class CudaEngine(Engine, device="cuda"):
    """vit.Engine on a GPU."""

    #: Whose kernels run.
    backend = "cuda"

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
        device: str | torch.device = "cuda",
    ) -> None:
        self._dtype = str(dtype).removeprefix("torch.")
        _check_options(self._dtype, num_threads=num_threads, calibrate=calibrate, exclude=exclude, weights=weights)
        native.count("max_batch", max_batch, 63)
        self.max_batch, self.num_threads = max_batch, None
        self._gpu = self._place(torch.device(device))
        self.device = self._gpu.device
        with self._gpu.turn(self._gpu.here()):  # memory of this stream, given back to it after its last work
            self._model = _frozen(model, self.backend, self.device, DTYPES[self._dtype])
        self._name, self._isa, self._weights = self._model.name, self._gpu.architecture, None
        self._preprocess, self._class_names = self._model.preprocess, self._model.class_names
        self._executors: dict[int, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()  # one replay after another: they share static tensors
        self._cache = Cache()
        self._size = (self._model.patch_embed.in_chans, *self._model.patch_embed.img_size)
        with running, self._gpu.turn(self._gpu.here()):
            self._statistics = [
                torch.tensor(values, device=self.device).view(-1, 1, 1)
                for values in (self._model.preprocess.mean, self._model.preprocess.std)
            ]
            self._shapes = self._tried()
            self._graph(max_batch or 1, ("logits",), torch.float32)

    def _place(self, device: torch.device) -> Gpu:
        """The GPU; BackendError when there is none of ours."""
        why = get(self.backend).unavailable()
        if why is None and (device.index or 0) >= torch.cuda.device_count():
            why = f"this machine has {torch.cuda.device_count()} CUDA devices"
        if why is not None:
            raise BackendError(
                f"vit: Engine(device='{device}') cannot be used: {why}. Use device='cpu', or the model itself"
            )
        index = torch.cuda.current_device() if device.index is None else device.index
        return CudaGpu(torch.device("cuda", index))

    @torch.inference_mode()
    def _tried(self) -> dict[str, tuple[int, ...]]:
        """The shape of every kind of output of one image, by computing it: a model that cannot be run says so now."""
        image = torch.zeros(1, *self._size, device=self.device)
        attention = ("attention.0",) if self._model.num_prefix_tokens else ()
        results = self._compute(image, ("logits", "features", "tokens.0", *attention))
        return {name.partition(".")[0]: tuple(result.shape[1:]) for name, result in results.items()}

    # ---- what it is ----

    @property
    def dtype(self) -> str:
        """ "float32", "bfloat16" or "float16"."""
        return self._dtype

    @property
    def config(self) -> dict[str, Any]:
        """Sizes and options of the network."""
        return asdict(self._model.options)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the weights and of what graphs compute in, images and results included."""
        own = [*self._model.parameters(), *self._model.buffers()]
        with self._lock:
            images = sum(graph.images.nbytes for graph in self._cache.graphs.values())
        return {"weights": sum(t.nbytes for t in own), "intermediate": self._gpu.memory() + images}

    def __repr__(self) -> str:
        size = " x ".join(map(str, self._size))
        last = self._shapes["logits"][-1]
        return f"Engine({printable(self.name)}, {self.dtype}, {size} -> {last}, {self.device}, {self.isa})"

    def save(self, path: Any) -> NoReturn:
        """Refused: nothing is packed."""
        _refuse("has nothing packed to save; save the model's weights (model.state_dict())")

    def profile(self, images: Any, calls: int = 5, layout: str = "NCHW") -> list[Phase]:
        """Refused: a graph has no phases."""
        _refuse("runs graphs, whose kernels torch.profiler shows")

    def __reduce__(self) -> NoReturn:
        raise TypeError("vit.Engine: an engine cannot be copied or pickled; make another one from the model")

    # ---- forward ----

    def shape(self, output: str, batch: int) -> tuple[int, ...]:
        """The shape of an output for a batch of that size."""
        kind, _ = kind_of(output, len(self._model.blocks))
        if kind not in self._shapes:
            raise ValueError(f"vit.Engine: {output} is of the first token, and the network has none before its patches")
        return batch, *self._shapes[kind]

    def _here(self) -> Any:
        return self._gpu.here()

    def _forward(
        self,
        images: Images,
        out: Tensor | Mapping[str, Tensor] | None,
        outputs: str | tuple[str, ...] | list[str],
        layout: str,
        here: Any,
    ) -> Result:
        with running, torch.inference_mode(False):  # results are the caller's
            given, single = self._given(images, layout), isinstance(outputs, str)
            names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
            with self._gpu.at(here):
                placed = places(names, out, single, lambda name: self.shape(name, len(given)), self.device)
            if len(given):
                with self._lock, self._gpu.turn(here):
                    self._run(given, names, placed)
            return placed[names[0]] if single else placed

    def _given(self, images: Images, layout: str) -> Tensor:
        """The images, checked, as a view [B, C, H, W]."""
        check_layout(layout)
        if isinstance(images, (list, tuple)):
            raise TypeError(
                "vit.Engine: images of several sizes in a list are for device='cpu', or the model itself; a graph has "
                "one size"
            )
        images = as_tensor(images, self.device)
        check_sizes(images, layout, self._size)
        if layout == "NHWC":
            images = images.permute(0, 3, 1, 2)
        sizes, wanted = (" x ".join(map(str, size)) for size in (images.shape[2:], self._size[1:]))
        if sizes != wanted:
            raise ValueError(f"vit.Engine: images are {sizes}, the engine takes {wanted}")
        if self.max_batch is not None and len(images) > self.max_batch:
            raise ValueError(
                f"vit.Engine: the batch is {len(images)}, the engine was made for at most {self.max_batch}"
            )
        return images

    @torch.inference_mode()
    def _run(self, images: Tensor, names: tuple[str, ...], places: Mapping[str, Tensor]) -> None:
        graph = self._graph(len(images), names, images.dtype)
        graph.images.copy_(images)
        graph.replay()
        for name in names:  # out of the graph's memory, which the next replay writes to
            places[name].copy_(graph.results[name])

    @torch.inference_mode()
    def _graph(self, batch: int, names: tuple[str, ...], pixels: torch.dtype) -> Captured:
        names = tuple(sorted(names))

        def make() -> Captured:
            images = torch.zeros(batch, *self._size, dtype=pixels, device=self.device)
            return Captured(images, *self._gpu.capture(lambda: self._compute(images, names)))

        # Whether products may be in TF32 is read when they are launched, and so becomes part of a graph.
        return self._cache.get((batch, names, pixels, tf32_allowed()), make)

    def _compute(self, images: Tensor, names: tuple[str, ...]) -> Results:
        """The forward of images as the engine is given them."""
        x = images
        if x.dtype == torch.uint8:
            mean, std = self._statistics
            x = (x.float() / 255 - mean) / std
        with torch.autocast(self.device.type, enabled=False):
            return outputs_of(self._model, x.to(DTYPES[self._dtype]), names)


def outputs_of(model: Any, images: Tensor, names: tuple[str, ...]) -> Results:
    """The forward of a model, as far as the outputs need it."""
    if names == ("logits",):
        return {"logits": model(images)}
    results: Results = {}
    tokens, given = model.start(images)
    for i, (block, more) in enumerate(zip(model.blocks, given, strict=True)):
        if f"attention.{i}" in names:
            rows = attention_rows_of(model, block.attn.head_dim)
            results[f"attention.{i}"] = block.probabilities(tokens, [0], rows, **more).squeeze(2)
        tokens = model._run(block, tokens, **{**model.NO_MASKS, **more})
        if f"tokens.{i}" in names:
            results[f"tokens.{i}"] = tokens
    if "logits" in names or "features" in names:
        tokens = call(model.ops, model.norm, tokens)
        for name in {"logits", "features"}.intersection(names):
            results[name] = model.forward_head(tokens, pre_logits=name == "features")
    return results


def _check_options(dtype: str, **others: Any) -> None:
    """ValueError for a dtype that GPUs do not compute in, and for options of the CPU's engine."""
    quantized = "quantize the model: vit.Engine(vit.quantize(model, 'int8'), device='cuda')"
    if dtype not in DTYPES:
        hint = f"; {quantized}" if dtype == "int8" else ""
        raise ValueError(f"vit.Engine: dtype {dtype!r} is not one of {', '.join(DTYPES)} on a GPU{hint}")
    for name, value in others.items():
        if value is not None and not (name == "exclude" and not len(value)):
            hint = "" if name == "num_threads" else f"; {quantized}"
            raise ValueError(f"vit.Engine: {name} belongs to device='cpu'{hint}")


def _refuse(why: str) -> NoReturn:
    raise BackendError(f"vit: an engine on a GPU {why}")


def _frozen(model: nn.Module, backend: str, device: torch.device, dtype: torch.dtype) -> VisionTransformer:
    """A copy of the model for the forward alone, planned for the backend; BackendError with the reasons why not."""
    if reasons := list(_refusals(model)):
        raise BackendError(
            f"vit: the engine cannot run this {type(model).__name__}\n" + "\n".join(f"  {reason}" for reason in reasons)
        )
    frozen: Any = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.backend = backend
    frozen.bind(frozen.plan_for(device, dtype, training=False))  # before anything moves
    frozen = frozen.to(device, dtype)
    frozen.replan(training=False)
    return frozen


def _refusals(model: nn.Module) -> Iterator[str]:
    """What a graph of the forward would pass over."""
    if not isinstance(model, VisionTransformer):
        yield "it is no vit.VisionTransformer; vit.create and vit.from_timm make one"
        return
    hook = "which a graph would call once, when it is made, and never again; remove it"
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        yield f"a forward hook for all modules is registered, {hook}"
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            yield f"{path or 'the model'} has a forward hook, {hook}"
        if any(t.is_meta for t in (*module._parameters.values(), *module._buffers.values()) if t is not None):
            yield f"{path or 'the model'} has tensors without values (on the meta device)"
