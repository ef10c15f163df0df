"""How good features are by themselves: nearest neighbours and a linear classifier on them (scikit-learn)."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch

from ..data import Samples
from ..data.loader import Images, InOrder, loader
from ..model import VisionTransformer
from ..support.extras import require

#: Images from which a classifier begins: more take minutes, and hardly move it.
MOST_PROBED = 10_000


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
    weight, bias = linear_probe(train, train_labels, int(max(train_labels.max(), test_labels.max())) + 1)
    return float(((test @ weight.T + bias).argmax(axis=1) == test_labels).mean())


def linear_probe(train: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """A linear classifier of features float32 [n, width], by logistic regression (ridge of 1) on them standardized:
    weight [classes, width] and bias [classes], float64. A class that does not occur is less likely than any other."""
    there = np.unique(labels)
    if len(there) < 2:
        raise ValueError("vit: a linear probe needs training images of two classes or more")
    kind = require("sklearn.linear_model", "train").LogisticRegression
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64) + 1e-6
    with require("threadpoolctl", "train").threadpool_limits(1):  # sums of several threads have other last bits
        found = kind(max_iter=1000).fit((train - mean) / spread, labels)
    slopes, offsets = found.coef_, found.intercept_
    if len(there) == 2:  # one row: of the second class against the first
        slopes, offsets = np.concatenate([-slopes, slopes]) / 2, np.concatenate([-offsets, offsets]) / 2
    weight, bias = np.zeros((classes, train.shape[1])), np.full(classes, offsets.min() - 5.0)
    weight[there] = slopes / spread
    bias[there] = offsets - weight[there] @ mean
    return weight, bias


def begin_head(model: VisionTransformer, samples: Samples, batch_size: int) -> bool:
    """Makes the classifier the linear probe of the features of at most MOST_PROBED of the samples, so that the first
    steps do not spoil the features for a random head ("linear probing, then fine-tuning", arXiv:2202.10054). False,
    and nothing is changed, where the model has no single linear classifier."""
    head = model.get_classifier()
    if not isinstance(head, torch.nn.Linear):
        return False
    samples = samples.take(range(0, len(samples), -(-len(samples) // MOST_PROBED)))
    weight, bias = linear_probe(features(model, samples, batch_size), samples.labels, head.out_features)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(bias))
    return True
