"""Data, tokenizers and small model configurations of the scripts, made with fixed seeds and no network.

Each public function prepares one script. It takes the folder of the downloaded repositories and the script's
own work folder, and may be called again: it writes the same files.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SYLLABLES = ("ba", "co", "di", "fu", "ge", "ho", "ka", "li", "mo", "nu", "pe", "ra", "si", "to", "ve", "zu")
_WORDS = tuple(a + b + c for a in _SYLLABLES for b in _SYLLABLES for c in _SYLLABLES[:8])


def nanogpt(sources: Path, work: Path) -> None:
    """A character-level dataset of 65 symbols, as data/shakespeare_char/prepare.py writes it."""
    import numpy

    folder = sources / "nanoGPT" / "data" / "shakespeare_char"
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    for split, tokens in (("train", 100_000), ("val", 10_000)):
        generator.integers(0, 65, tokens, dtype=numpy.uint16).tofile(folder / f"{split}.bin")
    symbols = [chr(i) for i in range(32, 97)]
    meta = {
        "vocab_size": 65,
        "itos": dict(enumerate(symbols)),
        "stoi": {s: i for i, s in enumerate(symbols)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def nothing(sources: Path, work: Path) -> None:
    """The script makes its own data."""


def image_folders(sources: Path, work: Path) -> None:
    """An ImageFolder of 10 classes: 8 training and 2 validation images each, of different sizes."""
    for split, images in (("train", 8), ("val", 2)):
        for label in range(10):
            _write_images(work / "images" / split / f"class-{label}", images, seed=label)


def llama_and_instructions(sources: Path, work: Path) -> None:
    """A Llama of 4 layers of width 256, and 200 instructions with answers of 10 to 80 words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _save_tokenizer(work / "tiny-llama", bos="<s>", eos="</s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    _save_model(LlamaForCausalLM, config, work / "tiny-llama")
    draw = random.Random(0)
    rows = [{"instruction": _text(draw, 5, 20), "output": _text(draw, 10, 80)} for _ in range(200)]
    _write_rows(work / "alpaca" / "train.jsonl", rows)


def bert_and_pairs(sources: Path, work: Path) -> None:
    """A BERT of 4 layers of width 256 at the name of the public one, pairs of sentences in the place of
    GLUE's MRPC, and a metric in the place of GLUE's."""
    _save_bert(work / "bert-base-cased")
    folder = work / "nyu-mll" / "glue"
    draw = random.Random(0)
    for split, count in (("train", 160), ("validation", 32), ("test", 32)):
        rows = [
            {"sentence1": _text(draw, 8, 40), "sentence2": _text(draw, 8, 40), "label": i % 2, "idx": i}
            for i in range(count)
        ]
        _write_rows(folder / f"mrpc-{split}.jsonl", rows)
    files = "".join(f"  - split: {s}\n    path: mrpc-{s}.jsonl\n" for s in ("train", "validation", "test"))
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{files}---\n", encoding="utf-8"
    )
    metric = work / "glue"
    metric.mkdir(parents=True, exist_ok=True)
    (metric / "glue.py").write_text(_METRIC, encoding="utf-8")


def words(sources: Path, work: Path) -> None:
    """160,000 words of text, of 2,048 different ones, in the place of WikiText-2."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines = (_text(draw, 20, 20) for _ in range(8_000))
    (work / "data" / "wikitext-2.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def graphs(sources: Path, work: Path) -> None:
    """188 graphs of 10 to 28 nodes in 2 classes, in the place of MUTAG and in its format."""
    folder = sources / "pytorch_geometric" / "data" / "TU" / "MUTAG" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    edges: list[str] = []
    owners: list[int] = []
    for graph in range(1, 189):
        first, nodes = len(owners) + 1, draw.randint(10, 28)
        owners += [graph] * nodes
        pairs = [(i, draw.randrange(i)) for i in range(1, nodes)] + [(0, nodes - 1)]
        edges += [f"{first + a}, {first + b}\n{first + b}, {first + a}" for a, b in pairs]
    _write_lines(folder / "MUTAG_A.txt", edges)
    _write_lines(folder / "MUTAG_graph_indicator.txt", owners)
    _write_lines(folder / "MUTAG_graph_labels.txt", [draw.choice((-1, 1)) for _ in range(188)])
    _write_lines(folder / "MUTAG_node_labels.txt", [i % 7 for i in range(len(owners))])


def unet_and_images(sources: Path, work: Path) -> None:
    """64 images, and a UNet of 3 resolutions and 32 to 64 channels."""
    _write_images(work / "images", 64, seed=0)
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 32,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "attention_head_dim": 8,
    }
    (work / "unet").mkdir(parents=True, exist_ok=True)
    (work / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def molecules(sources: Path, work: Path) -> None:
    """40 molecules of 6 to 14 atoms of H, C and O with random energies and forces, in extended XYZ."""
    import numpy
    from ase import Atoms
    from ase.io import write

    generator = numpy.random.default_rng(0)
    frames = []
    for _ in range(40):
        count = int(generator.integers(6, 15))
        grid = numpy.stack(numpy.meshgrid(*[numpy.arange(3)] * 3), axis=-1).reshape(-1, 3) * 1.5
        places = grid[generator.permutation(len(grid))[:count]] + generator.normal(0, 0.1, (count, 3))
        atoms = Atoms(generator.choice(["H", "C", "O"], count).tolist(), positions=places)
        atoms.info["REF_energy"] = float(generator.normal(-10 * count, 1))
        atoms.arrays["REF_forces"] = generator.normal(0, 1, (count, 3))
        frames.append(atoms)
    work.mkdir(parents=True, exist_ok=True)
    write(work / "train.xyz", frames, format="extxyz")


def bert_and_reviews(sources: Path, work: Path) -> None:
    """A BERT of 4 layers of width 256 at the name of the public one, and 64 + 32 labelled texts in the place
    of IMDB."""
    _save_bert(work / "bert-base-uncased")
    draw = random.Random(0)
    for split, count in (("train", 64), ("test", 32)):
        rows = [{"text": _text(draw, 20, 120), "label": i % 2} for i in range(count)]
        _write_rows(work / "imdb" / f"{split}.jsonl", rows)


def cifar(sources: Path, work: Path) -> None:
    """600 random images in the place of CIFAR-10 and in its format."""
    import numpy

    folder = work / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = generator.integers(0, 256, (100, 3072), dtype=numpy.uint8)
        labels = generator.integers(0, 10, 100).tolist()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))


PREPARE: dict[str, Callable[[Path, Path], None]] = {
    f.__name__: f
    for f in (
        nanogpt,
        nothing,
        image_folders,
        llama_and_instructions,
        bert_and_pairs,
        words,
        graphs,
        unet_and_images,
        molecules,
        bert_and_reviews,
        cifar,
    )
}

_METRIC = '''import datasets
import evaluate


class Glue(evaluate.Metric):
    """Accuracy only."""

    def _info(self):
        label = datasets.Value("int64")
        features = datasets.Features({"predictions": label, "references": label})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        equal = sum(p == r for p, r in zip(predictions, references))
        return {"accuracy": equal / len(references)}
'''


def _text(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(_WORDS, k=draw.randint(low, high)))


def _write_lines(path: Path, values: Any) -> None:
    path.write_text("".join(f"{v}\n" for v in values), encoding="utf-8")


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_lines(path, map(json.dumps, rows))


def _write_images(folder: Path, count: int, *, seed: int) -> None:
    import numpy
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = numpy.random.default_rng(seed)
    for i in range(count):
        height, width = generator.integers(240, 360, 2)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg")


def _save_tokenizer(folder: Path, *, bos: str, eos: str, **special: str) -> Any:
    """Save a tokenizer of whole words in `folder`, which surrounds each text, or pair of texts, with `bos`
    and `eos`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = list(dict.fromkeys(("[UNK]", "[PAD]", bos, eos, *special.values())))
    vocabulary = {word: i for i, word in enumerate((*names, *_WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} $B:1 {eos}:1",
        special_tokens=[(bos, vocabulary[bos]), (eos, vocabulary[eos])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        pad_token="[PAD]",
        bos_token=bos,
        eos_token=eos,
        model_max_length=512,
        **special,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _save_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = _save_tokenizer(
        folder, bos="[CLS]", eos="[SEP]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1024,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(BertModel, config, folder)


def _save_model(kind: Any, config: Any, folder: Path) -> None:
    import torch

    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
