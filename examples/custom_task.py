"""A task of your own: a loss that vit does not have, with the training, the run folder and the commands of vit.

A task is a module with TASK (examples/tasks/focal.py has 20 lines); its folder joins those that are looked at. For a
model that is to answer something else altogether, a loop of your own is shorter: examples/custom_data.py.
"""

import tempfile
from pathlib import Path

import vit
from vit.training import Run, TrainConfig, train

vit.tasks.__path__.append(str(Path(__file__).with_name("tasks")))
print("tasks:", ", ".join(vit.tasks.names()))

with tempfile.TemporaryDirectory() as folder:
    options = {"epochs": 8, "batch_size": 50, "lr": 4e-3, "warmup_epochs": 1.0, "augment": "none", "drop_path": 0.0}
    config = TrainConfig(task="focal", **options, ema=0.9)
    result = train(config, out=f"{folder}/run")
    again = Run.open(f"{folder}/run").evaluate()  # the task is known by its name
print(f"{result.test.accuracy:.1%} of {result.test.images} test images right, by {config.task}")
assert result.test.accuracy == again.accuracy > 0.8
