"""A simulated accelerator for tests: a PyTorch device "sim" whose memory lies in host memory.

    import simulated_accelerator

    simulated_accelerator.activate(capacity_bytes=2**30)
    torch.ones(3, device="sim")

It has what programs ask of an accelerator: memory of a hard capacity with ``torch.OutOfMemoryError`` and
the statistics of ``torch.accelerator``, streams and events, pinned host memory, a random generator of its
own, autocast with CUDA's lists, and collectives over gloo. It computes with the CPU's kernels, so its numbers
are the CPU's. `device.cpp` says what it does not simulate.

Importing this package does nothing. `activate` makes "sim" the accelerator of the whole process, which cannot
be undone, so tests call it in child processes only. A child process with the environment of `environment`
has the device as soon as it imports torch, as with the devices that other packages bring to torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Final

import platformdirs

_SOURCE: Final = Path(__file__).with_name("device.cpp")
_LIBRARY: Final = "sim_device"
_FIRST_TORCH: Final = "2.13"  # its interfaces for backends change between releases
_BUILD_LIMIT_S: Final = 600.0
_SETTING: Final = "SIMULATED_ACCELERATOR"  # "DEVICES CAPACITY_BYTES"
_CACHE: Final = "SIMULATED_ACCELERATOR_CACHE"  # where its library is, if not in the user's cache
_BUILD: Final = (
    "import sys; from torch.utils.cpp_extension import load;"
    "load(sys.argv[1], [sys.argv[2]], extra_cflags=['-O1', '-w'], build_directory=sys.argv[3])"
)


def missing() -> str | None:
    """Return why the device cannot be compiled here, in one line, or None."""
    import torch

    compiler = os.environ.get("CXX", "c++")  # as torch.utils.cpp_extension chooses it
    if sys.platform != "linux":
        return "the simulated accelerator is built on Linux only"
    if torch.torch_version.TorchVersion(torch.__version__) < _FIRST_TORCH:
        return f"the simulated accelerator needs torch {_FIRST_TORCH}, whose interfaces it implements"
    if shutil.which(compiler) is None:
        return f"no C++ compiler found ({compiler})"
    if shutil.which("ninja") is None:
        return "ninja, with which torch builds extensions, is not installed"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python are not installed"
    return None


def build() -> Path:
    """Return the path of the device's library, and compile it if it is not cached, which takes about half a
    minute. Raises subprocess.CalledProcessError if it does not compile."""
    folder = _cache_folder()
    library = folder / f"{_LIBRARY}.so"
    if library.exists():
        return library
    import fcntl

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes, one compiles
        if not library.exists():
            _compile(folder)
    return library


def _compile(folder: Path) -> None:
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        # In a process of its own: torch loads what it has built.
        command = [sys.executable, "-c", _BUILD, _LIBRARY, str(_SOURCE), str(draft)]
        subprocess.run(command, check=True, timeout=_BUILD_LIMIT_S, stdout=sys.stderr)
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _cache_folder() -> Path:
    import torch

    parts = f"{torch.__version__} {sys.implementation.cache_tag} {_BUILD}".encode()
    digest = hashlib.sha256(parts + _SOURCE.read_bytes()).hexdigest()[:16]
    cache = os.environ.get(_CACHE) or platformdirs.user_cache_path("memfit")
    return Path(cache) / f"simulated_accelerator-{digest}"


def environment(folder: Path, *, devices: int = 1, capacity_bytes: int = 2**30) -> dict[str, str]:
    """Return the variables for child processes that find so many devices of this capacity each when they
    import torch. ``folder``: an existing folder, in which the package is described to Python's package
    metadata."""
    metadata = folder / "simulated_accelerator-1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated-accelerator\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[torch.backends]\nsimulated = simulated_accelerator:activate_by_environment\n"
    )
    paths = [str(folder), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        _SETTING: f"{devices} {capacity_bytes}",
        _CACHE: str(_cache_folder().parent),
    }


def activate_by_environment() -> None:
    """Activate the device as the variables of `environment` say. Torch calls this when it is imported."""
    if _SETTING not in os.environ:
        return
    from memfit.types.device_kind import DeviceKind, add_device_kind

    devices, capacity_bytes = map(int, os.environ[_SETTING].split())
    activate(devices=devices, capacity_bytes=capacity_bytes)
    # The CPU's kernels, but what torch itself decides by the type of a device is decided as on CUDA.
    add_device_kind(DeviceKind(name="sim", kernels="cpu", checked=True))


@functools.cache
def load() -> ModuleType:
    """Return the device's library. Loading it registers kernels, but no device."""
    import torch  # noqa: F401 (its libraries must be loaded first)

    spec = importlib.util.spec_from_file_location(_LIBRARY, build())
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    return library


def activate(*, devices: int = 1, capacity_bytes: int = 2**30) -> ModuleType:
    """Make "sim" the accelerator of this process, with so many devices of this capacity each. Return its
    module, which is ``torch.sim`` from now on. It can be called once in a process."""
    import torch

    if hasattr(torch, "sim"):
        raise RuntimeError("the simulated accelerator is active already")
    library = load()
    torch.utils.rename_privateuse1_backend("sim")
    library.start(devices, capacity_bytes)
    if torch.distributed.is_available():
        library.share_collectives()
        torch.distributed.Backend.default_device_backend_map["sim"] = "gloo"
        torch.distributed.Backend.backend_capability["gloo"].append("sim")
    from simulated_accelerator import device_module

    torch._register_device_module("sim", device_module)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    return device_module
