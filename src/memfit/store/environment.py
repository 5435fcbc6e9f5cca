"""Record the environment on which a result depends. Versions are read from metadata: torch is never loaded.

The values of environment variables are only recorded; they have no effect here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from memfit.runtime.devices import accelerator_names

PACKAGES: Final = ("memfit", "torch", "transformers", "peft", "torchao", "bitsandbytes", "numpy")
VARIABLES: Final = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_VISIBLE_DEVICES",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
_UNKNOWN: Final = "unknown"


def fingerprint() -> Mapping[str, str]:
    """Return facts about this machine and its software, name -> text: "python" (interpreter), "system",
    "libc", "processor", "cores" (physical and logical), "ram_bytes", "accelerators" (as `accelerator_names`
    returns them: torch is not loaded), the versions of `PACKAGES` under their names, and the values of the
    environment `VARIABLES` under their names with "env " before. What cannot be determined is "unknown", a
    missing package "not installed", no accelerator "none seen", and a variable that is not set "unset".

    No host name, user name or path is among the facts unless a variable contains it, so that a record can be
    shared."""
    return _software() | _hardware() | {f"env {name}": os.environ.get(name, "unset") for name in VARIABLES}


def digest(environment: Mapping[str, str]) -> str:
    """Return sixteen hexadecimal digits, which are the same for mappings with equal keys and values, in
    whatever order."""
    text = json.dumps(dict(environment), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _software() -> dict[str, str]:
    system = {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or _UNKNOWN,
    }
    return system | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _hardware() -> dict[str, str]:
    import psutil

    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    return {
        "processor": _processor(Path("/proc/cpuinfo")),
        "cores": f"{physical or _UNKNOWN} physical, {logical or _UNKNOWN} logical",
        "ram_bytes": str(psutil.virtual_memory().total),
        "accelerators": ", ".join(accelerator_names()) or "none seen",
    }


def _processor(cpuinfo: Path) -> str:
    """Return the processor's name from ``cpuinfo``, Linux's /proc/cpuinfo; if it has none, the less precise
    name from Python, or "unknown"."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(cpuinfo), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or _UNKNOWN


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
