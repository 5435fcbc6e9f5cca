"""Our Evoformer, template block and point attention against OpenFold's, run beside them on the same weights.

    python benchmarks/openfold_agreement.py FOLDER

FOLDER holds a checkout of OpenFold (github.com/aqlaboratory/openfold), whose imports want the packages
dm-tree, ml-collections, biopython and modelcif. Random weights and inputs in float64,
odd sizes, masked residues; the largest difference of outputs and of gradients of the inputs is written to
benchmarks/openfold_agreement.md.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memfit.jobs.builtin.alphafold import evoformer, structure

PAGE = Path(__file__).with_suffix(".md")
ROWS, N, HEADS = 7, 13, 3
WIDTHS = evoformer.Widths(
    c_m=15,
    c_z=10,
    msa_heads=HEADS,
    msa_head_width=5,
    pair_heads=2,
    pair_head_width=4,
    triangle=11,
    outer=6,
    transition=2,
    dropout=(0.0, 0.0),
)
NAMES = (  # ours, theirs
    (r"^row\.attention\.norm", "msa_att_row.layer_norm_m"),
    (r"^row\.bias\.norm", "msa_att_row.layer_norm_z"),
    (r"^row\.bias\.weight", "msa_att_row.linear_z"),
    (r"^row\.attention", "msa_att_row.mha"),
    (r"^column\.attention\.norm", "{column}.{norm}"),
    (r"^column\.attention", "{column}.{inner}"),
    (r"^transition\.", "msa_transition."),
    (r"^outer\.product\.out", "outer_product_mean.linear_out"),
    (r"^outer\.norm", "outer_product_mean.layer_norm"),
    (r"^outer\.left", "outer_product_mean.linear_1"),
    (r"^outer\.right", "outer_product_mean.linear_2"),
    (r"^pairs\.outgoing", "pair_stack.tri_mul_out"),
    (r"^pairs\.incoming", "pair_stack.tri_mul_in"),
    (r"^pairs\.starting", "pair_stack.tri_att_start"),
    (r"^pairs\.ending", "pair_stack.tri_att_end"),
    (r"^pairs\.transition\.", "pair_stack.pair_transition."),
    (r"(tri_mul_\w+)\.norm_out", r"\1.layer_norm_out"),
    (r"(tri_mul_\w+)\.norm\b", r"\1.layer_norm_in"),
    (r"(tri_mul_\w+)\.left\.value", r"\1.linear_a_p"),
    (r"(tri_mul_\w+)\.left\.gate", r"\1.linear_a_g"),
    (r"(tri_mul_\w+)\.right\.value", r"\1.linear_b_p"),
    (r"(tri_mul_\w+)\.right\.gate", r"\1.linear_b_g"),
    (r"(tri_mul_\w+)\.gate", r"\1.linear_g"),
    (r"(tri_mul_\w+)\.out", r"\1.linear_z"),
    (r"(tri_att_\w+)\.attention\.norm", r"\1.layer_norm"),
    (r"(tri_att_\w+)\.bias\.weight", r"\1.linear"),
    (r"(tri_att_\w+)\.attention", r"\1.mha"),
    (r"transition\.norm", "transition.layer_norm"),
    (r"\.up\.", ".linear_1."),
    (r"\.down\.", ".linear_2."),
    (r"\.query\.", ".linear_q."),
    (r"\.key\.", ".linear_k."),
    (r"\.value\.", ".linear_v."),
    (r"\.gate\.", ".linear_g."),
    (r"\.out\.", ".linear_o."),
)


def openfold(folder: Path) -> None:
    """Their modules without their packages' own imports, which want kernels compiled for CUDA."""
    for name in ("openfold", "openfold.model", "openfold.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    kernel: Any = types.ModuleType("openfold.utils.kernel.attention_core")
    kernel.attention_core = _attention_core
    sys.modules[kernel.__name__] = kernel
    sys.modules["attn_core_inplace_cuda"] = types.ModuleType("attn_core_inplace_cuda")


def _attention_core(query: Any, key: Any, value: Any, *biases: Any) -> torch.Tensor:
    """What their kernel computes: queries are scaled before it."""
    logits = query @ key.transpose(-1, -2)
    for bias in biases:
        logits = logits if bias is None else logits + bias
    return logits.softmax(-1) @ value  # type: ignore[no-any-return]


def theirs_of(name: str, *, one_query: bool) -> str:
    column = "msa_att_col" if one_query else "msa_att_col._msa_att"
    for ours, theirs in NAMES:
        told = (
            theirs.format(
                column=column, norm="layer_norm_m", inner="global_attention" if one_query else "mha"
            )
            if "{" in theirs
            else theirs
        )
        name = re.sub(ours, told, name)
    return name


def block(one_query: bool) -> tuple[nn.Module, nn.Module]:
    from openfold.model.evoformer import EvoformerBlock, ExtraMSABlock

    widths = dataclasses.replace(WIDTHS, global_columns=one_query)
    given = {
        "c_m": 15,
        "c_z": 10,
        "c_hidden_msa_att": 5,
        "c_hidden_opm": 6,
        "c_hidden_mul": 11,
        "c_hidden_pair_att": 4,
        "no_heads_msa": HEADS,
        "no_heads_pair": 2,
        "transition_n": 2,
        "msa_dropout": 0.0,
        "pair_dropout": 0.0,
        "opm_first": False,
        "fuse_projection_weights": False,
        "inf": 1e9,
    }
    if one_query:
        theirs = ExtraMSABlock(**given, eps=1e-5, ckpt=False)
    else:
        theirs = EvoformerBlock(**given, eps=1e-3, no_column_attention=False)
    ours = _random(evoformer.EvoformerBlock(widths))
    state = {theirs_of(n, one_query=one_query): p for n, p in ours.named_parameters()}
    theirs.double().load_state_dict(state)
    return ours, theirs


def _random(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


def blocks() -> Iterator[tuple[str, float, float]]:
    for one_query, name in ((False, "Evoformer block"), (True, "extra-MSA block")):
        ours, theirs = block(one_query)
        held = torch.ones(1, N).double()
        held[:, -2:] = 0
        rows, pairs = held.unsqueeze(1).repeat(1, ROWS, 1), held.unsqueeze(1) * held.unsqueeze(2)
        rows[:, -1] = 0
        found = []
        for one in (ours, theirs):
            numbers = torch.Generator().manual_seed(1)
            m = torch.randn(1, ROWS, N, 15, generator=numbers, dtype=torch.float64).requires_grad_()
            z = torch.randn(1, N, N, 10, generator=numbers, dtype=torch.float64).requires_grad_()
            out = one(m, z, rows, pairs)
            weight = [torch.randn(o.shape, generator=numbers, dtype=torch.float64) for o in out]
            # What lies behind a mask is nobody's: transitions are masked there only by OpenFold.
            seen = [out[0] * rows[..., None], out[1] * pairs[..., None]]
            sum((s * w).sum() for s, w in zip(seen, weight, strict=True)).backward()
            found.append(([s.detach() for s in seen], [m.grad, z.grad]))
        yield name, _apart(found[0][0], found[1][0]), _apart(found[0][1], found[1][1])


def template_block() -> tuple[str, float, float]:
    """As their monomer presets have it: attention first."""
    from openfold.model.template import TemplatePairStackBlock

    ours = _random(evoformer.TemplateBlock(WIDTHS))
    theirs = TemplatePairStackBlock(
        10, 4, 11, 2, 2, 0.0, tri_mul_first=False, fuse_projection_weights=False, inf=1e9
    ).double()
    names = {n: theirs_of(f"pairs.{n}", one_query=False) for n, _ in ours.named_parameters()}
    theirs.load_state_dict({names[n].removeprefix("pair_stack."): p for n, p in ours.named_parameters()})
    held = torch.ones(1, N).double()
    held[:, -2:] = 0
    pairs, found = held.unsqueeze(1) * held.unsqueeze(2), []
    for one in (ours, theirs):
        numbers = torch.Generator().manual_seed(3)
        z = torch.randn(1, N, N, 10, generator=numbers, dtype=torch.float64).requires_grad_()
        out = one(z, pairs) if one is ours else one(z[:, None], pairs[:, None], chunk_size=None)[:, 0]
        seen = out * pairs[..., None]
        (seen * torch.randn(seen.shape, generator=numbers, dtype=torch.float64)).sum().backward()
        found.append(([seen.detach()], [z.grad]))
    return "template block", _apart(found[0][0], found[1][0]), _apart(found[0][1], found[1][1])


def attention() -> tuple[str, float, float]:
    from openfold.model.structure_module import InvariantPointAttention
    from openfold.utils.rigid_utils import Rigid, Rotation

    c_s, c_z, width, query, value = 9, 6, 5, 4, 8
    ours = _random(
        structure.InvariantPointAttention(
            structure.StructureWidths(
                c_s=c_s, c_z=c_z, heads=HEADS, head_width=width, query_points=query, value_points=value
            )
        )
    )
    theirs = InvariantPointAttention(c_s, c_z, width, HEADS, query, value, inf=1e9, eps=1e-8).double()
    theirs.load_state_dict(_point_weights(ours, width, value))
    found = []
    for one in (ours, theirs):
        numbers = torch.Generator().manual_seed(2)
        s = torch.randn(1, N, c_s, generator=numbers, dtype=torch.float64).requires_grad_()
        z = torch.randn(1, N, N, c_z, generator=numbers, dtype=torch.float64).requires_grad_()
        rotation = structure.rotation_of(torch.randn(1, N, 3, generator=numbers, dtype=torch.float64))
        place = 5 * torch.randn(1, N, 3, generator=numbers, dtype=torch.float64)
        held = torch.ones(1, N).double()
        held[:, -2:] = 0
        if one is ours:
            out = one(s, z, rotation, place, held)
        else:
            out = one(s, z, Rigid(Rotation(rot_mats=rotation), place), held)
        out = out * held[..., None]
        (out * torch.randn(out.shape, generator=numbers, dtype=torch.float64)).sum().backward()
        found.append(([out.detach()], [s.grad, z.grad]))
    return "invariant point attention", _apart(found[0][0], found[1][0]), _apart(found[0][1], found[1][1])


def _point_weights(ours: Any, width: int, value: int) -> dict[str, torch.Tensor]:
    """Their layouts: key and value side by side in each head, x y z of points apart."""

    def points(t: torch.Tensor) -> torch.Tensor:
        return t.unflatten(0, (HEADS, -1, 3))

    state: dict[str, torch.Tensor] = {"head_weights": ours.head_weight}
    columns = torch.arange(HEADS * (width + 4 * value + ours.widths.c_z))
    first, last = HEADS * width, HEADS * (width + 3 * value)
    columns[first:last] = columns[first:last].unflatten(0, (-1, 3)).T.flatten()
    for kind in ("weight", "bias"):
        of = {n: getattr(getattr(ours, n), kind) for n in ("key", "value", "key_points", "value_points")}
        state[f"linear_q.{kind}"] = getattr(ours.query, kind)
        pair = [of[n].unflatten(0, (HEADS, -1)) for n in ("key", "value")]
        state[f"linear_kv.{kind}"] = torch.cat(pair, 1).flatten(0, 1)
        own = points(getattr(ours.query_points, kind))
        both = torch.cat([points(of[n]) for n in ("key_points", "value_points")], 1)
        for name, t in (("linear_q_points", own), ("linear_kv_points", both)):
            state[f"{name}.linear.{kind}"] = t.movedim(2, 0).flatten(0, 2)
        state[f"linear_b.{kind}"] = getattr(ours.bias, kind)
        state[f"linear_out.{kind}"] = getattr(ours.out, kind)
    state["linear_out.weight"] = state["linear_out.weight"][:, columns]
    return state


def _apart(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference relative to the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    folder = Path(sys.argv[1])
    openfold(folder)
    torch.manual_seed(0)
    rows = [*blocks(), template_block(), attention()]
    commit = (
        sys.argv[2]
        if len(sys.argv) > 2
        else subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    )
    table = [f"| {name} | {out:.1e} | {grad:.1e} |" for name, out, grad in rows]
    PAGE.write_text(
        "# Agreement with OpenFold\n\n"
        "Written by `python benchmarks/openfold_agreement.py FOLDER`: the same random weights and inputs in\n"
        f"float64, odd sizes, masked residues and a masked row; OpenFold at commit {commit or 'unknown'}.\n"
        "Largest difference relative to the largest value, of outputs and of the inputs' gradients.\n\n"
        "| what | outputs | gradients |\n|---|--:|--:|\n" + "\n".join(table) + "\n"
    )
    print("\n".join(table))


if __name__ == "__main__":
    main()
