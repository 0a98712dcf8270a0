"""Public data sets as a table: where each keeps its images and masks, and what is known of it.

A pattern is matched, without regard to case, with the end of a file's path below the source, whose
own name comes first (``Kvasir-SEG/images/a.jpg``). Its named groups fill the templates of ids,
sites and groups.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

UNKNOWN_LICENCE = "see the publisher"
_PICTURE = r"\.(?:png|jpe?g|tiff?|bmp|gif)"
_VOLUME = r"\.nii(?:\.gz)?"

# Groups of a path's match, and the file, from which an image's site or group is told.
Rule = Callable[[Mapping[str, str], Path], str]


@dataclass(frozen=True)
class Layout:
    """Patterns of a data set's images and masks; both give the same id to what belongs together.

    Attributes:
        parts: masks that an image has; several are merged to their union. None is any number.
    """

    images: str
    masks: str
    image_id: str = "{id}"
    parts: int | None = 1


@dataclass(frozen=True)
class Metadata:
    """A table of the data set with a row for each image, and the columns to take from it."""

    file: str
    image_id: str
    group: str
    site: str


@dataclass(frozen=True)
class Kind:
    """A public data set.

    Attributes:
        sign: what the path of one of its images has and those of other data sets have not.
        site, group: a template, or a rule; an empty group makes each image its own.
        others: pattern of files that belong to the data set and are not used.
        volumes: whether the files are NIfTI volumes, to be cut into slices.
        values: what masks hold for class 1, 2, ...; for one class anything but zero.
    """

    title: str
    sign: str
    layouts: tuple[Layout, ...]
    site: str | Rule
    citation: str
    address: str
    licence: str = UNKNOWN_LICENCE
    group: str | Rule = ""
    others: str = r"(?!)"
    volumes: bool = False
    values: tuple[int, ...] = (1,)
    metadata: Metadata | None = None

    @property
    def classes(self) -> int:
        """The number of classes beside background."""
        return len(self.values)


def pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern of the table so that ``fullmatch`` takes any folders before it."""
    return re.compile(rf"(?:.*/)?(?:{text})", re.IGNORECASE)


# First frames of CVC-ClinicDB's 29 sequences among its 612, as published with the data set.
_CLINICDB_STARTS = (
    *(1, 26, 51, 68, 79, 104, 127, 152, 178, 200, 206, 228, 253, 278, 298),
    *(318, 343, 364, 384, 409, 429, 448, 467, 479, 504, 529, 547, 572, 592),
)
CLINICDB_FRAMES = 612


def clinicdb_sequence(frame: int) -> int:
    """Return the sequence (1..29) of a frame (1..612) of CVC-ClinicDB.

    Raises:
        ValueError: there is no such frame.
    """
    if not 1 <= frame <= CLINICDB_FRAMES:
        raise ValueError(f"CVC-ClinicDB has frames 1..{CLINICDB_FRAMES}, not {frame}")
    return bisect_right(_CLINICDB_STARTS, frame)


def _clinicdb_group(found: Mapping[str, str], _: Path) -> str:
    return f"seq{clinicdb_sequence(int(found['id'])):02d}"


def _pranet_group(found: Mapping[str, str], path: Path) -> str:
    return _clinicdb_group(found, path) if found["set"].lower() == "cvc-clinicdb" else ""


def _acdc_site(_: Mapping[str, str], path: Path) -> str:
    """Return the patient's pathology from ``Info.cfg`` beside the volume, where it is."""
    info = path.parent / "Info.cfg"
    text = info.read_text(errors="replace") if info.is_file() else ""
    found = re.search(r"^Group:\s*([A-Za-z]+)", text, re.MULTILINE)
    return found[1].lower() if found else "acdc"


def _pairs(images: str, masks: str, name: str = r"\d+") -> tuple[Layout, ...]:
    """Return a layout of two folders with the same names in them."""
    return (Layout(f"{images}(?P<id>{name}){_PICTURE}", f"{masks}(?P<id>{name}){_PICTURE}"),)


_ISIC = (Layout(r"(?P<id>ISIC_\d{7})\.jpe?g", r"(?P<id>ISIC_\d{7})_segmentation\.png"),)
_ISIC_OTHERS = r"ISIC_\d{7}_(?:superpixels|attribute_\w+)\.png"
_ISIC_ADDRESS = "https://challenge.isic-archive.com/data/"
_PRANET_ADDRESS = "https://github.com/DengPingFan/PraNet"  # links to a shared drive

KINDS: dict[str, Kind] = {
    "isic2017": Kind(
        title="ISIC 2017, task 1: skin lesions",
        sign=r"ISIC-?_?2017",
        layouts=_ISIC,
        site="isic2017",
        others=_ISIC_OTHERS,
        citation="Codella et al., Skin Lesion Analysis Toward Melanoma Detection: A Challenge at "
        "ISBI 2017, arXiv 1710.05006",
        address=_ISIC_ADDRESS,
    ),
    "isic2018": Kind(
        title="ISIC 2018, task 1: skin lesions",
        sign=r"ISIC-?_?2018",
        layouts=_ISIC,
        site="isic2018",
        others=_ISIC_OTHERS,
        citation="Codella et al., Skin Lesion Analysis Toward Melanoma Detection 2018, "
        "arXiv 1902.03368",
        address=_ISIC_ADDRESS,
    ),
    "ham10000": Kind(
        title="HAM10000 with lesion masks",
        sign=r"HAM10000",
        layouts=_ISIC,
        site="ham10000",
        metadata=Metadata(
            file=r"HAM10000_metadata(?:\.csv|\.tab|\.txt)?",
            image_id="image_id",
            group="lesion_id",
            site="dataset",
        ),
        citation="Tschandl, Rosendahl, Kittler, The HAM10000 dataset, Scientific Data 5, 180161, "
        "2018",
        address="https://doi.org/10.7910/DVN/DBW86T",
    ),
    "ph2": Kind(
        title="PH2: skin lesions",
        sign=r"IMD\d{3}_Dermoscopic_Image/",
        layouts=(
            Layout(
                r"IMD\d{3}_Dermoscopic_Image/(?P<id>IMD\d{3})\.bmp",
                r"IMD\d{3}_lesion/(?P<id>IMD\d{3})_lesion\.bmp",
            ),
        ),
        site="ph2",
        others=r"IMD\d{3}_roi/.*\.bmp",
        citation="Mendonça et al., PH2: a dermoscopic image database for research and "
        "benchmarking, EMBC 2013",
        address="https://www.fc.up.pt/addi/ph2%20database.html",
    ),
    "pranet-test": Kind(
        title="PraNet's TestDataset: polyps of five data sets",
        sign=r"TestDataset/[^/]+/images/",
        layouts=(
            Layout(
                rf"(?P<set>[^/]+)/images/(?P<id>[^/]+){_PICTURE}",
                rf"(?P<set>[^/]+)/masks/(?P<id>[^/]+){_PICTURE}",
                image_id="{set}_{id}",
            ),
        ),
        site="{set}",
        group=_pranet_group,
        citation="Fan et al., PraNet: Parallel Reverse Attention Network for Polyp Segmentation, "
        "MICCAI 2020",
        address=_PRANET_ADDRESS,
    ),
    "kvasir-seg": Kind(
        title="Kvasir-SEG: polyps",
        sign=r"Kvasir-?_?SEG|/c[jk][a-z0-9]{23}\.jpg",
        layouts=_pairs("images/", "masks/", r"[^/]+"),
        site="kvasir_seg",
        citation="Jha et al., Kvasir-SEG: A Segmented Polyp Dataset, MMM 2020, arXiv 1911.07069",
        address="https://datasets.simula.no/downloads/kvasir-seg.zip",
    ),
    "endotect": Kind(
        title="EndoTect 2020, segmentation: polyps",
        sign=r"EndoTect",
        layouts=_pairs("images/", "masks/", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        site="endotect",
        citation="Hicks et al., The EndoTect 2020 Challenge, ICPR Workshops 2021",
        address="https://osf.io/mh9sj",
    ),
    "cvc-clinicdb": Kind(
        title="CVC-ClinicDB: polyps of 29 sequences",
        sign=r"CVC-?_?(?:ClinicDB|612)",
        layouts=_pairs("(?:Original|bbdd|images)/", "(?:Ground[ _]?Truth|gtpolyp|masks)/"),
        site="cvc_clinicdb",
        group=_clinicdb_group,
        others=rf"gt(?:lumen|specular|void)/\d+{_PICTURE}",
        citation="Bernal et al., WM-DOVA maps for accurate polyp highlighting in colonoscopy, "
        "Computerized Medical Imaging and Graphics 43, 2015",
        address="https://polyp.grand-challenge.org/CVCClinicDB/",
        licence="research and education, not commercial; see the publisher",
    ),
    "cvc-colondb": Kind(
        title="CVC-ColonDB: polyps",
        sign=r"CVC-?_?ColonDB",
        layouts=_pairs("(?:images|CVC-ColonDB)/", "(?:masks/|CVC-ColonDB/p)"),
        site="cvc_colondb",
        others=rf"CVC-ColonDB/[sc]\d+{_PICTURE}",
        citation="Bernal, Sánchez, Vilariño, Towards automatic polyp detection with a polyp "
        "appearance model, Pattern Recognition 45 (9), 2012",
        address="http://mv.cvc.uab.es/projects/colon-qa/cvccolondb",
    ),
    "etis": Kind(
        title="ETIS-Larib Polyp DB",
        sign=r"ETIS",
        layouts=_pairs("(?:images|ETIS-LaribPolypDB)/", "(?:masks|Ground[ _]?Truth)/p?"),
        site="etis",
        citation="Silva et al., Toward embedded detection of polyps in WCE images for early "
        "diagnosis of colorectal cancer, IJCARS 9, 2014",
        address="https://polyp.grand-challenge.org/EtisLarib/",
    ),
    "cvc-300": Kind(
        title="CVC-300: polyps",
        sign=r"CVC-?_?300|CVC-?_?EndoScene",
        layouts=_pairs("(?:images|bbdd)/", "(?:masks|gtpolyp)/"),
        site="cvc_300",
        others=rf"gt(?:lumen|specular|void)/\d+{_PICTURE}",
        citation="Vázquez et al., A Benchmark for Endoluminal Scene Segmentation of Colonoscopy "
        "Images, Journal of Healthcare Engineering, 2017",
        address=_PRANET_ADDRESS,
    ),
    "busi": Kind(
        title="BUSI: breast ultrasound",
        sign=r"/(?:benign|malignant|normal) \(\d+\)\.png",
        layouts=(
            Layout(
                r"(?P<lesion>benign|malignant|normal) \((?P<id>\d+)\)\.png",
                r"(?P<lesion>benign|malignant|normal) \((?P<id>\d+)\)_mask(?:_\d+)?\.png",
                image_id="{lesion}_{id}",
                parts=None,
            ),
        ),
        site="busi",
        citation="Al-Dhabyani et al., Dataset of breast ultrasound images, Data in Brief 28, 2020",
        address="https://scholar.cu.edu.eg/Dataset_BUSI.zip",
    ),
    "montgomery": Kind(
        title="Montgomery County chest X-rays: lungs",
        sign=r"MCUCXR_\d{4}_[01]",
        layouts=(
            Layout(
                r"CXR_png/(?P<id>MCUCXR_\d{4}_[01])\.png",
                r"(?:left|right)Mask/(?P<id>MCUCXR_\d{4}_[01])\.png",
                parts=2,
            ),
        ),
        site="montgomery",
        citation="Jaeger et al., Two public chest X-ray datasets for computer-aided screening of "
        "pulmonary diseases, Quantitative Imaging in Medicine and Surgery 4 (6), 2014",
        address="https://openi.nlm.nih.gov/imgs/collections/NLM-MontgomeryCXRSet.zip",
    ),
    "jsrt": Kind(
        title="JSRT chest X-rays: lungs (Segmentation01, or SCR's left and right lungs)",
        sign=r"Segmentation01/|JPC(?:LN|NN)\d{3}",
        layouts=(
            Layout(
                rf"(?P<part>train|test)/org/(?P<id>[^/]+){_PICTURE}",
                rf"(?P<part>train|test)/label/(?P<id>[^/]+?)(?:_label)?{_PICTURE}",
                image_id="{part}_{id}",
            ),
            Layout(
                rf"(?<!lung/)(?<!heart/)(?<!clavicle/)(?P<id>JPC(?:LN|NN)\d{{3}}){_PICTURE}",
                rf"(?:left|right)[ _]lung/(?P<id>JPC(?:LN|NN)\d{{3}}){_PICTURE}",
                parts=2,
            ),
        ),
        site="jsrt",
        others=rf"(?:heart|(?:left|right)[ _]clavicle)/[^/]+{_PICTURE}",
        citation="Shiraishi et al., Development of a digital image database for chest radiographs "
        "with and without a lung nodule, AJR 174, 2000",
        address="http://imgcom.jsrt.or.jp/imgcom/wp-content/uploads/2018/11/Segmentation01.zip",
    ),
    "acdc": Kind(
        title="ACDC: cardiac MRI (1 right ventricle, 2 myocardium, 3 left ventricle)",
        sign=r"patient\d{3}_frame\d{2}\.nii",
        layouts=(
            Layout(
                rf"(?P<id>(?P<patient>patient\d{{3}})_frame\d{{2}}){_VOLUME}",
                rf"(?P<id>(?P<patient>patient\d{{3}})_frame\d{{2}})_gt{_VOLUME}",
            ),
        ),
        site=_acdc_site,
        group="{patient}",
        others=rf"patient\d{{3}}_4d{_VOLUME}",
        volumes=True,
        values=(1, 2, 3),
        citation="Bernard et al., Deep Learning Techniques for Automatic MRI Cardiac "
        "Multi-structures Segmentation and Diagnosis: Is the Problem Solved?, IEEE TMI 37, 2018",
        address="https://humanheart-project.creatis.insa-lyon.fr/database/",
        licence="CC BY-NC-SA 4.0 as mirrors state; see the publisher",
    ),
}

GENERAL = {
    "dicom": "DICOM files: series or single frames, masks as DICOM-SEG or as images beside them",
    "nifti": "NIfTI volumes, label volumes beside them",
}
