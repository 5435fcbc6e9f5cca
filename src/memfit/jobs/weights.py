"""Load trained weights and buffers from a folder of safetensors into a model, of which no parameter may be
missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memfit.files.read import read_json
from memfit.types.errors import UserError

if TYPE_CHECKING:
    import torch

_INDEX: Final = "model.safetensors.index.json"


def load_weights(model: torch.nn.Module, folder: str, *, may_miss: tuple[str, ...] = ()) -> None:
    """Copy the safetensors in ``folder`` (the shards named by its index if it has one, else all files) into
    the model's parameters and persistent buffers, one tensor at a time, converted to the model's dtype.

    Tied parameters may be stored under any of their names, and a leading ``esm.`` of the model's names may be
    missing in the files (see `_aliases`). Every parameter must be present in them, except those whose names
    start with one of ``may_miss`` (the head of a new task). A buffer that is missing keeps its initial value.
    Tensors that the model does not use are ignored. Under fake tensors, which hold no values, nothing is
    loaded, because weights do not change sizes; only the folder is checked. Raises UserError for a folder
    that is missing or has no safetensors, for a file or an index that cannot be read, for an index that names
    a file without the tensor, for a missing parameter, for files with none of the model's tensors, and for a
    tensor of another shape than the model's.
    """
    from torch._guards import detect_fake_mode

    files = _files_by_tensor(Path(folder))
    if detect_fake_mode() is not None:
        return
    tensors = model.state_dict(keep_vars=True)
    sources = {id(t): (t, name) for n, t in tensors.items() for name in _aliases(n) if name in files}
    missing = [n for n, p in model.named_parameters() if id(p) not in sources and not n.startswith(may_miss)]
    if not sources or missing:
        raise UserError(
            f"{folder} contains {'none' if not sources else 'not all'} of the model's parameters"
            + (f": {len(missing)} missing, first {missing[0]}" if sources else ""),
            allowed="weights saved from the same architecture and size",
        )
    for tensor, name in sources.values():
        _copy(tensor, files[name], name)


def _aliases(name: str) -> Iterator[str]:
    """Yield the names, in no fixed order, under which files may store the model's tensor ``name``, this name
    included.

    An encoder saved alone has no prefix ``esm.``, and Hugging Face still writes TensorFlow's gamma and beta
    for the weights and biases of some layer norms.
    """
    old_name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for spelling in {name, old_name}:
        yield from {spelling, spelling.removeprefix("esm.")}


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Return tensor name -> the file in ``folder`` that contains it, by the folder's index if it has one.
    Raises UserError if there is no such folder or it has no safetensors, and if the index, or without one any
    file, cannot be read."""
    if not folder.is_dir():
        raise UserError(
            f"no such folder of weights: {folder}", allowed="a folder that contains *.safetensors files"
        )
    if (folder / _INDEX).is_file():
        return {name: folder / file for name, file in _index(folder / _INDEX).items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"no safetensors files in {folder}",
            allowed=f"files *.safetensors, such as model.safetensors, with or without {_INDEX}",
        )
    return {name: file for file in files for name in _open(file).keys()}  # noqa: SIM118 - not a mapping


def _index(path: Path) -> dict[str, str]:
    data = read_json(path)
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict) or any(
        not isinstance(f, str) or Path(f).name != f for f in names.values()
    ):
        raise UserError(
            f"{path} is no index of safetensors files in its folder",
            allowed='JSON such as {"weight_map": {"TENSOR NAME": "FILE.safetensors"}}, with files beside it',
        )
    return names


def _open(file: Path) -> Any:
    import safetensors

    try:
        return safetensors.safe_open(str(file), framework="pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"cannot read {file} as a safetensors file: {error}", allowed="a complete *.safetensors file"
        ) from error


def _copy(tensor: torch.Tensor, file: Path, name: str) -> None:
    import safetensors
    import torch

    try:
        value = _open(file).get_tensor(name)
    except safetensors.SafetensorError as error:
        raise UserError(
            f"cannot read the tensor {name} from {file}: {error}",
            allowed="an index that names for each tensor the file that contains it",
        ) from error
    if value.shape != tensor.shape:
        raise UserError(
            f"the tensor {name} in {file} has shape {tuple(value.shape)}",
            allowed=f"{tuple(tensor.shape)}, its shape in the model",
            hint="give the job the size that the weights were saved from (--size, --dim, or the hf: model)",
        )
    with torch.no_grad():
        tensor.copy_(value)
