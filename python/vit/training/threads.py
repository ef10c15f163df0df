"""How many CPU threads a training takes."""

from __future__ import annotations

import os

from ..model import VisionTransformer
from ..support.cores import free_cores

#: Multiplications of a mean matrix product for which one more thread pays: 3 ms of an AVX2 core at 30 G/s, about the
#: time slice of Linux's scheduler, which is what a barrier costs when one of the threads is not running. Below it
#: (vit_digits at batch 64: 9 M, vit_mnist_demo at 128: 28 M) two threads gain 1.4x on an idle machine and lose 5x to
#: 17x on a busy one (2 shared cores, AVX2 and AVX-512); ViT-Ti/16 at batch 64 has 1,440 M.
WORK_PER_THREAD = 100e6


def choose_threads(model: VisionTransformer, batch_size: int) -> int:
    """Threads for forward and backward passes of `model`: one per WORK_PER_THREAD, at most this process's share of the
    free cores."""
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    tokens = model.num_prefix_tokens + model.patch_embed.num_patches
    work = matrices * tokens * batch_size / max(1, 4 * len(model.blocks))  # qkv, proj, fc1, fc2 of each block
    share = max(1, free_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)))
    return max(1, min(share, int(work / WORK_PER_THREAD)))
