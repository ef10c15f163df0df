"""Seeded numbers are the same bits everywhere, and nothing that is seeded is drawn by anything else."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from vit.model.layers import DropPath
from vit.support import random
from vit.support.random import Stream, fresh_key, normal

ROOT = Path(__file__).resolve().parents[2]


def digest(array: np.ndarray | torch.Tensor) -> str:
    little = np.asarray(array)
    return hashlib.sha256(little.astype(little.dtype.newbyteorder("<")).tobytes()).hexdigest()[:12]


#: Distribution -> digest of its first numbers. One that differs here differs in every seeded result of the project.
PINNED = {
    "raw words": (lambda s: s._raw(1000), "b4f9e4493b0c"),
    "standard_normal": (lambda s: s.standard_normal((300, 333)), "927ce3cf4d5f"),
    "standard_normal, float64": (lambda s: s.standard_normal(70_001, np.float64), "e1040e3a7088"),
    "standard_normal, bound 2": (lambda s: s.standard_normal(70_001, bound=2.0), "8761cf730847"),
    "lognormal": (lambda s: s.lognormal(0.5, 70_001), "ca307d9a82ae"),
    "uniform": (lambda s: s.uniform(-1.0, 3.0, 70_001), "36272d89b3fa"),
    "uniform, float32": (lambda s: s.uniform(-1.0, 3.0, 70_001, np.float32), "42d660561e16"),
    "integers": (lambda s: s.integers(-5, 1000, 70_001), "51401ba74951"),
    "permutation": (lambda s: s.permutation(70_001), "af5927b7b95c"),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_bits_are_pinned(name):
    draw, expected = PINNED[name]
    assert digest(draw(Stream("pinned", 0))) == expected, f"numpy {np.__version__}"


def test_pytorchs_own_numbers_that_are_relied_on():
    """The key of a new model and the masks of drop-path: two draws of PyTorch that are the same everywhere."""
    torch.manual_seed(0)
    assert fresh_key() == 14753975403562338988
    assert fresh_key() != fresh_key()
    torch.manual_seed(0)
    kept = DropPath(0.25)(torch.ones(500, 1, 1))[:, 0, 0] > 0
    assert digest(kept) == "427a23d0d54f"
    assert digest(torch.rand(1000)) == "5925addb9bc0"


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_instruction_set_changes_nothing(capability):
    """Weights, seeded weights, images and an augmented batch, in a process of another capability of PyTorch."""
    text = """
import hashlib, numpy, torch, vit
from vit.data import open_source
from vit.data.augment import Affine, CropFlip, Elastic
from vit.data.loader import EpochBatches, Images, loader
from vit.support.random import normal
from vit.bench.weights import seeded_state
torch.manual_seed(1)
tensors = list(vit.create("vit_digits").state_dict().values())
tensors += seeded_state(vit.create("vit_tiny_patch16_224", depth=1).state_dict()).values()
tensors.append(normal((2, 3, 64, 64), "images"))
for augment in (Affine(), Elastic(), CropFlip((8, 8))):
    samples = open_source("digits").divided(0.1, 0.2, 0).splits["train"]
    images = Images(samples, vit.create("vit_digits").preprocess, augment, seed=5)
    tensors += next(iter(loader(images, EpochBatches(len(samples), 100, 5), 0)))
print(hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:12])
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "b4adbb0126da"


def test_normal_numbers_are_normal():
    """The moments and the distribution function of two million; float64 has more than float32's bits."""
    for dtype in (np.float32, np.float64):
        z = Stream("moments").standard_normal(2_000_000, dtype).astype(np.float64)
        for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
            assert abs((z**power).mean() - expected) < 5 * (spread / len(z)) ** 0.5, power
        z.sort()
        exact = np.array([NormalDist().cdf(x) for x in z[::1000]])
        assert np.abs(exact - np.arange(0, len(z), 1000) / len(z)).max() < 2.7 / len(z) ** 0.5
    assert (z != z.astype(np.float32)).mean() > 0.99


def test_normal_numbers_follow_the_quantile():
    """Every part of the table, the tails to their ends, both signs; a bound cuts there and nowhere else."""
    k = np.concatenate([np.arange(0, 2**31, 2**17 - 1), 2 ** np.arange(31), [0, 2**31 - 1]]).astype(np.uint32)
    z = random._normal(k << 1).astype(np.float64)
    exact = np.array([-NormalDist().inv_cdf((int(i) + 0.5) / 2**32) for i in k])
    assert np.abs(z - exact).max() < 4e-6  # 3e-6 of the table, and float32
    assert np.array_equal(random._normal(k << 1 | 1), -random._normal(k << 1))
    cut = Stream("cut").standard_normal(1_000_000, bound=2.0)
    assert 1.999 < np.abs(cut).max() < 2.000001
    # A deviation of n numbers is off by sqrt((kurtosis - 1) / 4 n) of itself; between the bounds the kurtosis is 2.36.
    assert abs(cut.std() / 0.879626 - 1) < 4 * (1.36 / 4 / len(cut)) ** 0.5


def test_elementary_functions():
    """To 2e-7, as their docstrings say."""
    x = np.linspace(-80, 80, 100_001, dtype=np.float32)
    assert np.abs(random._exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 2e-7
    y = np.exp(-np.linspace(0, 23, 100_001)).astype(np.float32)
    exact = np.log(y.astype(np.float64))
    assert (np.abs(random._log(y) - exact) / np.maximum(1, -exact)).max() < 2e-7


def test_other_distributions():
    s = Stream("others", 2)
    for dtype, bits in ((np.float64, 53), (np.float32, 24)):
        u = s.uniform(0.0, 1.0, 500_000, dtype)
        assert u.dtype == dtype
        assert 0 <= u.min() < 1e-4  # where none of 500,000 is with a chance of e^-50
        assert 1 - 1e-4 < u.max() < 1
        assert np.array_equal(u * 2.0**bits, np.floor(u * 2.0**bits))
        assert abs(u.mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
    counts = np.bincount(s.integers(-2, 5, 70_000) + 2)
    assert len(counts) == 7
    assert np.abs(counts - 10_000).max() < 500
    order = s.permutation(1000)
    assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(order, s.permutation(1000))
    for size, shape in (((), ()), (0, (0,)), ((2, 0), (2, 0)), (3, (3,)), ((2, 3), (2, 3))):
        for drawn in (s.standard_normal(size), s.uniform(0, 1, size), s.integers(0, 3, size), s.lognormal(1, size)):
            assert drawn.shape == shape


def test_keys():
    """A key's parts count in order and kind; NumPy's integers are integers; a call goes on where one stopped."""
    keys = [(), (0,), (1,), ("0",), (0, 1), (1, 0), ("a", 1), ("a1",), ("a", "1"), (-1,), (2**64,), ("\udcff",)]
    assert len({digest(normal(4, *key)) for key in keys}) == len(keys)
    assert torch.equal(normal(4, np.int64(3)), normal(4, 3))
    s = Stream(7)
    parts = np.concatenate([s.standard_normal(1000), s.standard_normal(1001)])
    assert np.array_equal(parts, Stream(7).standard_normal(2001))
    assert normal((2, 3), 1, dtype=torch.bfloat16).dtype == torch.bfloat16


# ---- nothing else is seeded ----

DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|\w+_like)\b(?<!empty_like)(?<!zeros_like)"
    r"(?<!ones_like)(?<!full_like)|torch\.Generator|trunc_normal|(xavier|kaiming)_(uniform|normal)_|orthogonal_"
    r"|\.(normal|uniform|random|bernoulli|exponential|cauchy|geometric|log_normal)_\(|np\.random|numpy\.random|default_rng"
)

#: File -> what it may draw, and why.
ALLOWED = {
    "python/vit/support/random.py": (r"randint\(1 << 16|np\.random\.SFC64|numpy\.random|randn gives", "the generator"),
    "python/vit/model/layers.py": (r"torch\.rand\(", "drop-path, whose bits are pinned here; torch.compile knows it"),
    "python/vit/model/rope.py": (r"uniform_\(-limit", "coordinates disturbed in training, with the numbers timm draws"),
    "tests/draw.py": (r"draw\.|As (torch|nn)\.|torch\.randn and", "names what it stands for"),
    "tests/project/test_random.py": (r".", "this file"),
    "tests/data/test_data.py": (r"\.integers\(|default_rng", "bytes of image files, compared with what is read back"),
    "tests/training/test_training.py": (r"default_rng", "pixels of image files that are not looked at"),
    "tests/training/test_training_modes.py": (r"torch\.rand\(5\)", "that PyTorch's generator does not matter"),
    "tests/data/test_sources.py": (r"default_rng|np\.random", "bytes of image files, compared with what is read back"),
    "tests/data/test_images.py": (r"default_rng", "damaged bytes, and pixels that two ways of resizing share"),
    "tests/data/test_preprocess.py": (r"default_rng", "noise, resized by two libraries"),
    "tests/weights/test_weights_formats.py": (r"default_rng|RandomState", "pixels for two readers, one object"),
    "tests/engine/test_engine.py": (r"default_rng", "which bytes of a header are flipped"),
    "tests/engine/test_engine_c.py": (r"default_rng", "images for two readers of one file"),
    "benchmarks/int8_spread.py": (r"default_rng", "images of a published table, which shows a spread over seeds"),
    "benchmarks/gpu/ops.py": (r"\.random_\(\)", "a gigabyte whose values nobody looks at"),
}  # fmt: skip


def test_nothing_else_draws():
    """PyTorch's numbers depend on its version and the processor; vit.support.random and tests/draw.py have others."""
    found = []
    for folder in ("python/vit", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            allowed = re.compile(ALLOWED[name][0] if name in ALLOWED else r"(?!)")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if DRAWS.search(line) and not allowed.search(line) and not re.search(r"\bdraw\.\w+_\(", line):
                    found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "draw from vit.support.random or, in tests, from draw:\n" + "\n".join(found)


def test_what_is_allowed_is_there():
    for name, (pattern, _) in ALLOWED.items():
        assert re.search(pattern, (ROOT / name).read_text(encoding="utf-8")), name


def test_images_of_the_loader_are_the_streams():
    """An epoch's order is a function of the seed and the epoch, an augmentation also of the image."""
    from vit.data.loader import EpochBatches

    batches = EpochBatches(10, 5, 3)
    batches.epoch = 2
    order = [index for batch in batches for _, index in batch]
    assert order == Stream("order", 3, 2).permutation(10).tolist()
