"""Tiny files laid out as each public data set is published, and what an import makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 12, 16


def picture(path: Path) -> None:
    """Write a colour image."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[..., 0] = np.arange(WIDTH) * 10
    Image.fromarray(pixels).save(path)


def mask(path: Path, *, columns: slice = slice(8, 16)) -> None:
    """Write a mask of 0 and 255, with an edge where JPEG has one between its blocks."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[:, columns] = 255
    Image.fromarray(pixels).save(path)


def left(path: Path) -> None:
    """Write the mask of the left half of something."""
    mask(path, columns=slice(2, 4))


def right(path: Path) -> None:
    """Write the mask of the right half of something."""
    mask(path, columns=slice(8, 12))


def text(path: Path) -> None:
    """Write a text that has no meaning here."""
    path.write_text("read me\n")


def volume(path: Path) -> None:
    """Write a NIfTI volume of 3 slices, 10 mm apart, with pixels of 1.5 mm."""
    write_nifti(path, np.arange(3 * HEIGHT * WIDTH, dtype=np.int16).reshape(3, HEIGHT, WIDTH))


def labels(path: Path) -> None:
    """Write its labels: 1, 2, 3 in the middle slice alone."""
    values = np.zeros((3, HEIGHT, WIDTH), np.uint8)
    values[1, :, 1:4] = [1, 2, 3]
    write_nifti(path, values)


def write_nifti(
    path: Path, values: np.ndarray[Any, Any], spacing: tuple[float, ...] = (1.5, 1.5, 10.0)
) -> None:
    """Write values (Z, Y, X) with a spacing of x, y, z and the axes of LPS."""
    import SimpleITK as sitk  # noqa: N813

    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(path))


def info(group: str) -> Callable[[Path], None]:
    """Return a writer of ACDC's ``Info.cfg``."""
    return lambda path: _write(path, f"ED: 1\nES: 12\nGroup: {group}\nHeight: 180.0\n")


def _write(path: Path, content: str) -> None:
    path.write_text(content)


def metadata(path: Path) -> None:
    """Write HAM10000's table."""
    rows = ["lesion_id,image_id,dx,dataset"]
    rows += [f"HAM_{n // 2:07d},ISIC_{24306 + n:07d},bkl,vidir_modern" for n in range(3)]
    path.write_text("\n".join(rows) + "\n")


class Original(NamedTuple):
    """A data set as it is published, and the site, group and foreground columns of its images."""

    files: dict[str, Callable[[Path], None]]
    rows: dict[str, tuple[str, str]]
    foreground: Mapping[str, int] = MappingProxyType({})  # columns of 16; 8 unless it is said


def isic(top: str, truth: str) -> dict[str, Callable[[Path], None]]:
    """Return two images of an ISIC challenge and what lies beside them."""
    return {
        f"{top}/ISIC_0000001.jpg": picture,
        f"{top}/ISIC_0000002.jpg": picture,
        f"{top}/ISIC_0000001_superpixels.png": picture,
        f"{top}/ATTRIBUTION.txt": text,
        f"{truth}/ISIC_0000001_segmentation.png": mask,
        f"{truth}/ISIC_0000002_segmentation.png": mask,
    }


def pairs(images: str, masks: str, *names: str) -> dict[str, Callable[[Path], None]]:
    """Return images and masks of the same names in two folders."""
    return {f"{images}/{name}": picture for name in names} | {
        f"{masks}/{name}": mask for name in names
    }


UUIDS = ("0a1b2c3d-0000-4000-8000-00000000000a", "0a1b2c3d-0000-4000-8000-00000000000b")
ISIC_IDS = ("ISIC_0000001", "ISIC_0000002")
SLICES = [f"patient{n}_frame01_i{i:03d}" for n in ("001", "021") for i in (1, 2, 3)]

ORIGINALS = {
    "isic2017": Original(
        isic("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        dict.fromkeys(ISIC_IDS, ("isic2017", "")),
    ),
    "isic2018": Original(
        isic("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        dict.fromkeys(ISIC_IDS, ("isic2018", "")),
    ),
    "ham10000": Original(
        {
            "dataverse/HAM10000_images_part_1/ISIC_0024306.jpg": picture,
            "dataverse/HAM10000_images_part_1/ISIC_0024307.jpg": picture,
            "dataverse/HAM10000_images_part_2/ISIC_0024308.jpg": picture,
            "dataverse/HAM10000_metadata": metadata,
            **{
                f"dataverse/HAM10000_segmentations_lesion_tschandl/ISIC_{n}_segmentation.png": mask
                for n in ("0024306", "0024307", "0024308")
            },
        },
        {
            "ISIC_0024306": ("vidir_modern", "HAM_0000000"),
            "ISIC_0024307": ("vidir_modern", "HAM_0000000"),
            "ISIC_0024308": ("vidir_modern", "HAM_0000001"),
        },
    ),
    "ph2": Original(
        {
            "PH2Dataset/PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp": picture,
            "PH2Dataset/PH2 Dataset images/IMD002/IMD002_lesion/IMD002_lesion.bmp": mask,
            "PH2Dataset/PH2 Dataset images/IMD002/IMD002_roi/IMD002_R1_Label4.bmp": mask,
            "PH2Dataset/PH2_dataset.txt": text,
        },
        {"IMD002": ("ph2", "")},
    ),
    "pranet-test": Original(
        {
            **pairs("TestDataset/CVC-300/images", "TestDataset/CVC-300/masks", "149.png"),
            **pairs("TestDataset/CVC-ClinicDB/images", "TestDataset/CVC-ClinicDB/masks", "51.png"),
            **pairs("TestDataset/Kvasir/images", "TestDataset/Kvasir/masks", "cju0a.png"),
        },
        {
            "CVC-300_149": ("CVC-300", ""),
            "CVC-ClinicDB_51": ("CVC-ClinicDB", "seq03"),
            "Kvasir_cju0a": ("Kvasir", ""),
        },
    ),
    "kvasir-seg": Original(
        {
            **pairs("Kvasir-SEG/images", "Kvasir-SEG/masks", "cju0qkwl35piu0993l0dewei2.jpg"),
            "Kvasir-SEG/kavsir_bboxes.json": text,
        },
        {"cju0qkwl35piu0993l0dewei2": ("kvasir_seg", "")},
    ),
    "endotect": Original(
        pairs(
            "EndoTect_2020_Segmentation_Test_Dataset/images",
            "EndoTect_2020_Segmentation_Test_Dataset/masks",
            *(f"{each}.jpg" for each in UUIDS),
        ),
        dict.fromkeys(UUIDS, ("endotect", "")),
    ),
    "cvc-clinicdb": Original(
        pairs("CVC-ClinicDB/Original", "CVC-ClinicDB/Ground Truth", "1.tif", "26.tif", "612.tif"),
        {
            "1": ("cvc_clinicdb", "seq01"),
            "26": ("cvc_clinicdb", "seq02"),
            "612": ("cvc_clinicdb", "seq29"),
        },
    ),
    "cvc-colondb": Original(
        {
            "CVC-ColonDB/CVC-ColonDB/1.bmp": picture,
            "CVC-ColonDB/CVC-ColonDB/p1.bmp": mask,
            "CVC-ColonDB/CVC-ColonDB/s1.bmp": mask,
            "CVC-ColonDB/CVC-ColonDB/c1.bmp": mask,
        },
        {"1": ("cvc_colondb", "")},
    ),
    "etis": Original(
        {
            "ETIS-LaribPolypDB/ETIS-LaribPolypDB/1.tif": picture,
            "ETIS-LaribPolypDB/Ground Truth/p1.tif": mask,
        },
        {"1": ("etis", "")},
    ),
    "cvc-300": Original(
        {
            **pairs("CVC-300/bbdd", "CVC-300/gtpolyp", "1.bmp"),
            "CVC-300/gtlumen/1.bmp": mask,
        },
        {"1": ("cvc_300", "")},
    ),
    "busi": Original(
        {
            "Dataset_BUSI_with_GT/benign/benign (1).png": picture,
            "Dataset_BUSI_with_GT/benign/benign (1)_mask.png": mask,
            "Dataset_BUSI_with_GT/malignant/malignant (1).png": picture,
            "Dataset_BUSI_with_GT/malignant/malignant (1)_mask.png": left,
            "Dataset_BUSI_with_GT/malignant/malignant (1)_mask_1.png": right,
        },
        {"benign_1": ("busi", ""), "malignant_1": ("busi", "")},
        {"malignant_1": 6},
    ),
    "montgomery": Original(
        {
            "MontgomerySet/CXR_png/MCUCXR_0001_0.png": picture,
            "MontgomerySet/ManualMask/leftMask/MCUCXR_0001_0.png": left,
            "MontgomerySet/ManualMask/rightMask/MCUCXR_0001_0.png": right,
            "MontgomerySet/ClinicalReadings/MCUCXR_0001_0.txt": text,
        },
        {"MCUCXR_0001_0": ("montgomery", "")},
        {"MCUCXR_0001_0": 6},
    ),
    "jsrt": Original(
        {
            **pairs("Segmentation01/train/org", "Segmentation01/train/label", "0.png"),
            **pairs("Segmentation01/test/org", "Segmentation01/test/label", "0.png"),
            "Segmentation01/scr/JPCLN001.png": picture,
            "Segmentation01/scr/fold1/masks/left lung/JPCLN001.png": left,
            "Segmentation01/scr/fold1/masks/right lung/JPCLN001.png": right,
            "Segmentation01/scr/fold1/masks/heart/JPCLN001.png": mask,
        },
        dict.fromkeys(("train_0", "test_0", "JPCLN001"), ("jsrt", "")),
        {"JPCLN001": 6},
    ),
    "acdc": Original(
        {
            **{
                f"ACDC/database/training/patient{n}/{name}": write
                for n, pathology in (("001", "DCM"), ("021", "HCM"))
                for name, write in {
                    f"patient{n}_frame01.nii.gz": volume,
                    f"patient{n}_frame01_gt.nii.gz": labels,
                    f"patient{n}_4d.nii.gz": text,
                    "Info.cfg": info(pathology),
                }.items()
            },
        },
        {
            name: ("dcm", "patient001") if "001_" in name else ("hcm", "patient021")
            for name in SLICES
        },
        {name: 3 if name.endswith("i002") else 0 for name in SLICES},
    ),
}


def lay_out(kind: str, folder: Path) -> Path:
    """Write the files of ``kind`` below ``folder``; return the folder that holds all of them."""
    original = ORIGINALS[kind]
    for name, write in original.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    tops = {name.split("/")[0] for name in original.files}
    return folder / tops.pop() if len(tops) == 1 else folder
