"""The tables of all that crosses between a site and its server, in ``docs/deployment.md``.

They are made of the message classes themselves: ``python -m tools.crossing`` writes them anew, and
``tests/federation/test_crossing.py`` refuses old ones.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from pipeline.config import Config
from pipeline.disk import write_bytes
from pipeline.federation.flower.letters import Letter
from pipeline.federation.messages import (
    ClientEntry,
    DescribeRequest,
    DistilRequest,
    EvaluateRequest,
    FitRequest,
    PredictRequest,
    Reply,
)
from pipeline.segmentation.networks import build_model

PAGE = Path(__file__).parent.parent / "docs" / "deployment.md"
BEGIN, END = "<!-- made by python -m tools.crossing -->\n", "<!-- end -->\n"
LEAVES = (ClientEntry, Reply)
COMES = (FitRequest, PredictRequest, DistilRequest, EvaluateRequest, DescribeRequest)
AROUND = (Letter,)  # Flower's envelope of each of these

#: All that a reply's ``metrics`` may name, each one number, a mean over a site's images or steps.
METRICS = {
    "loss": "of the steps of a round",
    "loss_sup": "its part on the server's set",
    "loss_agree": "its part on pseudo-labels",
    "loss_prox": "its part by FedProx's term",
    "gradient_norm": "of the steps",
    "drift": "change of the weights, relative",
    "agreement": "Dice of SAM and client",
    "coverage": "share of pixels with a weight",
    "from_sam": "share of pixels in conflicts that SAM won",
    "from_client": "share of pixels in conflicts that the client won",
    "weight": "of a pixel",
    "sam_inverse_temperature": "calibration on the server's set",
    "client_inverse_temperature": "calibration on the server's set",
    "sam_bias": "log-odds of foreground that SAM's label lacks, on the server's set",
    "sam_offset": "true less expected Dice of SAM's label, on the server's set",
    "client_offset": "the same of the received model's",
    "sam_empty": "chance that an empty label of SAM's is right, on the server's set",
    "client_empty": "the same of the received model's",
    "client_consistency": "Dice of the model's labels under other light, on the server's set",
    "client_kept": "share of its expected Dice that the model keeps, by the same at the site",
    "room": "factor of the loss on the site's images, less where the model promises much Dice",
    "target_dice_1": "of the targets of class 1, on the server's set; so for each class",
    "model_dice_1": "of the received model alone",
    "target_gain_1": "of the first over the second, shrunk",
    "pseudo_label_dice": "with `federate.audit`, where a site has masks",
    "fusion_loss": "on the server's set",
    "fusion_loss_seg": "on the server's set",
    "fusion_loss_kl": "on the server's set",
    "fusion_counted": "share of the server's images taught",
    "dice": "on the site's validation or test part",
    "distance": "of the site's images to all sites' mean, a 95th percentile",
}

_LINE = re.compile(r"^    (\w+): (.+?)(?: = [^#]*?)?(?:  # (.*))?$", re.MULTILINE)
_SIZES = {  # by what is in a field's type
    "dict": "about 40 a number; the names are below",
    "str": "its letters",
    "int": "up to 20",
    "float": "up to 20",
    "bool": "5",
    "Literal": "4",
    "Rates": "3 numbers, up to 20 each",
    "bytes": "those of the message in it",
    "Calibration": "10 numbers and 3 a class, up to 20 each",
}


def tables() -> str:
    """Return the tables as Markdown.

    Raises:
        ValueError: a field is of a type, or a tensor of a shape, that nothing here knows.
    """
    sizes = _tensors() | _SIZES
    rows = ["| message | field | what it is | bytes |", "|---|---|---|---|"]
    ways = {"leaves a site": LEAVES, "comes to it": COMES, "around each, over Flower": AROUND}
    for title, kinds in ways.items():
        for kind in kinds:
            for name, (written, why) in _said(kind).items():
                text = f"{written} {why}" if "Tensor" in written else written
                found = [size for what, size in sizes.items() if re.search(what, text)]
                if not found:
                    raise ValueError(f"{kind.__name__}.{name}: how many bytes has a {text}?")
                what = f"`{name}` | {why or 'the name says it'}"
                rows.append(f"| {title}: `{kind.__name__}` | {what} | {found[0]} |")
    rows += ["", "| metric | what it is |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {what} |" for name, what in METRICS.items()), ""])


def _said(kind: type) -> dict[str, tuple[str, str]]:
    """Return the type and the comment of each field, as they stand in its class."""
    found: dict[str, tuple[str, str]] = {}
    for each in reversed(kind.__mro__):
        if each.__module__ == kind.__module__:
            lines = _LINE.findall(inspect.getsource(each))
            found |= {name: (written, why) for name, written, why in lines}
    return {field.name: found[field.name] for field in fields(kind)}


def _tensors() -> dict[str, str]:
    """Return the bytes of what has tensors, with those of the default settings as an example."""
    config = Config()
    size, classes = config.data.image_size, config.data.num_classes + 1
    images = config.partition.server_images - config.partition.calibration_min
    network = sum(value.nbytes for value in build_model(config, seed=0).state_dict().values())
    logits = 2 * images * classes * size**2
    return {
        "State": f"4 a number of the network: {network:,} for the default one, uncompressed",
        r"\(N, K": f"2 N (K+1) S²: {logits:,} for {images} images of {size} px and one class",
        r"\(C\+1, C": "8 C (C+1), C being the encoder's features at a quarter of the image's side",
    }


def renewed(page: str) -> str:
    """Return the page with its tables made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + tables() + END + after


if __name__ == "__main__":
    write_bytes(PAGE, renewed(PAGE.read_text()).encode())
