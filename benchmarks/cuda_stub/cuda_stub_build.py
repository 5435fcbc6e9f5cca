"""Build the stub of CUDA for the torch of this environment, and print the variables that load it.

    eval "$(PYTHON benchmarks/cuda_stub/cuda_stub_build.py FOLDER)" && PYTHON train.py

PYTHON is that of an environment with torch's CUDA build, whose packages bring CUDA's headers. Needs gcc and
nm.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("runtime.c")
_LIBRARIES: Final = ("torch_cuda", "c10_cuda", "torch_cuda_linalg", "caffe2_nvrtc")
_CALLED: Final = re.compile(r" U ((?:cuda|cublas|cudnn|cufft|cusparse|cusolver|cu[A-Z]|__cudaLaunch)\w*)")
_DEFINED: Final = re.compile(r" T (\w+)")
# These return texts and versions, which torch may have from the real libraries.
_REAL: Final = re.compile(r"\w+(ErrorString|ErrorName|GetVersion|CudartVersion)")
# Torch then asks cuDNN for one algorithm by functions that return sizes, not by graphs of operations.
_SETTINGS: Final = {"TORCH_CUDNN_V8_API_DISABLED": "1"}


def build(folder: Path) -> dict[str, str]:
    """Build the stub into ``folder``, and return the environment variables of a process that uses it. Raises
    CalledProcessError if the compiler or nm fails, and FileNotFoundError without them."""
    packages = Path(sysconfig.get_path("purelib"))
    folder.mkdir(parents=True, exist_ok=True)
    headers = [
        f"-I{p}" for p in (*packages.glob("nvidia/*/include"), packages / "triton/backends/nvidia/include")
    ]
    flags = ["-O1", "-w", "-fPIC"]
    subprocess.run(["gcc", *flags, "-c", *headers, str(_SOURCE), "-o", str(folder / "runtime.o")], check=True)
    defined = set(_DEFINED.findall(_symbols(folder / "runtime.o")))
    torch_libraries = [packages / "torch" / "lib" / f"lib{name}.so" for name in _LIBRARIES]
    called = {name for path in torch_libraries for name in _CALLED.findall(_symbols(path, "-D"))}
    others = sorted(name for name in called - defined if not _REAL.fullmatch(name))
    (folder / "others.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in others))
    for name, more in (("stub.so", []), ("libcuda.so.1", ["-Wl,-soname,libcuda.so.1"])):
        parts = [str(folder / "others.c"), str(folder / "runtime.o"), "-lpthread"]
        subprocess.run(["gcc", *flags, "-shared", *more, "-o", str(folder / name), *parts], check=True)
    return {"LD_PRELOAD": str(folder / "stub.so"), "LD_LIBRARY_PATH": str(folder), **_SETTINGS}


def _symbols(path: Path, *options: str) -> str:
    return subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    for name, value in build(Path(sys.argv[1]).resolve()).items():
        print(f"export {name}={shlex.quote(value)}")
