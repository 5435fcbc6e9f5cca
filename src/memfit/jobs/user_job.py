"""``path.py:attribute``: the user's own Job, or a function that returns one."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, Final

from memfit.types.errors import OUT_OF_MEMORY_TEXTS, UserError, first_line_of, suggest
from memfit.types.job import Dimension, Job
from memfit.types.peer_errors import is_peer_error

_OPTIONS: Final = ("size", "data", "weights", "batch", "length")


def load_user_job(spec: str, options: dict[str, Any]) -> Job:
    """Return the Job of the user's job ``spec``, ``path.py:attribute``, which names a Job or a function that
    returns one.

    ``options``: those of size, data, weights, batch and length that the user gave, and further dimensions;
    they are passed to the function by keyword. A Job accepts none. If ``spec`` names a function, the
    dimensions of the returned Job are its parameters that take whole numbers. Raises UserError for a missing
    file or attribute, for a file that is not Python, for an object that is not a Job, for an option that is
    not accepted, and for any error in the user's own code, with its location. The functions of the returned
    Job convert errors in the same way.
    """
    path, _, name = spec.rpartition(":")
    module = _run_file(Path(path), spec)
    value = _attribute(module, name, path)
    if isinstance(value, Job) and not options:
        return guard_job(value, spec)
    if isinstance(value, Job):
        given_options = ", ".join(f"--{o}" if o in _OPTIONS else f"--dim {o}" for o in options)
        raise UserError(
            f"{spec} is a Job, not a function, and does not accept {given_options}",
            hint=f"make {name} a function with the arguments {', '.join(options)} that returns the Job",
        )
    if not callable(value):
        raise UserError(
            f"{spec} is a {type(value).__name__}", allowed="a memfit.Job or a function that returns one"
        )
    return _call(value, options, spec)


def source_digest(spec: str) -> str:
    """Return a digest of the file that contains the user's job ``spec``, ``path.py:attribute``: the first 16
    hex digits of its SHA-256. Return "" for other jobs, and if there is no such file or it cannot be read.

    Files that it imports are not included.
    """
    path = Path(spec.rpartition(":")[0])
    with contextlib.suppress(OSError):
        if path.suffix == ".py" and path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return ""


def _call(function: Any, options: dict[str, Any], spec: str) -> Job:
    try:
        inspect.signature(function).bind(**options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{spec} cannot be called with {', '.join(options) or 'no arguments'}: {error}",
            allowed="a function that accepts by keyword each option that is given (of --size, --data, "
            "--weights, --batch, --length and --dim), and has defaults for all other arguments",
        ) from error
    job = run_user_code(lambda: function(**options), spec)
    if not isinstance(job, Job):
        raise UserError(f"{spec}() returned a {type(job).__name__}", allowed="a memfit.Job")
    return guard_job(dataclasses.replace(job, dimensions=_dimensions(function, options, job)), spec)


def _dimensions(function: Any, options: Mapping[str, Any], job: Job) -> tuple[Dimension, ...]:
    """Return the parameters of the function whose value in this call, or default, is a whole number of at
    least 1. A parameter ``batch`` or ``batch_size`` whose value is None has the batch size of the job."""
    dimensions = []
    for name, parameter in inspect.signature(function).parameters.items():
        value = options.get(name, parameter.default)
        if value is None and name in ("batch", "batch_size"):
            value = job.batch_size
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            dimensions.append(Dimension(name=name, value=value))
    return tuple(dimensions)


def guard_job(job: Job, spec: str) -> Job:
    """Return the job with its functions build_model, make_batch, loss, loss_terms and evaluate wrapped in
    `run_user_code`, so that their errors become one-line UserErrors that name ``spec``. A ``build_model``
    that returns no torch module raises one, too."""

    def build_model() -> Any:
        import torch

        model = run_user_code(job.build_model, spec)
        if not isinstance(model, torch.nn.Module):
            raise UserError(
                f"build_model of {spec} returned a {type(model).__name__}", allowed="a torch.nn.Module"
            )
        return model

    def guard(function: Any) -> Any:
        if function is None:
            return None
        return lambda *args, **kwargs: run_user_code(lambda: function(*args, **kwargs), spec)

    return dataclasses.replace(
        job,
        build_model=build_model,
        make_batch=guard(job.make_batch),
        loss=guard(job.loss),
        loss_terms=guard(job.loss_terms),
        evaluate=guard(job.evaluate),
    )


def _run_file(path: Path, spec: str) -> ModuleType:
    """Import the file ``path`` under a module name of its own and return the module. Raises UserError if
    there is no such Python file, or if importing it raises an error.

    The file's folder is appended to the import path and stays there, because the job may import modules
    beside it, at its top or inside a function. At the end of the path, they cannot replace modules of the
    standard library or of installed packages.
    """
    if not path.is_file():
        raise UserError(
            f"no such file: {path}, which the job {spec} names",
            hint="FILE.py:NAME names a job of your own: a Job, or a function that returns one, in this file",
        )
    resolved = path.resolve()
    name = f"memfit_user_{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    loader = _FromSource(name, str(resolved)) if resolved.suffix == ".py" else None
    module_spec = importlib.util.spec_from_file_location(name, resolved, loader=loader)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a Python file", allowed="a file ending in .py")
    module, run = importlib.util.module_from_spec(module_spec), module_spec.loader.exec_module
    sys.modules[name] = module  # dataclasses and pickle look their module up there
    _FOLDERS.pop(spec, None)
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    run_user_code(lambda: run(module), spec)
    return module


class _FromSource(importlib.machinery.SourceFileLoader):
    """Loader that compiles a file anew each time. Python's own uses the compiled copy in __pycache__, also if
    the file was replaced within the same second by another of the same length."""

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def shadowed_modules(spec: str) -> Iterator[str]:
    """Yield a warning of one line for each module beside the user's file that Python would not load under its
    name, but another in its place, for example one of the standard library. ``spec``: the user's job,
    ``path.py:attribute``. Only modules that the file imports, directly or through other modules beside it,
    are looked at.

    Nothing is imported. Nothing is yielded for other jobs, and files that cannot be read are skipped.
    """
    path = Path(spec.rpartition(":")[0])
    pending, visited = [path] if path.suffix == ".py" else [], set[str]()
    while pending:
        file = pending.pop()
        for name in sorted(_imported_names(file) - visited):
            visited.add(name)
            own_path = _own_module(path.parent, name)
            if own_path is None:
                continue
            origin = _origin(name)
            if origin is None or Path(origin).resolve() == own_path.resolve():
                pending.append(own_path)
            else:
                imported_from = "the standard library's module" if name in sys.stdlib_module_names else origin
                yield (
                    f"{file.name} imports {name}: Python loads {imported_from} instead of {own_path}; "
                    "rename that file if it is meant"
                )


def imported_files(spec: str) -> Iterator[Path]:
    """Yield the user's file, which the job ``spec``, ``path.py:attribute``, names, and those of the modules
    beside it that it imports, at its top or inside functions, directly or through other modules beside it.
    Nothing for other jobs. Nothing is imported."""
    path = Path(spec.rpartition(":")[0])
    pending, visited = [path] if path.suffix == ".py" and path.is_file() else [], set[Path]()
    while pending:
        file = pending.pop().resolve()
        if file not in visited:
            visited.add(file)
            yield file
            files = (_own_module(path.parent, name) for name in _imported_names(file))
            pending += [f for f in files if f is not None]


def _own_module(folder: Path, name: str) -> Path | None:
    files = (folder / f"{name}.py", folder / name / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _imported_names(file: Path) -> set[str]:
    """Return what `imported_names` yields for a file; none if it cannot be read."""
    try:
        return set(imported_names(file.read_bytes()))
    except OSError:
        return set()


def imported_names(source: str | bytes) -> Iterator[str]:
    """Yield the top-level names of all absolute imports in the text of a Python file, such as "numpy" for
    ``import numpy.linalg``; none if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _origin(name: str) -> str | None:
    """Return the file from which Python would import a top-level module, or a word such as "built-in" or
    "frozen" for a module without a file; None if there is no such module, or if it is a folder without
    __init__.py.
    """
    try:
        module_spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return module_spec.origin if module_spec is not None else None


_NO_GRADIENT = "Expected to have finished reduction in the prior iteration"  # DDP's reducer


def run_user_code(action: Any, spec: str) -> Any:
    """Return ``action()``. Convert any error that it raises, SystemExit included, to a UserError of one line
    with the file and line of the innermost call that is in the folder of the user's file.

    UserError, MemoryError, errors whose text says that memory ran out, and errors of a collective whose other
    ranks are gone are raised unchanged. For DDP's error about unused parameters, the message says what to do.
    ``spec``: the user's job, ``path.py:attribute``, or a name for what else runs; the message begins with it.

    The action runs in the folder that earlier ones of ``spec`` have changed to (os.chdir). Afterwards the
    current folder is that of before, so that relative paths of the command line keep their meaning.
    """
    try:
        with _own_folder(spec):
            return action()
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # user code may raise anything
        text = _text(error)
        if any(known in text for known in OUT_OF_MEMORY_TEXTS):
            raise  # an outcome of the run, not a mistake
        if isinstance(error, RuntimeError) and is_peer_error(text):
            raise  # another rank has died
        if _NO_GRADIENT in text:
            raise UserError(
                f"{spec}: ddp waits for gradients of parameters that the loss does not use",
                hint="freeze them (requires_grad_(False)), or use fsdp2, "
                "which does not wait for unused parameters",
            ) from error
        folder = Path(spec.rpartition(":")[0]).resolve().parent
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if Path(f.filename).is_relative_to(folder) and "site-packages" not in f.filename
        ]
        at_file_and_line = (
            f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else _syntax_place(error)
        )
        error_text = error.msg if isinstance(error, SyntaxError) else text
        raise UserError(
            f"{spec} raised {type(error).__name__}: {first_line_of(error_text)}{at_file_and_line}"
        ) from error


_FOLDERS: Final[dict[str, Path]] = {}  # by job: the current folder, if its code has changed it


@contextlib.contextmanager
def _own_folder(spec: str) -> Iterator[None]:
    try:
        before = Path.cwd()
    except OSError:  # it was deleted
        before = None
    if (folder := _FOLDERS.get(spec)) is not None:
        os.chdir(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before and (after := Path.cwd()) != before:
                _FOLDERS[spec] = after
                os.chdir(before)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  its __str__ is user code, too
        return "an error without a text"


def _syntax_place(error: BaseException) -> str:
    return f" at {error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else ""


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    if hasattr(module, name) and name:
        return getattr(module, name)
    jobs_and_functions = [n for n, v in vars(module).items() if _job_like(n, v, module)]
    raise UserError(
        f"{path} has no attribute {name!r}",
        allowed=", ".join(jobs_and_functions) or "none: the file defines no memfit.Job and no function",
        hint=suggest(name, jobs_and_functions),
    )


def _job_like(name: str, value: Any, module: ModuleType) -> bool:
    if name.startswith("_"):
        return False
    own_function = inspect.isfunction(value) and value.__module__ == module.__name__
    return isinstance(value, Job) or own_function
