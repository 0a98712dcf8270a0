"""Where public weights and data sets come from: addresses, digests, licences and publishers.

A digest is confirmed where independent projects name the same one. A licence is named only where
its text was found; else the publisher's page is. What has no stable address is here too, so that
``samfed fetch`` can say where to get it and what to do with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.downloads import RemoteFile

SEE_PUBLISHER = "see the publisher"


@dataclass(frozen=True)
class Source:
    """Weights or a data set.

    Attributes:
        page: of the publisher.
        files: all that is needed; none if there is no stable address.
        variant: of weights, the ``sam.variant`` that reads them.
        kind: of a data set, what ``samfed import`` calls its layout.
        file_name: of what a person gets by hand, for the command or setting that takes it.
    """

    title: str
    page: str
    licence: str = SEE_PUBLISHER
    files: tuple[RemoteFile, ...] = ()
    variant: str | None = None
    kind: str | None = None
    file_name: str = "FOLDER_OR_ARCHIVE"


def _sam(name: str, sha256: str, size: int) -> tuple[RemoteFile, ...]:
    return (
        RemoteFile(f"https://dl.fbaipublicfiles.com/segment_anything/{name}", name, sha256, size),
    )


def _one(url: str, name: str, sha256: str, size: int | None = None) -> tuple[RemoteFile, ...]:
    return (RemoteFile(url, name, sha256, size, confirmed=size is not None),)


_SAM_PAGE = "https://github.com/facebookresearch/segment-anything"

WEIGHTS = {
    "sam_vit_b": Source(
        "Segment Anything, ViT-B",
        _SAM_PAGE,
        "Apache-2.0",
        _sam(
            "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
            375_042_383,
        ),
        variant="vit_b",
    ),
    "sam_vit_l": Source(
        "Segment Anything, ViT-L",
        _SAM_PAGE,
        "Apache-2.0",
        _sam(
            "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
            1_249_524_607,
        ),
        variant="vit_l",
    ),
    "sam_vit_h": Source(
        "Segment Anything, ViT-H",
        _SAM_PAGE,
        "Apache-2.0",
        _sam(
            "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
            2_564_550_879,
        ),
        variant="vit_h",
    ),
    "mobile_sam": Source(
        "MobileSAM, TinyViT",
        "https://github.com/ChaoningZhang/MobileSAM",
        "Apache-2.0",
        _one(
            "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM/"
            "f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
            "mobile_sam.pt",
            "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
            40_728_226,
        ),
        variant="mobile_sam",
    ),
    "medsam": Source(
        "MedSAM, ViT-B",
        "https://github.com/bowang-lab/MedSAM",
        "Apache-2.0",
        variant="vit_b",
        file_name="medsam_vit_b.pth",
    ),
}

SOURCES = WEIGHTS
