"""Read the checkpoints of torch.distributed.checkpoint without running code that they name.

torch's own reader unpickles the file ``.metadata``, and any file can name any function there. Here it may
name only the classes of the format. Values that are no tensors are read with ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from memfit.files.read import read_bytes
from memfit.types.errors import UserError

_FORMAT: Final = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_UNREADABLE: Final = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


class CheckpointReader(FileSystemReader):
    """Reader of the checkpoint folder ``path``. Of the files in it, only ``.metadata`` and those named in
    ``files`` are opened.

    `read_metadata` raises UserError if ``.metadata`` cannot be read or parsed, if it names anything but the
    format's classes, or if it refers to other files than ``files`` or to compressed ones.
    """

    def __init__(self, path: Path, files: Collection[str]) -> None:
        super().__init__(path)
        self._folder, self._files = path, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._folder / ".metadata"
        try:
            metadata: Metadata = _Unpickler(io.BytesIO(read_bytes(path))).load()
            self._check(metadata)
        except _Refused as error:
            raise UserError(
                f"{path} is not the metadata of a checkpoint: {error}; nothing in it was run",
                allowed="a checkpoint that memfit wrote",
            ) from error
        except _UNREADABLE as error:
            raise UserError(
                f"{path} is damaged: {str(error)[:200] or type(error).__name__}",
                hint="resume from another checkpoint",
            ) from error
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check(self, metadata: object) -> None:
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise _Refused(f"it contains {type(metadata).__name__}")
        for place in metadata.storage_data.values():
            if place.relative_path not in self._files:
                raise _Refused(
                    f"it refers to {str(place.relative_path)[:100]!r}, which is no file of the checkpoint"
                )
            if place.transform_descriptors:
                raise _Refused(f"it is transformed by {str(place.transform_descriptors)[:100]}")


class _Refused(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _FORMAT.get(module, ()):
            raise _Refused(f"it names {module}.{name}"[:200])
        return super().find_class(module, name)
