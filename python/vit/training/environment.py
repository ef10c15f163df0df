"""accelerate's Accelerator, which only the configuration steers: no variable of the environment changes a result."""

from __future__ import annotations

import datetime
import os
import platform
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from ..backends import default_device, get
from ..support.extras import require
from ..support.text import printable
from .config import TrainConfig

#: Names (or beginnings of names) that accelerate reads as options of a training. `accelerate launch` sets many of them,
#: mostly to what is the default anyway.
_OPTIONS = (
    "ACCELERATE_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
    "XLA_USE_BF16",
    "XLA_DOWNCAST_BF16",
    "DEEPSPEED_",
)

#: Those that ask for another way to compute than this loop has, or has as an option: going on without it would be a
#: surprise.
_REFUSED = {
    "ACCELERATE_USE_FSDP": "sharded parameters, which vit train has as --parallel fsdp",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed, which vit train does not have",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM, which vit train does not have",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a mesh of processes; vit train shards parameters by --parallel fsdp",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker, which vit train does not have",
    "ACCELERATE_USE_TP": "tensor parallelism, which vit train does not have",
}

#: Those with an option of vit train in their place, and the value that says the same as the default.
_OURS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("--accumulate", "1"),
    "ACCELERATE_MIXED_PRECISION": ("--amp", "no"),
    "ACCELERATE_DYNAMO_BACKEND": ("nothing: the kernels are compiled already", "no"),
    "ACCELERATE_USE_CPU": ("--backend cpu or reference", "false"),
    "ACCELERATE_TORCH_DEVICE": ("--backend", ""),
    "ACCELERATE_GRADIENT_CLIPPING": ("--clip", ""),
    "ACCELERATE_DOWNCAST_BF16": ("--amp bf16", "no"),
    "XLA_USE_BF16": ("--amp bf16", "0"),
    "XLA_DOWNCAST_BF16": ("--amp bf16", "0"),
}
_OFF = ("", "0", "no", "false", "off", "n", "f")

#: Beginnings of the variables that a run record keeps: they choose threads, kernels and devices.
_RECORDED = (
    "ACCELERATE_", "ATEN_", "CUBLAS_", "CUDA_", "FSDP_", "GOMP_", "KMP_", "MKL_", "NVIDIA_TF32_OVERRIDE", "OMP_",
    "ONEAPI_", "SYCL_", "TORCH_", "VIT_", "WORLD_SIZE", "ZE_",
)  # fmt: skip


#: What launchers (torchrun, accelerate launch, mpirun) call the number of processes and the place of this one.
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


def check_launcher(on_cpu: bool) -> None:
    """ValueError for the variables of a launcher that no launcher sets so: a part of them, left in a shell, would start
    a wait for processes that nobody starts, or a training whose results nobody writes."""
    found = {}
    for name in (*_SIZES, *_RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if text := os.environ.get(name, ""):
            if not text.strip().isdigit():
                raise ValueError(f"vit: {name}={printable(text)} is no number of processes; unset it")
            found[name] = int(text)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return  # by the program around, however it came by its numbers
    size = next(((name, found[name]) for name in _SIZES if found.get(name, 0) > 1), None)
    rank = next((name for name in _RANKS if name in found), None)
    way_out = f"start them with a launcher (torchrun --nproc-per-node {size[1] if size else 2} -m vit train ...)"
    needed = ("RANK", rank) if on_cpu else ("LOCAL_RANK", "LOCAL_RANK" if "LOCAL_RANK" in found else None)
    if size and needed[1] is None:
        raise ValueError(
            f"vit: {size[0]}={size[1]} asks for {size[1]} processes, but {needed[0]} does not say which this one is; "
            f"{way_out}, or unset {size[0]} for one process"
        )
    if rank and found[rank] >= (size[1] if size else 1):
        what = f"{size[0]}={size[1]}" if size else f"{_SIZES[_RANKS.index(rank)]} is not set, for one process"
        raise ValueError(f"vit: {rank}={found[rank]}, but {what}; {way_out}, or unset {rank}")


@contextmanager
def without_options(report: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hides accelerate's variables while it builds something. Those that ask for other results are reported, with the
    option that does the same; ValueError for those that vit train has nothing like."""
    hidden = {name: value for name, value in os.environ.items() if name.startswith(_OPTIONS)}
    for name, what in _REFUSED.items():
        if hidden.get(name, "").strip().lower() not in _OFF:
            raise ValueError(f"vit: {name}={hidden[name]} asks for {what}; unset it")
    for name, (option, default) in _OURS.items():
        value = hidden.get(name, "").strip().lower()
        if name in hidden and value != default and not (value in _OFF and default in _OFF):
            report(f"{name}={hidden[name]} is not used: the options alone decide; for its effect give {option}")
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def accelerator(config: TrainConfig, report: Callable[[str], None] = lambda text: None) -> Any:
    """accelerate's Accelerator for the device of the configuration's backend. Precision is the loop's own (`--amp`)."""
    state = require("accelerate.state", "train")
    on_cpu = default_device(config.backend).type == "cpu"
    check_launcher(on_cpu)
    known = state.PartialState._shared_state
    if known and known["distributed_type"] == state.DistributedType.NO and (known["device"].type == "cpu") != on_cpu:
        # accelerate keeps one device per interpreter; a second training may be for another one.
        state.AcceleratorState._reset_state(reset_partial_state=True)
    elif state.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        state.AcceleratorState._reset_state()  # and one precision, which another part of the program has chosen
    plugin = require("accelerate.utils", "train").GradientAccumulationPlugin(
        num_steps=config.accumulate, adjust_scheduler=False, sync_with_dataloader=False
    )
    if on_cpu and os.environ.get("ACCELERATE_USE_CPU"):
        report = _but(report, "ACCELERATE_USE_CPU")  # what happens anyway
    with without_options(report):
        return require("accelerate", "train").Accelerator(
            cpu=on_cpu, mixed_precision="no", gradient_accumulation_plugin=plugin, kwargs_handlers=_rendezvous(on_cpu)
        )


def _rendezvous(on_cpu: bool) -> list[Any]:
    """How the processes find each other, where it is not torch's own way: after torchrun's restart (--max-restarts).

    The launcher's store outlives its processes. torch 2.14 looks up their addresses in it under the same keys after a
    restart and finds those of the dead, so that most restarts end in "connection refused" or wait for half an hour.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or torch.distributed.is_initialized():
        return []
    with suppress(RuntimeError):  # it is registered
        torch.distributed.register_rendezvous_handler("vit-restart", _meet_again)
    # accelerate's own limit would be NCCL's for all backends; these are torch's.
    limit = datetime.timedelta(minutes=30 if on_cpu else 10)
    kwargs = require("accelerate", "train").InitProcessGroupKwargs
    return [kwargs(init_method=f"vit-restart://{restarts}", timeout=limit)]


def _meet_again(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    """torch's rendezvous by the environment, with keys of this restart alone."""
    store, rank, size = next(torch.distributed.rendezvous("env://", **options))
    yield torch.distributed.PrefixStore(url.partition("?")[0], store), rank, size


def _but(report: Callable[[str], None], name: str) -> Callable[[str], None]:
    return lambda text: None if text.startswith(f"{name}=") else report(text)


def description(plan: dict[str, str]) -> dict[str, Any]:
    """Versions, host, backends and environment: what a run record says of where a training ran."""
    import accelerate
    import safetensors

    from ..version import __version__

    return {
        "versions": {
            "vit": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "accelerate": accelerate.__version__,
            "safetensors": safetensors.__version__,
        },
        "host": {
            "name": socket.gethostname(),
            "system": platform.platform(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)),
            "executable": sys.executable,
        },
        # Not vit.backends(): that would load every backend.
        "backends": {name: get(name).info() for name in sorted(set(plan.values()))},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_RECORDED)},
    }
