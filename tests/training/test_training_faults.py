"""Trainings and the processes, signals, disks, links and variables around them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_helpers import SMALL, STEPS, TINY, Hook, children, figures, has_metrics, same_bits, vit_process, wait_for
from vit.data import DataError, readers
from vit.data.readers import WatchedLoader, leave_signals
from vit.support.cores import available_cores, cgroup_quota, free_cores
from vit.support.files import append_line, replacing, write_text
from vit.support.lock import FolderInUse, FolderLock
from vit.training import Interrupted, ReaderError, TrainError, state, train
from vit.training.interrupt import Signals

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


# ---- processes that read images ----


class Numbers(torch.utils.data.Dataset[int]):
    """0, 1, 2, ...; item `at` does something else first."""

    def __init__(self, at: int, action: Any) -> None:
        self.at, self.action = at, action

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == self.at:
            self.action()
        return index


def die(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(60)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGSEGV", "SIGBUS"])
def test_a_reader_that_dies_is_named_with_its_signal(name: str) -> None:
    number = signal.Signals[name]
    numbers = torch.utils.data.DataLoader(Numbers(12, lambda: die(number)), batch_size=4, num_workers=2)
    with Signals(), pytest.raises(ReaderError, match=rf"process \d+ was ended by {name}"):
        list(WatchedLoader(numbers))


def test_a_reader_that_leaves_is_named_with_its_exit_code() -> None:
    numbers = torch.utils.data.DataLoader(Numbers(12, lambda: os._exit(3)), batch_size=4, num_workers=2)
    with pytest.raises(ReaderError, match=r"process \d+ ended with exit code 3"):
        list(WatchedLoader(numbers))


def test_a_stopped_reader_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "STOPPED_SECONDS", 2.0)
    numbers = torch.utils.data.DataLoader(Numbers(12, lambda: die(signal.SIGSTOP)), batch_size=4, num_workers=2)
    began = time.monotonic()
    with pytest.raises(ReaderError, match=r"process \d+ was stopped for 2 s"):
        list(WatchedLoader(numbers))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("error", [KeyError, FileNotFoundError, EOFError, DataError, RuntimeError])
def test_what_a_reader_raises_comes_as_it_is(error: type[Exception]) -> None:
    def fail() -> None:
        raise error("eleven")

    numbers = torch.utils.data.DataLoader(Numbers(11, fail), batch_size=4, num_workers=1)
    with pytest.raises(error, match="eleven") as caught:
        list(WatchedLoader(numbers))
    assert not isinstance(caught.value, ReaderError)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
def test_of_several_readers_the_dead_one_is_named_and_none_is_left() -> None:
    numbers = torch.utils.data.DataLoader(
        Numbers(12, lambda: die(signal.SIGKILL)), batch_size=4, num_workers=4, persistent_workers=True
    )
    watched = WatchedLoader(numbers)
    batches = iter(watched)
    next(batches)
    pids = [reader.pid for reader in watched.readers]
    with pytest.raises(ReaderError, match=rf"ended unexpectedly: process {pids[3]} was ended by SIGKILL"):
        list(batches)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_wrapper_that_hides_the_readers_changes_nothing(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    numbers = torch.utils.data.DataLoader(Numbers(12, lambda: die(signal.SIGKILL)), batch_size=4, num_workers=2)
    wrapped = accelerate.Accelerator(cpu=True).prepare_data_loader(numbers)
    with pytest.raises(ReaderError, match=r"process \d+ was ended by SIGKILL"):
        list(WatchedLoader(wrapped))


def test_processes_of_the_program_are_no_readers() -> None:
    """Started while batches are read: they outlive the readers."""
    numbers = torch.utils.data.DataLoader(Numbers(24, lambda: os._exit(3)), batch_size=4, num_workers=1)
    batches = iter(WatchedLoader(numbers))
    next(batches)
    other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    other.start()
    try:
        with pytest.raises(ReaderError, match="exit code 3"):
            list(batches)
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_a_lone_sigterm_to_a_reader_changes_nothing() -> None:
    numbers = torch.utils.data.DataLoader(
        Numbers(-1, None), batch_size=1, num_workers=2, worker_init_fn=leave_signals, persistent_workers=True
    )
    watched = WatchedLoader(numbers)
    batches = iter(watched)
    found = [next(batches), next(batches)]  # one of each: both are set up
    for reader in watched.readers:
        subprocess.run(["kill", "-TERM", str(reader.pid)], check=True)  # from another process than their parent
    found += list(batches)
    assert [int(number) for number in found] == list(range(40))
    watched.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_a_program_with_stopped_readers_comes_to_its_end(persistent: bool) -> None:
    """Stopped after their last batch, when nobody reads any more. Python's exit waits for all processes."""
    code = (
        "import os, signal, torch; from vit.data.readers import WatchedLoader\n"
        "data = torch.utils.data.DataLoader(list(range(8)), batch_size=1, num_workers=2, "
        f"persistent_workers={persistent})\n"
        "watched = WatchedLoader(data); batches = iter(watched); [next(batches) for _ in range(8)]\n"
        "[os.kill(reader.pid, signal.SIGSTOP) for reader in watched.readers]\n"
        "print(len(watched.readers), flush=True)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "2\n", "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_a_killed_reader_costs_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """One line, a checkpoint of the last step, and a resumed training with the bits of an undisturbed one."""
    config = dataclasses.replace(SMALL, workers=2)
    whole = train(dataclasses.replace(config, workers=0), out=tmp_path / "whole")

    def end_readers() -> None:
        readers = multiprocessing.active_children()
        for process in readers:
            os.kill(process.pid or 0, number)
        for process in readers:
            process.join(60)
            assert process.exitcode is not None

    # In the first epoch: in the second all batches may have been given already.
    kill = Hook(2, end_readers)
    with pytest.raises(TrainError, match=r"(ended|killed).*; go on with: vit train --resume .*run$"):
        train(config, out=tmp_path / "run", display=kill)
    assert not multiprocessing.active_children() or not [p for p in multiprocessing.active_children() if p.is_alive()]
    train(resume=tmp_path / "run", changes={"workers": 0})
    same_bits(whole.run, tmp_path / "run")


@pytest.mark.parametrize("target", ["reader", "group"])
def test_a_signal_with_readers_is_one_line(tmp_path: Path, target: str) -> None:
    """To one reader, as the kernel does without memory, or to the whole group, as a batch system does."""
    out = tmp_path / "run"
    words = [*TINY, "--epochs", "1000", "--workers", "2", "--out", str(out)]
    process = vit_process("train", *words, start_new_session=True)
    wait_for(lambda: has_metrics(out), process)
    if target == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(children(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=90)
    assert process.returncode == (128 + signal.SIGTERM if target == "group" else 1)
    assert len(error.splitlines()) == 1
    assert error.startswith("vit: stopped after step") == (target == "group")
    assert error.endswith(f"go on with: vit train --resume {out}\n")
    assert (out / "checkpoint.safetensors").is_file()


def test_the_handlers_are_put_back(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = [signal.getsignal(number) for number in numbers]
    train(dataclasses.replace(SMALL, epochs=1, workers=1), out=tmp_path / "run")
    assert [signal.getsignal(number) for number in numbers] == before
    assert not [thread for thread in threading.enumerate() if thread.name == "vit-readers"]


# ---- variables of the environment ----


@pytest.mark.parametrize(
    ("variables", "option"),
    [
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--accumulate"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "--amp"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "--amp"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}, "nothing"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.001"}, "--clip"),
        ({"ACCELERATE_DOWNCAST_BF16": "true"}, "--amp bf16"),
        ({"ACCELERATE_BYPASS_DEVICE_MAP": "true", "ACCELERATE_DEBUG_MODE": "1", "FSDP_OFFLOAD_PARAMS": "true"}, None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_no_variable_changes_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], option: str | None
) -> None:
    config = dataclasses.replace(SMALL, epochs=1)
    plain = train(config, out=tmp_path / "plain")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hook = Hook()
    other = train(config, out=tmp_path / "other", display=hook)
    assert hook.steps == STEPS
    same_bits(plain.run, other.run)
    assert {name: os.environ[name] for name in variables} == variables
    told = [line for line in hook.lines if "is not used" in line]
    assert bool(told) == (option is not None)
    assert option is None or option in told[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ACCELERATE_USE_FSDP", "vit train has as --parallel fsdp"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "--parallel fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "vit train does not have"),
        ("ACCELERATE_USE_MEGATRON_LM", "vit train does not have"),
    ],
)
def test_another_way_to_compute_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"vit: {name}=true asks for .*{words}; unset it"):
        train(SMALL, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(name, "false")
    train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 asks for 2 processes, but RANK does not say .*torchrun"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4 asks for 4 processes"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is no number"),
        ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE=-1 is no number"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, but WORLD_SIZE=2"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_half_of_a_launchers_variables_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^vit: {text}"):
        train(SMALL, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": ""}], ids="+".join)
def test_a_launcher_of_one_process_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "run")


def test_ranks_stop_when_their_launcher_has_died(tmp_path: Path) -> None:
    """torchrun killed outright leaves its ranks without anyone who could stop them."""
    text = (
        "import os, pathlib, time\n"
        "from vit.training.interrupt import Signals\n"
        "signals = Signals()\n"
        "if os.fork() == 0:\n"
        "    signals.launcher, before = os.getppid(), signals.stop_requested\n"
        "    pathlib.Path('ready').touch()\n"
        "    end = time.monotonic() + 60\n"
        "    while not signals.stop_requested and time.monotonic() < end: time.sleep(0.01)\n"
        "    pathlib.Path('new').write_text(f'{before} {signals.stop_requested}')\n"
        "    os.rename('new', 'result')\n"
        "    os._exit(0)\n"
        "while not os.path.exists('ready'): time.sleep(0.01)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", text], cwd=tmp_path, timeout=120)
    result, end = tmp_path / "result", time.monotonic() + 60
    while not result.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert result.read_text() == "False True"


def test_accelerates_state_of_another_program_part_does_not_matter(tmp_path: Path) -> None:
    code = (
        "import sys, accelerate; from pathlib import Path; accelerate.Accelerator(cpu=True, mixed_precision='bf16', "
        "gradient_accumulation_steps=3)\n"
        "import dataclasses; from training_helpers import SMALL; from vit.training import train\n"
        f"train(dataclasses.replace(SMALL, epochs=1), out=Path({str(tmp_path / 'other')!r}))"
    )
    search = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)
    same_bits(train(dataclasses.replace(SMALL, epochs=1), out=tmp_path / "plain").run, tmp_path / "other")


# ---- links, temporary files, one owner ----


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    for write in (lambda: write_text(link, "x"), lambda: append_line(link, "x", 0), lambda: append_line(link, "x", 8)):
        with pytest.raises(OSError, match=rf"^vit: {link} is a link to .*victim.*writes to no link"):
            write()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="is a link"):
        write_text(tmp_path / "dangling", "x")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_another_name_of_a_file_keeps_its_content(tmp_path: Path) -> None:
    """A backup by hard links (cp -al) is not written to."""
    path, backup = tmp_path / "metrics.jsonl", tmp_path / "backup"
    end = append_line(path, "one", 0)
    backup.hardlink_to(path)
    append_line(path, "two", end)
    assert (backup.read_text(), path.read_text()) == ("one\n", "one\ntwo\n")


def test_a_header_reaches_no_terminal_as_it_is(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"\\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"\\x1b\[2J") as caught:
        state.load(path)
    assert str(caught.value).isprintable()


def test_a_foreign_run_folder_cannot_destroy_a_file(tmp_path: Path) -> None:
    """Archives carry links: at a temporary name, and in the place of a file that grows."""
    run, victim = tmp_path / "run", tmp_path / "victim"
    with pytest.raises(Interrupted):
        train(SMALL, out=run, display=Hook(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    victim.write_text("precious")
    for name in (".checkpoint.safetensors.tmp", ".metrics.jsonl.tmp", ".best.safetensors.0123456789ab.tmp"):
        (run / name).symlink_to(victim)
    train(resume=run)
    assert victim.read_text() == "precious"
    for name in ("metrics.jsonl", "best.safetensors", ".lock", "curves.png"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(victim)
        with pytest.raises(OSError, match=rf"^vit: .*{name} is a link to"):
            train(resume=run)
        (run / name).unlink()
    assert victim.read_text() == "precious"


def test_temporary_files_are_new_and_their_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last one to end"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_owner_who_is_named(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from vit.support.lock import FolderLock\n"
    code += f"lock = FolderLock(Path({str(tmp_path)!r})); print('locked', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUse, match=rf"is in use by process {process.pid} on "):
        FolderLock(tmp_path)
    process.kill()
    process.communicate()
    with FolderLock(tmp_path), pytest.raises(FolderInUse, match="another thread of this process"):
        FolderLock(tmp_path)
    with FolderLock(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert not list(tmp_path.iterdir())


def test_a_run_that_trains_is_not_resumed_twice(tmp_path: Path) -> None:
    found: list[str] = []

    def again() -> None:
        for options in ({"resume": tmp_path / "run"}, {"config": SMALL, "out": tmp_path / "run", "resume": "auto"}):
            with pytest.raises(FolderInUse) as error:
                train(**options)  # type: ignore[arg-type]
            found.append(str(error.value))

    whole = train(SMALL, out=tmp_path / "run", display=Hook(3, again))
    assert len(found) == 2
    assert all(f"vit: {tmp_path / 'run'} is in use by" in text for text in found)
    assert not (whole.run / ".lock").exists()


def test_of_two_trainings_into_one_folder_one_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    pair = [vit_process("train", *TINY, "--epochs", "1", "--out", str(out)) for _ in range(2)]
    results = sorted((process.wait(120), process.communicate()[1]) for process in pair)
    assert [code for code, _ in results] == [0, 1]
    assert "is in use by" in results[1][1] or "exists already" in results[1][1]


# ---- full disks ----


@pytest.mark.parametrize("size", [100, 3000, 20_000])
def test_no_full_disk_is_a_dead_end(tmp_path: Path, size: int) -> None:
    """Whatever could still be written, the same command goes on, with the bits of an undisturbed training."""
    whole = train(SMALL, out=tmp_path / "whole")
    out = tmp_path / "run"
    words = ["train", "--resume", "auto", "--config", str(whole.run / "config.yaml"), "--out", str(out)]
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size})); "
    limited += "from vit.cli import main; sys.exit(main(sys.argv[1:]))"
    found = subprocess.run([sys.executable, "-c", limited, *words], capture_output=True, text=True, timeout=120)
    assert found.returncode == 1, found.stderr
    assert found.stderr.splitlines()[-1].startswith("vit: "), found.stderr  # joblib may warn before
    assert "Traceback" not in found.stderr
    found = subprocess.run([sys.executable, "-m", "vit", *words], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    same_bits(whole.run, out)


# ---- threads ----


def test_threads_follow_the_model_and_the_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import vit
    from vit.training import threads

    monkeypatch.setattr(threads, "free_cores", lambda: 8)
    small = vit.create("vit_mnist_demo", backend="reference")
    large = vit.create("vit_tiny_patch16_224", backend="reference")
    assert threads.choose_threads(small, 128) == 1
    assert threads.choose_threads(large, 64) == 8
    assert threads.choose_threads(large, 1) == 1
    monkeypatch.setattr(threads, "free_cores", lambda: 2)
    assert threads.choose_threads(large, 64) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads.choose_threads(large, 64) == 1


def test_free_cores_are_those_that_nobody_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for load, expected in ((0.0, 8), (8.0, 4), (15.0, 1), (40.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert free_cores(tmp_path) == expected
    assert available_cores(tmp_path) == 8
    (tmp_path / "proc/self").mkdir(parents=True)
    group = tmp_path / "sys/fs/cgroup/job/step"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    assert cgroup_quota(tmp_path) is None
    (group / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path) is None
    (group.parent / "cpu.max").write_text("250000 100000\n")
    assert (cgroup_quota(tmp_path), available_cores(tmp_path)) == (2.5, 2)
    (group / "cpu.max").write_text("50000 100000\n")
    assert (cgroup_quota(tmp_path), available_cores(tmp_path)) == (0.5, 1)


def test_a_quota_of_control_groups_version_1(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n")
    mount = tmp_path / "sys/fs/cgroup/cpu,cpuacct"  # of a container: its own group is the root
    mount.mkdir(parents=True)
    (mount / "cpu.cfs_quota_us").write_text("-1\n")
    (mount / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path) is None
    (mount / "cpu.cfs_quota_us").write_text("300000\n")
    assert cgroup_quota(tmp_path) == 3.0


def test_the_number_of_threads_changes_no_bit(tmp_path: Path) -> None:
    """Of gradients with more elements than PyTorch sums in one thread (32,768), too."""
    config = dataclasses.replace(SMALL, arch={"embed_dim": 128, "depth": 1, "num_heads": 2}, epochs=1)
    one = train(dataclasses.replace(config, threads=1), out=tmp_path / "one")
    two = train(dataclasses.replace(config, threads=2), out=tmp_path / "two")
    same_bits(one.run, two.run)
    assert figures(one.run)[0]["grad_norm"] == figures(two.run)[0]["grad_norm"]
