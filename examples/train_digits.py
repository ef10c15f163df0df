"""A training loop written by hand, on the handwritten digits that ship inside scikit-learn (in the `train` extra).

`vit train` does this with augmentation, a schedule, checkpoints and curves; here it is ordinary PyTorch.
"""

import torch
import torch.nn.functional as F
import vit
from sklearn.datasets import load_digits

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:1400], order[1400:]

model = vit.create("vit_digits")
print(model.explain())
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for epoch in range(8):
    model.train()
    for batch in train[torch.randperm(len(train))].split(100):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {accuracy:.1%}")
