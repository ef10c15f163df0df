"""Weights that are damaged, of another kind, or larger than they say: an error that names them."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import vit
from safetensors.torch import save_file
from test_weights import google_arrays, make_run
from test_weights_formats import NAME, A, create, model
from vit.weights import WeightsError

# ---- tensors that are not plain ----


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(3, 32), 0.1, 0, torch.qint8)


STRANGE = {
    "int8": lambda: torch.zeros(3, 32, dtype=torch.int8),
    "int64": lambda: torch.zeros(3, 32, dtype=torch.int64),
    "bool": lambda: torch.zeros(3, 32, dtype=torch.bool),
    "complex": lambda: torch.zeros(3, 32, dtype=torch.complex64),
    "sparse": lambda: torch.eye(3, 32).to_sparse(),
    "csr": lambda: torch.eye(3, 32).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, 32, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(32), torch.zeros(2)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.zeros(32), torch.zeros(2)], layout=torch.jagged),
    "quantized": _quantized,
    "repeated": lambda: torch.zeros(1).expand(3, 32),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("key", ["head.weight", "pos_embed", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"])
@pytest.mark.parametrize("classes", [3, 5])
def test_tensors_that_are_not_plain_are_named(kind, key, classes):
    with pytest.raises(WeightsError, match=rf"the given state dict: {key} .*parameters are dense floating-point"):
        create(model().state_dict() | {key: STRANGE[kind]()}, num_classes=classes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_of_files_that_are_not_plain_are_named(kind, tmp_path):
    torch.save(model().state_dict() | {"head.weight": STRANGE[kind]()}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=r"head\.weight|truncated"):
        create(tmp_path / "w.pt")


def _inside_itself(keys: tuple[str, ...]) -> dict:
    outer: dict = {}
    inner = outer
    for key in keys:
        inner[key] = {}
        inner = inner[key]
    inner["state_dict"] = outer
    return outer


def _fan(width: int) -> dict:
    found: dict = {}
    for _ in range(6):
        found = dict.fromkeys(map(str, range(width)), found)
    return found


CONTAINERS = {
    "inside itself": lambda: _inside_itself(()),
    "inside itself, below": lambda: _inside_itself(("model", "ema")),
    "deep": lambda: _inside_itself(("state_dict",) * 900),
    "under 3,000 names at each level": lambda: _fan(3000),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_mappings_that_repeat_are_looked_at_once(kind, tmp_path):
    """On the way of a pickle too; beside them a model is found."""
    found = CONTAINERS[kind]()
    with pytest.raises(WeightsError, match="holds no tensors that are parameters"):
        create(found)
    if kind != "deep":  # pickle itself recurses
        torch.save(found, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=r"w\.pt holds no tensors that are parameters"):
            create(tmp_path / "w.pt")
    state = model().state_dict()
    taken = create(found | {"model": state}).state_dict()
    assert all(torch.equal(taken[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.requires_grad_(),
        lambda t: torch.nn.Parameter(t),
        lambda t: torch.stack([t, t])[1],
        lambda t: t.T.contiguous().T if t.ndim == 2 else t,
        lambda t: t.flip(0).flip(0),
        lambda t: torch.cat([t, t])[: len(t)],
        lambda t: t.double(),
        lambda t: t.numpy(),
    ],
    ids=["grad", "parameter", "view", "transposed", "flip", "slice", "float64", "numpy"],
)
def test_tensors_of_every_ordinary_kind_are_taken(change):
    state = model().state_dict()
    found = create({key: change(value) for key, value in state.items()})
    assert all(torch.equal(found.state_dict()[key], value) for key, value in state.items())
    assert not any(p.grad_fn for p in found.parameters())


def test_subclasses_without_rules_of_their_own_are_taken():
    class Named(torch.Tensor):
        pass

    found = create({key: value.as_subclass(Named) for key, value in model().state_dict().items()})
    assert type(found.head.weight) is torch.nn.Parameter


def test_subclasses_with_rules_of_their_own_are_named():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(3, 32))
    with pytest.raises(WeightsError, match=r"head\.weight is a FakeTensor"):
        create(model().state_dict() | {"head.weight": fake})


@pytest.mark.parametrize(
    ("value", "dtype", "target"),
    [(1e300, torch.float64, "float32"), (-1e300, torch.float64, "bfloat16"), (7e4, torch.float32, "float16")],
)
def test_values_beyond_the_models_dtype_are_named(value, dtype, target):
    state = {key: tensor.to(dtype) for key, tensor in model().state_dict().items()}
    state["norm.bias"][3] = value
    with pytest.raises(WeightsError, match=rf"norm\.bias are too large for {target} and would become infinite"):
        create(state, dtype=target)
    assert torch.equal(create(state, dtype="float64").norm.bias, state["norm.bias"].double())


@pytest.mark.parametrize("key", ["head.weight", "pos_embed", "patch_embed.proj.weight", "cls_token", "norm.weight"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 32), (0, 3, 8, 8), (2, 17, 32)], ids=str)
@pytest.mark.parametrize("change", [{}, {"img_size": 64, "in_chans": 1}], ids=["same", "adapted"])
def test_shapes_of_no_model_are_named(key, shape, change):
    with pytest.raises(WeightsError, match=key):
        create(model().state_dict() | {key: torch.zeros(shape)}, **change)


# ---- archives ----


def rewrite(path: Path, change) -> None:
    """The zip file with change(name, content) -> a list of (name, content) for each member."""
    with zipfile.ZipFile(path) as old:
        members = [(item.filename, old.read(item)) for item in old.infolist()]
    changed = [item for name, content in members for item in change(name, content)]
    with zipfile.ZipFile(path, "w") as new:
        for item in changed:
            new.writestr(*item)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_stands_twice_is_named(tmp_path):
    np.savez(tmp_path / "w.npz", **google_arrays(model(), "augreg"))
    rewrite(tmp_path / "w.npz", lambda name, data: [(name, data)] * (1 + name.startswith("head/bias")))
    with pytest.raises(WeightsError, match="head/bias stand more than once"):
        create(tmp_path / "w.npz")


def test_a_member_that_says_more_than_it_has_is_named(tmp_path):
    np.savez(tmp_path / "w.npz", **google_arrays(model(), "augreg"))
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)})
    rewrite(tmp_path / "w.npz", lambda n, data: [(n, head.getvalue() if n.startswith("head/kernel") else data)])
    with pytest.raises(WeightsError, match=r"head/kernel says \[1099511627776, 3\] of float32 and has 0 bytes"):
        create(tmp_path / "w.npz")
    rewrite(tmp_path / "w.npz", lambda n, data: [("readme.txt", b"x") if n.startswith("cls") else (n, data)])
    with pytest.raises(WeightsError, match=r"readme\.txt are no arrays"):
        create(tmp_path / "w.npz")


def test_fortran_order_is_kept(tmp_path):
    arrays = {key: np.asfortranarray(value) for key, value in google_arrays(model(), "augreg").items()}
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    assert torch.equal(create(tmp_path / "w.npz").head.weight, model().head.weight)


# ---- refusals cost no time and no memory ----

PROBE = """
    import json, resource, sys, time
    import torch, vit
    from vit.weights import WeightsError
    vit.create("vit_tiny_patch16_224", backend="reference", depth=1)
    import safetensors.torch, zipfile, pickletools
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for path, name in json.loads(sys.argv[1]):
        before, start = peak(), time.process_time()
        try:
            vit.create(name, weights=path, backend="reference")
            said = "accepted"
        except WeightsError as error:
            said = str(error).splitlines()[0][:300]
        print(json.dumps([said, peak() - before, time.process_time() - start]))
"""


def check_refusals(cases: list[tuple[Path, str | None, str]]) -> None:
    """Loads each (path, model, words of the error) in one process: below 0.5 s and 50 MiB each."""
    given = json.dumps([(str(path), name) for path, name, _ in cases])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROBE), given], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for (path, _, words), line in zip(cases, lines, strict=True):
        said, memory, seconds = json.loads(line)
        assert words in said, path
        assert memory < 50, (path, said, memory)
        assert seconds < 0.5, (path, said, seconds)


def test_archives_larger_than_they_look(tmp_path):
    arrays, cases = google_arrays(model(), "augreg"), []
    for name in ("x", "head/kernel", "Transformer/encoderblock_0/LayerNorm_0/scale"):
        path = tmp_path / f"{len(cases)}.npz"
        np.savez_compressed(path, **(arrays | {name: np.zeros((32, 1 << 20), np.float32)}))
        cases.append((path, NAME, "unpack to"))
    torch.save(model().state_dict() | {"x": torch.zeros(1 << 25)}, tmp_path / "w.pt")
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    cases.append((path, NAME, "were not written by torch.save"))
    torch.save(model().state_dict() | {"head.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "v.pt")
    cases.append((tmp_path / "v.pt", NAME, "head.weight is a view that repeats its elements"))
    check_refusals(cases)


SIZES = [
    ({"depth": 100_000}, "does not fit the model"),
    ({"depth": 2**62}, "does not fit the model"),
    ({"embed_dim": 16_777_216}, "does not fit the model"),
    ({"embed_dim": 2**32}, "no memory holds a model of embed_dim 4294967296"),
    ({"mlp_ratio": 1e6}, "does not fit the model"),
    ({"in_chans": 10_000_000}, "in_chans 10000000, and patch_embed"),
    ({"num_classes": 10**12}, "num_classes 1000000000000, and head.weight has 7"),
    ({"img_size": 10**6}, "patches), and pos_embed has 17 rows"),
    ({"patch_size": 10**6, "img_size": 10**6}, "does not fit"),
    ({"patch_size": 4}, "does not fit"),
]


@pytest.mark.parametrize("kind", ["run", "timm"])
def test_sizes_of_a_record_are_compared_before_anything_is_built(kind, tmp_path):
    cases = []
    sizes = [*SIZES, ({"img_size": 10**6, "pos_embed": "sincos2d"}, "patches), and pos_embed has 17 rows")]
    for change, words in sizes if kind == "run" else SIZES:
        folder = tmp_path / f"run-{len(cases)}"
        make_run(folder)
        record = json.loads((folder / "model.json").read_text())
        record["arch"] |= change
        (folder / "model.json").write_text(json.dumps(record))
        if kind == "timm":
            (folder / "model.json").unlink()
            (folder / "best.safetensors").rename(folder / "model.safetensors")
            config = {"architecture": NAME, "model_args": record["arch"], "pretrained_cfg": {}}
            (folder / "config.json").write_text(json.dumps(config))
        cases.append((folder, None, words))
    check_refusals(cases)


def test_a_table_of_fixed_positions_is_not_made_for_a_record_alone(tmp_path):
    state = model(pos_embed="sincos2d").state_dict()
    del state["pos_embed"]
    checkpoint = vit.weights.Checkpoint(state, "x", arch=A | {"pos_embed": "sincos2d", "img_size": 10**6})
    with pytest.raises(WeightsError, match=r"patches\), and no pos_embed"):
        vit.create(NAME, weights=checkpoint)


# ---- records ----

DEEP = "[" * 100_000


@pytest.mark.parametrize("file", ["model.json", "config.json", "preprocessor_config.json"])
@pytest.mark.parametrize(
    "text", [DEEP, '{"a":' * 100_000, "{", "[1]", "\xff", '{"a": 1, "a": 2}', '{"std": NaN}', "3", ""]
)
def test_damaged_json_is_named(file, text, tmp_path):
    if file == "model.json":
        make_run(tmp_path / "run")
    else:
        (tmp_path / "run").mkdir()
        save_file(model().state_dict(), tmp_path / "run" / "model.safetensors")
        (tmp_path / "run" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "run" / file).write_text(text, encoding="latin-1")
    with pytest.raises(WeightsError, match=file):
        vit.create(weights=tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"arch": {"depth": "2"}},
        {"arch": {"depth": 2.0}},
        {"arch": {"depth": True}},
        {"arch": {"qkv_bias": "no"}},
        {"arch": {"img_size": [1, 2, 3]}},
        {"arch": {"global_pool": []}},
        {"arch": {"mlp_ratio": "4"}},
        {"arch": {"norm_eps": {}}},
        {"arch": {"surprise": 1}},
        {"arch": {"fc_norm": "x"}},
        {"preprocess": {}},
        {"preprocess": {"std": [0.0, 1, 1]}},
        {"preprocess": {"std": "x"}},
        {"preprocess": {"mean": [None]}},
        {"preprocess": {"crop_pct": "x"}},
        {"preprocess": {"crop_pct": 2.0}},
        {"preprocess": {"interpolation": "x"}},
        {"preprocess": {"crop_mode": "x"}},
        {"preprocess": {"in_chans": "3"}},
        {"preprocess": {"in_chans": 2**53, "mean": [0.5], "std": [0.5]}},
        {"preprocess": {"patch_size": 2**40}},
        {"preprocess": {"mean": []}},
        {"preprocess": {"img_size": 1.5}},
        {"preprocess": {"img_size": 2**31}},
        {"preprocess": {"img_size": [32, 2**31]}},
        {"preprocess": {"surprise": 1}},
        {"class_names": ["a", 3]},
        {"class_names": "abc"},
    ],
    ids=str,
)
def test_values_of_another_kind_are_named(change, tmp_path):
    make_run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    (part, values), *_ = change.items()
    record[part] = record[part] | values if isinstance(values, dict) and values else values
    (tmp_path / "run" / "model.json").write_text(json.dumps(record))
    key = next(iter(values), part) if isinstance(values, dict) else part
    with pytest.raises(WeightsError, match=rf"model\.json.*{key}"):
        vit.create(weights=tmp_path / "run")


def test_one_side_is_a_size(tmp_path):
    make_run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    record["preprocess"]["img_size"] = 32
    (tmp_path / "run" / "model.json").write_text(json.dumps(record))
    assert vit.create(weights=tmp_path / "run").preprocess.img_size == (32, 32)
    record["preprocess"]["img_size"] = 31
    (tmp_path / "run" / "model.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=r"makes images of \[31, 31\] pixels"):
        vit.create(weights=tmp_path / "run")


@pytest.mark.parametrize("change", [{"num_heads": 3}, {"proj_drop_rate": 1.0}], ids=str)
def test_sizes_that_no_model_has_are_named_with_their_folder(change, tmp_path):
    make_run(tmp_path / "run")
    record = json.loads((tmp_path / "run" / "model.json").read_text())
    record["arch"] |= change
    (tmp_path / "run" / "model.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=rf"run.*{next(iter(change))}"):
        vit.create(weights=tmp_path / "run")


def test_a_ratio_without_bound_is_an_error():
    for ratio in (1e308, math.inf, math.nan):
        with pytest.raises(ValueError, match="mlp_"):
            vit.create(NAME, mlp_ratio=ratio)
