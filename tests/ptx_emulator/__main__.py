"""Runs the case list on nvcc's PTX: python -m ptx_emulator --folder BUILD [--path NAME] [--device NAME] [PATTERN]

Without options this is the whole list, but its large shapes, on one device and path. The exit code is 1 when a case
fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from cuda_emulator import PATHS
from vit.parity import cases

from . import DEVICES, backend, build, nvcc
from .cases import failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", help="only cases whose id matches this regular expression")
    parser.add_argument("--folder", type=Path, required=True, help="where the module is compiled, and kept")
    parser.add_argument("--path", choices=tuple(PATHS), default="automatic")
    parser.add_argument("--device", choices=tuple(DEVICES), default="9.0", help="compute capability (default: 9.0)")
    parser.add_argument("--seed", type=int, help="warps in a random order, one block after the other: slow")
    parser.add_argument("--every", type=int, default=1, help="every n-th case (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="starting with this one (default: %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="list the kernels that were not launched")
    parser.add_argument("--instructions", action="store_true", help="list the forms of instructions that were run")
    args = parser.parse_args()
    if nvcc() is None:
        print("ptx_emulator: no nvcc was found; CUDACXX names one elsewhere", file=sys.stderr)
        return 2
    folder = build(args.folder)
    torch.set_num_threads(1)
    wanted = [case for case in cases("cuda", pattern=args.pattern) if case.group != "large"][args.first :: args.every]
    failed, start = 0, time.monotonic()
    with backend(folder, seed=args.seed) as (record, launches):
        record.use(args.path)
        record.device = DEVICES[args.device]
        for case in wanted:
            if text := failure(case, record, launches):
                failed += 1
                print(text, flush=True)
    print(f"{len(wanted)} cases, {failed} failed, {time.monotonic() - start:.0f} s, {len(launches.done)} kernels")
    if args.kernels:
        entries = {name for module in launches.modules.values() for name in module.entries()}
        print(*sorted(entries - launches.done.keys()), sep="\n")
    if args.instructions:
        print(*sorted({op for program in launches.programs.values() for op in program.opcodes}), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
