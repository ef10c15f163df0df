"""Run a timm model on vit's kernels: the names of the parameters are the same, so its state dict fits as it is.

Needs timm (in the `test` and `bench` extras). The weights are random here; with pretrained=True they are real ones.
"""

import timm
import torch
import vit

name = "vit_tiny_patch16_224"
theirs = timm.create_model(name, pretrained=False, num_classes=10).eval()
ours = vit.create(name, num_classes=10, weights=theirs.state_dict(), training=False)

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    difference = (ours(images) - theirs(images)).abs().max().item()

print(ours.explain())
print(f"largest difference of the logits: {difference:.1e}")
