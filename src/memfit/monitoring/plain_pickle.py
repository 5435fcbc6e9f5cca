"""Read a pickle of plain values from a file that nobody vouches for, without running code.

`pickle.loads` runs code that the file names. Here only instructions are carried out that build None, bool,
int, float, str, bytes, list, dict and tuple. None of them can import a name or call an object. The reader is
Python's own, written in Python: unlike the one in C, it does not reserve memory for numbers in the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any, ClassVar, Final

from memfit.types.errors import UserError

_NAMES: Final = (
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "BININT", "BININT1",
    "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE",
    "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "POP", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT",
    "LONG_BINPUT", "MEMOIZE",
)  # fmt: skip
_INSTRUCTIONS: Final = {op.name: op.code.encode("latin-1")[0] for op in pickletools.opcodes}
_NAME_OF: Final = {code: name for name, code in _INSTRUCTIONS.items()}
_FAULTS: Final = (
    pickle.UnpicklingError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError,
    OverflowError, MemoryError, RecursionError,
)  # fmt: skip


class _Refusal(Exception):
    """The file contains an instruction that is not carried out."""


class _PlainUnpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Any]] = {
        code: pickle._Unpickler.dispatch[code] for code in (_INSTRUCTIONS[n] for n in _NAMES)
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise _Refusal(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refusal("it refers to objects outside the file")


def load_plain(data: bytes, *, what: str) -> Any:
    """Return the value of a pickle. ``what``: its name in messages. Raises UserError if the pickle contains
    anything but plain values or is damaged. No code of the file is run."""
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin-1").load()
    except _Refusal as refusal:
        reason = str(refusal)
    except KeyError as error:
        code = error.args[0] if error.args else None
        if not isinstance(code, int) or code not in _NAME_OF:
            raise _damage_error(what, error) from None
        reason = f"it contains the instruction {_NAME_OF[code]}"
    except _FAULTS as error:
        raise _damage_error(what, error) from None
    raise UserError(
        f"{what} is not a pickle of plain values: {reason}; nothing in it was run",
        allowed="numbers, texts, lists and dictionaries, as torch.cuda.memory._dump_snapshot writes them",
    )


def _damage_error(what: str, error: Exception) -> UserError:
    return UserError(f"{what} is not a readable pickle: {type(error).__name__}: {error}"[:300])
