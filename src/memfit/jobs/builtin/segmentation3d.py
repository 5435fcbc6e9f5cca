"""``segmentation3d``: segment grey and white matter in volumes of the head with nnU-Net's 3-D U-Net.

Memory is dominated by patches with edges of 24 or 128 voxels at full resolution; there are few parameters.
The volume is the average of 152 brains and so clean that thresholds would suffice. It is therefore degraded
like a scan, anew for each patch: Rician noise of 9 % of white matter and a smooth bias field of 40 %, the
hardest setting of the BrainWeb phantom (Cocosco et al. 1997).

The loss is float32 under any plan. Its sums over the 2 million voxels of a patch exceed float16's maximum of
65,504, and a bfloat16 sum stops growing at 256 times the addend. The statistics of instance norm need no
island, because kernels accumulate them in float32 for any input dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from memfit.jobs.builtin.batches import Array, as_tensors, evaluating, step_rng
from memfit.jobs.builtin.options import BuiltInOptions, accept_keywords
from memfit.types.errors import UserError
from memfit.types.job import Job, Metric, OptimizerChoice

if TYPE_CHECKING:
    import torch

    from memfit.jobs.builtin.unet3d import UNetSize

NAME: Final = "segmentation3d"
TITLE: Final = "Segmentation of volumes (3-D U-Net)"
SIZES: Final = ("tiny", "paper")
DATA_SOURCE: Final = (
    "MNI152 2009a T1 template with tissue probabilities, read from the installed package nilearn (which "
    "does not state the template's licence), with simulated noise and bias field; a slab of 24 mm held out"
)
_DIMENSIONS: Final = {"crop": "patch"}
NOISE, BIAS = 0.09, 0.4  # relative to white matter, and peak to peak relative to 1
_HELD_OUT: Final = (104, 128)  # planes along y
_GAP: Final = 8  # planes on either side that belong to no set
_TEST_REGION: Final = ((34, 154), _HELD_OUT, (24, 144))  # first voxel and end along x, y, z
_TEST_PATCH: Final = 24
_TEST_SEED: Final = 20_090_101
_DICE: Final = "Dice of grey and white matter"
_LEVELS: Final = 128  # levels of intensity, for the naive result


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The volume of a head in voxels of 1 mm.

    ``intensity`` (x, y, z) float32, scaled so that the median of white matter is 1. ``tissue``, of the same
    shape, uint8: 0 other, 1 grey matter, 2 white matter.
    """

    intensity: Array
    tissue: Array


@accept_keywords
def make(options: BuiltInOptions) -> Job:
    """Return the job at one of SIZES ("tiny", "paper") on the volume that comes with the package nilearn.

    ``batch``: patches of a step. The dimension "crop" is the edge of a patch in voxels. Raises UserError for
    any ``data`` or ``length``; for a crop larger than the volume, so small that the deepest stage has a
    single voxel, or no multiple of 4 ("tiny") or 32 ("paper"); for an unknown dimension; and if nilearn is
    not installed.
    """
    options.refuse("data", "length", job=NAME, why="it trains on crops of the volume of the package nilearn")
    shape, head = options.resize(_shape(options.size), _DIMENSIONS), read()
    multiple, largest = 2 ** (len(shape.features) - 1), min(head.tissue.shape)
    if not 2 * multiple <= shape.patch <= largest:
        raise UserError(
            f"{NAME} cannot be trained on crops with an edge of {shape.patch} voxels (--dim crop)",
            allowed=f"multiples of {multiple} from {2 * multiple} to {largest // multiple * multiple}",
        )
    return Job(
        name=NAME,
        title=TITLE,
        size=options.label,
        build_model=lambda: options.load_into(_build(shape)),
        make_batch=lambda step, seed: train_batch(head, shape, shape.batch_size, step=step, seed=seed),
        loss=loss,
        loss_terms=lambda part: len(part["volume"]),
        evaluate=lambda model: mean_dice(model, head, shape),
        metric=metric(head),
        optimizer=OptimizerChoice(learning_rate=5e-3),
        batch_size=shape.batch_size,
        dimensions=options.dimensions_of(shape, _DIMENSIONS, {"crop": multiple}),
        steps=100,
        # a quarter would need four techniques, and a PoC also runs the plan without each of them
        demonstration_ratio=0.5,
        blocks="stages",
        data_source=DATA_SOURCE,
    )


def _shape(size: str) -> UNetSize:
    """Return the sizes of the network for ``size``: "tiny", or "paper" for any other name.

    ``paper`` is nnU-Net's 3d_fullres configuration for brain tumours (four image types, four classes).
    """
    from memfit.jobs.builtin.unet3d import UNetSize

    if size == "tiny":
        return UNetSize(features=(8, 16, 32), channels=1, classes=3, patch=24, batch_size=8)
    return UNetSize(features=(32, 64, 128, 256, 320, 320), channels=4, classes=4, patch=128, batch_size=2)


def _build(shape: UNetSize) -> torch.nn.Module:
    from memfit.jobs.builtin.unet3d import UNet

    return UNet(shape)


@functools.cache
def read() -> Head:
    """Return the average head (MNI152) that comes with the package nilearn. The same object is returned every
    time. Raises UserError if nilearn is not installed."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise UserError(
            f"the job {NAME} reads a volume that comes with the package nilearn, which is not installed",
            hint="pip install 'memfit[science]'",
        )
    folder = Path(spec.origin).parent / "datasets" / "data"
    t1, grey, white = (_volume(folder, name).astype(np.float32) for name in ("t1", "gm", "wm"))
    tissue = np.argmax([255 - grey - white, grey, white], axis=0).astype(np.uint8)
    return Head(intensity=t1 / np.median(t1[tissue == 2]), tissue=tissue)


def _volume(folder: Path, name: str) -> Array:
    import nibabel

    image: Any = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asarray(image.dataobj)


def simulate_scan(clean: Array, rng: np.random.Generator, channels: int = 1) -> Array:
    """Return the intensities of the cube ``clean`` (x, y, z) as a scanner would show them, (channels, x, y,
    z).

    A random polynomial of second degree is applied as bias field, the same in all channels, then Rician
    noise, different in each channel.
    """
    axis = np.linspace(-1, 1, len(clean), dtype=np.float32)
    x, y, z = axis[:, None, None], axis[None, :, None], axis[None, None, :]
    terms = (x, y, z, x * y, y * z, z * x, x * x, y * y, z * z)
    field = np.zeros_like(clean)
    for weight, term in zip(rng.standard_normal(len(terms)), terms, strict=True):
        field += np.float32(weight) * term
    low, high = field.min(), field.max()
    biased = clean * (1 - BIAS / 2 + BIAS * (field - low) / (high - low))
    real, imaginary = np.float32(NOISE) * rng.standard_normal((2, channels, *clean.shape), np.float32)
    return np.asarray(np.hypot(biased + real, imaginary))


def train_batch(
    head: Head, shape: UNetSize, batch_size: int, *, step: int, seed: int
) -> dict[str, torch.Tensor]:
    """Return a training batch of ``batch_size`` cubes with the edge ``shape.patch``: ``volume`` (batch,
    channels, x, y, z) float32, intensities with simulated noise, and ``tissue`` (batch, x, y, z) int64. Their
    positions are random and outside the held-out slab. Only cubes too large to lie beside the slab, as those
    of the size "paper", may also contain it."""
    rng = step_rng(step, seed)
    corners = _training_corners(head, shape.patch, batch_size, rng)
    return as_tensors(_cubes(head, corners, shape.patch, shape.channels, rng))


def _training_corners(head: Head, patch: int, count: int, rng: np.random.Generator) -> Array:
    """Return the lowest corners, int64 (count, 3), of cubes with the edge ``patch``. Each is centred on a
    random voxel of grey or white matter, and then moved as far as is necessary to lie inside the volume and
    at least 8 planes from the held-out slab. Cubes too large for the latter need only lie inside the
    volume."""
    low, high = np.zeros((2, count, 3), np.int64)
    high[:] = np.array(head.tissue.shape) - patch
    tissue_voxels = np.argwhere(head.tissue[::4, ::4, ::4] > 0) * 4
    centres = tissue_voxels[rng.integers(0, len(tissue_voxels), count)]
    max_below, min_above = _HELD_OUT[0] - _GAP - patch, _HELD_OUT[1] + _GAP
    # Cubes of the paper's size fit on neither side; they are for planning, not for training.
    if max_below >= 0:
        is_below = centres[:, 1] < sum(_HELD_OUT) / 2
        high[:, 1] = np.where(is_below, max_below, high[:, 1])
        low[:, 1] = np.where(is_below, 0, min_above)
    return np.clip(centres - patch // 2, low, high)


def _cubes(
    head: Head, corners: Array, patch: int, channels: int, rng: np.random.Generator
) -> dict[str, Array]:
    slices = [tuple(slice(c, c + patch) for c in corner) for corner in corners]
    return {
        "volume": np.stack([simulate_scan(head.intensity[p], rng, channels) for p in slices]),
        "tissue": np.stack([head.tissue[p] for p in slices]).astype(np.int64),
    }


def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """Return the weighted mean, over the model's outputs, of cross-entropy minus soft Dice, in float32. Soft
    Dice is averaged over the classes other than 0 and over volumes, so the loss of a batch is the mean of the
    losses of its equal parts.

    Each output has half the weight of the one at twice its resolution.
    """
    logits = model(batch["volume"])
    scales = range(len(logits) - 1, -1, -1)
    total = sum(2.0**-s for s in scales)
    mean: torch.Tensor = 0  # type: ignore[assignment]
    for out, scale in zip(logits, scales, strict=True):
        mean = mean + _output_loss(out, batch["tissue"], 2**scale) * (2.0**-scale / total)
    return mean


def _output_loss(logits: torch.Tensor, tissue: torch.Tensor, step: int) -> torch.Tensor:
    from torch.nn import functional

    logits, tissue = logits.float(), tissue[:, ::step, ::step, ::step]
    entropy = functional.cross_entropy(logits, tissue)
    shares = logits.softmax(dim=1)[:, 1:]
    truth = functional.one_hot(tissue, logits.shape[1]).movedim(-1, 1)[:, 1:].to(shares.dtype)
    overlap, sizes = (t.sum(dim=(2, 3, 4)) for t in (shares * truth, shares + truth))
    return entropy - ((2 * overlap + 1e-5) / (sizes + 1e-5)).mean()


def mean_dice(model: torch.nn.Module, head: Head, shape: UNetSize) -> dict[str, float]:
    """Return the mean Dice of grey and white matter in the held-out region, in percent: "Dice of grey and
    white matter" of the tissue that the model predicts, and "soft Dice of grey and white matter" of the
    probabilities of the tissues. The model gets one cube at a time, with the edge ``shape.patch``, since a
    network of many stages takes no smaller ones."""
    import torch

    cubes = _test_cubes(head, shape.patch, shape.channels)
    with evaluating(model) as device:
        probabilities = [
            model(torch.tensor(volume[None], device=device))[-1].float().softmax(1)[0].cpu().numpy()
            for volume in cubes["volume"]
        ]
    scored = cubes["scored"]
    shares = np.stack(probabilities, axis=1)[:, scored]  # (classes, voxels)
    truth = cubes["tissue"][scored]
    return {_DICE: dice(shares.argmax(0), truth), f"soft {_DICE}": _soft_dice(shares, truth)}


def _soft_dice(shares: Array, truth: Array) -> float:
    """Return `dice` of the probabilities ``shares`` (classes, voxels) in place of predicted labels."""
    overlaps = [
        2
        * shares[tissue][truth == tissue].sum(dtype=np.float64)
        / (shares[tissue].sum(dtype=np.float64) + (truth == tissue).sum())
        for tissue in (1, 2)
    ]
    return 100 * float(np.mean(overlaps))


def dice(predicted: Array, truth: Array) -> float:
    """Return the mean of the Dice of grey (1) and of white matter (2) between two label arrays of one shape,
    in percent."""
    scores = [
        2
        * ((predicted == tissue) & (truth == tissue)).sum()
        / ((predicted == tissue).sum() + (truth == tissue).sum())
        for tissue in (1, 2)
    ]
    return 100 * float(np.mean(scores))


def _test_cubes(head: Head, patch: int, channels: int) -> dict[str, Array]:
    """Return ``volume`` and ``tissue`` of the cubes with the edge ``patch`` that cover the held-out region,
    always with the same noise. They may extend beyond it: ``scored`` (cubes, x, y, z) is True for the voxels
    inside the region."""
    low, end = np.array(_TEST_REGION).T
    tiles = -(-(end - low) // patch)
    corners = (low + end - tiles * patch) // 2 + np.array(list(np.ndindex(*tiles))) * patch
    cubes = _cubes(head, corners, patch, channels, np.random.default_rng(_TEST_SEED))
    voxels = corners[:, None] + np.arange(patch)[:, None]
    x, y, z = np.moveaxis((low <= voxels) & (voxels < end), 2, 0)
    return cubes | {"scored": x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :]}


def metric(head: Head) -> Metric:
    """Return the metric, the mean Dice of grey and white matter in the held-out region in percent; higher is
    better. Its naive result predicts for each of 128 levels of intensity the tissue that is most common there
    in training cubes."""
    rng = np.random.default_rng(_TEST_SEED + 1)
    corners = _training_corners(head, _TEST_PATCH, 24, rng)
    train, test = _cubes(head, corners, _TEST_PATCH, 1, rng), _test_cubes(head, _TEST_PATCH, 1)
    counts = np.stack(
        [
            np.bincount(_level(train["volume"][:, 0][train["tissue"] == t]), minlength=_LEVELS)
            for t in range(3)
        ]
    )
    commonest = counts.argmax(axis=0)
    return Metric(
        name=_DICE,
        unit="percentage points",
        higher_is_better=True,
        margin=0.75,
        margin_source=(
            "nnU-Net and its residual successor of like size, which its authors call on par, differ by up to "
            "0.75 points on six datasets (Isensee et al. 2024, arXiv 2404.09556, table 1)"
        ),
        naive=dice(commonest[_level(test["volume"][:, 0])], test["tissue"]),
        naive_name="the commonest training tissue of each intensity",
    )


def _level(intensity: Array) -> Array:
    return np.minimum(intensity * (_LEVELS / 2), _LEVELS - 1).astype(np.int64)
