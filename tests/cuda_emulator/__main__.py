"""Runs cases on the emulator: python -m cuda_emulator --folder BUILD [--path NAME] [--sanitize] [PATTERN]

With --sanitize the process restarts itself with the sanitizers' libraries; what they find ends it. The exit code is 1
when a case fails or the sanitizers object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from vit.parity import backend_ops, cases, run

from . import PATHS, build, registered, sanitizer_environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pattern", nargs="?", help="only cases whose id matches this regular expression")
    parser.add_argument("--folder", type=Path, required=True, help="where the module is compiled, and kept")
    parser.add_argument("--path", choices=tuple(PATHS), default="automatic")
    parser.add_argument("--every", type=int, default=1, help="every n-th case (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="starting with this one (default: %(default)s)")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    args = parser.parse_args()
    module = build(args.folder, args.sanitize)
    if args.sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
        environment = sanitizer_environment()
        if environment is None:
            print("cuda_emulator: the compiler has no AddressSanitizer library", file=sys.stderr)
            return 2
        os.execve(sys.executable, [sys.executable, "-m", "cuda_emulator", *sys.argv[1:]], environment)
    torch.set_num_threads(1)
    wanted = [case for case in cases("cuda", pattern=args.pattern) if case.group != "large"][args.first :: args.every]
    failed, worst, start = 0, (0.0, ""), time.monotonic()
    with registered(module) as emulated:
        emulated.use(args.path)
        for case in wanted:
            result = run(case, backend_ops(emulated.name))
            worst = max(worst, (result.ratio, case.id))
            if not result.ok:
                failed += 1
                print(result.text, flush=True)
    seconds = time.monotonic() - start
    print(f"{len(wanted)} cases, {failed} failed, {seconds:.0f} s; closest to its bound: {worst[0]:.2f} {worst[1]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
