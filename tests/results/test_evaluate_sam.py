"""`samfed evaluate-sam`: teachers side by side in JSON, in words and on a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipeline.sam  # noqa: F401  (before segment_anything imports torchvision)

# isort: split
import numpy as np
import pytest
import torch
from conftest import copy_cache, listing, tiny_config
from page_reader import Page, pictures

from pipeline.config import Config
from pipeline.data.images import load_labelled, resize_mask
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.federation.inputs import load_public_alone
from pipeline.federation.server import federate
from pipeline.params import with_settings
from pipeline.results.evaluate_teacher import (
    EXAMPLES,
    NETWORK,
    TEACHERS,
    TeacherEvaluation,
    evaluate_teacher,
    render_evaluation,
)
from pipeline.results.without_sam import Outlook, networks_without_sam, outlook
from pipeline.sam.device import Download
from pipeline.sam.finetune import finetune
from pipeline.sam.teacher import Teacher, load_teacher
from pipeline.segmentation.metrics import dice_score
from pipeline.segmentation.networks import build_model, predict_masks


@pytest.fixture(scope="module")
def adapted(
    tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    """A cache with an adapted teacher, and what evaluate-sam said of it."""
    config = tiny_config(tiny_images, tmp_path_factory.mktemp("evaluate") / "cache")
    prepare(config)
    finetune(config)
    return config, evaluate_teacher(config).as_json()


def test_the_configured_teacher_comes_first(adapted: tuple[Config, dict[str, Any]]) -> None:
    config, result = adapted
    assert json.loads((config.cache.root / "evaluate-sam.json").read_text()) == result
    own = {name: value for name, value in result.items() if name != "teachers"}
    assert list(result["teachers"]) == list(TEACHERS)
    assert list(own)[-2:] == ["network", "outlook"]
    del own["network"], own["outlook"]
    assert own == result["teachers"]["adapted"]
    assert (result["variant"], result["prompt"]) == ("vit_t", "none")
    partition = load_partition(config.cache.root / "partition.json")
    items = list(load_labelled(config, partition, partition.server.calibration))
    teacher, size = load_teacher(config, partition), config.data.image_size
    masks = [teacher.label([item.image], size).masks[0] for item in items]
    dice = [
        dice_score(mask, resize_mask(item.mask, size), num_classes=1)
        for mask, item in zip(masks, items, strict=True)
    ]
    assert result["dice"] == pytest.approx(np.mean(dice))
    assert result["empty"] == np.mean([not mask.any() for mask in masks])
    assert sum(result["reliability"]["pixels"]) == len(items) * size * size


def test_zero_shot_beside_it(adapted: tuple[Config, dict[str, Any]]) -> None:
    _, result = adapted
    points = result["teachers"]["points"]
    assert points["prompt"] == "points:3"
    assert points["n"] == result["n"]
    assert {"dice", "dice_ci95", "iou", "hd95", "assd", "ece", "empty"} <= set(points)
    assert points["dice"] != result["dice"]


def test_the_page(adapted: tuple[Config, dict[str, Any]]) -> None:
    config, result = adapted
    html = (config.cache.root / "evaluate-sam.html").read_text()
    reader = Page(html)
    assert reader.open == []
    references = [v for name, v in reader.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:image/png;base64,", "#image")) for value in references)
    heading, *rows = reader.cells(0)
    assert heading == (
        ["Labels of", "Dice", "IoU", "HD95, px", "ASSD, px", "Calibration error", "Empty masks"]
    )
    low, high = result["dice_ci95"]
    assert [row[0] for row in rows] == [*TEACHERS, NETWORK]
    assert rows[0][1] == f"{result['dice']:.3f} {low:.3f} to {high:.3f}"
    assert rows[0][5] == f"{result['ece']:.3f}"
    examples = min(EXAMPLES, result["n"])
    # the figure; image, truth, two teachers and the network
    assert len(pictures(html)) == 1 + examples * 5
    assert result["outlook"]["text"] in html
    assert "says nothing of the official" in " ".join(" ".join(reader.texts).split())


def test_the_same_bytes_again(adapted: tuple[Config, dict[str, Any]]) -> None:
    config, result = adapted
    path = config.cache.root / "evaluate-sam.html"
    before = path.read_bytes()
    again = evaluate_teacher(config)
    assert again.as_json() == result
    assert path.read_bytes() == before
    lines = again.text().splitlines()
    names = ["labels of", *TEACHERS, NETWORK, result["outlook"]["text"], str(path)]
    assert all(line.startswith(name) for line, name in zip(lines, names, strict=True))
    assert lines[1].split()[1] == f"{result['dice']:.3f}"


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1, 1, 1, 1]), (8, [4])])
def test_batches_and_threads_are_those_of_stage_one(
    adapted: tuple[Config, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
    batches: list[int],
) -> None:
    """The same result but for kernels' rounding."""
    config, expected = adapted  # batches of 3 and 1
    run = config.precompute.model_copy(update={"batch_size": batch_size, "threads": 1})
    begin, calls = Teacher.begin, []

    def record(self: Teacher, images: Sequence[Any], size: int) -> Download:
        calls.append((len(images), torch.get_num_threads()))
        return begin(self, images, size)

    monkeypatch.setattr(Teacher, "begin", record)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = evaluate_teacher(config.model_copy(update={"precompute": run})).as_json()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert calls == [(count, 1) for count in batches * 2]  # adapted, points
    for name in ("adapted", "points"):
        old, new = expected["teachers"][name], found["teachers"][name]
        for key in ("dice", "iou", "hd95", "ece", "empty"):
            assert new[key] == pytest.approx(old[key], rel=1e-3, abs=1e-4), (name, key)


def test_memory_that_does_not_suffice_for_a_batch(
    adapted: tuple[Config, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config, expected = adapted
    begin = Teacher.begin

    def lack(self: Teacher, images: Sequence[Any], size: int) -> Download:
        if len(images) > 1:
            raise MemoryError
        return begin(self, images, size)

    monkeypatch.setattr(Teacher, "begin", lack)
    found = evaluate_teacher(config).as_json()
    assert "going on with batches of 1 (precompute.batch_size: 3)" in caplog.text
    assert found["dice"] == pytest.approx(expected["dice"], rel=1e-3, abs=1e-4)


def test_a_prompted_teacher(adapted: tuple[Config, dict[str, Any]], tmp_path: Path) -> None:
    config = copy_cache(adapted[0], tmp_path, ("partition.json", "images"))
    config = with_settings(config, "test", sam={"prompt": "points"})
    finetune(config)
    result = evaluate_teacher(config)
    found = result.as_json()
    assert found["prompt"] == "points:3"
    assert found["dice"] == adapted[1]["teachers"]["points"]["dice"]
    missing = "nothing was adapted, since sam.prompt is points"
    assert found["teachers"]["adapted"] == {"missing": missing}
    assert result.text().splitlines()[1].split() == ["adapted", "-", *missing.split()]


def test_the_network_is_what_rounds_start_from(
    adapted: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    """The first model is in the cache for them, and its own test of the same images agrees."""
    config, result = adapted
    starts = listing(config.cache.root / "starts")
    assert len(starts) == 1
    config = copy_cache(config, tmp_path, ("partition.json", "images", "starts"))
    run = federate(with_settings(config, "test", federate={"method": "start"}))
    assert listing(config.cache.root / "starts") == starts
    model = build_model(config, seed=config.seed)
    model.load_state_dict(run.load_model())
    assert result["network"]["encoder"] == config.model.encoder
    partition = load_partition(config.cache.root / "partition.json")
    public = load_public_alone(config, partition)
    truth = public.calibration.truth
    assert truth is not None
    masks = predict_masks(model, public.calibration.images).numpy()
    dice = [
        dice_score(mask, true, num_classes=1)
        for mask, true in zip(masks, truth.numpy(), strict=True)
    ]
    assert result["network"]["dice"] == pytest.approx(np.mean(dice))


def test_with_out_nothing_is_written_to_the_cache(
    adapted: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config = copy_cache(adapted[0], tmp_path / "cache", ("partition.json", "images", "teacher"))
    before = listing(config.cache.root)
    assert evaluate_teacher(config, out=tmp_path / "out").as_json() == adapted[1]
    assert listing(config.cache.root) == before


def test_of_several_networks_the_best_one_counts(
    adapted: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config = copy_cache(adapted[0], tmp_path, ("partition.json", "images", "teacher", "starts"))
    own = config.model.model_dump(exclude={"clients"})
    networks = [own, own | {"decoder_channels": [4, 4, 4]}, own]
    config = with_settings(config, "test", model={"clients": networks})
    partition = load_partition(config.cache.root / "partition.json")
    assert len(networks_without_sam(config, partition)) == 2
    found = evaluate_teacher(config)
    assert found.network["dice"] >= adapted[1]["network"]["dice"]
    assert found.network["best_of"] == 2


def measured(dice: float, **classes: float) -> dict[str, Any]:
    """What matters to the outlook of a teacher or a network."""
    named = {name: {"dice": value} for name, value in (classes or {"foreground": dice}).items()}
    return {
        "dice": dice,
        "classes": named,
        "architecture": "unet",
        "encoder": "e",
        "steps": 9,
        "best_of": 1,
        "empty": 0.0,
    }


@pytest.mark.parametrize(
    ("sam", "network", "groups", "difference", "kind"),
    [
        ([0.9, 0.7], [0.5, 0.5], "ab", (0.4 + 0.2) / 4, "likely"),
        ([0.9, 0.7], [0.5, 0.5], "aa", 0.3 / 3, "likely"),  # a group counts as one
        ([0.55, 0.55], [0.5, 0.5], "aa", 0.05 / 3, "open"),
        ([0.4, 0.4], [0.5, 0.5], "ab", -0.2 / 4, "open"),
        ([0.0, 0.0], [0.5, 0.5], "ab", -1.0 / 4, "unlikely"),
    ],
)
def test_the_outlook_by_hand(
    sam: list[float], network: list[float], groups: str, difference: float, kind: str
) -> None:
    summaries = measured(sum(sam) / 2), measured(sum(network) / 2)
    found = outlook(*summaries, (sam, network), groups)
    assert found.difference == pytest.approx(difference)
    assert found.kind == kind
    assert f"Dice {sum(sam) / 2:.3f}. unet on e, trained on the same images" in found.text
    assert "it, has 0.500. The mean difference over groups, with two more groups" in found.text


def test_the_outlook_names_classes_in_which_sam_is_worse() -> None:
    sam, network = measured(0.6, rv=0.9, lv=0.31), measured(0.5, rv=0.5, lv=0.48)
    found = outlook(sam, network, ([0.6], [0.5]), "a")
    assert "SAM is worse at lv 0.31 for 0.48." in found.text


@pytest.mark.parametrize(("steps", "empty"), [(0, 0.5), (10, 1.0)])
def test_a_network_that_learnt_nothing_is_no_rival(steps: int, empty: float) -> None:
    network = measured(0.0) | {"steps": steps, "empty": empty}
    found = outlook(measured(0.9), network, ([0.9] * 4, [0.0] * 4), "abcd")
    assert found.kind == "open"
    assert "learnt nothing" in found.text


def test_labels_that_are_all_empty_are_not_likely_to_help() -> None:
    """With one group and a network of 0.25 the difference alone would leave it open."""
    found = outlook(measured(0.0) | {"empty": 1.0}, measured(0.25), ([0.0], [0.25]), "a")
    assert found.difference > -0.1
    assert found.kind == "unlikely"
    assert "All of its masks are empty." in found.text


def test_the_outlook_says_that_it_chose_among_networks() -> None:
    found = outlook(measured(0.9), measured(0.5) | {"best_of": 3}, ([0.9], [0.5]), "a")
    assert "unet on e, the best of 3 networks, trained" in found.text


def test_a_class_that_nobody_has_says_nothing() -> None:
    """Without truth and labels a class has no Dice (found with two classes, one of them absent)."""
    sam, network = measured(0.6, rv=0.9, lv=0.0), measured(0.5, rv=0.5, lv=0.5)
    for one, other in ((sam, network), (network, sam)):
        one["classes"]["lv"]["dice"] = None
        found = outlook(one, other, ([0.6], [0.5]), "a")
        assert "lv" not in found.text


def test_the_outlook_shows_the_number_that_decides_it() -> None:
    """Images may say the opposite of groups where one group has most of them."""
    dice = [0.1] * 8 + [0.9] * 3, [0.5] * 11
    found = outlook(measured(0.3), measured(0.5), dice, "aaaaaaaabcd")
    assert found.kind == "likely"
    assert f"say 0, is {(-0.4 + 3 * 0.4) / 6:+.3f}." in found.text


def summary(dice: float, **changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {"n": 1, "dice": dice, "iou": dice, "hd95": 3.0, "assd": 1.0}
    summary |= {"ece": 0.125, "empty": 0.5, "dice_ci95": [0.25, 0.75]}
    bins = {"pixels": [0, 4], "confidence": [None, 0.75], "accuracy": [None, 1.0]}
    return summary | {"reliability": bins} | changes


def test_the_page_by_hand() -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 1
    image = np.full((16, 16, 3), 90, np.uint8)
    example = ("<b>&x", image, {"truth": mask, NETWORK: mask, "points": mask * 0})
    teachers = {"adapted": {"missing": "why <not>"}, "points": summary(0.5)}
    network = summary(0.75)
    view = Outlook("open", 0.0, "whether <SAM> helps is open")
    result = TeacherEvaluation("points", teachers, network, view, Path("page.html"))
    html = render_evaluation(result, [example], variant="vit_b")
    reader = Page(html)
    assert "&lt;b&gt;&amp;x</td>" in html
    rows = reader.cells(0)
    assert rows[1][1] == "not measured: why <not>"
    assert rows[2][1:] == ["0.500 0.250 to 0.750", "0.500", "3.0", "1.0", "0.125", "50 %"]
    assert rows[3][1:3] == ["0.750 0.250 to 0.750", "0.750"]
    assert "<p>Whether &lt;SAM&gt; helps is open.</p>" in html
    assert "says nothing of the official" not in html  # that is for vit_t
    overlay = pictures(html)[-2]
    colours = {colour for _, colour in overlay.getcolors() or []}
    assert colours == {(0, 0, 0, 0), (255, 255, 255, 255)}  # an empty mask, the truth's outline
