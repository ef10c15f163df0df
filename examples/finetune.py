"""Fine-tuning: a model that has learned the digits 0 to 4 learns 5 to 9 from 100 images, beside one that starts anew.

With published weights it is the same: vit.create("vit_small_patch16_224", weights=..., num_classes=5). Without Python:
`vit train --recipe finetune --model vit_small_patch16_224 --weights model.safetensors --data photos/`.
"""

import tempfile

import torch
import torch.nn.functional as F
import vit
from sklearn.datasets import load_digits

torch.set_num_threads(1)  # the matrices are small
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
low, high = (part[torch.randperm(len(part))] for part in ((labels < 5).nonzero()[:, 0], (labels > 4).nonzero()[:, 0]))


def train(model, which, epochs, lr):
    """AdamW on the images `which`; layers near the image move less: 0.7 times the learning rate of the one above."""
    blocks = len(model.blocks)
    groups = []
    for name, parameter in model.named_parameters():
        depth = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else (0 if "embed" in name else blocks + 1)
        groups.append({"params": [parameter], "lr": lr * 0.7 ** (blocks + 1 - depth)})
    optimizer = torch.optim.AdamW(groups)
    model.train()
    for _ in range(epochs):
        for batch in which[torch.randperm(len(which))].split(50):
            loss = F.cross_entropy(model(images[batch]), labels[batch] % 5)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model, which):
    return (model(images[which]).argmax(1) == labels[which] % 5).float().mean().item()


with tempfile.TemporaryDirectory() as folder:
    learned = train(vit.create("vit_digits", num_classes=5), low, epochs=8, lr=3e-3)
    vit.weights.save(learned, folder)
    few, test = high[:100], high[100:]
    tuned = vit.create(weights=folder, num_classes=5)
    tuned.reset_classifier(5)  # the five classes are others
    found = {
        "fine-tuned": accuracy(train(tuned, few, epochs=20, lr=3e-3), test),
        "from the start": accuracy(train(vit.create("vit_digits", num_classes=5), few, epochs=20, lr=3e-3), test),
    }
for name, share in found.items():
    print(f"{name:<15} {share:.1%} of {len(test)} images right")
assert found["fine-tuned"] > found["from the start"]
