"""A digest of everything that decides the traces of a job, by which they are kept on disk.

If one of these may have changed, the digest changes: memfit, torch and all installed packages, the processor,
environment variables, what the user asked for, and, for a job that is not part of memfit, the source of all
modules outside the installed packages and their values, the files that Python code opened, the model, and
the first batches. Where that cannot be known, there is no digest, and nothing is kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import os
import random
import re
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Final

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor

from memfit.jobs import registry
from memfit.jobs.opened_files import (
    OPENED_WHILE_LOADING,
    not_loaded_at,
    note_opened_files,
    process_start,
)
from memfit.jobs.user_job import imported_files
from memfit.store.environment import fingerprint
from memfit.store.prediction_cache import FOLDER_VARIABLE, LIMIT_VARIABLE, digest_of
from memfit.trace.tracer import fake_model
from memfit.types.job import Job, JobRef
from memfit.types.serialization import to_plain

_MEMFIT: Final = Path(__file__).resolve().parents[1]
_MOST_FILE_BYTES: Final = 256 * 2**20  # read by the job, together; more is not hashed, and nothing is kept
_MOST_TENSOR_BYTES: Final = 2**30  # of one tensor or array; a larger one is not hashed
_MOST_VALUES: Final = 300_000  # of a job's modules, model and batches
# Environment variables that say something about the terminal, the session or folders of caches, not about a
# computation. torch sets one of a cache itself, when it is first needed.
_SESSION: Final = re.compile(
    rf"_|PWD|OLDPWD|SHLVL|COLUMNS|LINES|COLORTERM|NO_COLOR|FORCE_COLOR|PS1|WINDOWID|DISPLAY|WAYLAND_DISPLAY|STY"
    rf"|LS_COLORS|PYTEST_CURRENT_TEST|{FOLDER_VARIABLE}|{LIMIT_VARIABLE}"
    r"|(TERM|TMUX|SSH|DBUS|XDG_SESSION|VSCODE|HIST|GPG)(_.*)?|TERM.*|.*_CACHE_DIR"
)
# Variables that the built-in jobs, torch and its libraries may read.
_OF_LIBRARIES: Final = re.compile(
    r"(TORCH|PYTORCH|PYTHON|OMP|KMP|MKL|OPENBLAS|ONEDNN|DNNL|ATEN|CUDA|CUBLAS|CUDNN|NCCL|GLOO|HF|TRANSFORMERS"
    r"|TRITON|MEMFIT).*"
)
_PLAIN_LIBRARIES: Final = frozenset({"torch", "numpy", "memfit"})  # beside Python's own
_DATABASES: Final = frozenset({"sqlite3", "_sqlite3", "mmap", "dbm", "_dbm", "_gdbm"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobContent:
    """``digest``: a digest of everything that decides the job's traces. ``files``: absolute path of each file
    outside the installed packages whose content is part of it -> (path, bytes, time of the last change); None
    for a job of memfit, which has none."""

    digest: str
    files: Mapping[str, Any] | None

    def covers(self, opened: Iterable[str]) -> bool:
        """Return whether the digest covers what was read since: all files ``opened`` and all modules that are
        loaded now are in it, if they are not Python's or a package's, and no file in it has changed. True for
        a job of memfit."""
        if self.files is None:
            return True
        try:
            is_unchanged = all(_status(file) == status for file, status in self.files.items())
        except OSError:
            return False
        return is_unchanged and {*_own_paths(opened), *_own_modules()} <= self.files.keys()


def job_content(ref: JobRef, job: Job) -> JobContent | None:
    """Return the content of the job that ``ref`` names and `load` has returned.

    None if it cannot be known: for jobs that exist in this process only, if batches differ between two calls
    with the same arguments, if the job's files have more than 256 MiB, if it has more than 300,000 values or
    a tensor of more than 1 GiB, if a value is of a type whose content cannot be read, or if a file of the job
    or of memfit has changed after this process has loaded it. Errors of the job's functions that make its
    model and batches are raised.
    """
    if ref.spec in registry.of_this_process() or _memfit_changed_s() > process_start():
        return None
    is_built_in = ref.spec in registry.names() and not ref.data and not ref.weights
    plain_fields = {
        f.name: value
        for f in dataclasses.fields(job)
        if not callable(value := getattr(job, f.name)) or isinstance(value, type)
    }
    facts = [_software(), _variables(_OF_LIBRARIES if is_built_in else re.compile(".*")), to_plain(ref)]
    try:
        if is_built_in:
            return JobContent(digest=digest_of(*facts, _digest_values(plain_fields)), files=None)
        with _unchanged_generators():
            return _content_of_files(ref, job, facts)
    except (_UnknownContentError, OSError):
        return None


class _UnknownContentError(Exception):
    pass


def _content_of_files(ref: JobRef, job: Job, facts: list[Any]) -> JobContent:
    opened = dict(OPENED_WHILE_LOADING)
    with note_opened_files(opened):
        model = fake_model(job)
        batches = [_digest_values(job.make_batch(step, 0)) for step in (0, 0, 1)]
    if batches[0] != batches[1]:
        raise _UnknownContentError("the batch differs between calls with the same arguments")
    files = {*_own_paths(opened), *_own_modules(), *_own_paths(map(str, imported_files(ref.spec)))}
    statuses = {file: _status(file) for file in sorted(files)}
    if sum(size for _, size, _ in statuses.values()) > _MOST_FILE_BYTES:
        raise _UnknownContentError("the job's files are too large to be hashed")
    _refuse_changed(statuses, opened)
    modules = _modules_of(ref, files)
    digest = digest_of(
        *facts,
        str(Path.cwd()),
        [(file, hashlib.sha256(Path(file).read_bytes()).hexdigest()) for file in statuses],
        batches,
        _digest_values(
            [
                job,
                [(name, type(m), vars(m)) for name, m in model.named_modules()],
                [(m.__name__, _values(m)) for m in modules],
            ]
        ),
        _library_files(model, modules),
        _status(ref.weights),
    )
    return JobContent(digest=digest, files=statuses)


def _refuse_changed(statuses: Mapping[str, Any], opened: Mapping[str, float]) -> None:
    """Raise _UnknownContentError if one of the files has changed after this process has read it or has loaded
    it as a module. ``opened``: file -> the time when it was first opened."""
    read_s = dict(opened)
    for module in list(sys.modules.values()):
        if (file := _module_file(module)) in statuses:
            read_s[file] = min(not_loaded_at(module), read_s.get(file, math.inf))
    for file, (_, _, changed_ns) in statuses.items():
        if changed_ns / 1e9 > read_s.get(file, math.inf):
            raise _UnknownContentError(f"{file} has changed after it was read")


# -- this machine and its software --------------------------------------------------------------------


@functools.cache
def _software() -> list[Any]:
    """Return what of this machine and its software may decide a trace: processor and packages, versions of
    Python, torch and memfit, default dtype, number of threads, and instruction set."""
    return [
        {name: fact for name, fact in fingerprint().items() if name != "accelerators"},
        _memfit_digest(),
        str(_MEMFIT),
        sys.version,
        torch.__version__,
        str(torch.version.git_version),
        _distributions(),
        str(torch.get_default_dtype()),
        torch.get_num_threads(),
        torch.backends.cpu.get_cpu_capability(),
        torch.backends.mkldnn.enabled,
    ]


def _memfit_digest() -> str:
    """Return a digest of all files of memfit."""
    digest = hashlib.sha256()
    for path in sorted(_MEMFIT.rglob("*")):
        if "__pycache__" not in path.parts and path.is_file():
            digest.update(f"{path.relative_to(_MEMFIT)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _memfit_changed_s() -> float:
    """Return the time of the last change of a Python file of memfit, in seconds since 1970."""
    return max(path.stat().st_mtime for path in _MEMFIT.rglob("*.py"))


def _distributions() -> list[Any]:
    """Return the name, which includes the version, and the time of installation of each installed package."""
    endings = (".dist-info", ".egg-info", ".egg-link", ".pth")
    packages = []
    for folder in dict.fromkeys(sys.path):
        with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
            packages += [(e.name, e.stat().st_mtime_ns) for e in entries if e.name.endswith(endings)]
    return sorted(packages)


def _variables(names: re.Pattern[str]) -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if names.fullmatch(name) and not _SESSION.fullmatch(name)
    }


# -- files ----------------------------------------------------------------------------------------------


@functools.cache
def _library_folders() -> tuple[str, ...]:
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = {*(sysconfig.get_path(n) for n in names), *site.getsitepackages(), site.getusersitepackages()}
    # Folders of packages that a .pth file or PYTHONPATH adds, such as those of an environment below this one.
    folders |= {path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}}
    folders |= {str(Path(os.__file__).parent), str(_MEMFIT), "/proc", "/sys", "/dev"}
    return tuple(f"{os.path.realpath(folder)}{os.sep}" for folder in folders)


def _own_paths(paths: Iterable[str]) -> Iterator[str]:
    """Yield those of the absolute paths that are neither Python's nor an installed package's. Compiled Python
    files are left out, as their sources count."""
    for path in paths:
        if not path.startswith(_library_folders()) and not path.endswith(".pyc"):
            yield path


def _module_file(module: Any) -> str:
    file = getattr(module, "__file__", None)
    return os.path.realpath(file) if isinstance(file, str) else ""


def _own_modules() -> Iterator[str]:
    files = (_module_file(module) for module in list(sys.modules.values()))
    return _own_paths(file for file in files if file and Path(file).is_file())


def _modules_of(ref: JobRef, files: set[str]) -> list[types.ModuleType]:
    """Return the modules, sorted by file, of the user's file, which the job ``ref`` names, and of what it has
    imported at its top, directly or through other modules. Only modules whose file is in ``files`` are
    returned."""
    own_modules = {file: m for m in list(sys.modules.values()) if (file := _module_file(m)) in files}
    path = os.path.realpath(ref.spec.rpartition(":")[0])
    pending, modules = [path], dict[str, types.ModuleType]()
    while pending:
        if (file := pending.pop()) in own_modules and file not in modules:
            modules[file] = own_modules[file]
            owners = (_owner(value) for value in vars(modules[file]).values())
            pending += [_module_file(sys.modules.get(owner)) for owner in owners]
    return [modules[file] for file in sorted(modules)]


def _library_files(model: torch.nn.Module, modules: Iterable[types.ModuleType]) -> list[Any]:
    """Return path, size and time of change of the loaded files of those packages that the model's classes,
    and what the job's modules import, come from. torch and memfit are not among them."""
    owners = {type(m).__module__ for m in model.modules()}
    for module in modules:
        owners.update(_owner(value) for value in vars(module).values())
    packages = {owner.partition(".")[0] for owner in owners} - {"torch", "memfit"} - sys.stdlib_module_names
    files = {
        file
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in packages and (file := _module_file(module))
    }
    return [_status(file) for file in sorted(files)]


def _owner(value: object) -> str:
    """Return the name of the module that the value is, or that its function or class comes from."""
    # Deprecated objects of torch warn if an attribute is read, even their __class__.
    if issubclass(type(value), types.ModuleType):
        return value.__name__  # type: ignore[attr-defined,no-any-return]
    return str((callable(value) and getattr(value, "__module__", None)) or type(value).__module__)


def _status(path: str | None) -> Any:
    """Return (path, bytes, time of the last change) of a file, or a list of these of the files directly in a
    folder. None for no path. Raises OSError if there is no such file."""
    if path is None:
        return None
    if Path(path).is_dir():
        return [_status(str(file)) for file in sorted(Path(path).iterdir()) if file.is_file()]
    status = Path(path).stat()
    return path, status.st_size, status.st_mtime_ns


# -- values ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _unchanged_generators() -> Iterator[None]:
    """Restore the states of the global generators of random numbers at the end of the context."""
    states = random.getstate(), numpy.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])


def _values(module: types.ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _digest_values(value: Any) -> str:
    """Return a digest of the value and of all that it refers to: numbers, texts, tensors, containers,
    functions with what they enclose, and objects with their attributes. Raises _UnknownContentError if
    something is of a type whose content cannot be read, or if there are too many values."""
    digest, numbers = hashlib.blake2b(digest_size=20), dict[int, int]()
    kept, pending = [], [value]
    while pending:
        current = pending.pop()
        if isinstance(current, type(None) | bool | int | float | complex | str | bytes):
            digest.update(f"{type(current).__name__} {current!r}\0".encode("utf-8", "surrogatepass"))
            continue
        if id(current) in numbers:
            digest.update(f"again {numbers[id(current)]}\0".encode())
            continue
        numbers[id(current)] = len(numbers)
        kept.append(current)  # its id stays its own
        try:
            text, parts = _head(current)
            parts = list(parts)
        except _UnknownContentError:
            raise
        except (
            Exception
        ) as error:  # of an object that cannot be read, whose type is the user's or a library's
            raise _UnknownContentError(f"{type(current)} cannot be read") from error
        digest.update(f"{text} {len(parts)}\0".encode())
        pending.extend(reversed(parts))
        if len(numbers) + len(pending) > _MOST_VALUES:
            raise _UnknownContentError("too many values")
    return digest.hexdigest()


@functools.singledispatch
def _head(value: Any) -> tuple[str, Iterable[Any]]:
    """Return (text for the value itself, other values that it consists of). Raises _UnknownContentError if
    its content cannot be read."""
    name = _class_name(type(value))
    attributes = _attributes(value)
    contents = [*value.items()] if isinstance(value, Mapping) else []
    contents = [*value] if isinstance(value, list | tuple | collections.deque) else contents
    if not attributes and not contents:
        return _text_of_plain(value, name), ()
    return name, [*attributes, *contents]


@_head.register(type)
def _head_of_class(value: type) -> tuple[str, Iterable[Any]]:
    return f"class {_class_name(value)}", ()


@_head.register(types.ModuleType)
@_head.register(logging.Logger)
def _head_of_module(value: Any) -> tuple[str, Iterable[Any]]:
    return f"{_class_name(type(value))} {getattr(value, '__name__', '') or value.name}", ()


@_head.register(PurePath)
def _head_of_path(value: PurePath) -> tuple[str, Iterable[Any]]:
    return f"path {value}", ()


@_head.register(set)
@_head.register(frozenset)
def _head_of_set(value: Any) -> tuple[str, Iterable[Any]]:
    return _class_name(type(value)), sorted(map(_digest_values, value))


@_head.register(types.FunctionType)
def _head_of_function(function: types.FunctionType) -> tuple[str, Iterable[Any]]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    parts = [_constants(function.__code__), function.__defaults__, function.__kwdefaults__, *cells]
    return f"function {function.__module__}.{function.__qualname__}", parts


@_head.register(types.MethodType)
def _head_of_method(value: types.MethodType) -> tuple[str, Iterable[Any]]:
    return "method", [value.__func__, value.__self__]


@_head.register(functools.partial)
def _head_of_partial(value: functools.partial[Any]) -> tuple[str, Iterable[Any]]:
    return "partial", [value.func, value.args, value.keywords]


@_head.register(random.Random)
def _head_of_random(value: random.Random) -> tuple[str, Iterable[Any]]:
    if isinstance(value, random.SystemRandom):  # numbers of the operating system
        raise _UnknownContentError("a generator without a state")
    return _class_name(type(value)), [value.getstate()]


@_head.register(numpy.random.Generator)
def _head_of_numpy_generator(value: numpy.random.Generator) -> tuple[str, Iterable[Any]]:
    return _class_name(type(value)), [value.bit_generator.state]


@_head.register(torch.Generator)
def _head_of_torch_generator(value: torch.Generator) -> tuple[str, Iterable[Any]]:
    return _class_name(type(value)), [value.get_state()]


@_head.register(numpy.ndarray)
def _head_of_array(array: numpy.ndarray) -> tuple[str, Iterable[Any]]:
    text = f"{_class_name(type(array))} {array.shape} {array.dtype}"
    if array.dtype.hasobject:
        return text, array.ravel().tolist()
    if array.nbytes > _MOST_TENSOR_BYTES:
        raise _UnknownContentError("an array is too large to be hashed")
    return f"{text} {hashlib.sha256(array.tobytes()).hexdigest()}", ()


@_head.register(numpy.ma.MaskedArray)
def _head_of_masked_array(array: numpy.ma.MaskedArray[Any, Any]) -> tuple[str, Iterable[Any]]:
    fill_value = str(getattr(array, "fill_value", None))  # numpy.ma.masked has none
    return _class_name(type(array)), [numpy.ma.getdata(array), numpy.ma.getmaskarray(array), fill_value]


@_head.register(torch.Tensor)
def _head_of_tensor(tensor: torch.Tensor) -> tuple[str, Iterable[Any]]:
    text = f"{_class_name(type(tensor))} {tuple(tensor.shape)} {tensor.dtype} {tensor.device} {tensor.layout}"
    text += f" {tensor.requires_grad}"
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return text, ()
    if tensor.layout is not torch.strided or tensor.numel() * tensor.element_size() > _MOST_TENSOR_BYTES:
        raise _UnknownContentError("a tensor is sparse or too large to be hashed")
    content = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{text} {tensor.stride()} {hashlib.sha256(content.numpy().tobytes()).hexdigest()}", ()


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _constants(code: types.CodeType) -> list[Any]:
    inner = [_constants(c) if isinstance(c, types.CodeType) else c for c in code.co_consts]
    return [code.co_code, code.co_names, *inner]


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _attributes(value: Any) -> list[Any]:
    """Return the pairs (name, value) of the attributes of an object, those in slots included."""
    pairs = [*getattr(value, "__dict__", {}).items()]
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        names = {slots} if isinstance(slots, str) else {*slots}
        pairs += [
            (slot, getattr(value, slot))
            for slot in sorted(names - {"__dict__", "__weakref__"})
            if hasattr(value, slot)
        ]
    return pairs


def _text_of_plain(value: Any, name: str) -> str:
    """Return the text of a value without parts: its class, and what ``repr`` says of its content. Raises
    _UnknownContentError unless it is of Python, torch or numpy, or of a class without any attributes."""
    is_compiled = not hasattr(value, "__dict__") and "__slots__" not in vars(type(value))
    library = type(value).__module__.partition(".")[0]
    if is_compiled and (library in _DATABASES or library not in _PLAIN_LIBRARIES | sys.stdlib_module_names):
        raise _UnknownContentError(f"a value of the class {name}")
    text = repr(value) if is_compiled else ""
    return f"{name} {text}" if " at 0x" not in text else name
