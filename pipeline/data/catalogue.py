"""Where public weights and data sets come from: addresses and digests.

A digest is confirmed where independent projects name the same one; of these the size is known too.
What has no stable address is here as well, so that ``samfed fetch`` can say where to get it and
what to do with it. Titles, licences and publishers of data sets are the importers' (``KINDS``).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.data.downloads import RemoteFile
from pipeline.data.importers.table import KINDS


@dataclass(frozen=True)
class Source:
    """Weights or a data set.

    Attributes:
        page: of the publisher.
        files: all that is needed; none if there is no stable address.
        variant: of weights, the ``sam.variant`` that reads them.
        kind: of a data set, what ``samfed import`` calls it.
        file_name: of weights that a person gets by hand.
    """

    title: str
    page: str
    licence: str
    files: tuple[RemoteFile, ...] = ()
    variant: str | None = None
    kind: str | None = None
    file_name: str | None = None


def _sam(name: str, sha256: str, size: int) -> tuple[RemoteFile, ...]:
    return (
        RemoteFile(f"https://dl.fbaipublicfiles.com/segment_anything/{name}", name, sha256, size),
    )


def _one(url: str, name: str, sha256: str, size: int | None = None) -> tuple[RemoteFile, ...]:
    return (RemoteFile(url, name, sha256, size, confirmed=size is not None),)


def _isic(name: str, sha256: str, size: int | None = None) -> RemoteFile:
    url = f"https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_{name}"
    return RemoteFile(url, f"ISIC2018_{name}", sha256, size, confirmed=size is not None)


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

_ARCHIVES = {
    "isic2018": (
        _isic(
            "Task1-2_Training_Input.zip",
            "80f98572347a2d7a376227fa9eb2e4f7459d317cb619865b8b9910c81446675f",
            11_165_358_566,
        ),
        _isic(
            "Task1_Training_GroundTruth.zip",
            "99f8b2bb3c4d6af483362010715f7e7d5d122d9f6c02cac0e0d15bef77c7604c",
        ),
        _isic(
            "Task1-2_Validation_Input.zip",
            "0ea920fcfe512d12a6e620b50b50233c059f67b10146e1479c82be58ff15a797",
        ),
        _isic(
            "Task1_Validation_GroundTruth.zip",
            "f6911e9c0a64e6d687dd3ca466ca927dd5e82145cb2163b7a1e5b37d7a716285",
        ),
    ),
    "kvasir-seg": _one(
        "https://datasets.simula.no/downloads/kvasir-seg.zip",
        "kvasir-seg.zip",
        "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7",
        46_227_172,
    ),
    "busi": _one(
        "https://scholar.cu.edu.eg/Dataset_BUSI.zip",
        "Dataset_BUSI.zip",
        "b2ce09f6063a31a73f628b6a6ee1245187cbaec225e93e563735691d68654de7",
    ),
    "montgomery": _one(
        "https://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip",
        "NLM-MontgomeryCXRSet.zip",
        "54601e952315d8f67383e9202a6e145997ade429f54f7e0af44b4e158714f424",
    ),
    "jsrt": _one(
        # offered without TLS; the digest guards its bytes
        "http://imgcom.jsrt.or.jp/imgcom/wp-content/uploads/2018/11/Segmentation01.zip",
        "Segmentation01.zip",
        "ab1f26a910bc18eae170928e9f2d98512cc4dc8949bf6cd38b98a93398714fcf",
    ),
    "acdc": _one(
        "https://humanheart-project.creatis.insa-lyon.fr/database/api/v1/collection/"
        "637218c173e9f0047faa00fb/download",
        "ACDC.zip",
        "2787e08b0d3525cbac710fc3bdf69ee7c5fd7446472e49db8bc78548802f6b5e",
    ),
}

SOURCES = WEIGHTS | {
    kind: Source(known.title, known.address, known.licence, _ARCHIVES.get(kind, ()), kind=kind)
    for kind, known in KINDS.items()
}
