"""Your own images: a Dataset in a loop of your own, and the same arrays in a file that `vit train` reads.

The images here are drawn: a bright bar that lies or stands, somewhere in noise.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from vit.training import TrainConfig, train

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 2}


def draw(count, seed):
    """uint8 images [count, 16, 16] and labels [count]: 0 lies, 1 stands."""
    rng = np.random.default_rng(seed)
    pictures, kinds = rng.integers(0, 100, (count, 16, 16)).astype(np.uint8), rng.integers(0, 2, count)
    for picture, kind, (row, column) in zip(pictures, kinds, rng.integers(0, 8, (count, 2)), strict=True):
        high, wide = (3, 8) if kind == 0 else (8, 3)
        picture[row : row + high, column : column + wide] = 220
    return pictures, kinds


class Bars(Dataset):
    """What a loop of your own needs: a length, and pairs of a tensor and a class. model.preprocess makes the tensor."""

    def __init__(self, count, seed, preprocess):
        self.pictures, self.kinds = draw(count, seed)
        self.preprocess = preprocess

    def __len__(self):
        return len(self.kinds)

    def __getitem__(self, index):
        return self.preprocess(Image.fromarray(self.pictures[index])), int(self.kinds[index])


torch.set_num_threads(1)  # the matrices are small
torch.manual_seed(0)
model = vit.create("vit_digits", **SIZES)
loader = DataLoader(Bars(400, 0, model.preprocess), batch_size=50, shuffle=True)
optimizer = vit.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(12):
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
with torch.inference_mode():
    images, labels = next(iter(DataLoader(Bars(200, 1, model.preprocess), batch_size=200)))
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
print(f"a loop of one's own: {accuracy:.1%} of 200 images right")

with tempfile.TemporaryDirectory() as folder:
    arrays = {}
    for split, count in (("train", 400), ("val", 100), ("test", 200)):
        arrays[f"x_{split}"], arrays[f"y_{split}"] = draw(count, len(split))
    np.savez(Path(folder, "bars.npz"), **arrays)
    options = {"epochs": 12, "batch_size": 50, "lr": 3e-3, "warmup_epochs": 1.0, "augment": "none", "ema": 0.0}
    config = TrainConfig(data=f"{folder}/bars.npz", model="vit_digits", arch=SIZES, **options)
    result = train(config, out=f"{folder}/run")  # on the command line: vit train --data bars.npz --model vit_digits ...
print(f"vit train: {result.test.accuracy:.1%} of {result.test.images} images right")
assert min(accuracy, result.test.accuracy) > 0.8
