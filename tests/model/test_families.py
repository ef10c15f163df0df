"""What holds for the models of every file of timm: autocast, adapters, exported programs, what blocks are given."""

from __future__ import annotations

import warnings
from typing import Any

import draw
import pytest
import timm
import torch
import vit
from conftest import USABLE
from rounding import close
from torch import Tensor, nn
from vit.support.random import normal

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
FAMILIES = {
    "vit_tiny_patch16_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "naflexvit_base_patch16_gap": {key: value for key, value in SMALL.items() if key != "img_size"},
}
family = pytest.mark.parametrize("name", FAMILIES)


def images(count: int = 2) -> Tensor:
    return normal((count, 3, 32, 32), "images")


def pair(name: str, backend: str = "auto") -> tuple[nn.Module, nn.Module]:
    """timm's model and ours, with the same weights, none of them at zero or one."""
    theirs = timm.create_model(name, **FAMILIES[name])
    for parameter in theirs.parameters():
        draw.normal_(parameter, std=0.2)
    ours = vit.create(name, backend=backend, device="cpu", **FAMILIES[name])
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_on_what_was_chosen_by_itself(name, dtype):
    """A dtype that the kernels of "auto" have not is PyTorch's; a backend that was named says what it lacks."""
    _, ours = pair(name)
    exact, x = ours(images()).detach(), images()
    with torch.autocast("cpu", dtype):
        y = ours.train()(x)
        y = y[0] if isinstance(y, tuple) else y
        y.float().square().sum().backward()
        got = ours.eval()(x)
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all()) for p in ours.parameters())
    close(got, exact)
    if dtype == torch.float16 and "cpu" in USABLE:
        _, named = pair(name, "cpu")
        with torch.autocast("cpu", dtype), pytest.raises(vit.BackendError, match="float16 is not one of float32"):
            named(x)


def test_a_compiled_model_runs_under_autocast_to_a_dtype_that_no_kernel_has():
    dtype = torch.float16
    _, ours = pair("vit_tiny_patch16_224")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype), torch.no_grad():
        expected = ours(images())
        assert torch.equal(compiled(images()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_models_run_under_autocast(dtype):
    _, ours = pair("vit_tiny_patch16_224")
    exact = vit.quantize(ours, "int8")
    expected = exact(images())
    with torch.autocast("cpu", dtype), torch.no_grad():
        got = exact(images()).float()
    # 8-bit inputs round to other steps of 1/127 of a row's largest where they were rounded before.
    assert torch.nn.functional.cosine_similarity(got, expected).min() > 0.99


@family
def test_blocks_are_given_what_timm_gives_them(name):
    def given(model: nn.Module) -> list[Any]:
        calls: list[Any] = []

        def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(
                (len(args), {k: v if v is None or isinstance(v, bool) else v.shape for k, v in kwargs.items()})
            )

        for block in model.blocks:
            block.register_forward_pre_hook(keep, with_kwargs=True)
        model(images())
        model.forward_intermediates(images())
        return calls

    theirs, ours = pair(name)
    assert given(ours) == given(theirs)


@family
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["qkv", "fc2"])
def test_an_adapter_acts_before_it_is_merged(name, target):
    """Also where timm passes it over: EVA's qkv, of which timm reads the weight alone."""
    peft = pytest.importorskip("peft")
    _, ours = pair(name)
    plain = ours(images()).detach()
    torch.manual_seed(7)
    model = peft.get_peft_model(ours, peft.LoraConfig(target_modules=[target], init_lora_weights=False, r=4)).eval()
    before = model(images())
    before.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_" in n)
    assert (before - plain).abs().max() > 1e-3
    close(model.merge_and_unload()(images()), before.detach())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "naflexvit_base_patch16_gap"])
def test_an_exported_program_takes_other_batches(name):
    _, ours = pair(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ours, (images(),), dynamic_shapes=({0: batch},))
    close(program.module()(images(5)), ours(images(5)))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("naflex")])  # neither does timm's
def test_a_traced_onnx_file_takes_other_batches(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, ours = pair(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            ours, (images(),), tmp_path / "m.onnx", dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}}
        )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    close(session.run(None, {"x": images(5).numpy()})[0], ours(images(5)))
