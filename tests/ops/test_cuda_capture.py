"""Captures of the CUDA kernels as graphs, without a GPU: what a capture does not allow is not done in one, and a replay
gives the bits of a call."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator

import cuda_emulator
import draw
import pytest
import torch
import vit
from captures import CaptureError, Graph, replayed
from cuda_emulator import PATHS, Emulated
from optim_helpers import KINDS, SETTINGS
from quantized_helpers import FORMS, layer
from torch import Tensor
from vit.optim import AdamW
from vit.parity import Case, backend_ops, cases
from vit.parity.problems import DEFINITIONS, build
from vit.parity.runner import _allow_tf32, call

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

CASES = [case for case in cases("cuda") if case.group != "large"]


@pytest.fixture(scope="module")
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulated]:
    """The module of test_cuda_host.py."""
    built = cuda_emulator.build(cuda_emulator.kept(request, tmp_path_factory))
    with cuda_emulator.registered(built, "cuda_captured") as record:
        yield record


@pytest.fixture(autouse=True)
def _first_device(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "emulated" in request.fixturenames:
        emulated = request.getfixturevalue("emulated")
        emulated.use("automatic")
        emulated.device = 0


def check(emulated: Emulated, case: Case) -> None:
    problem, ops = build(case), backend_ops(emulated.name)
    with _allow_tf32(case.tf32):
        replayed(
            emulated,
            lambda: [t.contiguous() for t in call(problem, lambda t: DEFINITIONS[case.op].call(ops, case, t)).values()],
            [x for x in problem.tensors.values() if case.layout != "expanded"],
        )


@pytest.mark.parametrize(
    ("case", "path"),
    [(case, list(PATHS)[i % 3]) for i, case in enumerate(CASES[4::31])],
    ids=lambda value: getattr(value, "id", value),
)
def test_ops(emulated, case, path):
    emulated.use(path)
    check(emulated, case)


@pytest.mark.parametrize("form", **FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_of_8_bits(emulated, dtype, form):
    x, (weight, scale), bias = draw.randn(33, 40).to(dtype), layer(24, 40, form), draw.randn(24)
    routine = getattr(vit.ops, form.routine)
    replayed(emulated, lambda: [routine(x, weight, scale, bias, backend=emulated.name)], [x])


#: One block of every kind of its parts: packed and three projections, rotary positions, gated MLPs, RMSNorm.
MODELS = {
    "vit_tiny_patch16_224": {},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_giant_patch14_dinov2": {"global_pool": "avg"},
    "vit_base_patch16_siglip_224": {},
}


def small(emulated: Emulated, name: str, dtype: torch.dtype, training: bool = False, **options) -> torch.nn.Module:
    sizes = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 5,
        "mlp_ratio": 4,
    }
    model = vit.create(name, **(sizes | options), backend=emulated.name, training=training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(draw.randn(*parameter.shape) * 0.1)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_forward_of_a_model(emulated, name, dtype):
    model, images = small(emulated, name, dtype, **MODELS[name]), draw.randn(3, 3, 16, 16).to(dtype)
    with torch.no_grad():
        replayed(emulated, lambda: [model(images)], [images])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_a_model(emulated, dtype):
    model, images = small(emulated, "vit_tiny_patch16_224", dtype, training=True), draw.randn(3, 3, 16, 16).to(dtype)
    labels = torch.tensor([1, 0, 3])

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)  # so that gradients lie in the graph's memory, as PyTorch's guide says
        loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    replayed(emulated, step, [images])


def test_what_was_not_known_before_a_capture_is_refused_in_it(emulated):
    """So the tests above see what they are there for: attributes, the permission of shared memory, a new context."""
    emulated.exported.vit_emulator_reset(0b1)
    q = draw.randn(1, 197, 1, 64, dtype=torch.bfloat16)
    emulated.device = 1
    with pytest.raises(CaptureError, match="cudaSetDevice"), Graph(emulated).capture():
        vit.ops.gelu(q, backend=emulated.name)
    emulated.exported.vit_emulator_reset(0b11)
    with pytest.raises(CaptureError, match="cudaDeviceGetAttribute"), Graph(emulated).capture():
        vit.ops.attention(q, q, q, backend=emulated.name)
    for x in (q[:, :20], q[:, :20].float()):  # which ask for all that is known of a device
        vit.ops.attention(x, x, x, backend=emulated.name)
    with pytest.raises(CaptureError, match=r"allow: cudaFuncSetAttribute$"), Graph(emulated).capture():
        vit.ops.attention(q, q, q, backend=emulated.name)
    with pytest.raises(CaptureError, match="reads a number"), Graph(emulated).capture():
        float(q.sum())


def test_an_attribute_asked_for_in_every_launch_is_noticed(tmp_path):
    """The mutation that the emulated runtime has to see, in the code that launches every kernel."""
    csrc = tmp_path / "csrc"
    shutil.copytree(cuda_emulator.CSRC, csrc)
    program = tmp_path / "capture_test"
    here = cuda_emulator.HERE
    command = [cuda_emulator.compiler(), "-std=c++17", "-O0", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    command += [f"-I{csrc}", f"-I{csrc / 'cuda'}", "-include", str(here / "hopper_instructions.cuh"), "-x", "c++"]
    command += ['-DVIT_CUDA_ARCHITECTURES="emulated"', '-DVIT_CUDA_COMPILER="emulated"', "-DVIT_CUDA_WITH_HOPPER=1"]
    command += [str(csrc / "cuda/gelu.cu"), str(csrc / "cuda/runtime.cu"), str(csrc / "check.cpp")]
    command += [str(here / "emulator.cpp"), str(here / "capture_test.cpp"), "-o", str(program)]
    cuda_emulator.run(command)
    assert cuda_emulator.run([str(program)]) == "refused: \n"
    launch = csrc / "cuda/runtime.cuh"
    whole = "  check_launch(cudaLaunchKernelEx("
    text = launch.read_text()
    assert whole in text
    question = "  cudaFuncAttributes found;\n"
    question += "  went_well(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)));\n"
    launch.write_text(
        text.replace(whole, question + whole).replace('#include "vit.h"', '#include "vit.h"\n#include "driver.cuh"')
    )
    cuda_emulator.run(command)
    assert cuda_emulator.run([str(program)]) == "refused: cudaFuncGetAttributes\n"


@pytest.mark.parametrize(("dtype", "state"), [*KINDS, (torch.float16, "8bit")])
def test_a_step_of_adamw_that_can_be_captured(emulated, dtype, state):
    """As one that cannot, to the roundings of a step."""

    def stepped(**options) -> list[Tensor]:
        draw.restart("steps")
        parameters = [torch.nn.Parameter(draw.randn(size).to(dtype)) for size in (5000, 7)]
        optimizer = AdamW(parameters, **SETTINGS, state=state, max_norm=30.0, ema_decay=0.9, **options)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = draw.randn(*parameter.shape).to(dtype)
            optimizer.step()
        return [p.detach() for p in parameters] + [t for p in parameters for t in optimizer.state[p].values()]

    names = {"backend": emulated.name}
    for found, wanted in zip(stepped(**names, capturable=True), stepped(**names), strict=True):
        if wanted.dtype == torch.uint8:
            assert (found.int() - wanted.int()).abs().max() <= 1
        else:
            bound = 8 * torch.finfo(wanted.dtype).eps
            torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)


@pytest.mark.slow
def test_training_steps(emulated):
    """Forward, backward and AdamW as one graph: each replay is the next step, with the learning rate of that moment."""
    batches, rates = draw.randn(3, 2, 3, 16, 16), (3e-3, 1e-3, 5e-4)
    labels = torch.tensor([1, 0])

    def trained(capture: bool) -> list[Tensor]:
        draw.restart("training")
        model = small(emulated, "vit_tiny_patch16_224", torch.float32, training=True, embed_dim=32)
        images = batches[0].clone()
        options = {"max_norm": 1.0, "ema_decay": 0.9, "capturable": True, "backend": emulated.name}
        optimizer = AdamW(model.parameters(), **(SETTINGS | options))

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        graph, losses = Graph(emulated), []
        for i, (batch, rate) in enumerate(zip(batches, rates, strict=True)):
            images.copy_(batch)
            optimizer.param_groups[0]["lr"].fill_(rate)
            if i == 1 and capture:
                with graph.capture():
                    loss = step()
            if i and capture:
                graph.replay()
            else:
                loss = step()
            losses.append(loss.clone())
        states = [t for p in model.parameters() for t in optimizer.state[p].values()]
        return [*losses, *(p.detach() for p in model.parameters()), *states]

    for found, wanted in zip(trained(True), trained(False), strict=True):
        assert torch.equal(found, wanted)


def test_a_step_whose_replays_would_repeat_the_first_is_refused(emulated, monkeypatch):
    parameter = torch.nn.Parameter(draw.randn(10))
    parameter.grad = draw.randn(10)
    before = parameter.detach().clone()
    monkeypatch.setattr(importlib.import_module("vit.optim.adamw"), "_capturing", lambda device: True)
    plain, capturable = (AdamW([parameter], max_norm=1.0, capturable=c, backend=emulated.name) for c in (False, True))
    with pytest.raises(RuntimeError, match=r"number of the step would stay what they are now; use .*capturable=True"):
        plain.step()
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        capturable.step()
    capturable.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match=r"lr is a number of the CPU .* group\['lr'\]\.fill_"):
        capturable.step()
    assert torch.equal(parameter, before)
    assert not plain.state[parameter]
    assert not capturable.state[parameter]


@pytest.mark.parametrize("answer", [True, False])
def test_who_asks_whether_a_capture_is_under_way(monkeypatch, answer):
    asked = importlib.import_module("vit.optim.adamw")._capturing
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answer)
    assert asked(torch.device("cuda", 1)) is answer
    assert not asked(torch.device("cpu"))


def test_a_capturable_state_is_saved_and_loaded(emulated):
    def made() -> tuple[torch.nn.Parameter, AdamW]:
        draw.restart("state")
        parameter = torch.nn.Parameter(draw.randn(10))
        parameter.grad = draw.randn(10)
        return parameter, AdamW([parameter], capturable=True, backend=emulated.name)

    (one, first), (two, second) = made(), made()
    first.step()
    with torch.no_grad():
        two.copy_(one)
    second.load_state_dict(first.state_dict())
    for optimizer in (first, second):
        optimizer.step()
    assert torch.equal(one, two)
    assert isinstance(second.param_groups[0]["lr"], Tensor)
    assert second.param_groups[0]["lr"] is not first.param_groups[0]["lr"]
