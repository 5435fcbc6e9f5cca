"""Memory and energy counters against sums made by hand; tests that change a whole process run in a child."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from child_ranks import run_script

from memfit.runtime import cgroup, counting_allocator, memory
from memfit.runtime.cgroup import Group
from memfit.runtime.child_process import CHILD_ENV
from memfit.runtime.counting_allocator import AllocatorUnavailable, available
from memfit.runtime.energy import EnergyMeter
from memfit.runtime.memory_cap import MemoryLimit
from memfit.runtime.oom import is_oom_error, is_oom_text
from memfit.types.errors import MemfitError

needs_compiler = pytest.mark.skipif(available() is not None, reason=f"no counting allocator: {available()}")
MIB = 2**20
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA needs Linux")


def forked(code: str, folder: Path) -> Any:
    """What `code` leaves in `out` in a process of its own, whose memory is not measured."""
    (folder / "code.py").write_text(f"import json\nout = None\n{code}\nprint(json.dumps(out))")
    done = run_script(folder / "code.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def child(code: str, *, env: dict[str, str] | None = None) -> Any:
    """What `code`, run by a fresh Python, leaves in `out`."""
    text = f"import json\nout = None\n{code}\nprint(json.dumps(out))"
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={**os.environ, **CHILD_ENV, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- the counting allocator

COUNTED = (
    "import torch\nfrom memfit.runtime.counting_allocator import CountingAllocator\nc = CountingAllocator()\n"
)


@needs_compiler
def test_sizes_are_rounded_up_to_64_bytes_and_the_peak_is_reset(tmp_path: Path) -> None:
    out = forked(
        COUNTED
        + """
before = torch.ones(1000)                  # not counted: made before the install
c.install()
c.install()                                # once more does nothing
def now(): return [c.live_bytes(), c.peak_bytes(), *c.counts()]
out = [now()]
a = torch.empty(16)                        # 64 B: exactly one unit
b = torch.empty(17)                        # 68 B -> 128 B
view, none = b[:3], torch.empty(0)         # neither is memory
out.append(now())
del a, b
out.append(now())                          # the view keeps b's 128 B alive
c.reset_peak()
out.append(now())
del view
del before                                 # freed through torch, passes uncounted
out.append(now())
""",
        tmp_path,
    )
    assert out == [
        [0, 0, 0, 0, 0],
        [192, 192, 2, 0, 2],
        [128, 192, 2, 1, 1],
        [128, 128, 2, 1, 1],
        [0, 128, 2, 2, 0],
    ]


@needs_compiler
def test_buffers_of_a_deep_copy_are_counted_like_its_parameters(tmp_path: Path) -> None:
    out = forked(
        COUNTED
        + """
import copy
c.install()
norm = torch.nn.BatchNorm1d(160)
before = c.live_bytes()
again = copy.deepcopy(norm)
out = [c.live_bytes() - before, again.running_var.tolist() == norm.running_var.tolist()]
del again, norm
out.append(c.live_bytes())
""",
        tmp_path,
    )
    assert out == [4 * 640 + 64, True, 0]


@needs_compiler
def test_allocations_of_every_thread_are_counted_and_logged(tmp_path: Path) -> None:
    out = forked(
        COUNTED
        + """
import threading
c.install()
kept, barrier = [], threading.Barrier(4)
def work():
    barrier.wait()
    for i in range(500):
        torch.empty(32 * (i % 7 + 1))      # freed at once
    kept.append(torch.empty(1024))         # 4096 B
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
c.start_log()
[t.start() for t in threads]
[t.join() for t in threads]
log = c.stop_log()
running, peak = 0, 0
for delta in log.deltas_bytes:
    running += delta
    peak = max(peak, running)
out = [c.live_bytes(), *c.counts(), running, peak == c.peak_bytes(), len({e.thread for e in log.events})]
""",
        tmp_path,
    )
    assert out == [4 * 4096, 4 * 501, 4 * 500, 4, 4 * 4096, True, 4]


@needs_compiler
def test_the_log_is_the_sequence_of_allocations_and_frees(tmp_path: Path) -> None:
    out = forked(
        COUNTED
        + """
c.install()
held = torch.empty(16)
c.start_log()
x = torch.empty(100)                       # 400 -> 448
y = torch.empty(1, dtype=torch.uint8)      # 1 -> 64
del x
y.untyped_storage().resize_(65)            # a new block of 128, then the old one goes
log = c.stop_log()
times = [e.time_ns for e in log.events]
out = [log.start_bytes, log.deltas_bytes, times == sorted(times)]
torch.empty(5)                             # after the log
c.start_log()
out.append(c.stop_log().deltas_bytes)
""",
        tmp_path,
    )
    assert out == [64, [448, 64, -448, 128, -64], True, []]


@needs_compiler
def test_onednn_convolutions_and_backward_run_through_the_allocator(tmp_path: Path) -> None:
    """oneDNN calls raw_allocate and raw_deallocate, which need context and data pointer to be one."""
    out = forked(
        COUNTED
        + """
torch.manual_seed(0)
m, x = torch.nn.Conv2d(4, 8, 3), torch.ones(2, 4, 9, 9)
plain = m(x).sum()
c.install()
counted = m(x).sum()
counted.backward()
del counted
out = [bool(torch.isfinite(m.weight.grad).all()), c.peak_bytes() > 2 * 8 * 7 * 7 * 4]
out.append(plain.item() == m(x).sum().item())
m.zero_grad()
out.append(c.live_bytes())
""",
        tmp_path,
    )
    assert out[:3] == [True, True, True]
    assert out[3] < 4096  # gradients are gone; what stays is autograd's own odds and ends


@pytest.mark.long
@needs_compiler
def test_two_processes_may_build_the_allocator_at_once(tmp_path: Path) -> None:
    code = "from memfit.runtime.counting_allocator import available\nprint(available())"
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate()[0].strip() for p in both] == ["None", "None"]
    assert len(list((tmp_path / "memfit").iterdir())) == 1  # no draft is left


def test_without_a_compiler_available_returns_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting_allocator, "_COMPILERS", ("no-such-compiler",))
    assert available() == "no C++ compiler found (no-such-compiler)"


def test_a_failing_compiler_leaves_no_file(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: it does not like it' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(AllocatorUnavailable, match=r"does not compile: .*it does not like it"):
        counting_allocator._compile((str(compiler),), tmp_path / "cache" / "x.so")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unwritable_cache_folder_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AllocatorUnavailable, match="cache folder cannot be written"):
        counting_allocator._compile(("cc",), tmp_path / "file" / "x.so")


def test_a_library_that_does_not_load_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.so").write_text("no library")
    with pytest.raises(AllocatorUnavailable, match="does not load"):
        counting_allocator._load(tmp_path / "x.so")


# --- the counter used where nothing can be built

EVENTS = """
import torch
from memfit.runtime import memory
"""


def test_without_a_compiler_torch_events_count_the_same_bytes(tmp_path: Path) -> None:
    out = forked(
        EVENTS
        + """
from memfit.runtime import counting_allocator as allocator
allocator._COMPILERS = ()
c = memory.peak_counter()
out = [c.source]
a, b = torch.empty(16), torch.empty(17)
out.append([c.live_bytes(), c.peak_bytes()])
del a
out.append([c.live_bytes(), c.peak_bytes()])
c.reset_peak()
out.append(c.peak_bytes())
""",
        tmp_path,
    )
    assert out == ["torch allocator events", [192, 192], [128, 192], 128]


@needs_compiler
def test_both_counters_agree_on_a_training_step(tmp_path: Path) -> None:
    out = forked(
        EVENTS
        + """
events, counted = memory.TorchEvents(), memory.peak_counter()
m = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.ReLU(), torch.nn.Linear(200, 3))
o = torch.optim.AdamW(m.parameters())
for _ in range(2):
    m(torch.ones(50, 64)).pow(2).sum().backward()
    o.step()
    o.zero_grad()
out = [counted.source, counted.peak_bytes(), events.peak_bytes(), counted.live_bytes(), events.live_bytes()]
""",
        tmp_path,
    )
    assert out[0] == "counting allocator"
    assert out[1] == out[2] > 3 * 4 * (64 * 200 + 200 * 3)  # weights and two moments at least
    assert out[3] == out[4]


# --- the process


@pytest.mark.skipif(memory.data_bytes() is None, reason="no /proc")
def test_the_resident_peak_is_measured_and_reset() -> None:
    size = 64 * MIB
    start = memory.rss_bytes()
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.rss_peak_bytes() >= start + 0.9 * size
    del block
    assert memory.reset_rss_peak()
    assert memory.rss_peak_bytes() < start + 0.5 * size
    assert memory.data_bytes() > 0  # type: ignore[operator]


def test_without_proc_resident_memory_is_read_with_psutil(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = memory.rss_bytes()
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "_STATM", tmp_path / "none")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "none" / "x")
    assert memory.rss_bytes() == pytest.approx(real, rel=0.2)
    assert memory.rss_peak_bytes() >= 0.8 * real
    assert not memory.reset_rss_peak()
    assert memory.data_bytes() is None


# --- the cap

TRAIN = """
import torch
from memfit.runtime.memory_cap import MemoryLimit
from memfit.runtime.oom import is_oom_error
from memfit.runtime.memory import peak_counter
torch.set_num_threads(1)
counter = peak_counter()
def train(width, layers):
    torch.manual_seed(0)
    m = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
    o = torch.optim.AdamW(m.parameters())
    for _ in range(2):
        m(torch.ones(64, width)).pow(2).mean().backward()
        o.step()
        o.zero_grad()
train(512, 2)                              # the warm-up step of the same kind
"""


@LINUX
def test_a_child_that_takes_more_than_its_cap_runs_out_of_memory() -> None:
    out = child(
        TRAIN
        + f"""
out = {{}}
for ratio in (1.5, 1.02, 0.9):
    limit = MemoryLimit({64 * MIB}, counter=counter)
    limit.apply()
    try:
        x = torch.empty(int(ratio * {64 * MIB}), dtype=torch.uint8).fill_(1)
        out[ratio] = "fits"
    except RuntimeError as error:
        out[ratio] = "oom" if is_oom_error(error) else repr(error)
    limit.lift()
    x = torch.ones(int(ratio * {64 * MIB}), dtype=torch.uint8)      # without the cap it fits
    del x
"""
    )
    assert out == {"1.5": "oom", "1.02": "oom", "0.9": "fits"}


@needs_compiler
@LINUX
def test_the_cap_counts_at_most_4_percent_more_than_the_tensors() -> None:
    """The overhead above tensor bytes is at most 4 %: training passes at 1.04 x its peak, not at 0.99 x."""
    out = child(
        TRAIN
        + """
counter.reset_peak()
def attempt(cap_bytes):
    limit = MemoryLimit(cap_bytes, counter=counter)
    limit.apply()
    try:
        train(1024, 8)
        fits = True
    except RuntimeError as error:
        fits = False if is_oom_error(error) else repr(error)
    limit.lift()
    return fits, limit.used_bytes(), limit.footprint_bytes, limit.kind
out = [attempt(2**40), counter.peak_bytes()]
out += [attempt(int(1.04 * out[1])), attempt(int(0.99 * out[1]))]
"""
    )
    (fits, used, footprint, kind), peak, above, below = out
    assert (fits, kind, above[0], below[0]) == (True, "RLIMIT_DATA", True, False)
    # weights, both moments and gradients of 8 layers are live together in the optimizer step
    assert peak > 4 * 4 * 8 * 1024 * 1025
    assert 0.99 * peak < used < 1.04 * peak + 4 * MIB  # and what the math library packs matrices into
    assert footprint > 0
    assert below[1] <= 0.99 * peak


@needs_compiler
@LINUX
def test_freed_blocks_are_reused_and_do_not_enlarge_the_process() -> None:
    """The allocator of ordinary training does so too; otherwise mapping pages takes half of a step."""
    out = child(
        COUNTED
        + f"""
from memfit.runtime.memory import data_bytes
c.install()
start = data_bytes()
def room(): return (data_bytes() - start) // {MIB}
a = torch.empty({8 * MIB}, dtype=torch.uint8)
first = a.data_ptr()
del a
out = [room(), torch.empty({8 * MIB}, dtype=torch.uint8).data_ptr() == first, c.live_bytes(), *c.counts()]
for size in range(1, 9):                       # none is of a size that is kept
    b = torch.empty(size * {MIB} - 64, dtype=torch.uint8)
    del b
    out.append(room() <= 8)
out.append(room() >= 7)                        # some are kept
c.release()
out.append(room())
"""
    )
    assert out == [8, True, 0, 2, 2, 0, *[True] * 8, True, 0]


@needs_compiler
@LINUX
def test_kept_blocks_are_released_before_an_allocation_under_the_cap_fails() -> None:
    out = child(
        TRAIN
        + f"""
keep = torch.empty({48 * MIB}, dtype=torch.uint8)
del keep                                       # before the cap: no part of the footprint
limit = MemoryLimit({64 * MIB}, counter=counter)
limit.apply()
def most(mib):
    try:
        return torch.empty(int(mib * {MIB}), dtype=torch.uint8).fill_(1)[0].item() == 1
    except RuntimeError as error:
        return False if is_oom_error(error) else repr(error)
out = [most(40), most(60), most(65), most(30), most(63)]
limit.lift()
"""
    )
    assert out == [True, True, False, True, True]


def test_out_of_memory_errors_are_recognised_and_others_are_not() -> None:
    class OutOfMemoryError(RuntimeError):
        """Has the name of torch's own error."""

    text = (
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    )
    for error in (
        MemoryError(),
        OutOfMemoryError(),
        OSError(12, "x"),
        RuntimeError(text),
        RuntimeError("std::bad_alloc"),
    ):
        assert is_oom_error(error)
    for other in (
        OSError(2, "x"),
        RuntimeError("shape mismatch"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ):
        assert not is_oom_error(other)
    assert is_oom_text("libgomp: Out of memory allocating 8 bytes")


def test_onednns_primitive_error_counts_as_out_of_memory_only_under_a_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError("could not create a primitive")
    monkeypatch.setattr("memfit.runtime.oom.resource.getrlimit", lambda _: (-1, -1))
    assert not is_oom_error(error)
    monkeypatch.setattr("memfit.runtime.oom.resource.getrlimit", lambda _: (10**9, -1))
    assert is_oom_error(error)


# --- control groups


def tree(root: Path, *, controllers: str = "cpu memory pids") -> Path:
    """A user's session as systemd lays it out; returns the file used in place of /proc/self/cgroup."""
    home = root / "user.slice" / "app.slice" / "shell.scope"
    home.mkdir(parents=True)
    for path in (home, home.parent):
        (path / "cgroup.procs").write_text("")
        (path / "cgroup.subtree_control").write_text(controllers if path != home else "")
    own = root / "own"
    own.write_text("1:name=systemd:/x\n0::/user.slice/app.slice/shell.scope\n")
    return own


def test_a_control_group_is_made_beside_the_group_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    group = Group.of(77, root=tmp_path, own=own)
    assert group is not None
    assert group.path == tmp_path / "user.slice" / "app.slice" / "memfit-77"
    group.make(5 * MIB)
    assert (group.path / "memory.max").read_text() == str(5 * MIB)
    assert (group.path / "memory.swap.max").read_text() == "0"
    assert (group.oom_kills(), group.peak_bytes()) == (0, None)
    (group.path / "memory.events").write_text("low 0\nmax 9\noom 1\noom_kill 1\n")
    (group.path / "memory.peak").write_text("4096\n")
    assert (group.oom_kills(), group.peak_bytes()) == (1, 4096)
    group.enter()
    assert (group.path / "cgroup.procs").read_text() == "77"
    group.leave()
    assert (group.home / "cgroup.procs").read_text() == "77"


def test_out_of_memory_kills_in_the_group_of_this_process_are_counted(tmp_path: Path) -> None:
    own = tree(tmp_path)
    home = tmp_path / "user.slice" / "app.slice" / "shell.scope"
    assert cgroup.oom_kills_here(root=tmp_path, own=own) is None  # before Linux 5.2
    (home / "memory.events.local").write_text("low 0\nmax 9\noom 1\noom_kill 1\n")
    (home.parent / "memory.events.local").write_text("oom_kill 7\n")
    assert cgroup.oom_kills_here(root=tmp_path, own=own) == 1
    own.write_text("4:memory:/x\n0::/\n")  # version 1
    assert cgroup.oom_kills_here(root=tmp_path, own=own) is None
    (tmp_path / "memory" / "x").mkdir(parents=True)
    (tmp_path / "memory" / "x" / "memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    assert cgroup.oom_kills_here(root=tmp_path, own=own) == 2


@pytest.mark.parametrize("why", ["root", "controller", "version 1", "top"])
def test_no_control_group_is_made_without_delegation(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(tmp_path, controllers="cpu" if why == "controller" else "memory")
    monkeypatch.setattr(os, "geteuid", lambda: 0 if why == "root" else 1000)
    if why in ("version 1", "top"):
        own.write_text("0::/\n" if why == "top" else "4:memory:/x\n")
    assert cgroup.Group.of(77, root=tmp_path, own=own) is None


def test_a_control_group_cap_moves_the_process_in_reads_the_peak_and_moves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tree(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    group = Group.of(os.getpid(), root=tmp_path, own=own)
    assert group is not None
    monkeypatch.setattr(Group, "of", lambda _: group)
    monkeypatch.setattr("memfit.runtime.memory_cap._data_limit_holds", lambda: False)
    limit = MemoryLimit(3 * MIB)
    assert (limit.kind, limit.footprint_bytes) == ("cgroup", None)
    limit.apply()
    assert (group.path / "memory.max").read_text() == str(3 * MIB)
    assert (group.path / "cgroup.procs").read_text() == str(os.getpid())
    assert limit.footprint_bytes is not None
    assert limit.footprint_bytes > MIB
    assert limit.used_bytes() is None  # before Linux 5.19
    (group.path / "memory.peak").write_text("4096")
    limit.lift()
    (group.path / "memory.peak").write_text("9999")
    assert limit.used_bytes() == 4096  # as it was when the cap was lifted
    assert (group.home / "cgroup.procs").read_text() == str(os.getpid())


def test_a_raised_cap_is_that_of_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(path=tmp_path / "memfit-1", home=tmp_path, pid=1)
    monkeypatch.setattr(Group, "of", lambda _: group)
    monkeypatch.setattr("memfit.runtime.memory_cap._data_limit_holds", lambda: False)
    limit = MemoryLimit(3 * MIB)
    limit.apply(at_least_data_bytes=2**50)
    assert limit.cap_bytes > 2**49
    assert (group.path / "memory.max").read_text() == str(limit.cap_bytes)


@LINUX
def test_rlimit_data_is_preferred_and_checked_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert MemoryLimit(MIB).kind == "RLIMIT_DATA"
    assert resource.getrlimit(resource.RLIMIT_DATA) == before  # trying leaves nothing behind
    monkeypatch.setattr(Group, "of", lambda _: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)  # as a kernel that ignores it
    with pytest.raises(MemfitError, match="no hard memory cap is possible here"):
        MemoryLimit(MIB)


def test_where_no_memory_limit_works_an_error_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = Group(path=tmp_path / "memfit-1", home=tmp_path, pid=1)
    monkeypatch.setattr("memfit.runtime.memory_cap.data_bytes", lambda: None)  # no /proc
    monkeypatch.setattr(Group, "of", lambda _: group)
    group.path.mkdir()  # the name is taken
    with pytest.raises(MemfitError, match="neither RLIMIT_DATA nor a control group"):
        MemoryLimit(MIB)
    group.path.rmdir()
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError))
    with pytest.raises(MemfitError, match="neither RLIMIT_DATA nor a control group"):
        MemoryLimit(MIB)
    assert not group.path.exists()  # nothing half-made stays


# --- energy


def zone(root: Path, name: str, kind: str, energy_uj: object, range_uj: int = 1000) -> Path:
    path = root / name
    path.mkdir()
    (path / "name").write_text(kind + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return path / "energy_uj"


def test_rapl_energy_sums_packages_and_handles_counter_overflow(tmp_path: Path) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100, 262_143_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 990_000_000, 1_000_000_000)
    zone(tmp_path, "intel-rapl:0:0", "dram", 5)  # inside or beside a package: not added
    zone(tmp_path, "intel-rapl:2", "psys", 5)
    meter = EnergyMeter(powercap=tmp_path)
    meter.start()
    first.write_text("3000100")  # 3 J
    second.write_text("15000000")  # wrapped: 10 J to the end, 15 J from zero
    joules, boundary = meter.stop()
    assert joules == pytest.approx(28.0)
    assert boundary == "package (RAPL)"


@pytest.mark.parametrize("breaks", ["never there", "unreadable", "gone", "not started"])
def test_energy_is_none_without_a_working_meter(breaks: str, tmp_path: Path) -> None:
    energy = tmp_path / "x"
    if breaks != "never there":
        energy = zone(tmp_path, "intel-rapl:0", "package-0", "" if breaks == "unreadable" else 7)
    meter = EnergyMeter(powercap=tmp_path)
    if breaks != "not started":
        meter.start()
    if breaks == "gone":
        energy.unlink()
    assert meter.stop() == (None, "")


class FakeNvml:
    class NVMLError(Exception):
        pass

    def __init__(self, millijoules: list[int]) -> None:
        self.millijoules, self.asked = millijoules, ""

    def nvmlInit(self) -> None:  # noqa: N802 (the library's name)
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked = uuid
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, _: str) -> int:  # noqa: N802
        if not self.millijoules:
            raise self.NVMLError
        return self.millijoules.pop(0)


@pytest.mark.parametrize(
    ("readings", "expected"), [([1000, 3500], (2.5, "board (NVML)")), ([7], (None, "")), ([], (None, ""))]
)
def test_nvml_energy_is_read_from_the_board_with_the_uuid_of_the_device(
    readings: list[int], expected: tuple[float | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = FakeNvml(list(readings))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(uuid="ab-12"))
    meter = EnergyMeter("cuda:1")
    meter.start()
    assert meter.stop() == expected
    assert nvml.asked == "GPU-ab-12"


def test_without_nvml_a_gpu_has_no_energy_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    meter = EnergyMeter("cuda")
    meter.start()
    assert meter.stop() == (None, "")
