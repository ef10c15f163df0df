"""Two processes train one model with PyTorch's DistributedDataParallel, and come to the losses of one process.

    torchrun --nproc-per-node 2 examples/ddp.py

Without torchrun it starts itself so. `torchrun --nproc-per-node 2 -m vit train ...` does all this by itself.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
import vit
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel

BATCH, STEPS = 64, 12


def train(rank, processes):
    """STEPS losses, each the mean over all processes; every process takes its own part of a batch."""
    torch.set_num_threads(1)  # the matrices are small
    torch.manual_seed(0)  # the same weights everywhere
    digits = load_digits()
    images, labels = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)
    model = vit.create("vit_digits", backend="cpu" if vit.backends()["cpu"]["available"] else "reference")
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        part = torch.arange(step % 3 * BATCH + rank, (step % 3 + 1) * BATCH, processes)
        loss = F.cross_entropy(wrapped(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()  # the gradients are averaged over the processes here
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


if "RANK" not in os.environ:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    raise SystemExit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)

dist.init_process_group("gloo")  # "nccl" on GPUs, and model.to(rank)
losses = train(dist.get_rank(), dist.get_world_size())
if dist.get_rank() == 0:
    alone = train(0, 1)
    worst = max(abs(a - b) for a, b in zip(losses, alone, strict=True))
    print(f"{dist.get_world_size()} processes: loss {losses[0]:.3f} -> {losses[-1]:.3f}, one process's to {worst:.1e}")
    assert worst < 1e-4  # float32: sums in another order, over 12 steps
dist.barrier()
dist.destroy_process_group()
