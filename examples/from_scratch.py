"""Every part of a Vision Transformer with its backward, in NumPy: checked against the model of vit, then trained.

Parameters have the names that vit and timm give them. Each part returns its result and a function that takes the
gradient of the result, adds those of its parameters to `grads`, and returns the gradient of its input.
`from_scratch.ipynb` is this script as a notebook.
"""

# %%
import numpy as np
import torch
import torch.nn.functional as F
import vit
from PIL import Image
from scipy.special import erf
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4, "pos_embed": "learned"}
threadpool_limits(1)  # the matrices are small
HEADS, PATCH, EPS = SIZES["num_heads"], 2, 1e-6


# %% [markdown]
# ## Linear layer
#
# The patch embedding, q, k and v, the MLP and the head are all this one. The weight is stored [outputs, inputs], as in
# PyTorch, so that `dx = dy W` and `dW = dy^T x` read it as it lies.


# %%
def add(grads, name, value):
    grads[name] = grads.get(name, 0) + value


def linear(x, p, grads, name):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum of dy."""
    weight = p[f"{name}.weight"].reshape(len(p[f"{name}.bias"]), -1)

    def backward(dy):
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        add(grads, f"{name}.weight", (flat_dy.T @ flat_x).reshape(p[f"{name}.weight"].shape))
        add(grads, f"{name}.bias", flat_dy.sum(0))
        return dy @ weight

    return x @ weight.T + p[f"{name}.bias"], backward


# %% [markdown]
# ## Layer norm, GELU, softmax
#
# Each row is brought to mean 0 and variance 1. Its gradient loses two directions: that of the mean and that of the
# row itself, along which the result does not change. The softmax subtracts the largest value first, or `exp` would
# overflow; its backward needs no matrix of [N, N] derivatives.


# %%
def layer_norm(x, p, grads, name):
    """y = w n + b with n = (x - mean) / s, s = sqrt(var + eps); dx = (w dy - mean(w dy) - n mean(w dy n)) / s."""
    spread = np.sqrt(x.var(-1, keepdims=True) + EPS)
    normal = (x - x.mean(-1, keepdims=True)) / spread

    def backward(dy):
        rest = tuple(range(dy.ndim - 1))
        add(grads, f"{name}.weight", (dy * normal).sum(rest))
        add(grads, f"{name}.bias", dy.sum(rest))
        dn = dy * p[f"{name}.weight"]
        return (dn - dn.mean(-1, keepdims=True) - normal * (dn * normal).mean(-1, keepdims=True)) / spread

    return normal * p[f"{name}.weight"] + p[f"{name}.bias"], backward


def gelu(x):
    """y = x Phi(x), Phi being the normal distribution; dx = dy (Phi(x) + x phi(x))."""
    phi = (1 + erf(x / np.sqrt(2).astype(x.dtype))) / 2
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi).astype(x.dtype)
    return x * phi, lambda dy: dy * (phi + x * density)


def softmax(x):
    """y = exp(x) / sum exp(x), the largest subtracted first; dx = y (dy - sum(dy y))."""
    y = np.exp(x - x.max(-1, keepdims=True))
    y /= y.sum(-1, keepdims=True)
    return y, lambda dy: y * (dy - (dy * y).sum(-1, keepdims=True))


# %% [markdown]
# ## Attention
#
# Every token asks (q), every token answers (k, v). Scores are divided by the square root of the head's width *before*
# the softmax: sums of d products have a deviation of sqrt(d), and a softmax of large numbers hardly learns.


# %%
def attention(x, p, grads, name):
    """softmax(q k^T / sqrt(d)) v of every head, between two linear layers."""
    batch, tokens, width = x.shape
    packed, qkv_back = linear(x, p, grads, f"{name}.qkv")
    q, k, v = packed.reshape(batch, tokens, 3, HEADS, width // HEADS).transpose(2, 0, 3, 1, 4)
    scale = float(width // HEADS) ** -0.5
    weights, softmax_back = softmax(q @ k.swapaxes(-1, -2) * scale)
    mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(x.shape)
    y, proj_back = linear(mixed, p, grads, f"{name}.proj")

    def backward(dy):
        dm = proj_back(dy).reshape(batch, tokens, HEADS, -1).transpose(0, 2, 1, 3)
        ds = softmax_back(dm @ v.swapaxes(-1, -2)) * scale
        parts = np.stack([ds @ k, ds.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ dm])
        return qkv_back(parts.transpose(1, 3, 0, 2, 4).reshape(batch, tokens, 3 * width))

    return y, backward


# %% [markdown]
# ## Block and network
#
# Each half of a block adds to its input, so that gradients reach the first block undiminished. The class token is one
# more token that only collects; positions are added, since attention itself does not know where a patch was.


# %%
def block(x, p, grads, name):
    """x + attention(norm(x)), and of that x + MLP(norm(x))."""
    normal, norm1_back = layer_norm(x, p, grads, f"{name}.norm1")
    attended, attention_back = attention(normal, p, grads, f"{name}.attn")
    x = x + attended
    normal, norm2_back = layer_norm(x, p, grads, f"{name}.norm2")
    hidden, fc1_back = linear(normal, p, grads, f"{name}.mlp.fc1")
    active, gelu_back = gelu(hidden)
    y, fc2_back = linear(active, p, grads, f"{name}.mlp.fc2")

    def backward(dy):
        dy = dy + norm2_back(fc1_back(gelu_back(fc2_back(dy))))
        return dy + norm1_back(attention_back(dy))

    return x + y, backward


def forward(images, p, grads):
    """images [B, 1, H, W] -> logits [B, classes], and the backward of all of it."""
    patches, embed_back = linear(patchify(images), p, grads, "patch_embed.proj")
    first = np.broadcast_to(p["cls_token"], (len(images), 1, patches.shape[-1]))
    x = np.concatenate([first, patches], 1) + p["pos_embed"]
    backs = []
    for number in range(SIZES["depth"]):
        x, back = block(x, p, grads, f"blocks.{number}")
        backs.append(back)
    normal, norm_back = layer_norm(x[:, :1], p, grads, "norm")
    logits, head_back = linear(normal[:, 0], p, grads, "head")

    def backward(dy):
        dx = np.zeros_like(x)
        dx[:, :1] = norm_back(head_back(dy)[:, None])
        for back in reversed(backs):
            dx = back(dx)
        add(grads, "pos_embed", dx.sum(0, keepdims=True))
        add(grads, "cls_token", dx[:, :1].sum(0, keepdims=True))
        embed_back(dx[:, 1:])

    return logits, backward


def patchify(images):
    """[B, 1, H, W] -> [B, patches, pixels]: squares of PATCH, row by row."""
    batch, _, height, width = images.shape
    squares = images.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    return squares.reshape(batch, -1, PATCH * PATCH)


# %% [markdown]
# ## Loss and optimizer
#
# Softmax and cross entropy together have the simplest gradient there is: probabilities minus the truth.


# %%
def cross_entropy(logits, labels):
    """-log softmax(logits)[label], the mean; d logits = (softmax - one hot) / B."""
    shares, _ = softmax(logits)
    rows = np.arange(len(labels))
    gradient = shares.copy()
    gradient[rows, labels] -= 1
    return -np.log(shares[rows, labels]).mean(), gradient / len(labels)


def adam(p, grads, state, step, lr, beta1=0.9, beta2=0.999):
    """Adam (arXiv:1412.6980): p -= lr m / (sqrt(v) + eps), both averages corrected for their start at 0."""
    for name, g in grads.items():
        m, v = state.setdefault(name, [np.zeros_like(g), np.zeros_like(g)])
        m += (1 - beta1) * (g - m)
        v += (1 - beta2) * (g * g - v)
        p[name] -= lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + 1e-8)


# %% [markdown]
# ## The check
#
# In float64, logits and every gradient must be those of PyTorch's autograd through vit's reference.

# %%
digits = load_digits()
images, labels = (digits.images[:, None] / 8 - 1).astype(np.float32), digits.target
torch.manual_seed(0)
model = vit.create("vit_digits", backend="reference", **SIZES)

exact = model.double()
params = {name: value.detach().numpy().copy() for name, value in exact.named_parameters()}
for value in params.values():
    value += 0.05 * np.random.default_rng(value.size).standard_normal(value.shape)  # no zeros, which hide mistakes
exact.load_state_dict({name: torch.from_numpy(value) for name, value in params.items()})
wanted = exact(torch.from_numpy(images[:8]).double())
F.cross_entropy(wanted, torch.from_numpy(labels[:8])).backward()
grads = {}
logits, backward = forward(images[:8].astype(np.float64), params, grads)
backward(cross_entropy(logits, labels[:8])[1])
worst = max(np.abs(grads[name] - value.grad.numpy()).max() for name, value in exact.named_parameters())
print(f"{len(grads)} gradients checked; logits differ by {np.abs(logits - wanted.detach().numpy()).max():.1e}, ")
print(f"gradients by {worst:.1e} at most")
assert np.allclose(logits, wanted.detach().numpy(), atol=1e-12)
assert worst < 1e-12

# %% [markdown]
# ## Training
#
# 1,400 of the handwritten digits that come with scikit-learn, in float32; the other 397 are the test.

# %%
torch.manual_seed(0)
start = vit.create("vit_digits", backend="reference", **SIZES)
params = {name: value.detach().numpy().copy() for name, value in start.named_parameters()}
params["pos_embed"] *= 25  # 0.5: as large as the patches, so that their places count from the first step
rng = np.random.default_rng(0)
order = rng.permutation(len(images))
train, test = order[:1400], order[1400:]
state, step = {}, 0
for epoch in range(EPOCHS := 8):
    for batch in np.array_split(rng.permutation(train), 28):
        step, grads = step + 1, {}
        logits, backward = forward(images[batch], params, grads)
        loss, gradient = cross_entropy(logits, labels[batch])
        backward(gradient)
        adam(params, grads, state, step, lr=6e-3 * (1 - step / (28 * EPOCHS + 1)))
    accuracy = (forward(images[test], params, {})[0].argmax(1) == labels[test]).mean()
    print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {accuracy:.1%}")
assert accuracy > 0.9

# %% [markdown]
# What is still wrong: each digit as it was drawn, and what it was taken for.

# %%
answers = forward(images[test], params, {})[0].argmax(1)
wrong = test[answers != labels[test]][:16]
print("taken for", *answers[answers != labels[test]][:16])
strip = np.concatenate([np.pad(255 - 15 * digits.images[i].astype(np.uint8), 1) for i in wrong], axis=1)
picture = Image.fromarray(strip).resize((4 * strip.shape[1], 4 * strip.shape[0]), Image.Resampling.NEAREST)
picture  # noqa: B018 (a notebook shows it)
