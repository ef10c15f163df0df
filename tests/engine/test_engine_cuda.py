"""vit.Engine(device="cuda") without a GPU: its graphs are those of the emulator, everything else is what ships."""

from __future__ import annotations

import importlib
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import cuda_emulator
import draw
import pytest
import torch
import vit
from captures import READS, Graph
from conftest import USABLE
from cuda_emulator import Emulated
from rounding import WIDE, close
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vit.engine.cuda import CudaEngine, outputs_of
from vit.engine.graphs import WARM_UP, Cache, Captured, CudaGpu

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5, "mlp_ratio": 4}


class EmulatedGpu:
    """What graphs.CudaGpu is on a GPU; counts what it is asked for."""

    device = torch.device("cpu")
    architecture = "emulated"

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        self.forwards = self.captures = self.replays = self.inside = 0

    def here(self) -> int:
        return threading.get_ident()

    def at(self, caller: int) -> AbstractContextManager[Any]:
        return nullcontext()

    @contextmanager
    def turn(self, caller: int) -> Iterator[None]:
        self.inside += 1
        assert self.inside == 1, "two threads at once"
        yield
        self.inside -= 1

    def capture(self, forward: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], None], dict[str, Tensor]]:
        forward()
        graph = Graph(self.emulated)
        with graph.capture():
            results = forward()
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            graph.replay()

        return replay, results

    def memory(self) -> int:
        return 0


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    built = cuda_emulator.build(cuda_emulator.kept(request, tmp_path_factory))
    with cuda_emulator.registered(built, "cuda_engine") as record:
        yield record


@pytest.fixture
def engine_of(emulated: Emulated) -> Callable[..., Any]:
    """A CudaEngine whose GPU is the emulator's."""

    class OnEmulator(CudaEngine):
        backend = emulated.name

        def _place(self, device: torch.device) -> EmulatedGpu:
            return EmulatedGpu(emulated)

    return OnEmulator


def make(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    model = vit.create(name, **(SIZES | options), backend="reference", training=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw.randn(*parameter.shape) * 0.2)
    return model


def eager(model: nn.Module, emulated: Emulated, dtype: torch.dtype, images: Tensor) -> Tensor:
    """The model's own forward on the same kernels."""
    with torch.no_grad():
        other = vit.create("vit_tiny_patch16_224", **SIZES, backend=emulated.name, training=False)
        other.load_state_dict(model.state_dict())
        return other.to(dtype)(images.to(dtype)).float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_those_of_the_model_bit_for_bit(emulated, engine_of, dtype):
    model = make()
    engine = engine_of(model, dtype=dtype)
    assert (engine.dtype, engine.weights, engine.isa) == (dtype, None, "emulated")
    for batch in (2, 1, 2):
        images = draw.randn(batch, 3, 16, 16)
        logits = engine(images)
        assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
        assert torch.equal(logits, eager(model, emulated, getattr(torch, dtype), images))
    assert engine._gpu.captures == 2  # batches of 1 (when it was made) and 2
    assert engine._gpu.replays == 3


def test_a_result_stays_what_it_is(engine_of):
    engine, images = engine_of(make()), draw.randn(1, 3, 16, 16)
    first = engine(images)
    kept = first.clone()
    engine(images + 1)
    assert torch.equal(first, kept)
    assert not torch.equal(engine(images + 1), kept)


def test_images_in_every_form(engine_of):
    model = make()
    engine = engine_of(model)
    pixels = draw.randint(0, 256, (2, 3, 16, 16)).to(torch.uint8)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))
    expected = engine((pixels.float() / 255 - mean) / std)
    assert torch.equal(engine(pixels), expected)
    last = pixels.permute(0, 2, 3, 1)
    assert torch.equal(engine(last, layout="NHWC"), expected)
    assert torch.equal(engine(last.contiguous().numpy(), layout="NHWC"), expected)
    assert torch.equal(engine(pixels.contiguous(memory_format=torch.channels_last)), expected)
    assert engine(pixels[:0]).shape == (0, 5)


@pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": ""}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": "avg"}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_base_patch16_siglip_224", {"embed_dim": 48, "num_heads": 3}),
        ("naflexvit_base_patch16_gap", {}),
    ],
)
def test_outputs_are_those_of_the_engine_on_the_cpu(engine_of, name, options):
    model = make(name, **options)
    engine, other = engine_of(model), vit.Engine(model)
    images = draw.randn(2, 3, 16, 16)
    names = ("logits", "features", "tokens.0", "tokens.1")
    if model.num_prefix_tokens:
        names = (*names, "attention.0", "attention.1")
    else:
        with pytest.raises(ValueError, match=r"attention\.1 is of the first token, and the network has none before"):
            engine(images, outputs="attention.1")
    results, expected = engine(images, outputs=names), other(images, outputs=names)
    assert list(results) == list(names)
    for key in names:
        assert tuple(results[key].shape) == engine.shape(key, 2) == other.shape(key, 2)
        close(results[key], expected[key].double(), WIDE)
    place = torch.empty(engine.shape("tokens.1", 2))
    assert engine(images, out=place, outputs="tokens.1") is place
    assert torch.equal(place, results["tokens.1"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("vit_tiny_patch16_224", "int8"), ("eva02_tiny_patch14_224", "int8"), ("vit_small_patch16_dinov3", "fp8")],
)
def test_a_quantized_model(engine_of, emulated, name, dtype):
    model = vit.quantize(make(name), dtype)
    images = draw.randn(2, 3, 16, 16)
    engine = engine_of(model, dtype="bfloat16")
    model.backend = emulated.name
    with torch.no_grad():
        expected = model.to(torch.bfloat16)(images.bfloat16()).float()
    assert torch.equal(engine(images), expected)


def test_threads_and_submit(engine_of):
    engine = engine_of(make())
    images = [draw.randn(1 + i % 2, 3, 16, 16) for i in range(6)]
    expected = [engine(x) for x in images]
    found: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: engine(images[i])})) for i in range(6)]
    for thread in threads:
        thread.start()
    futures = [engine.submit(x) for x in images]
    for thread in threads:
        thread.join()
    for i, logits in enumerate(expected):
        assert torch.equal(found[i], logits)
        assert torch.equal(futures[i].result(), logits)


def test_the_engine_goes_on_after_an_error(engine_of):
    engine, images = engine_of(make(), max_batch=2), draw.randn(1, 3, 16, 16)
    logits = engine(images)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (draw.randn(3, 3, 16, 16), {}, "the batch is 3, the engine was made for at most 2"),
        (draw.randn(1, 3, 16, 8), {}, "images are 16 x 8, the engine takes 16 x 16"),
        (draw.randn(3, 16, 16), {}, r"add the batch dimension: images\[None\]"),
        (draw.randn(1, 16, 16, 3), {}, 'pass layout="NHWC"'),
        (images.half(), {}, "images are float16; allowed are float32"),
        (images, {"layout": "HWC"}, "layout 'HWC' is not one of NCHW, NHWC"),
        (images, {"outputs": "tokens.2"}, "unknown output 'tokens.2'; there are logits"),
        (images, {"outputs": ()}, "at least one"),
        (images, {"out": torch.empty(1, 4)}, r"out for 'logits' must be contiguous float32 \[1, 5\] on the CPU"),
        (images.to("meta"), {}, r"images are on meta, the engine runs on the CPU; use images.cpu\(\)"),
    ]
    for given, options, text in wrong:
        with pytest.raises(ValueError, match=text):
            engine(given, **options)
    assert torch.equal(engine(images), logits)


class Traffic(TorchDispatchMode):
    """Operations between the CPU and a GPU, and those that read a number of one: a capture allows none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        places = {t.device.type for t in tree_leaves((args, kwargs, results)) if isinstance(t, Tensor)}
        if len(places) > 1 or func._schema.name in READS:
            self.seen.append(func._schema.name)
        return results


#: One of each kind of positions, tokens, MLPs and pooling.
NAMES = ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "flexivit_small", "vit_small_patch14_reg4_dinov2"]
NAMES += ["vit_small_patch16_dinov3", "eva02_tiny_patch14_224", "eva_giant_patch14_224", "vit_base_patch16_siglip_224"]
NAMES += ["vit_base_patch16_clip_224", "naflexvit_base_patch16_gap", "naflexvit_base_patch16_par_gap"]


@pytest.mark.parametrize("name", NAMES)
def test_between_kernels_a_forward_asks_nothing_of_a_gpu(name):
    """With PyTorch's fake tensors of a GPU, which have no values."""
    with FakeTensorMode():
        model = vit.create(name, depth=1, backend="reference", training=False, device="cuda")
        images = torch.empty(2, model.patch_embed.in_chans, *model.patch_embed.img_size, device="cuda")
        with torch.no_grad(), Traffic() as traffic:
            model(images)
            outputs_of(model, images, ("logits", "features", "tokens.0", "attention.0"))
        with Traffic() as copied:
            torch.ones(2, device="cpu").to("cuda")
    assert not traffic.seen
    assert copied.seen


def test_later_changes_of_the_model_have_no_effect(engine_of):
    model, images = make(), draw.randn(1, 3, 16, 16)
    engine = engine_of(model)
    before = engine(images)
    with torch.no_grad():
        model.head.weight.zero_()
    assert torch.equal(engine(images), before)
    assert model.backend == "reference"


def test_autocast_and_inference_mode_around_a_call_change_nothing(engine_of):
    engine, images = engine_of(make()), draw.randn(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        first = engine(images)
    assert torch.equal(engine(images), first)
    assert not first.is_inference()
    first += 1


def test_tf32_is_asked_for_in_every_call(engine_of):
    engine, images = engine_of(make()), draw.randn(1, 3, 16, 16)
    exact = engine(images)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert not torch.equal(engine(images), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(engine(images), exact)
    assert engine._gpu.captures == 2


def test_memory_of_graphs_is_bounded():
    made: list[int] = []

    def make_one(key: int) -> Callable[[], Captured]:
        def make() -> Captured:
            made.append(key)
            return Captured(torch.empty(key), lambda: None, {})

        return make

    cache = Cache(most=2)
    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get(key, make_one(key)).images.numel() == key
    assert made == [1, 2, 3, 2]
    assert list(cache.graphs) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        cache.get(4, lambda: 1 // 0)
    assert list(cache.graphs) == [2]


def hooked() -> nn.Module:
    model = make()
    model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: nn.Linear(3, 4), "it is no vit.VisionTransformer"),
        (hooked, "blocks.1.mlp has a forward hook, which a graph would call once"),
        (lambda: make().to("meta"), "tensors without values"),
        (lambda: make(embed_dim=600, num_heads=2), "head dimension|head_dim|300"),
    ],
)
def test_what_it_cannot_run_is_a_reason_at_construction(engine_of, model, text):
    with pytest.raises(vit.BackendError, match=text):
        engine_of(model())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dtype": "int8"}, r"dtype 'int8' is not one of float32, bfloat16, float16 on a GPU; quantize the model: vit"),
        ({"dtype": "float64"}, "dtype 'float64' is not one of float32, bfloat16, float16 on a GPU$"),
        ({"num_threads": 2}, "num_threads belongs to device='cpu'$"),
        ({"calibrate": torch.zeros(1)}, "calibrate belongs to device='cpu'; quantize the model"),
        ({"exclude": ["blocks.0.mlp.fc1"]}, "exclude belongs to device='cpu'; quantize the model"),
        ({"weights": "int4"}, "weights belongs to device='cpu'; quantize the model"),
        ({"max_batch": 0}, "max_batch must be positive or None, got 0"),
    ],
)
def test_options_of_another_device_are_refused_by_name(engine_of, options, text):
    for make_one in (engine_of, lambda *a, **o: vit.Engine(*a, **o, device="cuda")):
        with pytest.raises(ValueError, match=text):
            make_one(make(), **options)


def test_what_only_the_engine_of_the_cpu_has_is_refused(engine_of, tmp_path):
    engine = engine_of(make())
    with pytest.raises(vit.BackendError, match="nothing packed to save"):
        engine.save(tmp_path / "model.vit")
    with pytest.raises(vit.BackendError, match=r"torch\.profiler"):
        engine.profile(draw.randn(1, 3, 16, 16))
    with pytest.raises(TypeError, match="make another one from the model"):
        pickle.dumps(engine)
    assert "float32, 3 x 16 x 16 -> 5" in repr(engine)
    assert engine.memory["weights"] == sum(p.nbytes for p in make().parameters())
    assert engine.config["depth"] == 2
    assert isinstance(engine, vit.Engine)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_without_a_gpu_it_is_an_error_with_the_reason_and_a_way_out(device):
    with pytest.raises(vit.BackendError, match=r"device='cuda.* cannot be used: .+\. Use device='cpu'"):
        vit.Engine(make(), device=device)


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device 'xpu' is not one of cpu, cuda"):
        vit.Engine(make(), device="xpu")


def test_what_is_asked_of_pytorch(monkeypatch):
    """The order of CUDA calls: warm-up on the engine's stream, then a capture there into the shared pool; a call waits
    for the caller's stream, and the caller's stream for the call, after an error too."""
    log: list[Any] = []
    real = inspect.signature(torch.cuda.graph.__init__).parameters
    assert list(real)[:5] == ["self", "cuda_graph", "pool", "stream", "capture_error_mode"]
    assert {"replay", "pool"} <= set(dir(torch.cuda.CUDAGraph))
    assert hasattr(torch.cuda.Stream, "wait_stream")

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(of: Stream) -> Iterator[None]:
        log.append(f"on {of.name}")
        yield
        log.append(f"off {of.name}")

    @contextmanager
    def graph(*arguments: Any, **options: Any) -> Iterator[None]:
        log.append(("capture", arguments[1], arguments[2].name, options))
        assert CudaGpu.capturing.locked()
        yield

    fake = SimpleNamespace(
        Stream=lambda device: Stream("the engine's"),
        current_stream=lambda device: Stream("the caller's"),
        stream=stream,
        graph=graph,
        CUDAGraph=lambda: SimpleNamespace(replay="replay"),
        graph_pool_handle=lambda: (0, 7),
        get_device_capability=lambda device: (9, 0),
        is_current_stream_capturing=lambda: False,
        memory_snapshot=lambda: [
            {"total_size": size, "segment_pool_id": pool} for size, pool in ((3, (0, 7)), (4, (0, 7)), (100, (0, 0)))
        ],
    )
    graphs = importlib.import_module("vit.engine.graphs")
    monkeypatch.setattr(graphs.torch, "cuda", fake)
    gpu = CudaGpu(torch.device("cuda", 1))
    assert (gpu.architecture, gpu.memory()) == ("sm_90", 7)
    here = gpu.here()
    log.clear()
    with gpu.turn(here):
        replay, results = gpu.capture(lambda: log.append("forward") or {})
    options = {"capture_error_mode": "thread_local"}
    entered = ["the engine's waits for the caller's", "on the engine's"]
    left = ["off the engine's", "the caller's waits for the engine's"]
    assert log == [*entered, *["forward"] * WARM_UP, ("capture", (0, 7), "the engine's", options), "forward", *left]
    assert (replay, results) == ("replay", {})
    log.clear()
    with pytest.raises(KeyError), gpu.turn(here):
        raise KeyError
    assert log[-1] == left[-1]
    fake.is_current_stream_capturing = lambda: True
    with pytest.raises(RuntimeError, match="cannot become part of another one; capture the model's own forward"):
        gpu.here()


#: What the tests above cannot see: PyTorch's own streams, pools and captures.
on_a_gpu = pytest.mark.skipif("cuda" not in USABLE, reason="the cuda backend is not usable here")


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_replays_the_bits_of_the_model(dtype):
    model = vit.create("vit_tiny_patch16_224", backend="cuda", training=False, device="cuda")
    engine, side = vit.Engine(model, dtype=dtype, device="cuda"), torch.cuda.Stream()
    model = model.to(getattr(torch, dtype))
    batches = [draw.randn(count, 3, 224, 224) for count in (1, 5, 1, 2, 5)]
    with torch.no_grad():
        expected = [model(batch.to("cuda", getattr(torch, dtype))).float() for batch in batches]
    found = [engine(batch) for batch in batches]
    with torch.cuda.stream(side):
        found += [engine(batch.cuda()) for batch in batches]
    found += [future.result() for future in [engine.submit(batch) for batch in batches]]
    torch.cuda.synchronize()
    for got, wanted in zip(found, expected * 3, strict=True):
        assert torch.equal(got, wanted)
    assert engine.memory["intermediate"] > 0


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_replays_training_steps():
    def trained(capture: bool) -> list[Tensor]:
        draw.restart("training")
        model = draw.fill(vit.create("vit_tiny_patch16_224", depth=2, backend="cuda", device="cuda"), 0.1)
        images, labels = torch.zeros(4, 3, 224, 224, device="cuda"), torch.arange(4, device="cuda")
        optimizer = vit.optim.AdamW(model.parameters(), max_norm=1.0, capturable=True, backend="cuda")

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        if capture:
            with torch.cuda.graph(graph):
                step()
        for rate in (1e-3, 5e-4, 1e-4):
            images.copy_(draw.randn(4, 3, 224, 224))
            optimizer.param_groups[0]["lr"].fill_(rate)
            (graph.replay if capture else step)()
        return [parameter.detach().clone() for parameter in model.parameters()]

    for got, wanted in zip(trained(True), trained(False), strict=True):
        assert torch.equal(got, wanted)
