"""Use one op on its own: the fastest backend forward and backward, checked against the reference."""

import torch
import vit

B, N, H, D = 2, 197, 3, 64
qkv = torch.randn(B, N, 3, H, D, requires_grad=True)
q, k, v = qkv.unbind(2)  # views of the packed projection: the kernels read them in place

out = vit.ops.attention(q, k, v)  # backend="auto"
out.square().mean().backward()
print("attention:", tuple(out.shape), "gradient of qkv:", tuple(qkv.grad.shape))

expected = vit.ops.attention(q, k, v, backend="reference")
print(f"largest difference to the reference: {(out - expected).abs().max().item():.1e}")

for name, record in vit.backends().items():
    print(f"{name:<10} {'usable' if record['available'] else record['reason']}")
