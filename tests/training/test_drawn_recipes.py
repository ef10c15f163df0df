"""The recipes on drawn data, which learn visibly in two minutes: by what, and that they begin to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import vit
from vit import tasks
from vit.data import open_source
from vit.data.loader import Images
from vit.training import TrainConfig, train
from vit.training.config import recipe_options

#: What three epochs have to pass, by the task's own figure. Rooms with a learned embedding had 0.55; the mean depth of
#: each pixel has 0.72, the mean place of each point 0.28, the ground alone 0.20,
#: sets of digits in any order 0.19.
LEAST = {"shapes": 0.6, "stick_figures": 0.7, "rooms": 0.74, "digit_sets": 0.8}


def built(name: str) -> tuple[Any, Images]:
    """The untrained model of a recipe, and the images it is shown."""
    options = recipe_options(name)
    source = open_source(options["data"])
    torch.manual_seed(0)
    head = tasks.get(options["task"]).arch | {"num_classes": len(source.class_names)}
    model = vit.create(options["model"], "reference", **head | options["arch"])
    return model, Images(source.splits["train"], model.preprocess)


@pytest.mark.parametrize("name", LEAST)
def test_tokens_know_their_places_from_the_start(name: str) -> None:
    """Where a patch is differs from place to place by at least a fifth of what is on it. In an embedding that is to be
    learned it is a 25th, and what depends on the place (all of a room's depth) is not learned for hundreds of steps."""
    model, images = built(name)
    pixels = torch.stack([images[0, index][0] for index in range(64)])
    with torch.no_grad():
        patches = model.patch_embed(pixels).flatten(1, -2)
    places = model.pos_embed[0, model.num_prefix_tokens :]
    assert places.std(dim=0).mean() > 0.2 * patches.std(dim=0).mean()


@pytest.mark.parametrize("name", LEAST)
def test_a_batch_can_be_learned_by_heart(name: str) -> None:
    """Loss, targets and figure mean the same: where the loss of 8 pictures is small, the figure is good."""
    model, images = built(name)
    options = recipe_options(name)
    task = tasks.get(options["task"])
    pixels, targets = (torch.stack(part) for part in zip(*(images[0, index] for index in range(8)), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), options["lr"], weight_decay=0.0)
    for _ in range(150):
        optimizer.zero_grad()
        loss = task.loss(task.arrange(model(pixels), model), targets, 0.0, options.get("loss", "ce"))
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        measures = task.measure(task.arrange(model(pixels), model), targets)
    assert task.figures(task.summarize(measures))[task.metric] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", LEAST)
def test_the_recipe_learns(name: str, tmp_path: Path) -> None:
    """In small: three of its epochs."""
    options = recipe_options(name) | {"epochs": 3, "threads": 1, "warmup_epochs": 0.5}
    found = train(TrainConfig(**options), out=tmp_path / "run").test
    task = tasks.get(options["task"])
    assert task.figures(found)[task.metric] > LEAST[name]
