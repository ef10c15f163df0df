"""How good features are by themselves: nearest neighbours and a linear classifier on them (scikit-learn)."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch

from ..data import Samples
from ..data.loader import Images, InOrder, loader
from ..model import VisionTransformer
from ..support.extras import require


@torch.no_grad()
def features(model: VisionTransformer, samples: Samples, batch_size: int, workers: int = 0) -> np.ndarray:
    """What the head would get of each image, in order: float32 [n, width]."""
    was_training = model.training
    model.eval()
    found = []
    with closing(loader(Images(samples, model.preprocess), InOrder(len(samples), batch_size), workers)) as batches:
        for images, _ in batches:
            tokens = model.forward_features(images.to(model.device, model.dtype))
            found.append(model.forward_head(tokens, pre_logits=True).float().cpu())
    model.train(was_training)
    return torch.cat(found).numpy()


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, neighbours: int
) -> float:
    """Share of test images that have the class of most of their nearest training images, nearer ones counting more."""
    if neighbours > len(train):
        raise ValueError(f"vit: --knn {neighbours} is more than the {len(train)} training images")
    kind = require("sklearn.neighbors", "train").KNeighborsClassifier
    return float(
        kind(neighbours, weights="distance", metric="cosine").fit(train, train_labels).score(test, test_labels)
    )


def probe_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Share of test images that logistic regression on standardized features of the training images finds."""
    if len(np.unique(train_labels)) < 2:
        raise ValueError("vit: --probe needs training images of two classes or more")
    kind = require("sklearn.linear_model", "train").LogisticRegression
    mean, spread = train.mean(axis=0), train.std(axis=0) + 1e-6
    fitted = kind(max_iter=1000).fit((train - mean) / spread, train_labels)
    return float(fitted.score((test - mean) / spread, test_labels))
