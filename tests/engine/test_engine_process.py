"""vit.Engine in processes that fork, end while calls run, or share their machine with others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import USABLE

pytestmark = pytest.mark.skipif("cpu" not in USABLE, reason="the cpu backend is not usable here")

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

START = """
import atexit, gc, os, signal, sys, threading, time
import torch, vit
torch.manual_seed(0)
arch = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2, num_classes=10)
model = vit.create("vit_tiny_patch16_224", backend="cpu", training=False, **arch)
x = torch.linspace(-2, 2, 4 * 3 * 32 * 32).sin().view(4, 3, 32, 32)
engine = vit.Engine(model, num_threads=2)

def for_ever(f):
    threading.Thread(target=lambda: [f() for _ in iter(int, 1)], daemon=True).start()

def in_child(f):
    # f() in a forked child, which has 60 seconds; what it returns must be true.
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # kills a child that hangs
        try:
            os._exit(0 if f() else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def run(script: str, timeout: float = 300) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", START + script],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


#: What daemon threads do when the main thread ends. Each runs in a forked child of one process, which leaves as Python
#: leaves: sys.exit in the child of a fork that never used OpenMP.
AT_EXIT = {
    "call": "for_ever(lambda: engine(x))",
    "many threads": "[for_ever(lambda: engine(x)) for _ in range(4)]",
    "submit": "for_ever(lambda: engine.submit(x).result())",
    "pending": "[engine.submit(x) for _ in range(8)]",
    "another engine for each call": "for_ever(lambda: vit.Engine.load(FILE)(x))",
    "build": "for_ever(lambda: vit.Engine(model))",
    "del": "for_ever(lambda e=engine: e(x)); del engine",
    "atexit": "atexit.register(lambda: engine(x)); for_ever(lambda: engine(x))",
    "server": """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import urlopen
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        while True: engine(x)
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
threading.Thread(target=lambda: urlopen(f"http://127.0.0.1:{server.server_port}/"), daemon=True).start()
""",
}

LEAVE = """
for turn in range(TURNS):
    child = os.fork()
    if child == 0:
        exec(compile(BODY, "<body>", "exec"))
        time.sleep(0.02 + 0.005 * turn)
        sys.exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != 0:
        print("turn", turn, "ended with", code, flush=True)
        os._exit(1)
os._exit(0)
"""


@pytest.mark.parametrize("what", AT_EXIT)
def test_leaving_python_during_a_call(what, tmp_path):
    """All end with 0, from different moments of the call. The end of one takes a second of processor time."""
    turns = 20 if what == "call" else 4
    saved = f"FILE = {str(tmp_path / 'model.vit')!r}; engine.save(FILE)"
    done = run(f"{saved}\nTURNS = {turns}\nBODY = {AT_EXIT[what]!r}\n{LEAVE}")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["call", "submit"])
def test_leaving_python_while_openmp_threads_work(what):
    """The same without a fork before it: the pool of the process is at work."""
    for _ in range(3):
        done = run(f"{AT_EXIT[what]}\ntime.sleep(0.1)")
        assert done.returncode == 0, done.stdout + done.stderr


def test_collecting_engines_while_others_are_in_a_call():
    script = """
expected = engine(x)
wrong = []
def work():
    for _ in range(30):
        e = vit.Engine(model, num_threads=2)
        e.me = e
        if not torch.equal(e(x), expected): wrong.append(1)
        del e
        gc.collect()
threads = [threading.Thread(target=work) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong
"""
    done = run(script)
    assert done.returncode == 0, done.stderr


FORKS = {
    "after calls": "engine(x)",
    "after submit": "engine.submit(x).result()",
    "after the model": "model(x)",
    "after training": "model.train()(x).sum().backward(); model.eval()",
    "during a call": "for_ever(lambda: engine(big)); time.sleep(0.05)",
    "during calls of many threads": "[for_ever(lambda: engine(big[:n])) for n in (1, 7, 40)]; time.sleep(0.05)",
    "during submit": "for_ever(lambda: engine.submit(big).result()); time.sleep(0.05)",
    "while engines are made": "for_ever(lambda: vit.Engine(model, max_batch=3)); time.sleep(0.05)",
}


@pytest.mark.parametrize("what", FORKS)
def test_a_forked_child_uses_the_engine(what):
    """The same bits in the child: by a call, by submit, by a grandchild, by an engine of its own."""
    script = f"""
big = torch.linspace(-2, 2, 40 * 3 * 32 * 32).sin().view(40, 3, 32, 32)
expected, of_big = engine(x), engine(big)
{FORKS[what]}
def child():
    assert torch.equal(engine(x), expected)
    assert torch.equal(engine(big), of_big)
    assert torch.equal(engine.submit(x).result(30), expected)
    assert torch.equal(engine.submit(big).result(30), of_big)
    assert torch.equal(vit.Engine(model)(x), expected)
    in_child(lambda: torch.equal(engine.submit(x).result(30), expected))
    return True
for _ in range(5):
    in_child(child)
os._exit(0)
"""
    done = run(script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_spawned_children_load_the_file(tmp_path):
    script = f"""
import multiprocessing
engine.save({str(tmp_path / "model.vit")!r})
torch.save((x, engine(x)), {str(tmp_path / "pair.pt")!r})
"""
    done = run(script)
    assert done.returncode == 0, done.stderr
    (tmp_path / "spawned.py").write_text("""
import multiprocessing, sys, torch, vit
def work(folder):
    x, expected = torch.load(folder + "/pair.pt")
    return torch.equal(vit.Engine.load(folder + "/model.vit")(x), expected)
if __name__ == "__main__":
    for method in ("spawn", "forkserver", "fork"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(work, [sys.argv[1]] * 2) == [True, True], method
""")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", tmp_path / "spawned.py", tmp_path],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_quota_of_control_groups(tmp_path):
    """Both versions, nested, in containers with and without a namespace of their own; and threads beside others."""
    program = tmp_path / "cores"
    sources = [ROOT / "tests/native/cores.cpp", ROOT / "csrc/cpu/engine/cores.cpp"]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", ROOT / "csrc", *sources, "-o", program]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    v2 = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
    v1 = "32 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    cases = [
        # cgroup, mountinfo, files, cores
        ("0::/\n", v2.format(top="/"), {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", v2.format(top="/"), {"cpu.max": "max 100000"}, float("inf")),
        ("0::/\n", v2.format(top="/"), {}, float("inf")),
        ("0::/a/b\n", v2.format(top="/"), {"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, 2),
        ("0::/a/b\n", v2.format(top="/"), {"a/cpu.max": "200000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/docker/x\n", v2.format(top="/docker/x"), {"cpu.max": "300000 100000"}, 3),
        ("0::/../other\n", v2.format(top="/"), {"cpu.max": "300000 100000"}, 3),
        ("4:cpu,cpuacct:/\n", v1.format(top="/"), {"cpu,cpuacct/cpu.cfs_quota_us": "250000"}, 2.5),
        ("4:cpu,cpuacct:/\n", v1.format(top="/"), {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, float("inf")),
        ("4:cpu,cpuacct:/k/p\n", v1.format(top="/"), {"cpu,cpuacct/k/cpu.cfs_quota_us": "400000"}, 4),
        ("4:cpu,cpuacct:/k/p\n", v1.format(top="/k/p"), {"cpu,cpuacct/cpu.cfs_quota_us": "100000"}, 1),
        ("3:cpuset:/k\n", v1.format(top="/"), {"cpu,cpuacct/k/cpu.cfs_quota_us": "100000"}, float("inf")),
        ("", "", {}, float("inf")),
        ("nonsense\n::\n0::\n", "nonsense - x\n" + v2.format(top="/"), {"cpu.max": "100000 0"}, float("inf")),
    ]
    for number, (group, mounts, files, cores) in enumerate(cases):
        root = tmp_path / str(number)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("5:memory:/elsewhere\n" + group)
        (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n" + mounts)
        for name, content in files.items():
            path = root / "sys/fs/cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")
            if name.endswith("cfs_quota_us"):
                path.with_name("cpu.cfs_period_us").write_text("100000\n")
        got = subprocess.run([program, "quota", f"{root}"], capture_output=True, text=True, check=True).stdout
        assert float(got) == cores, (number, group, got)
    for others, cores, limit, threads in (
        (0, 2, 2, 2), (0.3, 2, 2, 2), (1, 2, 2, 1), (4, 2, 2, 1), (1, 64, 64, 63), (64, 64, 64, 32), (66, 64, 4, 3),
        (0, 64, 4, 4), (1000, 8, 8, 1), (5, 8, 1, 1),
    ):  # fmt: skip
        given = [program, "beside", str(others), str(cores), str(limit)]
        got = subprocess.run(given, capture_output=True, text=True, check=True).stdout
        assert int(got) == threads, (others, cores, limit, got)
    for (load, busy, mine, idle), cores, limit, others in (
        ((2, 1, 1, 1), 2, 2, 0),  # the load is of programs that have ended
        ((2, 2, 2, 0), 2, 2, 0),
        ((1, 2, 4 / 3, 0), 2, 2, 1),  # one program beside two threads
        ((6, 2, 0.5, 0), 2, 2, 6),  # six of them
        ((0.2, 1.5, 0.5, 0.5), 2, 2, 1),  # one that has begun
        ((8, 8, 0, 0), 8, 8, 8),
        ((0, 0.1, 0.2, 1.9), 2, 2, 0),
    ):
        given = [program, "others", *(str(value) for value in (load, busy, mine, idle, cores, limit))]
        got = subprocess.run(given, capture_output=True, text=True, check=True).stdout
        assert float(got) == pytest.approx(others, abs=1e-4), (load, busy, mine, idle, got)
