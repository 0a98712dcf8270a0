"""MobileSAM's image encoder: TinyViT-5M (Wu et al., 2022) with the neck of segment-anything.

Zhang et al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications", 2023,
distilled it from ViT-H. The blocks are timm's; the last stage keeps stride 16 where TinyViT, a
classifier, goes to 32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from segment_anything.modeling.common import LayerNorm2d
from timm.models.tiny_vit import TinyVit
from torch import Tensor, nn

_SIZES = {
    "embed_dims": (64, 128, 160, 320),
    "depths": (2, 2, 6, 2),
    "num_heads": (2, 4, 5, 10),
    "window_sizes": (7, 7, 14, 7),
}

#: MobileSAM's names as patterns, and ours; its classifier, which it never uses, has none.
_NAMES = (
    (r"^image_encoder\.(norm_head|head)\..*", ""),
    (r"^image_encoder\.patch_embed\.seq\.0\.", "image_encoder.patch_embed.conv1."),
    (r"^image_encoder\.patch_embed\.seq\.2\.", "image_encoder.patch_embed.conv2."),
    (r"^image_encoder\.layers\.0\.downsample\.", "image_encoder.stages.1.downsample."),
    (r"^image_encoder\.layers\.1\.downsample\.", "image_encoder.stages.2.downsample."),
    (r"^image_encoder\.layers\.2\.downsample\.", "image_encoder.stages.3.downsample."),
    (r"^image_encoder\.layers\.", "image_encoder.stages."),
    (r"^(image_encoder\..*)\.c\.weight$", r"\1.conv.weight"),
)


class TinyVitEncoder(nn.Module):
    """TinyViT-5M at stride 16, and a neck to ``out_channels``.

    Batch normalisation always uses the pretrained statistics: few images would spoil them, and an
    adapter does not hold them.
    """

    def __init__(self, *, img_size: int, out_channels: int) -> None:
        super().__init__()
        self.img_size = img_size
        body = TinyVit(num_classes=0, drop_path_rate=0.0, **_SIZES)
        self.patch_embed, self.stages = body.patch_embed, body.stages
        self.stages[-1].downsample.conv2.conv.stride = (1, 1)
        width = _SIZES["embed_dims"][-1]
        self.neck = nn.Sequential(
            nn.Conv2d(width, out_channels, kernel_size=1, bias=False),
            LayerNorm2d(out_channels),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(out_channels),
        )
        # depthwise convolutions run about twice as fast with channels last
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> TinyVitEncoder:
        """Set the mode of all but batch normalisation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Encode ``x`` (B, 3, S, S) float, normalised, into (B, out_channels, S/16, S/16)."""
        features = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        out: Tensor = self.neck(self.stages(features))
        return out


def from_mobile_sam(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint of MobileSAM (``mobile_sam.pt``) under the names that are used here."""
    found = {}
    for name, value in state.items():
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        if name:
            found[name] = value
    return found
