"""Models of timm, vit-pytorch and torchvision, small, with random weights, and one written by hand."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from samples.exported_model import Model, of_torch

# timm


@dataclass(frozen=True)
class Timm:
    """An architecture of timm, and what makes it small."""

    name: str
    size: int = 64
    """Of a picture, in pixels; given to the model where `sized`."""

    sized: bool = True
    small: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Make it."""
        _with_torchvision()
        sized = {"img_size": self.size} if self.sized else {}
        module = import_module("timm").create_model(self.name, num_classes=10, **sized, **self.small)
        assert isinstance(module, nn.Module)
        return module

    def unfused(self) -> nn.Module:
        """Make it without torch's fused attention."""
        _with_torchvision()
        layers = import_module("timm.layers")
        layers.set_fused_attn(enable=False)
        try:
            return self.build()
        finally:
            layers.set_fused_attn(enable=True)


_THIN = {"depth": 2, "embed_dim": 96, "num_heads": 4}
_STAGES = {"depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32}

TIMM = (
    Timm("vit_tiny_patch16_224", small={"depth": 2}),
    Timm("vit_base_patch16_siglip_224", small=_THIN),
    Timm("vit_relpos_small_patch16_224", small={"depth": 2}),
    Timm("vit_so150m2_patch16_reg1_gap_256", small=_THIN),
    Timm("naflexvit_base_patch16_gap", sized=False, small=_THIN),
    Timm("samvit_base_patch16", small=_THIN | {"global_attn_indexes": (1,)}),
    Timm("deit_tiny_distilled_patch16_224", small={"depth": 2}),
    Timm("beit_base_patch16_224", small=_THIN),
    Timm("eva02_tiny_patch14_224", 56, small={"depth": 2}),
    Timm("swin_tiny_patch4_window7_224", 56, small=_STAGES),
    Timm("swinv2_tiny_window8_256", small=_STAGES),
    Timm("swinv2_cr_tiny_224", small=_STAGES),
    Timm("cait_xxs24_224", small={"depth": 2}),
    Timm("xcit_nano_12_p16_224", small={"depth": 2}),
    Timm("crossvit_tiny_240", 240, small={"depth": [[1, 1, 0]]}),
    Timm("coat_lite_tiny"),
    Timm("coatnet_nano_rw_224"),
    Timm("levit_128s"),
    Timm("efficientformer_l1", 224, sized=False),
    Timm("efficientformerv2_s0", 224, sized=False),
    Timm("efficientvit_b0", sized=False),
    Timm("efficientvit_m0", sized=False),
    Timm("maxvit_rmlp_pico_rw_256"),
    Timm("pvt_v2_b0", sized=False),
    Timm("twins_pcpvt_small"),
    Timm("twins_svt_small"),
    Timm("mobilevit_xxs", sized=False),
    Timm("mobilevitv2_050", sized=False),
    Timm("mobilenetv4_hybrid_medium", sized=False),
    Timm("edgenext_xx_small", sized=False),
    Timm("davit_tiny", sized=False, small={"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (2, 4)}),
    Timm("gcvit_xxtiny", 224, sized=False),
    Timm("hiera_tiny_224"),
    Timm("nest_tiny"),
    Timm("mvitv2_tiny"),
    Timm("convit_tiny", small={"depth": 4}),
    Timm("visformer_tiny"),
    Timm("tnt_s_legacy_patch16_224", small={"depth": 2}),
    Timm("volo_d1_224"),
    Timm("fastvit_sa12", sized=False),
    Timm("tiny_vit_5m_224", sized=False),
    Timm("nextvit_small", sized=False),
    Timm("swiftformer_xs", sized=False),
    Timm("botnet26t_256", 256, sized=False),
    Timm("halonet26t", 256, sized=False),
    Timm("lambda_resnet26t", sized=False),
    Timm("resnet50_clip", sized=False),
    Timm("sequencer2d_s", sized=False),
    Timm("mixer_s32_224"),
)


def _with_torchvision() -> None:
    """Import torchvision, whose wheel on PyPI is compiled for CUDA's torch.

    Beside a CPU's torch its operators are not there, and the import ends where it describes two of them; no model here
    runs any, so they are declared and no more.
    """
    try:
        import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_module("torchvision")


# vit-pytorch and torchvision


def _of(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    """A class of a module, made with these options."""

    def build() -> nn.Module:
        _with_torchvision()
        made = getattr(import_module(module), name)(**options)
        assert isinstance(made, nn.Module)
        return made

    return build


_PLAIN: dict[str, Any] = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4}
_TOKENS = _PLAIN | {"mlp_dim": 64}
_T2T = {name: value for name, value in _TOKENS.items() if name != "patch_size"}
_VIT_PYTORCH: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("ViT", _TOKENS, 64),
    "simple_vit": ("SimpleViT", _TOKENS, 64),
    "simple_vit_with_qk_norm": ("SimpleViT", _TOKENS, 64),
    "simple_vit_with_register_tokens": ("SimpleViT", _TOKENS, 64),
    "deepvit": ("DeepViT", _TOKENS, 64),
    "cait": ("CaiT", _TOKENS | {"cls_depth": 1}, 64),
    "parallel_vit": ("ViT", _TOKENS, 64),
    "vit_for_small_dataset": ("ViT", _TOKENS, 64),
    "normalized_vit": ("nViT", _TOKENS, 64),
    "levit": (
        "LeViT",
        {"image_size": 64, "num_classes": 10, "stages": 2, "dim": (32, 64), "depth": 1, "heads": (2, 4), "mlp_mult": 2},
        64,
    ),
    "t2t": ("T2TViT", _T2T | {"t2t_layers": ((7, 4), (3, 2))}, 64),
    "cvt": ("CvT", {"num_classes": 10, "s1_depth": 1, "s2_depth": 1, "s3_depth": 1}, 64),
    "twins_svt": ("TwinsSVT", {"num_classes": 10, "s3_depth": 1}, 224),
    "crossformer": ("CrossFormer", {"num_classes": 10, "depth": (1, 1, 1, 1), "dim": (32, 64, 64, 64)}, 224),
    "max_vit": ("MaxViT", {"num_classes": 10, "dim_conv_stem": 32, "dim": 32, "dim_head": 16, "depth": (1, 1)}, 112),
}
"""By the module that each is in."""

_VISION: Mapping[str, tuple[str, dict[str, Any], int]] = {
    "vit_b_16": (
        "VisionTransformer",
        {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 64},
        64,
    ),
    "swin_t": (
        "SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [7, 7]},
        56,
    ),
    "swin_v2_t": (
        "SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [8, 8]},
        64,
    ),
    "maxvit_t": (
        "MaxVit",
        {
            "input_size": (64, 64), "stem_channels": 32, "block_channels": [32, 64], "block_layers": [1, 1],
            "head_dim": 16, "stochastic_depth_prob": 0.0, "partition_size": 4,
        },
        64,
    ),
}  # fmt: skip


def _vision(name: str) -> Callable[[], nn.Module]:
    """A model of torchvision."""
    made, options, _ = _VISION[name]

    def build() -> nn.Module:
        _with_torchvision()
        models = import_module("torchvision.models.swin_transformer")
        v2 = {"block": models.SwinTransformerBlockV2, "downsample_layer": models.PatchMergingV2}
        return _of("torchvision.models", made, **options, **(v2 if name == "swin_v2_t" else {}))()

    return build


# Written by hand


class C2PSA(nn.Module):
    """YOLO11's attention: convolutions around two blocks whose queries, keys and values are channels of a 1x1 one."""

    def __init__(self, channels: int = 64, blocks: int = 2) -> None:
        super().__init__()
        half = channels // 2
        self.first = nn.Conv2d(3, channels, 3, stride=4, padding=1)
        self.spread = nn.Conv2d(channels, 2 * half, 1)
        self.blocks = nn.ModuleList(_PSABlock(half, heads=2) for _ in range(blocks))
        self.join = nn.Conv2d(2 * half, channels, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """From `[b, 3, height, width]` to `[b, channels, height / 4, width / 4]`."""
        kept, found = self.spread(self.first(pictures)).chunk(2, 1)
        for block in self.blocks:
            found = block(found)
        joined: Tensor = self.join(torch.cat((kept, found), 1))
        return joined


class _PSABlock(nn.Module):
    """Attention over positions, keys half as wide as values, and two 1x1 convolutions; both added to what comes in."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, channels // heads
        self.keys = self.width // 2
        self.packed = nn.Conv2d(channels, channels + 2 * self.keys * heads, 1)
        self.place = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.out = nn.Conv2d(channels, channels, 1)
        self.mlp = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.SiLU(), nn.Conv2d(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, channels, height, width]`."""
        b, channels, height, width = x.shape
        packed = self.packed(x).view(b, self.heads, 2 * self.keys + self.width, height * width)
        q, k, v = packed.split([self.keys, self.keys, self.width], dim=2)
        map_ = ((q.transpose(-2, -1) @ k) * self.keys**-0.5).softmax(dim=-1)
        mixed = (v @ map_.transpose(-2, -1)).view(b, channels, height, width)
        x = x + self.out(mixed + self.place(v.reshape(b, channels, height, width)))
        added: Tensor = x + self.mlp(x)
        return added


def _all() -> Iterator[Model]:
    yield of_torch("YOLO, by hand", "C2PSA", C2PSA, 3, 64, 64)
    for one in TIMM:
        needs = ("timm", "torchvision")
        yield of_torch("timm", one.name, one.build, 3, one.size, one.size, unfused=one.unfused, needs=needs)
    for name, (made, options, size) in _VIT_PYTORCH.items():
        build = _of(f"vit_pytorch.{name}", made, **options)
        yield of_torch("vit-pytorch", name, build, 3, size, size, needs=("vit_pytorch", "torchvision"))
    for name, (_, _, size) in _VISION.items():
        yield of_torch("torchvision", name, _vision(name), 3, size, size, needs=("torchvision",))


MODELS = tuple(_all())
"""Of torch, exported both ways."""
