"""Models of other libraries, as a user would train them, by group: the population of unseen_models.py.

A group maps a name to a function that makes a `Task`. Nothing here was chosen by what memfit says of it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def hide_if_broken(package: str) -> None:
    """Libraries look whether a package is there before they import it: one that does not load is not."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError):
        find: Any = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *more: None if name == package else find(name, *more)


hide_if_broken("torchaudio")  # before transformers is imported
functional = nn.functional
Loss = Callable[[Any, Any], torch.Tensor]


@dataclasses.dataclass
class Task:
    """``batches``: forms of the same batch; the first that the model takes is the batch."""

    model: nn.Module
    batches: list[Any]
    loss: Loss


Make = Callable[[], Task]
CLASSES, PIXELS = 10, 64


def class_loss(model: Any, batch: Any) -> torch.Tensor:
    out = model(batch["x"])
    return functional.cross_entropy(getattr(out, "logits", out), batch["y"])


def mask_loss(model: Any, batch: Any) -> torch.Tensor:
    out = model(batch["x"])
    while isinstance(out, tuple | list):
        out = out[0]
    return functional.binary_cross_entropy_with_logits(out, batch["y"])


def mean_loss(model: Any, batch: Any) -> torch.Tensor:
    """Of what the model returns: its own loss where it has one."""
    out = model(**batch)
    own = getattr(out, "loss", None)
    return own if own is not None else first_tensor(out).square().mean()


def first_tensor(out: Any) -> torch.Tensor:
    if isinstance(out, torch.Tensor):
        return out
    return first_tensor(next(iter(out.values())) if hasattr(out, "values") else out[0])


def images(count: int, size: int = PIXELS, channels: int = 3) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(count, channels, size, size), "y": torch.randint(0, CLASSES, (count,))}


# -- vision -----------------------------------------------------------------------------------------


def timm_models() -> dict[str, Make]:
    import timm

    def make(name: str) -> Task:
        with torch.device("meta"):
            light = timm.create_model(name, num_classes=CLASSES)
        refuse_large(light)
        model = timm.create_model(name, num_classes=CLASSES)
        size = model.default_cfg["input_size"][-1]
        return Task(model, [images(4, min(size, 128)), images(2, size)], class_loss)

    return {name: functools.partial(make, name) for name in timm.list_models()}


def torchvision_classifiers() -> dict[str, Make]:
    import torchvision

    def make(name: str) -> Task:
        with torch.device("meta"):
            light = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        refuse_large(light)
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
        clip = {"x": torch.randn(2, 3, 8, 112, 112), "y": torch.randint(0, CLASSES, (2,))}
        return Task(model, [images(4, 128), images(2, 224), clip], class_loss)

    kinds = (torchvision.models, torchvision.models.video)
    names = [name for kind in kinds for name in torchvision.models.list_models(module=kind)]
    return {name: functools.partial(make, name) for name in names}


def torchvision_segmentation() -> dict[str, Make]:
    import torchvision

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["x"])["out"], batch["y"])

    def make(name: str) -> Task:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
        batch = {"x": torch.randn(2, 3, 96, 96), "y": torch.randint(0, 5, (2, 96, 96))}
        return Task(model, [batch], loss)

    names = torchvision.models.list_models(module=torchvision.models.segmentation)
    return {name: functools.partial(make, name) for name in names}


def torchvision_detection() -> dict[str, Make]:
    import torchvision

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.stack(list(model(batch["images"], batch["targets"]).values())).sum()

    def make(name: str) -> Task:
        sizes = {} if name.startswith("ssd") else {"min_size": 128, "max_size": 160}
        model = torchvision.models.get_model(
            name, weights=None, weights_backbone=None, num_classes=4, **sizes
        )
        refuse_large(model)
        target = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 60.0]]), "labels": torch.tensor([1])}
        if "mask" in name:
            target["masks"] = torch.ones(1, 128, 128, dtype=torch.uint8)
        if "keypoint" in name:
            target["keypoints"] = torch.full((1, 17, 3), 20.0)
        batch = {"images": [torch.rand(3, 128, 128) for _ in range(2)], "targets": [target, target]}
        return Task(model, [batch], loss)

    names = torchvision.models.list_models(module=torchvision.models.detection)
    return {name: functools.partial(make, name) for name in names}


def segmentation_models() -> dict[str, Make]:
    import segmentation_models_pytorch as smp

    def make(name: str, encoder: str) -> Task:
        model = smp.create_model(name, encoder_name=encoder, encoder_weights=None, classes=1)
        refuse_large(model)
        return Task(
            model, [{"x": torch.randn(4, 3, 96, 96), "y": torch.rand(4, 1, 96, 96).round()}], mask_loss
        )

    pairs = itertools.product(sorted(smp.MODEL_ARCHITECTURES_MAPPING), smp.encoders.get_encoder_names())
    return {f"{name} {encoder}": functools.partial(make, name, encoder) for name, encoder in pairs}


def monai_networks() -> dict[str, Make]:
    from monai.networks import nets

    levels = {"channels": (8, 16, 32), "strides": (2, 2)}
    both = {"in_channels": 1, "out_channels": 1}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "UNet": ("mask", {**both, **levels, "num_res_units": 2}),
        "AttentionUnet": ("mask", {**both, **levels}),
        "BasicUNet": ("mask", {**both, "features": (8, 8, 16, 32, 64, 8)}),
        "BasicUNetPlusPlus": ("mask", {**both, "features": (8, 8, 16, 32, 64, 8)}),
        "SegResNet": ("mask", {**both, "init_filters": 8}),
        "DynUNet": (
            "mask",
            {**both, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2]},
        ),
        "UNETR": ("mask", {**both, "img_size": 32, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4}),
        "SwinUNETR": ("mask", {**both, "feature_size": 12}),
        "VNet": ("mask", {**both}),
        "HighResNet": ("mask", {**both}),
        "AutoEncoder": ("mask", {**both, **levels}),
        "FlexibleUNet": ("mask", {**both, "backbone": "efficientnet-b0"}),
        "DenseNet121": ("class", {"in_channels": 1, "out_channels": CLASSES}),
        "SEResNet50": ("class", {"in_channels": 1, "num_classes": CLASSES}),
        "EfficientNetBN": (
            "class",
            {"model_name": "efficientnet-b0", "in_channels": 1, "num_classes": CLASSES},
        ),
        "MedNeXtSmall": ("mask", {**both, "init_filters": 8}),
    }

    def make(name: str, dims: int) -> Task:
        what, settings = kinds[name]
        model = getattr(nets, name)(spatial_dims=dims, **settings)
        size = [32] * 3 if dims == 3 else [64] * 2
        if name == "UNETR" and dims == 2:
            size = [32] * 2
        x = torch.randn(2, 1, *size)
        if what == "class":
            return Task(model, [{"x": x, "y": torch.randint(0, CLASSES, (2,))}], class_loss)
        return Task(model, [{"x": x, "y": torch.rand(2, 1, *size).round()}], mask_loss)

    return {f"{n} {d}D": functools.partial(make, n, d) for n in kinds for d in (2, 3)}


# -- diffusion --------------------------------------------------------------------------------------


def noise(width: int, channels: int = 4, size: int = 16) -> dict[str, Any]:
    context = torch.randn(2, 7, width)
    sample = torch.randn(2, channels, size, size)
    return {"sample": sample, "timestep": torch.tensor([3, 700]), "encoder_hidden_states": context}


def unet(width: int, layers: int) -> Task:
    import diffusers

    blocks = (width, 2 * width)
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=blocks,
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Task(model, [{"sample": torch.randn(4, 3, 32, 32), "timestep": torch.arange(4)}], mean_loss)


def conditional(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=32,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )
    return Task(model, [noise(32)], mean_loss)


def autoencoder(kind: str, width: int, layers: int) -> Task:
    import diffusers

    model = getattr(diffusers, kind)(
        block_out_channels=(width, 2 * width),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return Task(model, [{"sample": torch.randn(2, 3, 48, 48)}], mean_loss)


def dit(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        num_layers=layers,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_embeds_ada_norm=100,
        norm_num_groups=4,
    )
    batch = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 5])}
    return Task(model, [{**batch, "class_labels": torch.tensor([3, 4])}], mean_loss)


def pixart(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=width // 4,
        num_layers=layers,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=width,
        caption_channels=32,
        use_additional_conditions=False,
    )
    batch = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 5])}
    more = {"encoder_hidden_states": torch.randn(2, 7, 32), "added_cond_kwargs": {}}
    return Task(model, [{**batch, **more}], mean_loss)


def stable3(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        num_layers=layers,
        attention_head_dim=width // 4,
        out_channels=4,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=width,
        pooled_projection_dim=64,
    )
    batch = {"hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 5])}
    more = {"encoder_hidden_states": torch.randn(2, 7, 32), "pooled_projections": torch.randn(2, 64)}
    return Task(model, [{**batch, **more}], mean_loss)


def video(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(width, 2 * width),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        cross_attention_dim=32,
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )
    return Task(model, [{**noise(32), "sample": torch.randn(2, 4, 4, 16, 16)}], mean_loss)


def signal(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.UNet1DModel(
        sample_size=256,
        in_channels=2,
        out_channels=2,
        block_out_channels=(width, width, 2 * width),
        layers_per_block=layers,
        extra_in_channels=16,
    )
    return Task(model, [{"sample": torch.randn(2, 2, 256), "timestep": torch.tensor([1, 5])}], mean_loss)


def control(width: int, layers: int) -> Task:
    import diffusers

    model = diffusers.ControlNetModel(
        block_out_channels=(width, 2 * width),
        layers_per_block=layers,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        conditioning_embedding_out_channels=(8, 16),
    )
    return Task(model, [{**noise(32), "controlnet_cond": torch.randn(2, 3, 32, 32)}], mean_loss)


def diffusers_models() -> dict[str, Make]:
    kinds: dict[str, Callable[[int, int], Task]] = {
        "UNet2D": unet,
        "UNet2DCondition": conditional,
        "DiT": dit,
        "PixArt": pixart,
        "SD3": stable3,
        "UNet3DCondition": video,
        "UNet1D": signal,
        "ControlNet": control,
        "AutoencoderKL": functools.partial(autoencoder, "AutoencoderKL"),
        "VQModel": functools.partial(autoencoder, "VQModel"),
    }
    return {
        f"{name} {width} x {layers}": functools.partial(make, width, layers)
        for name, make in kinds.items()
        for width in (32, 64, 96)
        for layers in (1, 2)
    }


# -- transformers -----------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 64,
    "d_model": 64,
    "dim": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "embedding_size": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "d_ff": 128,
    "n_inner": 128,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "hidden_dim": 128,
    "ffn_dim": 128,
    "vocab_size": 1000,
    "head_dim": 16,
    "d_kv": 16,
    "image_size": 64,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 8,
    "num_conv_pos_embedding_groups": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def small_config(kind: str) -> Any:
    from transformers import AutoConfig

    known = AutoConfig.for_model(kind)
    return AutoConfig.for_model(kind, **{k: v for k, v in _SMALL.items() if hasattr(known, k)})


def transformers_group(
    mapping: str, batches: Callable[[Any, nn.Module], list[Any]], experts: bool = False
) -> dict[str, Make]:
    import transformers
    from transformers.models.auto import modeling_auto

    def make(kind: str, class_name: str) -> Task:
        config = small_config(kind)
        if experts and not any(hasattr(config, name) for name in _EXPERTS):
            raise ValueError("no mixture of experts")
        with torch.device("meta"):
            refuse_large(getattr(transformers, class_name)(config))
        model = getattr(transformers, class_name)(config)
        return Task(model, batches(config, model), mean_loss)

    names = getattr(modeling_auto, mapping)
    return {
        f"{name}": functools.partial(make, kind, name)
        for kind, name in names.items()
        if isinstance(name, str) and hasattr(transformers, name)
    }


def tokens(config: Any, model: nn.Module) -> list[Any]:
    ids = torch.randint(3, 200, (4, 64))
    return [{"input_ids": ids, "labels": ids}]


def pairs(config: Any, model: nn.Module) -> list[Any]:
    return [{"input_ids": torch.randint(3, 200, (4, 48)), "labels": torch.randint(3, 200, (4, 32))}]


def sounds(config: Any, model: nn.Module) -> list[Any]:
    wave, bands = torch.randn(2, 16000), getattr(config, "num_mel_bins", 80)
    labels = [{"labels": torch.tensor([0, 1])}, {"labels": torch.randint(3, 20, (2, 8))}]
    forms = [{"input_values": wave}, {"input_features": torch.randn(2, 200, bands)}]
    forms += [{"input_features": torch.randn(2, bands, 3000)}, {"input_values": torch.randn(2, 1024, bands)}]
    return [{**form, **label} for form in forms for label in labels]


def pictures(config: Any, model: nn.Module) -> list[Any]:
    sizes = dict.fromkeys((getattr(config, "image_size", 64), 64, 224))
    return [
        {"pixel_values": torch.randn(2, 3, s, s), "labels": torch.tensor([0, 1])}
        for s in sizes
        if isinstance(s, int)
    ]


def time_series() -> dict[str, Make]:
    import transformers as hf

    past, future = 30, 12

    def lagged(name: str, width: int) -> Task:
        config = getattr(hf, f"{name}Config")(
            prediction_length=future,
            context_length=24,
            lags_sequence=[1, 2, 3],
            num_time_features=1,
            d_model=width,
            encoder_layers=2,
            decoder_layers=2,
        )
        batch = {
            "past_values": torch.randn(4, past),
            "past_time_features": torch.randn(4, past, 1),
            "past_observed_mask": torch.ones(4, past),
            "future_values": torch.randn(4, future),
            "future_time_features": torch.randn(4, future, 1),
        }
        return Task(getattr(hf, f"{name}ForPrediction")(config), [batch], mean_loss)

    def patched(name: str, width: int) -> Task:
        config = getattr(hf, f"{name}Config")(
            num_input_channels=3,
            context_length=64,
            prediction_length=future,
            patch_length=8,
            patch_stride=8,
            d_model=width,
            num_hidden_layers=2,
            num_layers=2,
        )
        batch = {"past_values": torch.randn(4, 64, 3), "future_values": torch.randn(4, future, 3)}
        return Task(getattr(hf, f"{name}ForPrediction")(config), [batch], mean_loss)

    made = {
        **dict.fromkeys(("TimeSeriesTransformer", "Informer", "Autoformer"), lagged),
        **dict.fromkeys(("PatchTST", "PatchTSMixer"), patched),
    }
    return {
        f"{name} {width}": functools.partial(make, name, width)
        for name, make in made.items()
        for width in (32, 64)
    }


# -- graphs and atoms -------------------------------------------------------------------------------


def graph_models() -> dict[str, Make]:
    import torch_geometric as pyg
    from torch_geometric.data import Batch, Data

    def batch(edge_features: int = 0) -> Any:
        def graph() -> Any:
            edges = torch.randint(0, 20, (2, 60))
            data = Data(x=torch.randn(20, 16), edge_index=edges, y=torch.randn(1))
            if edge_features:
                data.edge_attr = torch.randn(60, edge_features)
            return data

        return Batch.from_data_list([graph() for _ in range(8)])

    def loss(model: Any, batch: Any) -> torch.Tensor:
        nodes = model(batch.x, batch.edge_index)
        pooled = pyg.nn.global_mean_pool(nodes, batch.batch)
        return functional.mse_loss(pooled[:, 0], batch.y)

    def plain(name: str, width: int, layers: int) -> Task:
        more = {
            "aggregators": ["mean", "max"],
            "scalers": ["identity"],
            "deg": torch.ones(10, dtype=torch.long),
        }
        settings = more if name == "PNA" else {}
        model = getattr(pyg.nn, name)(16, width, layers, 1, **settings)
        return Task(model, [batch()], loss)

    def unet(width: int, layers: int) -> Task:
        return Task(pyg.nn.GraphUNet(16, width, 1, layers), [batch()], loss)

    def attentive(width: int, layers: int) -> Task:
        def own(model: Any, b: Any) -> torch.Tensor:
            return functional.mse_loss(model(b.x, b.edge_index, b.edge_attr, b.batch)[:, 0], b.y)

        return Task(pyg.nn.AttentiveFP(16, width, 1, 4, layers, 2), [batch(4)], own)

    plains = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
    made: dict[str, Callable[[int, int], Task]] = {n: functools.partial(plain, n) for n in plains}
    made |= {"GraphUNet": unet, "AttentiveFP": attentive}
    return {
        f"{name} {width} x {layers}": functools.partial(make, width, layers)
        for name, make in made.items()
        for width in (32, 128)
        for layers in (2, 4)
    }


def e3nn_models() -> dict[str, Make]:
    from e3nn import o3
    from e3nn.nn import FullyConnectedNet, Gate

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.irreps = o3.Irreps(f"{width}x0e + {width}x1o")
            self.sphere = o3.Irreps.spherical_harmonics(1)
            gate = Gate(f"{width}x0e", [torch.tanh], f"{width}x0e", [torch.sigmoid], f"{width}x1o")
            self.product = o3.FullyConnectedTensorProduct(
                self.irreps, self.sphere, gate.irreps_in, shared_weights=False
            )
            self.radial = FullyConnectedNet([8, 32, self.product.weight_numel], torch.nn.functional.silu)
            self.gate = gate

        def forward(self, x: Any, vectors: Any, lengths: Any, edges: Any) -> torch.Tensor:
            angles = o3.spherical_harmonics(self.sphere, vectors, normalize=True)
            sent = self.product(x[edges[0]], angles, self.radial(lengths))
            return self.gate(torch.zeros(len(x), sent.shape[1]).index_add(0, edges[1], sent))  # type: ignore[no-any-return]

    class Network(nn.Module):
        def __init__(self, width: int, layers: int) -> None:
            super().__init__()
            self.embed = o3.Linear("4x0e", f"{width}x0e + {width}x1o")
            self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
            self.out = o3.Linear(f"{width}x0e + {width}x1o", "1x0e")

        def forward(self, atoms: Any, vectors: Any, lengths: Any, edges: Any) -> torch.Tensor:
            x = self.embed(atoms)
            for layer in self.layers:
                x = layer(x, vectors, lengths, edges)
            return self.out(x).sum()  # type: ignore[no-any-return]

    def make(width: int, layers: int) -> Task:
        batch = {
            "atoms": torch.randn(20, 4),
            "vectors": torch.randn(80, 3),
            "lengths": torch.rand(80, 8),
            "edges": torch.randint(0, 20, (2, 80)),
        }
        return Task(Network(width, layers), [batch], mean_loss)

    return {f"network {w} x {n}": functools.partial(make, w, n) for w in (4, 8, 16) for n in (1, 2, 3)}


def mace_models() -> dict[str, Make]:
    import numpy
    from e3nn import o3
    from mace import data, modules, tools
    from mace.tools import torch_geometric

    def loss(model: Any, batch: Any) -> torch.Tensor:
        out = model(batch.to_dict(), training=True, compute_force=True)
        return out["energy"].square().mean() + out["forces"].square().mean()

    def make(width: int, order: int) -> Task:
        table = tools.AtomicNumberTable([1, 6, 8])
        model = modules.ScaleShiftMACE(
            r_max=4.0,
            num_bessel=6,
            num_polynomial_cutoff=5,
            max_ell=2,
            num_interactions=2,
            num_elements=3,
            interaction_cls=modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
            interaction_cls_first=modules.interaction_classes["RealAgnosticInteractionBlock"],
            hidden_irreps=o3.Irreps(f"{width}x0e + {width}x1o"),
            MLP_irreps=o3.Irreps("16x0e"),
            gate=torch.nn.functional.silu,
            atomic_energies=numpy.zeros(3),
            avg_num_neighbors=8,
            atomic_numbers=[1, 6, 8],
            correlation=order,
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
        rng = numpy.random.default_rng(0)
        configs = [
            data.Configuration(
                atomic_numbers=rng.choice([1, 6, 8], 12),
                positions=rng.random((12, 3)) * 5,
                properties={"energy": 0.0, "forces": numpy.zeros((12, 3))},
                property_weights={"energy": 1.0, "forces": 1.0},
                cell=numpy.eye(3) * 30,
                pbc=(False,) * 3,
            )
            for _ in range(2)
        ]
        atoms = [data.AtomicData.from_config(c, z_table=table, cutoff=4.0) for c in configs]
        loader = torch_geometric.dataloader.DataLoader(atoms, batch_size=2, shuffle=False)
        return Task(model.float(), [next(iter(loader))], loss)

    return {f"MACE {w} order {n}": functools.partial(make, w, n) for w in (8, 16, 32) for n in (2, 3)}


def lightning_examples() -> dict[str, Make]:
    from lightning.pytorch.demos import boring_classes, transformer

    def step(model: Any, batch: Any) -> torch.Tensor:
        out = model.training_step(batch, 0)
        return out["loss"] if isinstance(out, dict) else out  # type: ignore[no-any-return]

    def boring(name: str) -> Task:
        return Task(getattr(boring_classes, name)(), [torch.randn(16, 32)], step)

    def language(width: int) -> Task:
        model = transformer.Transformer(vocab_size=500, ninp=width, nhead=2, nhid=2 * width, nlayers=2)
        ids = torch.randint(0, 500, (4, 35))

        def loss(model: Any, batch: Any) -> torch.Tensor:
            out = model(batch["inputs"], batch["target"])
            return functional.nll_loss(out, batch["target"].view(-1))

        return Task(model, [{"inputs": ids, "target": ids}], loss)

    def autoencoder(width: int) -> Task:
        import lightning

        class AutoEncoder(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 3))
                self.decoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 784))

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                x = batch[0].view(batch[0].size(0), -1)
                return functional.mse_loss(self.decoder(self.encoder(x)), x)

        return Task(AutoEncoder(), [(torch.rand(32, 1, 28, 28), torch.zeros(32).long())], step)

    made: dict[str, Make] = {n: functools.partial(boring, n) for n in ("BoringModel", "DemoModel")}
    made |= {f"Transformer {w}": functools.partial(language, w) for w in (64, 200)}
    return made | {f"AutoEncoder {w}": functools.partial(autoencoder, w) for w in (64, 512)}


# -- all --------------------------------------------------------------------------------------------

MOST_PARAMETERS = 30_000_000


class TooLarge(Exception):
    """More parameters than are trained here."""


def refuse_large(model: nn.Module) -> None:
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise TooLarge("too many parameters")


# Group: (how many jobs of it are drawn, its population).
GROUPS: dict[str, tuple[int, Callable[[], dict[str, Make]]]] = {
    "timm": (6, timm_models),
    "torchvision": (2, torchvision_classifiers),
    "torchvision segmentation": (1, torchvision_segmentation),
    "torchvision detection": (2, torchvision_detection),
    "diffusers": (5, diffusers_models),
    "transformers causal": (
        2,
        functools.partial(transformers_group, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", tokens),
    ),
    "transformers MoE": (
        1,
        functools.partial(transformers_group, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", tokens, experts=True),
    ),
    "transformers encoder-decoder": (
        2,
        functools.partial(transformers_group, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", pairs),
    ),
    "transformers audio": (
        2,
        functools.partial(transformers_group, "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES", sounds),
    ),
    "transformers time series": (1, time_series),
    "transformers vision": (
        2,
        functools.partial(transformers_group, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", pictures),
    ),
    "PyG": (4, graph_models),
    "e3nn": (1, e3nn_models),
    "mace-torch": (1, mace_models),
    "monai": (4, monai_networks),
    "segmentation-models-pytorch": (3, segmentation_models),
    "lightning": (1, lightning_examples),
}
