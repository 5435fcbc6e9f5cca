"""``memfit doctor``: show what this machine has, what works on it, and what to install."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from memfit.cli.log_filters import quiet_libraries
from memfit.cli.options import JsonOptions, StoreOptions
from memfit.cli.output import console, emit, refuse_options
from memfit.cli.progress import Bars
from memfit.runtime.child_process import dying_with_parent
from memfit.types.errors import MemfitError
from memfit.types.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.types.machine import Machine

# Optional package -> the extra of memfit that installs it.
EXTRAS: Final[Mapping[str, str]] = {"bitsandbytes": "lowbit", "torchao": "lowbit", "peft": "lora"}
# Vendor -> torch's name for the software of its devices, and how to install torch's build for it.
_BUILDS: Final[Mapping[str, tuple[str, str]]] = {
    "NVIDIA": ("CUDA", "pip install --force-reinstall torch  (on Linux: the build for CUDA)"),
    "AMD": (
        "ROCm",
        "pip install --force-reinstall torch --index-url URL  (see pytorch.org/get-started/locally: ROCm)",
    ),
}
_IMPORT_LIMIT_S: Final = 120.0
_IMPORTED: Final = "memfit: imported"  # a line of its own, as modules may print while they are imported
_IMPORT: Final = (
    "import importlib, sys\n"
    "for n in sys.argv[1:]:\n"
    "    importlib.import_module(n)\n"
    f"    print('\\n{_IMPORTED}', flush=True)"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one check. ``name``: what was checked. ``ok``: True if it works, False if not, None for
    plain information. ``detail``: what was found, in words. ``fix``: the command or step that would help, ""
    if none is needed or known."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstallOptions:
    """The engine to install, None for none, and the folder for its virtual environment."""

    install: Annotated[
        str | None,
        typer.Option(
            metavar="ENGINE",
            help="Instead of checks: create a virtual environment and install this engine there, for "
            "engines whose dependencies conflict with memfit's, such as colossalai; memfit then runs the "
            "engine with it. `memfit list engines` shows the names. Engines that run in memfit's own "
            "environment are refused.",
        ),
    ] = None
    into: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --install: folder for the virtual environment; it must be new or empty. Default: "
            "memfit/engines/ENGINE in your data folder (on Linux ~/.local/share). Refused without --install.",
        ),
    ] = None


def doctor(options: InstallOptions, store: StoreOptions, output: JsonOptions) -> None:
    """Show what this machine has, which tools, packages, techniques and engines work on it, what to install
    for those that do not, and where memfit keeps its files. With --install, install an engine."""
    if options.install is not None:
        _install(options.install, options.into, as_json=output.json)
        return
    refuse_options({"--into": options.into}, "needs --install")
    with Bars("en") as progress:
        checks_by_group = {"machine": list(machine()), "tools": list(tools())}
        progress("packages", 0, 0, ", ".join(EXTRAS))
        checks_by_group["packages"] = packages(EXTRAS)
        checks_by_group["techniques"] = techniques(checks_by_group["packages"], _machine_here())
        checks_by_group["engines"] = list(engines())
        checks_by_group["files"] = list(files(store))
    if output.json:
        emit(
            {
                group: [dataclasses.asdict(check) for check in checks]
                for group, checks in checks_by_group.items()
            }
        )
    else:
        width = max(len(check.name) for checks in checks_by_group.values() for check in checks)
        for group, checks in checks_by_group.items():
            _print(group, checks, width)


def _install(name: str, into: Path | None, *, as_json: bool) -> None:
    from memfit.engines.registry import engine
    from memfit.runtime.engine_environment import install
    from memfit.types.serialization import to_plain

    with Bars("en") as progress:
        environment = install(engine(name), into, lambda line: progress("install", 0, 0, line))
    if as_json:
        emit({"engine": name, "environment": to_plain(environment)})
    else:
        size, duration = format_bytes(environment.installed_bytes), format_seconds(environment.took_s)
        print(f"{name} is installed in {environment.folder}: {size}, in {duration}")


def machine() -> Iterator[Check]:
    """Yield, in this order, information on the processor, the cores, the memory and the system, the check of
    torch and, if torch can be imported, the checks of `accelerator_checks`."""
    from memfit.runtime.local_machine import host_memory_limit, threads
    from memfit.store import fingerprint

    facts = fingerprint()
    yield Check(name="processor", ok=None, detail=facts["processor"])
    yield Check(name="cores", ok=None, detail=f"{facts['cores']}; {threads()} usable by this process")
    limit, installed_bytes = host_memory_limit(), int(facts["ram_bytes"])
    total = format_bytes(limit.total_bytes)
    if limit.total_bytes < installed_bytes:
        total += f" by the {limit.source}, of {format_bytes(installed_bytes)} in the machine"
    yield Check(name="memory", ok=None, detail=f"{total}, {format_bytes(limit.free_bytes)} free now")
    yield Check(name="system", ok=None, detail=f"{facts['system']}, {facts['python']}")
    check = torch_check()
    yield check
    if check.ok:
        yield from accelerator_checks()


def torch_check() -> Check:
    """Check whether torch can be imported. The detail is its version, or the error of the import."""
    quiet_libraries()
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check(name="torch", ok=False, detail=_one_line(str(error)), fix="pip install torch")
    return Check(name="torch", ok=True, detail=str(torch.__version__))


def accelerator_checks() -> Iterator[Check]:
    """Yield information on the drivers of accelerators, then one check for each accelerator that torch finds,
    with its product name and its memory.

    If torch finds none, yield a single check instead. Without a driver, it is plain information. With one, it
    fails: ``fix`` installs a build of torch for the driver or, if this build is for it already, says what to
    look at. If torch cannot say what it finds, the single check fails with its error.
    """
    from memfit.runtime.devices import accelerator_kind, accelerators, loaded_drivers, torch_build

    drivers = loaded_drivers()
    for vendor, version in drivers.items():
        yield Check(name="driver", ok=None, detail=f"{vendor}, version {version or 'unknown'}")
    try:
        devices = accelerators()
    except MemfitError as error:
        yield Check(name="accelerator", ok=False, detail=_one_line(str(error)))
        return
    for accelerator in devices:
        detail = f"{accelerator.name}: {format_bytes(accelerator.total_bytes)}"
        detail += f", {format_bytes(accelerator.free_bytes)} free now"
        if accelerator.context_bytes:
            detail += f", of which each process takes {format_bytes(accelerator.context_bytes)}"
        if accelerator.driver:
            detail += f", driver {accelerator.driver}"
        yield Check(name=accelerator.device, ok=True, detail=detail)
    if not accelerator_kind():
        if not drivers:
            yield Check(name="accelerator", ok=None, detail="none: memfit trains on the processor")
            return
        vendor = next(iter(drivers))
        needed_build, fix = _BUILDS[vendor]
        detail = f"there is a driver of {vendor}, but this build of torch cannot use it"
        if (build := torch_build()).startswith(needed_build):
            detail = f"there is a driver of {vendor}, and torch is built for {build}, but it finds no device"
            fix = f"see whether the driver supports {build}, and whether a variable hides the devices"
        yield Check(name="accelerator", ok=False, detail=detail, fix=fix)


def tools() -> Iterator[Check]:
    """Yield the checks of the counting allocator, the memory cap and the energy meter, in this order."""
    yield allocator_check()
    yield cap_check()
    yield meter_check()


def allocator_check() -> Check:
    """Check whether the counting allocator, a library that counts the memory of tensors on the CPU, can be
    built, and build it unless that was done before. Without it, the peak memory of runs is computed from the
    events that torch's own allocator reports."""
    name = "counting allocator"
    try:
        from memfit.runtime.counting_allocator import available

        reason = available()
    except (ImportError, OSError) as error:
        reason = str(error)
    if reason is None:
        return Check(name=name, ok=True, detail="built; peaks are counted over all threads")
    detail = f"{_one_line(reason)}; peaks come from torch's allocator events instead"
    return Check(name=name, ok=False, detail=detail, fix="install a C++ compiler, for example g++")


def cap_check() -> Check:
    """Check how the memory of runs can be capped: on an accelerator of this machine by a memory fraction, if
    it has one; on the processor by a cgroup of each run or, if cgroups cannot be created here, by
    RLIMIT_DATA. The check fails if neither of these two is possible."""
    from memfit.runtime.cgroup import Group

    name, on_device = "memory cap", ""
    with contextlib.suppress(ImportError, OSError):
        from memfit.runtime.devices import accelerator_kind, has_memory_fraction

        if kind := accelerator_kind():
            cap = "a memory fraction" if has_memory_fraction(kind) else "none"
            on_device = f"{cap} of the accelerator's memory; on the processor: "
    if Group.of(os.getpid()) is not None:
        return Check(name=name, ok=True, detail=f"{on_device}each run has a cgroup of its own")
    try:
        from memfit.runtime.memory import data_bytes

        can_limit_data = data_bytes() is not None
    except (ImportError, OSError):
        can_limit_data = False
    if can_limit_data:
        detail = f"{on_device}RLIMIT_DATA of each run (cgroups cannot be created here)"
        return Check(name=name, ok=True, detail=detail)
    detail = f"{on_device}none: this system has no /proc, so runs cannot be capped"
    return Check(name=name, ok=False, detail=detail)


def meter_check() -> Check:
    """Check which energy meter can be read. If there is one, the detail says what it measures, such as
    "package (RAPL)". If there is none, ``ok`` is None and not False: energy is then modelled as power x
    time."""
    from memfit.runtime.energy import EnergyMeter

    meter = EnergyMeter()
    meter.start()
    joules, boundary = meter.stop()
    if joules is None:
        return Check(
            name="energy meter", ok=None, detail="none can be read: energy is modelled as power x time"
        )
    return Check(name="energy meter", ok=True, detail=boundary)


def packages(extras: Mapping[str, str]) -> list[Check]:
    """Return one check for each optional package in ``extras`` (package -> the extra of memfit that installs
    it), in this order. It fails if the package is not installed, or if it is but cannot be imported in a
    child process. The detail is its version, or why the check failed."""
    installed = {name: version for name in extras if (version := _version(name))}
    broken = dict(broken_imports(list(installed)))
    return [_package(name, extra, installed.get(name), broken.get(name)) for name, extra in extras.items()]


def _package(name: str, extra: str, version: str | None, error: str | None) -> Check:
    install_command = f"pip install 'memfit[{extra}]'"
    if version is None:
        return Check(name=name, ok=False, detail="not installed", fix=install_command)
    if error is not None:
        return Check(
            name=name, ok=False, detail=f"{version} cannot be imported: {error}", fix=install_command
        )
    return Check(name=name, ok=True, detail=version)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def broken_imports(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, reason in one line) for each of the modules ``names`` that cannot be imported, in this
    order. The imports run one after the other in a child process, because a broken library may crash the
    process that imports it. After a module that fails, a new child process goes on with the next one. A child
    that has run for two minutes is stopped, and the module that it was importing counts as failed."""
    remaining = list(names)
    while remaining:
        reason, imported_count = _import(remaining)
        remaining = remaining[imported_count:]
        if remaining:
            yield remaining.pop(0), reason


def _import(names: Sequence[str]) -> tuple[str, int]:
    """Import ``names`` in this order in a child process, until one fails. Return (a text, how many were
    imported before that). The text is the last line that the child printed to standard error; its exit code
    if it printed none there, as when all were imported; or that the import did not finish, if the child ran
    for two minutes."""
    try:
        child = subprocess.run(
            dying_with_parent([sys.executable, "-P", "-c", _IMPORT, *names]),
            capture_output=True,
            check=False,
            timeout=_IMPORT_LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        reason = f"the import did not finish within {_IMPORT_LIMIT_S:.0f} s"
        return reason, _imported_count(error.stdout or b"")
    lines = child.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
    return _one_line(lines[-1]), _imported_count(child.stdout)


def _imported_count(output: bytes) -> int:
    return output.splitlines().count(_IMPORTED.encode())


def _machine_here() -> Machine | None:
    """Return this machine, None if torch or its accelerator cannot be used."""
    try:
        from memfit.runtime.local_machine import this_machine

        return this_machine("world")
    except (ImportError, OSError, MemfitError):
        return None


def techniques(checks: Sequence[Check], here: Machine | None = None) -> list[Check]:
    """Return one check for each of memfit's techniques. It fails if the devices of the machine ``here``
    (None: not checked) cannot run it or searches leave it out there, and if one of the optional packages that
    the technique needs failed in ``checks``, those of `packages`; the detail then says why, otherwise what
    the technique does. If memfit's techniques cannot be imported at all, return a single failed check."""
    quiet_libraries()
    try:
        from memfit.techniques.compiled import can_compile
        from memfit.techniques.registry import TECHNIQUES, unsupported_techniques
    except (ImportError, OSError, MemfitError) as error:
        return [Check(name="techniques", ok=False, detail=_one_line(str(error)))]
    failed_checks = {check.name: check for check in checks if not check.ok}
    reasons: dict[str, str] = {}
    if here is not None:
        kind, name = here.device.kind, here.device.name
        for t in TECHNIQUES.values():
            if not t.runs_on(kind):
                reasons[t.name] = f"not proposed on {name}: no kernels for it in {' or '.join(t.needs)}"
        refused = unsupported_techniques(here) | (set() if can_compile(kind) else {"compile"})
        reasons |= dict.fromkeys(refused, f"cannot run on {name}")
    return [
        Check(name=t.name, ok=False, detail=f"{reasons[t.name]}: {t.summary}")
        if t.name in reasons
        else _technique(t.name, t.summary, [failed_checks[p] for p in t.needs if p in failed_checks])
        for t in TECHNIQUES.values()
    ]


def _technique(name: str, summary: str, failed_checks: Sequence[Check]) -> Check:
    if not failed_checks:
        return Check(name=name, ok=True, detail=summary)
    reason = "; ".join(f"needs {check.name}: {check.detail}" for check in failed_checks)
    extras = ",".join(dict.fromkeys(EXTRAS[check.name] for check in failed_checks if check.name in EXTRAS))
    fix = f"pip install 'memfit[{extras}]'" if len(failed_checks) > 1 and extras else failed_checks[0].fix
    return Check(name=name, ok=False, detail=reason, fix=fix)


def engines() -> Iterator[Check]:
    """Yield one check for each engine. It fails if something keeps the engine from running here; ``fix`` is
    then the command that would help. The detail is what keeps it from running, otherwise its installed
    version, followed by what the engine is. On a machine with accelerators it says which engines cannot train
    on them, and which memfit has not run on this kind."""
    from memfit.engines.registry import ENGINES, trains_on
    from memfit.engines.replay import ENGINE as REPLAY
    from memfit.runtime.devices import accelerator_kind

    kind = accelerator_kind() if torch_check().ok else ""
    for engine in ENGINES.values():
        probe = engine.probe()
        problem, detail = probe.problem, probe.problem or probe.version
        if kind and not problem and not trains_on(engine, kind):
            problem = f"trains on the processor, not on {kind} devices"
            detail = f"{probe.version}, {problem}"
        elif kind and not problem and kind not in engine.tried_on and engine is not REPLAY:
            detail += f", not tried on {kind} devices"
        yield Check(name=engine.name, ok=not problem, detail=f"{detail}: {engine.summary}", fix=probe.fix)


def files(store: StoreOptions) -> Iterator[Check]:
    """Yield checks with plain information: the path of the store, with its size if it exists; the path of the
    cache's folder; and where predictions are kept, how many and how large they are, and how to clear them,
    or that they are not kept on disk. Raises UserError if the environment variable MEMFIT_CACHE_LIMIT is not
    a size."""
    import platformdirs

    from memfit.store import default_path
    from memfit.store.prediction_cache import PredictionCache, default_folder, limit_bytes

    path = store.store or default_path()
    state = (
        f"{format_bytes(path.stat().st_size)}" if path.is_file() else "created by the first proof of concept"
    )
    yield Check(name="store", ok=None, detail=f"{path} ({state})")
    yield Check(
        name="cache", ok=None, detail=f"{platformdirs.user_cache_path('memfit')} (the counting allocator)"
    )
    folder = default_folder()
    if folder is None:
        yield Check(name="predictions", ok=None, detail="not kept on disk: MEMFIT_CACHE is off")
        return
    count, size_bytes = PredictionCache(folder).usage()
    yield Check(
        name="predictions",
        ok=None,
        detail=f"{folder} ({count} entries, {format_bytes(size_bytes)} of at most "
        f"{format_bytes(limit_bytes())}; to clear them, delete this folder)",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _print(title: str, checks: Sequence[Check], width: int) -> None:
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
    output = console()
    output.print(Text(title, style="bold"))
    output.print(table)
