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
from conftest import copy_cache, tiny_config
from page_reader import Page, pictures

from pipeline.config import Config
from pipeline.data.images import load_labelled, resize_mask
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.params import with_settings
from pipeline.results.evaluate_teacher import (
    EXAMPLES,
    TEACHERS,
    evaluate_teacher,
    render_evaluation,
)
from pipeline.sam.device import Download
from pipeline.sam.finetune import finetune
from pipeline.sam.teacher import Teacher, load_teacher
from pipeline.segmentation.metrics import dice_score


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
    assert own == result["teachers"]["adapted"]
    assert list(result["teachers"]) == list(TEACHERS)
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
        ["SAM", "Dice", "IoU", "HD95, px", "ASSD, px", "Calibration error", "Empty masks"]
    )
    low, high = result["dice_ci95"]
    assert [row[0] for row in rows] == list(TEACHERS)
    assert rows[0][1] == f"{result['dice']:.3f} {low:.3f} to {high:.3f}"
    assert rows[0][5] == f"{result['ece']:.3f}"
    examples = min(EXAMPLES, result["n"])
    assert len(pictures(html)) == 1 + examples * 4  # the figure; image, truth and two teachers
    assert "says nothing of the official" in " ".join(" ".join(reader.texts).split())


def test_the_same_bytes_again(adapted: tuple[Config, dict[str, Any]]) -> None:
    config, result = adapted
    path = config.cache.root / "evaluate-sam.html"
    before = path.read_bytes()
    again = evaluate_teacher(config)
    assert again.as_json() == result
    assert path.read_bytes() == before
    lines = again.text().splitlines()
    assert [line.split()[0] for line in lines] == ["teacher", *TEACHERS, str(path)]
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


def summary(dice: float, **changes: Any) -> dict[str, Any]:
    summary: dict[str, Any] = {"n": 1, "dice": dice, "iou": dice, "hd95": 3.0, "assd": 1.0}
    summary |= {"ece": 0.125, "empty": 0.5, "dice_ci95": [0.25, 0.75]}
    bins = {"pixels": [0, 4], "confidence": [None, 0.75], "accuracy": [None, 1.0]}
    return summary | {"reliability": bins} | changes


def test_the_page_by_hand() -> None:
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 4:8] = 1
    image = np.full((16, 16, 3), 90, np.uint8)
    example = ("<b>&x", image, {"truth": mask, "points": mask * 0})
    teachers = {"adapted": {"missing": "why <not>"}, "points": summary(0.5)}
    html = render_evaluation(teachers, [example], variant="vit_b", configured="points")
    reader = Page(html)
    assert "&lt;b&gt;&amp;x</td>" in html
    rows = reader.cells(0)
    assert rows[1][1] == "not measured: why <not>"
    assert rows[2][1:] == ["0.500 0.250 to 0.750", "0.500", "3.0", "1.0", "0.125", "50 %"]
    assert "says nothing of the official" not in html  # that is for vit_t
    overlay = pictures(html)[-1]
    colours = {colour for _, colour in overlay.getcolors() or []}
    assert colours == {(0, 0, 0, 0), (255, 255, 255, 255)}  # an empty mask, the truth's outline
