"""A task of one's own for examples/custom_task.py: classification by the focal loss (arXiv:1708.02002)."""

import torch
import torch.nn.functional as F
from vit.tasks.classification import Classification


class Focal(Classification):
    """Figures and pictures of classification; -(1 - p)^2 log p in the place of cross entropy, p of the right class.

    `vit.tasks.Task` names everything that a task may decide.
    """

    def loss(self, outputs, targets, smoothing, kind="ce"):
        shares = targets if targets.ndim == 2 else F.one_hot(targets, outputs.shape[1]).float()
        likely = outputs.float().log_softmax(1)
        return -(shares * (1 - likely.exp()) ** 2 * likely).sum(1).mean()

    @torch.no_grad()
    def monitor(self, outputs, targets):
        return super().monitor(outputs, targets)


TASK = Focal()
