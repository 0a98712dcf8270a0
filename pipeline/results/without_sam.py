"""The clients' network without SAM on the calibration part: what SAM's labels have to be worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.config import Config, NetworkConfig
from pipeline.data.partition import Partition
from pipeline.federation.calibration import shrunk_mean
from pipeline.federation.inputs import load_public_alone
from pipeline.federation.pretraining import first_model
from pipeline.progress import Progress
from pipeline.runtime import resolve_device, torch_threads
from pipeline.segmentation.networks import build_model, predict_probabilities

#: A difference of Dice from which SAM is likely to help, and one from which it is not.
LIKELY, UNLIKELY = 0.02, -0.1


class Predicted(NamedTuple):
    """What a network says of the calibration images, in their order."""

    network: NetworkConfig
    truth: NDArray[np.uint8]  # (N, S, S) class indices
    masks: NDArray[np.uint8]  # (N, S, S) class indices
    probabilities: NDArray[np.float32]  # (N, S, S), of the mask's class


@dataclass(frozen=True)
class Outlook:
    """Whether SAM is likely to help, by its labels and the network's on the calibration part."""

    kind: Literal["likely", "open", "unlikely"]
    difference: float  # SAM's Dice less the network's: mean over groups, and two more that say 0
    text: str


def networks_without_sam(
    config: Config,
    partition: Partition,
    *,
    keep: bool = True,
    progress: Progress | None = None,
) -> list[Predicted]:
    """Train each kind of client network on D_p's training part, and let it label the other one.

    They are the first models of federated rounds.

    Args:
        keep: write them to the cache, where the rounds find them.
    """
    public = load_public_alone(config, partition)
    truth = public.calibration.truth
    if truth is None:
        raise ValueError("the calibration part has no truth")
    device = resolve_device(config.federate.device)
    found = []
    with torch_threads(config.federate.threads):
        for network in dict.fromkeys(config.model.clients or (config.model,)):
            model = build_model(config, seed=config.seed, network=network).to(device)
            model.load_state_dict(
                first_model(
                    config,
                    network,
                    public,
                    public_sha256=partition.server_sha256(),
                    keep=keep,
                    progress=progress,
                )
            )
            # of every class only for a batch at a time: an image has K+1 floats a pixel
            best = [
                predict_probabilities(model, part).max(dim=1)
                for part in public.calibration.images.split(32)
            ]
            masks = torch.cat([each.indices.to(torch.uint8) for each in best]).numpy()
            values = torch.cat([each.values for each in best]).numpy()
            found.append(Predicted(network, truth.numpy(), masks, values))
    return found


def outlook(
    sam: Mapping[str, Any],
    network: Mapping[str, Any],
    dice: tuple[Sequence[float], Sequence[float]],
    groups: Sequence[str],
) -> Outlook:
    """Say whether SAM is likely to help.

    Args:
        sam: what ``evaluate_teacher`` measured of it; network: the same of the network.
        dice: of each image, of SAM's label and of the network's. groups: of each image.
    """
    difference = shrunk_mean(torch.tensor(dice[0]) - torch.tensor(dice[1]), groups)
    best_of = network["best_of"]
    choice = f", the best of {best_of} networks," if best_of > 1 else ","
    numbers = (
        f"On the calibration part ({_count(len(groups), 'image')}, "
        f"{_count(len(set(groups)), 'group')}) its labels have Dice {sam['dice']:.3f}. "
        f"{network['architecture']} on {network['encoder']}{choice} trained on the same images "
        f"without SAM as rounds start from it, has {network['dice']:.3f}. The mean difference over "
        f"groups, with two more groups that say 0, is {difference:+.3f}."
    )
    worse = []
    for name, own in sam["classes"].items():
        ours, theirs = own["dice"], network["classes"][name]["dice"]
        # a class that neither truth nor labels have has no Dice
        if None not in (ours, theirs) and ours - theirs < UNLIKELY:
            worse.append(f"{name} {ours:.2f} for {theirs:.2f}")
    if worse and len(sam["classes"]) > 1:
        numbers += f" SAM is worse at {', '.join(worse)}."
    if network["steps"] == 0 or network["empty"] == 1:
        why = "its masks are all empty" if network["steps"] else "federate.pretrain_steps is 0"
        text = f"Whether SAM helps is open: the network to compare with learnt nothing ({why})."
        return Outlook("open", difference, text)
    if difference > LIKELY:
        return Outlook("likely", difference, f"SAM is likely to help. {numbers}")
    if difference < UNLIKELY or sam["empty"] == 1:
        found = " All of its masks are empty." if sam["empty"] == 1 else ""
        advice = (
            " Its labels by themselves are likely to harm; more sam.epochs, another sam.variant or "
            "more labelled images may mend it."
        )
        text = f"SAM is not likely to help. {numbers}{found}{advice}"
        return Outlook("unlikely", difference, text)
    text = (
        f"Whether SAM helps is open. {numbers} SAM may help at hospitals whose images are unlike "
        "the server's."
    )
    return Outlook("open", difference, text)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
