"""``memfit doctor``: show what this machine has, what works on it, and what to install."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, StoreOptions
from memfit.cli.output import console, emit
from memfit.cli.progress import Bars
from memfit.types.errors import MemfitError
from memfit.types.units import format_bytes

# Optional package -> the extra of memfit that installs it.
EXTRAS: Final[Mapping[str, str]] = {"bitsandbytes": "lowbit", "torchao": "lowbit", "peft": "lora"}
_IMPORT_LIMIT_S: Final = 120.0
_IMPORT: Final = (
    "import importlib, sys\nfor n in sys.argv[1:]:\n    importlib.import_module(n)\n    print(n, flush=True)"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check. ``ok`` is None for plain information; ``fix``: the command or step that would
    help."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def doctor(store: StoreOptions, output: JsonOptions) -> None:
    """Show what works on this machine and what to install."""
    with Bars("en") as progress:
        found = {"machine": list(machine()), "tools": list(tools())}
        progress("packages", 0, 0, ", ".join(EXTRAS))
        found["packages"] = packages(EXTRAS)
        found["techniques"] = techniques(found["packages"])
        found["engines"] = list(engines())
        found["files"] = list(files(store))
    if output.json:
        emit({room: [dataclasses.asdict(check) for check in checks] for room, checks in found.items()})
    else:
        width = max(len(check.name) for checks in found.values() for check in checks)
        for room, checks in found.items():
            _print(room, checks, width)


def machine() -> Iterator[Check]:
    """Yield checks of the processor, memory, system and torch."""
    from memfit.runtime.local_machine import free_bytes, threads
    from memfit.store import fingerprint

    seen = fingerprint()
    yield Check(name="processor", ok=None, detail=seen["processor"])
    yield Check(name="cores", ok=None, detail=f"{seen['cores']}; {threads()} usable by this process")
    total = format_bytes(int(seen["ram_bytes"]))
    yield Check(name="memory", ok=None, detail=f"{total}, {format_bytes(free_bytes())} free now")
    yield Check(name="system", ok=None, detail=f"{seen['system']}, {seen['python']}")
    yield torch_check()


def torch_check() -> Check:
    """Check whether torch can be imported, and list the GPUs it can use."""
    quiet_libraries()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name="torch", ok=False, detail=_one_line(str(error)), fix="pip install torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(
        name="torch", ok=True, detail=f"{torch.__version__}, GPU: {', '.join(gpus) or 'none it can use'}"
    )


def tools() -> Iterator[Check]:
    """Yield checks of memfit's measuring tools."""
    yield allocator_check()
    yield cap_check()
    yield meter_check()


def allocator_check() -> Check:
    """Check whether the counting allocator is available."""
    name = "counting allocator"
    try:
        from memfit.runtime.counting_allocator import available

        reason = available()
    except (ImportError, OSError) as error:
        reason = str(error)
    if reason is None:
        return Check(name=name, ok=True, detail="built; peaks are counted over all threads")
    told = f"{_one_line(reason)}; peaks come from torch's allocator events instead"
    return Check(name=name, ok=False, detail=told, fix="install a C++ compiler, for example g++")


def cap_check() -> Check:
    """Check how the memory of runs can be capped."""
    from memfit.runtime.cgroup import Group

    name = "memory cap"
    if Group.of(os.getpid()) is not None:
        return Check(name=name, ok=True, detail="cgroup of its own for each run")
    try:
        from memfit.runtime.memory import data_bytes

        bounded = data_bytes() is not None
    except (ImportError, OSError):
        bounded = False
    if bounded:
        return Check(name=name, ok=True, detail="RLIMIT_DATA of each run (no cgroup may be made here)")
    return Check(name=name, ok=False, detail="none: this system has no /proc, runs cannot be capped")


def meter_check() -> Check:
    """Check whether an energy meter can be read."""
    from memfit.runtime.energy import EnergyMeter

    meter = EnergyMeter()
    meter.start()
    joules, boundary = meter.stop()
    if joules is None:
        return Check(
            name="energy meter", ok=None, detail="none that may be read: energy is modelled as power x time"
        )
    return Check(name="energy meter", ok=True, detail=boundary)


def packages(extras: Mapping[str, str]) -> list[Check]:
    """Check the optional packages. Each is actually imported, as an installed package may be broken."""
    installed = {name: version for name in extras if (version := _version(name))}
    broken = dict(broken_imports(list(installed)))
    return [_package(name, extra, installed.get(name), broken.get(name)) for name, extra in extras.items()]


def _package(name: str, extra: str, version: str | None, error: str | None) -> Check:
    install = f"pip install 'memfit[{extra}]'"
    if version is None:
        return Check(name=name, ok=False, detail="not installed", fix=install)
    if error is not None:
        return Check(name=name, ok=False, detail=f"{version} does not import: {error}", fix=install)
    return Check(name=name, ok=True, detail=version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def broken_imports(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, reason) for each package that cannot be imported. Imports run in a child process, because
    a broken library may crash it."""
    waiting = list(names)
    while waiting:
        reason, imported = _import(waiting)
        waiting = waiting[imported:]
        if waiting:
            yield waiting.pop(0), reason


def _import(names: Sequence[str]) -> tuple[str, int]:
    """Import ``names`` in a child process. Return the last line of the error, and how many were imported
    before it."""
    try:
        child = subprocess.run(
            (sys.executable, "-P", "-c", _IMPORT, *names),
            capture_output=True,
            text=True,
            check=False,
            timeout=_IMPORT_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        return f"not done after {_IMPORT_LIMIT_S:.0f} s", len((error.stdout or b"").split())
    lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
    return _one_line(lines[-1]), sum(line in names for line in child.stdout.splitlines())


def techniques(found: Sequence[Check]) -> list[Check]:
    """Check whether the packages that each technique needs are available. ``found``: the checks of the
    packages."""
    quiet_libraries()
    try:
        from memfit.techniques.registry import TECHNIQUES
    except (ImportError, OSError, MemfitError) as error:
        return [Check(name="techniques", ok=False, detail=_one_line(str(error)))]
    bad = {check.name: check for check in found if not check.ok}
    return [_technique(t.name, t.summary, [bad[p] for p in t.needs if p in bad]) for t in TECHNIQUES.values()]


def _technique(name: str, summary: str, without: Sequence[Check]) -> Check:
    if not without:
        return Check(name=name, ok=True, detail=summary)
    why = "; ".join(f"needs {check.name}: {check.detail}" for check in without)
    extras = ",".join(dict.fromkeys(EXTRAS[check.name] for check in without if check.name in EXTRAS))
    fix = f"pip install 'memfit[{extras}]'" if len(without) > 1 and extras else without[0].fix
    return Check(name=name, ok=False, detail=why, fix=fix)


def engines() -> Iterator[Check]:
    """Yield what each engine lacks on this machine, and the command that installs it."""
    from memfit.engines.registry import ENGINES

    for engine in ENGINES.values():
        probe = engine.probe()
        detail = f"{probe.version} {probe.problem}".strip() if probe.problem else probe.version
        yield Check(
            name=engine.name, ok=not probe.problem, detail=f"{detail}: {engine.summary}", fix=probe.fix
        )


def files(store: StoreOptions) -> Iterator[Check]:
    """Yield the locations of the store and the cache."""
    import platformdirs

    from memfit.store import default_path

    path = store.store or default_path()
    state = f"{format_bytes(path.stat().st_size)}" if path.is_file() else "made by the first proof of concept"
    yield Check(name="store", ok=None, detail=f"{path} ({state})")
    yield Check(
        name="cache", ok=None, detail=f"{platformdirs.user_cache_path('memfit')} (the counting allocator)"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _print(room: str, checks: Sequence[Check], width: int) -> None:
    from rich.table import Table
    from rich.text import Text

    signs: dict[Any, Text] = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text(" ")}
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column()
    table.add_column(width=width)
    for check in checks:
        detail = Text(check.detail)
        if check.fix:
            detail.append(f"\n→ {check.fix}", style="yellow")
        table.add_row(signs[check.ok], Text(check.name), detail)
    out = console()
    out.print(Text(room, style="bold"))
    out.print(table)
