"""The engine gives the model's logits or says why it cannot, whatever has been done to the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import draw
import pytest
import torch
import vit
from conftest import USABLE
from rounding import close
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, parametrize, prune
from vit.model.blocks import Mlp
from vit.model.layers import DropPath, LayerScale
from vit.model.mlp import GluMlp
from vit.support.random import normal

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the engine is part of the native CPU backend")

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


def make(**arch: Any) -> vit.VisionTransformer:
    model = vit.create("vit_tiny_patch16_224", **(SMALL | arch))
    for name, parameter in model.named_parameters():
        draw.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    return model.eval()


def images() -> torch.Tensor:
    """The same ones at every call."""
    return normal((2, 3, 32, 32), "images")


def same_logits(model: nn.Module) -> None:
    close(vit.Engine(model)(images()), model(images()))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class Own(vit.VisionTransformer):
    def forward_head(self, tokens, pre_logits=False):
        return super().forward_head(tokens, pre_logits) * 2


def share_block(m: Any) -> None:
    m.blocks[1] = m.blocks[0]


def share_weight(m: Any) -> None:
    m.blocks[1].mlp.fc1.weight = m.blocks[0].mlp.fc1.weight


def share_layer(m: Any) -> None:
    m.blocks[1].attn.proj = m.blocks[0].attn.proj


def fewer_blocks(m: Any) -> None:
    del m.blocks[0]


def other_head(m: Any) -> None:
    m.head = nn.Linear(32, 7)


def no_head(m: Any) -> None:
    m.head = nn.Identity()


def wider_mlps(m: Any) -> None:
    for block in m.blocks:
        block.mlp.fc1, block.mlp.fc2 = nn.Linear(32, 48), nn.Linear(48, 32)


def no_biases(m: Any) -> None:
    m.blocks[0].attn.proj = nn.Linear(32, 32, bias=False)
    m.blocks[1].mlp.fc1 = nn.Linear(32, 128, bias=False)
    m.head = nn.Linear(32, 3, bias=False)
    m.patch_embed.proj = nn.Conv2d(3, 32, 8, 8, bias=False)


def no_norm(m: Any) -> None:
    m.norm = nn.Identity()


def largest_tokens(m: Any) -> None:
    m.global_pool = "max"


def one_layer_scale(m: Any) -> None:
    m.blocks[1].ls2 = LayerScale(32, 0.5)
    draw.normal_(m.blocks[1].ls2.gamma.data)


def normed_first(m: Any) -> None:
    m.norm_pre = nn.LayerNorm(32, 1e-6)
    draw.normal_(m.norm_pre.weight.data, 1.0, 0.3)


def other_drops(m: Any) -> None:
    m.blocks[0].drop_path1 = DropPath(0.5).eval()
    m.head_drop = nn.Identity()


def tanh_everywhere(m: Any) -> None:
    for block in m.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def backward_hook(m: Any) -> None:
    m.blocks[0].register_full_backward_hook(lambda *args: None)


def pruned(m: Any) -> None:
    for block in m.blocks:
        prune.l1_unstructured(block.mlp.fc1, "weight", 0.5)
        prune.random_unstructured(block.attn.proj, "bias", 3)
    m.blocks[0].mlp.fc1.weight_orig.data *= 1.5  # the masked weight made before is now stale


def structured(m: Any) -> None:
    prune.ln_structured(m.blocks[0].attn.qkv, "weight", 0.3, 2, 0)
    prune.l1_unstructured(m.patch_embed.proj, "weight", 0.3)
    prune.l1_unstructured(m.blocks[0].norm1, "weight", 0.3)


def pruned_twice(m: Any) -> None:
    prune.l1_unstructured(m.head, "weight", 0.3)
    prune.l1_unstructured(m.head, "weight", 0.3)


def old_weight_norm(m: Any) -> None:
    nn.utils.weight_norm(m.blocks[0].mlp.fc2).weight_g.data *= 1.5


def old_spectral_norm(m: Any) -> None:
    nn.utils.spectral_norm(m.blocks[0].mlp.fc2).weight_orig.data *= 1.5


def weight_norm(m: Any) -> None:
    parametrizations.weight_norm(m.blocks[0].mlp.fc2).parametrizations.weight.original0.data *= 1.5


def spectral_norm(m: Any) -> None:
    parametrizations.spectral_norm(m.blocks[0].attn.qkv)
    m.eval()


def own_parametrization(m: Any) -> None:
    parametrize.register_parametrization(m.blocks[0].attn.qkv, "bias", Doubled())
    parametrize.register_parametrization(m, "pos_embed", Doubled())


WORKS = [
    share_block, share_weight, share_layer, fewer_blocks, other_head, no_head, wider_mlps, no_biases, other_drops,
    tanh_everywhere, backward_hook, pruned, structured, pruned_twice, old_weight_norm, old_spectral_norm, weight_norm,
    spectral_norm, own_parametrization, no_norm, largest_tokens, one_layer_scale, normed_first,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", WORKS, ids=lambda change: change.__name__)
def test_it_has_the_logits_of_the_changed_model(change):
    model = make()
    before = model(images()).detach()
    change(model)
    model.eval()
    same_logits(model)
    if change not in (backward_hook, other_drops):
        after = model(images()).detach()
        assert after.shape != before.shape or (after - before).abs().max() > 1e-4


def test_a_model_in_training_mode_keeps_its_state():
    model = make(drop_path_rate=0.5, proj_drop_rate=0.5)
    parametrizations.spectral_norm(model.blocks[0].attn.qkv)
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    engine = vit.Engine(model)
    assert model.training
    assert model.blocks[0].attn.qkv.parametrizations.weight[0].training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    close(engine(images()), model.eval()(images()))


def hook(place: str, kind: str = "forward_hook") -> Callable[[Any], Any]:
    return lambda m: getattr(m.get_submodule(place), f"register_{kind}")(lambda *args: None)


def put(place: str, module: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    def change(m: Any) -> None:
        above, _, last = place.rpartition(".")
        setattr(m.get_submodule(above), last, module())

    return change


def set_(place: str, name: str, value: Any) -> Callable[[Any], Any]:
    return lambda m: setattr(m.get_submodule(place), name, value)


def own_forward(m: Any) -> None:
    real = m.blocks[0].mlp.forward
    m.blocks[0].mlp.forward = lambda x: real(x) * 2


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (hook("blocks.0"), r"blocks\.0 has a forward hook"),
    "hook of the model": (hook(""), "the model has a forward hook"),
    "pre-hook": (hook("blocks.1.mlp.act", "forward_pre_hook"), r"blocks\.1\.mlp\.act has a forward hook"),
    "hook on an identity": (hook("norm_pre"), "norm_pre has a forward hook"),
    "hook on the blocks": (hook("blocks"), "blocks has a forward hook"),
    "own forward": (own_forward, r"blocks\.0\.mlp has a forward of its own"),
    "own pool": (lambda m: setattr(m, "pool", lambda x: x[:, 1]), "the model has a pool of its own"),
    "layer scale": (put("blocks.0.ls1", lambda: nn.Linear(32, 32)), r"blocks\.0\.ls1 is a Linear; the engine knows Id"),
    "query norm": (put("blocks.1.attn.q_norm", lambda: nn.LayerNorm(16, 1e-6)), "a norm of queries and keys differs"),
    "hidden norm": (put("blocks.1.mlp.norm", lambda: nn.LayerNorm(128, 1e-6)), r"mlp\.norm differs from layer"),
    "other norm": (put("blocks.1.norm2", lambda: nn.RMSNorm(32, 1e-6)), "norm differs from layer to layer: LayerN"),
    "other eps": (put("norm_pre", lambda: nn.LayerNorm(32, 1e-3)), "norm eps differs from layer to layer"),
    "gated": (lambda m: setattr(m.blocks[1], "mlp", GluMlp(m.options)), "mlp differs from layer to layer: GluMlp, Mlp"),
    "relu": (put("blocks.0.mlp.act", nn.ReLU), r"blocks\.0\.mlp\.act is a ReLU; the engine knows GELU"),
    "one tanh": (put("blocks.0.mlp.act", lambda: nn.GELU(approximate="tanh")), "activation differs"),
    "extra module": (put("blocks.0.attn.gate", lambda: nn.Linear(32, 32)), r"blocks\.0\.attn\.gate is a Linear; .* no"),
    "extra module of the model": (put("attn_pool", lambda: nn.Identity()), "attn_pool is a Identity"),
    "extra parameter": (lambda m: m.register_parameter("reg_token", nn.Parameter(torch.ones(1))), "has reg_token"),
    "extra buffer": (lambda m: m.blocks[0].attn.register_buffer("rope", torch.ones(1)), r"blocks\.0\.attn has rope"),
    "missing module": (lambda m: m.blocks[0].__delattr__("ls2"), r"blocks\.0\.ls2 is missing"),
    "missing class token": (lambda m: setattr(m, "cls_token", None), "global_pool 'token' does not go with"),
    "no blocks": (set_("", "blocks", nn.Sequential()), "the model has no blocks"),
    "other sequence": (put("blocks", lambda: nn.ModuleList()), "blocks is a ModuleList"),
    "positions": (set_("", "pos_embed", nn.Parameter(torch.ones(1, 9, 32))), r"pos_embed is \[1, 9, 32\], .* \[1, 17,"),
    "width": (put("blocks.0.attn.proj", lambda: nn.Linear(32, 16)), r"blocks\.0\.attn\.proj\.weight is \[16, 32\]"),
    "two norms": (put("fc_norm", lambda: nn.LayerNorm(32, 1e-6)), "norm and fc_norm are both norms; the engine"),
    "norm without bias": (put("blocks.0.norm1", lambda: nn.LayerNorm(32, 1e-6, bias=False)), r"norm1\.bias is missing"),
    "heads": (set_("blocks.0.attn", "num_heads", 4), "num_heads differs"),
    "pooling": (set_("", "global_pool", "sum"), "global_pool 'sum' does not go with this model"),
    "pooling by attention": (set_("", "global_pool", "map"), "global_pool 'map' does not go with this model"),
    "stem": (put("patch_embed.proj", lambda: nn.Conv2d(3, 32, 8, 8, dilation=2)), "not a convolution whose stride"),
    "overlapping": (put("patch_embed.proj", lambda: nn.Conv2d(3, 32, 16, 8, 4)), "not a convolution whose stride"),
    "other stem": (put("patch_embed", lambda: nn.Conv2d(3, 32, 8, 8)), "patch_embed is a Conv2d"),
    "NaN": (lambda m: m.blocks[0].norm1.weight.data.fill_(torch.nan), r"blocks\.0\.norm1\.weight holds NaN"),
    "NaN when masked": (
        lambda m: prune.l1_unstructured(m.head, "weight", 0.5).weight_orig.data.fill_(torch.inf),
        r"head\.weight holds NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_does_not_know_is_a_reason(case):
    model = make()
    change, words = REFUSED[case]
    change(model)
    with pytest.raises(vit.BackendError, match=words):
        vit.Engine(model)


def test_a_hook_for_all_modules_is_a_reason():
    handle = everywhere.register_module_forward_hook(lambda *args: None)
    try:
        with pytest.raises(vit.BackendError, match="a forward hook for all modules"):
            vit.Engine(make())
    finally:
        handle.remove()
    same_logits(make())


@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm, Mlp, vit.VisionTransformer], ids=lambda kind: kind.__name__)
def test_a_forward_put_into_a_class_is_a_reason(kind, monkeypatch):
    model, real = make(), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: real(self, x) * 2)
    with pytest.raises(vit.BackendError, match=f"the class {kind.__name__} has been given another forward"):
        vit.Engine(model)
    monkeypatch.undo()
    same_logits(model)


def test_a_scale_of_attention_is_a_reason_where_it_is_used():
    model = make()
    model.blocks[1].attn.scale = 0.1
    same_logits(model)
    model.blocks[1].attn.fused_attn = False
    with pytest.raises(vit.BackendError, match=r"blocks\.1\.attn\.scale is 0\.1"):
        vit.Engine(model)


def test_a_subclass_is_a_reason():
    with pytest.raises(vit.BackendError, match=r"needs a vit\.VisionTransformer, got Own"):
        vit.Engine(Own(**SMALL))


@pytest.mark.filterwarnings("ignore")
def test_adapters_are_a_reason_until_they_are_merged():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["fc1"], init_lora_weights=False)
    adapted = peft.get_peft_model(make(), config)
    with pytest.raises(vit.BackendError, match=r"needs a vit\.VisionTransformer"):
        vit.Engine(adapted)
    with pytest.raises(
        vit.BackendError, match=r"blocks\.0\.mlp\.fc1 is a peft\.[a-z.]+\.Linear; [\s\S]*merge"
    ) as refusal:
        vit.Engine(adapted.base_model.model)
    assert "lora_A" not in str(refusal.value)
    same_logits(adapted.merge_and_unload())
