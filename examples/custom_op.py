"""An operation of your own in the model: the squared ReLU (arXiv:2109.08668) in place of GELU, with its own backward.

What is exchanged is called as a module; everything around it stays on vit's kernels. An op for vit itself, on every
backend, is docs/add-an-op.md.
"""

import torch
import torch.nn.functional as F
import vit
from torch import Tensor, nn


@torch.library.custom_op("example::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """y = max(x, 0)^2."""
    return F.relu(x).square()


@torch.library.custom_op("example::squared_relu_backward", mutates_args=())
def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx = 2 max(x, 0) dy."""
    return 2 * F.relu(x) * dy


squared_relu.register_fake(lambda x: torch.empty_like(x))  # shapes, for torch.compile
squared_relu_backward.register_fake(lambda dy, x: torch.empty_like(x))
squared_relu.register_autograd(
    lambda ctx, dy: squared_relu_backward(dy, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return squared_relu(x)


torch.set_num_threads(1)  # the matrices are small
torch.manual_seed(0)
x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(squared_relu, x)
torch.library.opcheck(squared_relu, (x,), test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
print("the backward is that of the forward, and the op's shapes are known to torch.compile")

models = {name: vit.create("vit_digits", backend=name) for name in ("auto", "reference")}
models["reference"].load_state_dict(models["auto"].state_dict())
for model in models.values():
    for block in model.blocks:
        block.mlp.act = SquaredReLU()
images, gradients = torch.randn(8, 1, 8, 8), {}
for name, model in models.items():
    model.to(images.device)(images).square().sum().backward()
    gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
plan = sorted(set(models["auto"].plan.values()))
largest = (gradients["auto"] - gradients["reference"]).abs().max() / gradients["reference"].abs().max()
print(f"gradients on {'+'.join(plan)} and on reference differ by {largest:.1e} of the largest")
assert largest < 1e-4  # float32
