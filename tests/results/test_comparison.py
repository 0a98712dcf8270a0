"""Runs side by side: means over seeds, paired differences, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.errors import ConfigError, DataError, IdentityError, StageError
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.results.compare import choose_layout, compare, compare_rows, row_of
from pipeline.results.finished import SCORES, Evaluation, FinishedRun, read_run
from pipeline.results.gallery import save_gallery
from pipeline.segmentation.metrics import ClassMetrics, Distances, ImageMetrics
from pipeline.segmentation.statistics import summarise

PARTITION = "a" * 64
# Client a has two images of patient p, client b one image of patient q.
IMAGES = (("a", "a1", "p"), ("a", "a2", "p"), ("b", "b1", "q"))
Scores = Sequence[tuple[float, float]]
FOREGROUND = {"foreground": {"n": 3, "dice": 0.5}}
TOLERANCE = {"px": 2.0, "mm": 2.0}


def run(
    name: str,
    scores: Scores,
    *,
    method: str = "sam_fed",
    seed: int = 0,
    classes: Any = FOREGROUND,
    **sections: Any,
) -> FinishedRun:
    """A run in memory; ``scores`` are Dice and HD95 of ``IMAGES``, none in mm."""
    federate = {"method": method, "name": name, **sections.pop("federate", {})}
    config = tiny_config(Path("data"), Path("cache"), seed=seed, federate=federate, **sections)
    return FinishedRun(
        name=name,
        config=config,
        clients=("a", "b"),
        history=[],
        evaluation=Evaluation(
            method, seed, 2, {"pooled": {"classes": classes}}, TOLERANCE, {}, None
        ),
        partition=PARTITION,
        images=IMAGES,
        scores=eight(scores),
    )


def eight(scores: Scores) -> NDArray[np.float64]:
    """Rows of ``SCORES`` for pairs of Dice and HD95, none in mm."""
    rows = [(d, d / 2, h, h / 10, d, *3 * (np.nan,)) for d, h in scores]
    return np.array(rows, dtype=np.float64)


def dice(*values: float) -> Scores:
    return [(value, 100 * (1 - value)) for value in values]


def table(runs: Sequence[FinishedRun], **options: Any) -> dict[str, dict[str, Any]]:
    """The rows of a comparison by name."""
    rows: dict[str, list[FinishedRun]] = {}
    for each in runs:
        rows.setdefault(row_of(each.name), []).append(each)
    return {row["row"]: row for row in compare_rows(rows, **options).rows}


SAM_FED = [
    run("sam_fed-seed0", dice(0.9, 0.6, 0.6), seed=0),
    run("sam_fed-seed1", dice(0.5, 0.6, 0.4), seed=1),
]
SUPERVISED = [
    run("supervised-seed0", dice(0.5, 0.5, 0.0), method="supervised", seed=0),
    run("supervised-seed1", dice(0.3, 0.5, 0.0), method="supervised", seed=1),
]


def write(
    runs: Path,
    name: str,
    scores: Scores,
    *,
    method: str = "sam_fed",
    seed: int = 0,
    partition: str = PARTITION,
    images: Sequence[tuple[str, str, str]] = IMAGES,
    **sections: Any,
) -> Path:
    """A run's folder as `samfed federate` and `samfed evaluate` leave it."""
    config = run(name, scores, method=method, seed=seed, **sections).config
    folder = RunFolder(runs / name)
    folder.begin(config, "f" * 64, mode="auto", archive=runs.parent / "archive")
    folder.save_checkpoint(Checkpoint(1, {"w": torch.zeros(2)}, {}, partition, "f" * 64))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["client", "image_id", "group", *SCORES])
    writer.writerows([*image, *line] for image, line in zip(images, eight(scores), strict=True))
    (folder.path / "per_image.csv").write_text(out.getvalue())
    folder.append_history({"round": 1, "clients": {}, "val": {"dice": None}})
    dice = float(np.mean([score for score, _ in scores]))
    pooled = {"n": len(images), "dice": dice, "classes": FOREGROUND}
    test = {"pooled": pooled, "clients": {}, "client_mean": {}}
    metrics = Evaluation(method, seed, 1, test, TOLERANCE, {}, None).as_json()
    (folder.path / "metrics.json").write_text(json.dumps(metrics))
    save_gallery(folder.path / "gallery.safetensors", [])
    return folder.path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The four runs of the table worked by hand."""
    folder = tmp_path / "cache" / "runs"
    for each in (*SAM_FED, *SUPERVISED):
        method = each.config.federate.method
        write(
            folder, each.name, each.scores[:, [0, 2]].tolist(), method=method, seed=each.config.seed
        )
    return folder


# --------------------------------------------------------------------------- numbers


def test_a_table_by_hand() -> None:
    """By image, sam_fed has Dice 0.7, 0.6, 0.5 and supervised 0.4, 0.5, 0."""
    found = compare_rows({"sam_fed": SAM_FED, "supervised": SUPERVISED}).as_json()
    assert {key: found[key] for key in ("reference", "n", "groups", "image_size", "partition")} == {
        "reference": "sam_fed",
        "n": 3,
        "groups": 2,
        "image_size": 32,
        "partition": PARTITION,
    }
    ours, base = found["rows"]
    assert (ours["row"], ours["method"], ours["seeds"]) == ("sam_fed", "sam_fed", [0, 1])
    assert ours["runs"] == ["sam_fed-seed0", "sam_fed-seed1"]
    assert ours["difference"] is None
    assert ours["dice"] == pytest.approx(0.6)
    assert ours["hd95"] == pytest.approx(40)
    assert ours["dice_sd"] == pytest.approx(0.02**0.5)  # of 0.7 and 0.5
    expected = {"dice": (0.65 + 0.5) / 2, "hd95": (35 + 50) / 2}
    assert {key: ours["client_mean"][key] for key in expected} == pytest.approx(expected)
    for name, *values in (("a", 2, 0.65, 35), ("b", 1, 0.5, 50)):
        assert [ours["clients"][name][key] for key in ("n", "dice", "hd95")] == pytest.approx(
            values
        )
    # two groups: the percentiles are the means of the groups themselves
    assert ours["dice_ci95"] == pytest.approx([0.5, 0.65])
    assert base["dice"] == pytest.approx(0.3)
    difference = base["difference"]
    # by image -0.3, -0.1, -0.5; by group, sums -0.4 and -0.5, means -0.2 and -0.5
    assert difference["dice"] == pytest.approx(-0.3)
    assert difference["dice_ci95"] == pytest.approx([-0.5, -0.2])
    assert difference["dice_p"] == 0.5  # of totals 0.9, 0.1, -0.1, -0.9
    assert difference["hd95"] == pytest.approx(30)
    assert difference["hd95_ci95"] == pytest.approx([20, 50])
    assert difference["hd95_p"] == 0.5
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_one_run_has_the_interval_that_evaluate_gives_it() -> None:
    one = run("sam_fed", dice(0.7, 0.2, 0.4))
    unknown = Distances(*3 * (np.nan,))
    of_class = (ClassMetrics(1, 2, 2, unknown, unknown),)
    rows = [ImageMetrics(*row[:4], *row[2:5], classes=of_class) for row in one.scores.tolist()]
    expected = summarise(rows, [group for _, _, group in IMAGES], seed=0)
    found = table([one])["sam_fed"]
    for key in ("dice", "dice_ci95", "hd95", "hd95_ci95"):
        assert found[key] == pytest.approx(expected[key], abs=1e-12)
    assert (found["dice_sd"], found["hd95_sd"], found["difference"]) == (None, None, None)


def test_a_row_that_equals_the_reference() -> None:
    twin = [replace(each, name=each.name.replace("sam_fed", "twin")) for each in SAM_FED]
    found = table([*SAM_FED, *twin])
    for name in SCORES[:5]:
        keys = (name, f"{name}_ci95", f"{name}_p")
        assert [found["twin"]["difference"][key] for key in keys] == [0, [0, 0], 1]
    assert found["twin"]["difference"]["hd95_mm_p"] is None
    names = ("row", "runs", "difference")
    assert {k: v for k, v in found["twin"].items() if k not in names} == {
        k: v for k, v in found["sam_fed"].items() if k not in names
    }


def test_a_difference_changes_its_sign_with_the_reference() -> None:
    runs = [*SAM_FED, *SUPERVISED]
    there = table(runs)["supervised"]["difference"]
    back = table(runs, reference="supervised")["sam_fed"]["difference"]
    assert back["dice"] == -there["dice"]
    assert back["dice_ci95"] == pytest.approx([-bound for bound in there["dice_ci95"][::-1]])
    assert back["dice_p"] == there["dice_p"]


@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_order_of_runs_changes_nothing(data: st.DataObject) -> None:
    score = st.tuples(st.floats(0, 1), st.floats(0, 50))
    scores = st.lists(score, min_size=3, max_size=3)
    made = [
        run(f"{method}-seed{seed}", data.draw(scores), method=method, seed=seed)
        for method in ("sam_fed", "supervised")
        for seed in range(3)
    ]
    assert table(data.draw(st.permutations(made))) == table(made)


def test_the_order_of_lines_in_a_file_changes_nothing(runs: Path) -> None:
    expected = compare(runs)
    path = runs / "supervised-seed1" / "per_image.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *lines[::-1]]))
    assert compare(runs) == expected


# --------------------------------------------------------------------------- rows and references


def test_rows_come_by_method_then_name_or_as_they_are_named(runs: Path) -> None:
    for name, method in (("zero", "supervised"), ("a", "oracle"), ("a-seed-x", "sam_fed")):
        write(runs, name, dice(0.1, 0.2, 0.3), method=method)
    (runs / "notes.txt").write_text("no run")
    (runs / ".hidden").mkdir()

    def order(*names: str) -> list[str]:
        return [row["row"] for row in compare(runs, names).rows]

    assert order() == ["supervised", "zero", "a-seed-x", "sam_fed", "a"]
    assert order("zero", "sam_fed", "a") == ["zero", "sam_fed", "a"]
    assert order("sam_fed", "zero", "sam_fed-seed0") == ["sam_fed", "zero"]


def test_a_run_can_be_named_alone_or_with_its_row(runs: Path) -> None:
    def seeds(*names: str) -> list[int]:
        (row,) = compare(runs, names).rows
        found: list[int] = row["seeds"]
        return found

    assert seeds("sam_fed-seed1") == [1]
    assert seeds("sam_fed-seed1", "sam_fed-seed0") == [0, 1]
    assert seeds("sam_fed", "sam_fed-seed1") == [0, 1]


def test_a_run_without_a_number_joins_its_row(runs: Path) -> None:
    write(runs, "sam_fed", dice(0.1, 0.2, 0.3), seed=7)
    (row,) = compare(runs, ["sam_fed"]).rows
    assert row["runs"] == ["sam_fed-seed0", "sam_fed-seed1", "sam_fed"]


def test_the_reference_is_sam_fed_where_it_is_there(runs: Path) -> None:
    assert compare(runs).reference == "sam_fed"
    assert compare(runs, reference="supervised").reference == "supervised"
    alone = compare(runs, ["supervised"])
    assert alone.reference is None
    assert [row["difference"] for row in alone.rows] == [None]
    for names, there in (((), "supervised, sam_fed"), (("supervised",), "supervised")):
        with pytest.raises(ConfigError) as caught:
            compare(runs, names, reference="oracle")
        assert str(caught.value) == f"--reference oracle: no such row; found {there}"


def test_runs_that_are_not_evaluated_are_left_out_and_named(
    runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (runs / "sam_fed-seed1" / "metrics.json").unlink()
    (runs / "oracle").mkdir()
    assert [row["seeds"] for row in compare(runs).rows] == [[0, 1], [0]]
    assert caplog.messages == [
        "left out, not evaluated yet: oracle, sam_fed-seed1",
        "rows have different seeds: supervised 0, 1; sam_fed 0",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
    caplog.clear()
    compare(runs, ["sam_fed"])
    assert caplog.messages == ["left out, not evaluated yet: sam_fed-seed1"]
    for name in ("sam_fed-seed1", "oracle"):
        with pytest.raises(StageError) as early:
            compare(runs, ["supervised", name])
        assert str(early.value) == (
            f"{runs / name / 'metrics.json'}: not found; run `samfed evaluate` first"
        )


def test_the_same_seeds_are_no_warning(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    compare(runs)
    assert caplog.messages == []


def test_names_that_are_not_there(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        compare(runs, ["sam_fed", "other"])
    assert str(caught.value) == (
        f"other: no such row or run in {runs}; found sam_fed-seed0, sam_fed-seed1, "
        "supervised-seed0, supervised-seed1"
    )
    nothing = tmp_path / "none"
    with pytest.raises(StageError) as early:
        compare(nothing)
    assert str(early.value) == f"{nothing}: found no evaluated run; run `samfed evaluate` first"
    with pytest.raises(StageError, match=r"no such row or run in .*; found none$"):
        compare(nothing, ["sam_fed"])


# --------------------------------------------------------------------------- refused


def test_runs_of_one_row_with_the_same_seed(runs: Path) -> None:
    write(runs, "sam_fed", dice(0.1, 0.2, 0.3), seed=1)
    with pytest.raises(ConfigError) as caught:
        compare(runs)
    assert str(caught.value) == (
        "row sam_fed: sam_fed and sam_fed-seed1 have the same seed, 1; name one of them"
    )
    assert compare(runs, ["sam_fed-seed0", "sam_fed-seed1"]).rows[0]["seeds"] == [0, 1]


def test_a_seed_that_is_not_the_one_in_the_name(runs: Path) -> None:
    path = write(runs, "sam_fed-seed2", dice(0.1, 0.2, 0.3), seed=0)
    with pytest.raises(ConfigError) as caught:
        compare(runs)
    assert str(caught.value) == f"{path}: made with seed 0, but its name says 2; rename it"


def test_runs_of_one_row_by_different_methods(runs: Path) -> None:
    write(runs, "sam_fed-seed2", dice(0.1, 0.2, 0.3), seed=2, method="sam_only")
    with pytest.raises(ConfigError) as caught:
        compare(runs)
    assert str(caught.value) == (
        "row sam_fed: sam_fed-seed0 and sam_fed-seed2 differ in federate.method (sam_fed, "
        "sam_only); only runs that differ in their seed alone can share a row"
    )


def test_runs_of_one_row_may_differ_in_where_and_how_fast_they_were_made() -> None:
    other = run(
        "sam_fed-seed2",
        dice(0.1, 0.2, 0.3),
        seed=2,
        federate={"threads": 3},
        precompute={"batch_size": 5},
        model={"encoder_weights": "there/weights.safetensors"},
    )
    same = run("sam_fed-seed3", dice(0.1, 0.2, 0.3), seed=3, model={
        "encoder_weights": "here/weights.safetensors"
    })  # fmt: skip
    assert table([other, same])["sam_fed"]["seeds"] == [2, 3]
    own = [
        run(
            f"own-seed{seed}",
            dice(0.1, 0.2, 0.3),
            seed=seed,
            model={"clients": [{"encoder_weights": f"{folder}/weights.safetensors"}]},
            federate={"link_mbit": 50.0 + seed, "warn_drift": 3.0 + seed},
        )
        for seed, folder in enumerate(("here", "there"))
    ]
    assert table(own)["own"]["seeds"] == [0, 1]
    text = r"differ in model\.encoder_weights \(None, weights\.safetensors\), federate\.rounds \(2,"
    longer = replace(other, config=same.config.model_copy(update={
        "federate": same.config.federate.model_copy(update={"rounds": 5}), "seed": 2,
    }))  # fmt: skip
    with pytest.raises(ConfigError, match=text):
        table([SAM_FED[0], longer])


def test_agreement_matters_to_the_methods_that_weigh_alone() -> None:
    def with_ceiling(method: str) -> FinishedRun:
        made = run(f"{method}-seed2", dice(0.1, 0.2, 0.3), method=method, seed=2)
        strict = made.config.agreement.model_copy(update={"calibrate": False})
        return replace(made, config=made.config.model_copy(update={"agreement": strict}))

    assert table([*SUPERVISED, with_ceiling("supervised")])["supervised"]["seeds"] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"differ in agreement\.calibrate"):
        table([*SAM_FED, with_ceiling("sam_fed")])


def test_the_teacher_matters_to_the_methods_that_learn_from_it_alone() -> None:
    def with_teacher(method: str, **settings: Any) -> FinishedRun:
        scores = dice(0.1, 0.2, 0.3)
        return run(f"{method}-seed2", scores, method=method, seed=2, sam=settings)

    weaker = with_teacher("supervised", lora_rank=1)
    assert table([*SUPERVISED, weaker])["supervised"]["seeds"] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"differ in sam\.lora_rank"):
        table([*SAM_FED, with_teacher("sam_fed", lora_rank=1)])
    one = with_teacher("sam_only", checkpoint="here/sam.pth")
    two = replace(with_teacher("sam_only", checkpoint="there/sam.pth"), name="sam_only-seed3")
    two = replace(two, config=two.config.model_copy(update={"seed": 3}))
    assert table([one, two])["sam_only"]["seeds"] == [2, 3]


def test_runs_of_different_partitions(runs: Path) -> None:
    write(runs, "oracle", dice(0.1, 0.2, 0.3), method="oracle", partition="b" * 64)
    with pytest.raises(IdentityError) as caught:
        compare(runs)
    assert str(caught.value) == (
        "supervised-seed0 and oracle: made on different partitions, aaaaaaaaaaaa and "
        "bbbbbbbbbbbb; compare runs of one partition"
    )


@pytest.mark.parametrize(("key", "value", "was"), [("image_size", 48, 32), ("num_classes", 2, 1)])
def test_runs_of_different_sizes(runs: Path, key: str, value: int, was: int) -> None:
    write(runs, "large", dice(0.1, 0.2, 0.3), method="oracle", data={key: value})
    with pytest.raises(IdentityError) as caught:
        compare(runs, ["sam_fed", "large"])
    assert str(caught.value) == (
        f"sam_fed-seed0 and large: data.{key} is {was} and {value}; their scores cannot be compared"
    )


@pytest.mark.parametrize(
    ("images", "named"),
    [
        ((*IMAGES[:2], ("b", "b2", "q")), "b1 (client b, group q)"),
        ((*IMAGES[:2], ("b", "b1", "r")), "b1 (client b, group q)"),
        (IMAGES[:2], "b1 (client b, group q)"),
        ((*IMAGES, ("c", "c1", "s")), "c1 (client c, group s)"),
    ],
)
def test_runs_scored_on_different_images(
    runs: Path, images: Sequence[tuple[str, str, str]], named: str
) -> None:
    scores = dice(0.1, 0.2, 0.3, 0.4)[: len(images)]
    write(runs, "oracle", scores, method="oracle", images=images)
    with pytest.raises(IdentityError) as caught:
        compare(runs, ["oracle", "sam_fed"])
    assert str(caught.value) == (
        f"oracle and sam_fed-seed0: scored on different images, e.g. {named} in one of them; run "
        "`samfed evaluate` for both again"
    )


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("dice", "DICE", "'dice'"),
        ("0.6", "", "could not convert string to float: ''"),
        ("0.6", "nan", "a2 is there twice or has no score"),
        ("a2", "a1", "a1 is there twice or has no score"),
        ("0.6,0.3,40.0,4.0,0.6,nan,nan,nan\nb,b1,q,0.4", "", "could not convert"),
    ],
)
def test_scores_that_are_damaged(runs: Path, old: str, new: str, fault: str) -> None:
    path = runs / "sam_fed-seed1" / "per_image.csv"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(DataError) as caught:
        compare(runs)
    assert str(caught.value).startswith(f"{path}: not the scores of images ({fault}")
    assert str(caught.value).endswith("); run `samfed evaluate` again")


def test_scores_that_are_cut_short(runs: Path) -> None:
    path = runs / "sam_fed-seed1" / "per_image.csv"
    lines = path.read_text().splitlines()
    for kept, fault in (
        (lines[:-1], "not the images of metrics.json"),
        (lines[:1], "not the images of metrics.json"),
    ):
        path.write_text("\n".join(kept))
        with pytest.raises(DataError) as caught:
            read_run(RunFolder(path.parent))
        assert str(caught.value) == f"{path}: {fault}; run `samfed evaluate` again"
    path.unlink()
    with pytest.raises(StageError) as early:
        read_run(RunFolder(path.parent))
    assert str(early.value) == f"{path}: not found; run `samfed evaluate` first"


def test_metrics_without_a_table(runs: Path) -> None:
    path = runs / "sam_fed-seed1" / "metrics.json"
    whole = json.loads(path.read_text())
    for old, fault in ((whole | {"format": 3}, "format 3"), ({}, "format 1"), ([], "no table")):
        path.write_text(json.dumps(old))
        with pytest.raises(DataError) as early:
            compare(runs)
        expected = f"{path}: {fault}, this samfed reads format 2; run `samfed evaluate` again"
        assert str(early.value) == expected
    owner = {"splits": {"train": 1}, "masks": 1, "groups": 1, "sites": ["a"]}
    path.write_text(json.dumps(whole | {"data": {"server": owner}}))
    compare(runs)
    test = whole["test"]
    for change in (
        {"test": 1},
        {"test": {"clients": {}}},
        {"test": test | {"clients": {"a": {"n": 1, "dice": 0.5}}}},  # no dice_ci95
        {"test": test | {"pooled": test["pooled"] | {"dice_ci95": 7, "iou": [1]}}},
        {"test": test | {"pooled": test["pooled"] | {"classes": {"polyp": {"dice": "x"}}}}},
        {"test": test | {"client_mean": {"dice": "0.5"}}},
        {"tolerance": {}},
        {"data": {"server": owner | {"splits": {"tsain": 1}}}},
        {"data": {"server": owner | {"sites": 1}}},
        {"data": {"server": 1}},
        {"data": []},
        {"other": 1},
    ):
        damaged = whole | change
        path.write_text(json.dumps(damaged))
        with pytest.raises(DataError) as caught:
            compare(runs)
        assert str(caught.value).startswith(f"{path}: no method and test metrics in it (")
        assert str(caught.value).endswith("); run `samfed evaluate` again")


def test_a_run_without_its_checkpoint(runs: Path) -> None:
    shutil.rmtree(runs / "sam_fed-seed1" / "checkpoints")
    with pytest.raises(StageError) as caught:
        compare(runs)
    assert str(caught.value) == (
        f"{runs / 'sam_fed-seed1'}: no such run; run `samfed federate` first"
    )


# --------------------------------------------------------------------------- Markdown


def test_the_tables_as_markdown(runs: Path) -> None:
    assert compare(runs).text() == (
        "| method | seeds | Dice | 95 % interval | SD over seeds | mean over clients | HD95 px "
        "| 95 % interval | mean over clients | NSD 2 px "
        "| Dice points over `sam_fed` | 95 % interval | p |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        "| `supervised` | 2 | 0.300 | 0.000 to 0.450 | 0.047 | 0.225 | 70.0 | 55.0 to 100.0 | 77.5 "
        "| 0.300 | -30.0 | -50.0 to -20.0 | 0.500 |\n"
        "| `sam_fed` | 2 | 0.600 | 0.500 to 0.650 | 0.141 | 0.575 | 40.0 | 35.0 to 50.0 | 42.5 "
        "| 0.600 | – | – | – |\n"
        "\n"
        "3 test images in 2 groups, 32 px. Scores are averaged over seeds by image, then over "
        "images; intervals are bootstraps over groups, p a two-sided sign-flip test over groups, "
        "not corrected for several methods.\n"
        "\n"
        "Dice by client (images), mean over seeds:\n"
        "\n"
        "| method | a (2) | b (1) |\n"
        "|---|---|---|\n"
        "| `supervised` | 0.450 | 0.000 |\n"
        "| `sam_fed` | 0.650 | 0.500 |"
    )


def test_markdown_without_a_reference_has_no_differences() -> None:
    text = compare_rows({"supervised": SUPERVISED[:1]}).text()
    head, rule, row, _, note, *_ = text.splitlines()
    assert head.endswith("| mean over clients | NSD 2 px |")
    assert head.count("|") == rule.count("|") == row.count("|") == 11
    assert "| 1 | 0.333 | 0.000 to 0.500 | – |" in row
    assert note.endswith("; intervals are bootstraps over groups.")


def test_markdown_of_small_numbers_and_odd_names() -> None:
    base = [dice(0.5, 0.5, 0.5), dice(0.5, 0.5, 0.4998)]
    found = compare_rows({
        "sam_fed": [run("sam_fed", base[0])],
        "a|b": [run("a|b", base[1])],
    })  # fmt: skip
    found.rows[1]["difference"]["dice_p"] = 0.0004
    row = found.text().splitlines()[3]
    assert row.startswith(r"| `a\|b` | 1 | 0.500 |")
    assert row.endswith("| +0.0 | +0.0 to +0.0 | < 0.001 |")


# --------------------------------------------------------------------------- classes, CSV and LaTeX


def organs(name: str, *, seed: int, liver: float) -> FinishedRun:
    """A run of two classes, of which one has a name that LaTeX and Markdown would misread."""
    score = {"n": 3, "dice": liver, "iou": 0.5, "hd95": 4.0, "assd": 1.0, "nsd": 0.75}
    classes = {"liver|left_lobe": score, "tumour": {**dict.fromkeys(score), "n": 0}}
    data = {"num_classes": 2, "class_names": list(classes)}
    return run(name, dice(0.5, 0.5, liver), seed=seed, classes=classes, data=data)


def test_classes_are_averaged_over_seeds() -> None:
    runs = [organs("sam_fed-seed0", seed=0, liver=0.5), organs("sam_fed-seed1", seed=1, liver=0.7)]
    found = compare_rows({"sam_fed": runs})
    (row,) = found.rows
    assert row["classes"]["liver|left_lobe"]["dice"] == pytest.approx(0.6)
    assert row["classes"]["tumour"]["dice"] is None
    assert found.text().split("By class")[1].splitlines()[2:] == [
        "| method | class | images | Dice | IoU | HD95 px | ASSD px | NSD 2 px |",
        "|---|---|---|---|---|---|---|---|",
        "| `sam_fed` | liver\\|left_lobe | 3 | 0.600 | 0.500 | 4.0 | 1.0 | 0.750 |",
        "| `sam_fed` | tumour | 0 | – | – | – | – | – |",
    ]
    tables = replace(found, layout="latex").text()
    assert (
        "\nsam\\_fed & liver\\textbar{}left\\_lobe & 3 & 0.600 & 0.500 & 4.0 & 1.0 & 0.750 \\\\\n"
        in tables
    )
    other = replace(organs("b", seed=0, liver=0.5), evaluation=SAM_FED[0].evaluation)
    with pytest.raises(
        IdentityError, match=r"data\.class_names differ, liver.* and foreground; run"
    ):
        compare_rows({"sam_fed": runs, "b": [other]})


def test_distances_in_mm_are_shown_where_all_images_have_them() -> None:
    known = [replace(each, scores=each.scores.copy()) for each in SAM_FED]
    for each in known:
        each.scores[:, 5:] = each.scores[:, 2:5] / 2
    found = compare_rows({"sam_fed": known})
    head, _, row, *_ = found.text().splitlines()
    assert "| NSD 2 px | HD95 mm | ASSD mm | NSD 2 mm | Dice points" in head
    assert row.endswith("| 0.600 | 20.0 | 2.0 | 0.300 | – | – | – |")
    known[0].scores[0, 5:] = np.nan
    (row,) = compare_rows({"sam_fed": known}).rows
    assert (row["hd95_mm"], row["hd95_mm_ci95"], row["hd95"]) == (None, None, pytest.approx(40))


def test_the_table_as_latex() -> None:
    """Two rows with intervals and the paired test; every line ends where LaTeX wants it to."""
    found = replace(compare_rows({"sam_fed": SAM_FED, "a_b": SUPERVISED}), layout="latex")
    lines = found.text().splitlines()
    assert lines[1:3] == ["\\begin{tabular}{lrrrrrrrrr}", "\\toprule"]
    head, ours, base = lines[3], *lines[5:7]
    assert head.count(" & ") == ours.count(" & ") == base.count(" & ") == 9
    assert ours.startswith("sam\\_fed & 2 & 0.600 & [0.500, 0.650] & 40.0 & [35.0, 50.0] & 0.600 &")
    assert base == (
        "a\\_b & 2 & 0.300 & [0.000, 0.450] & 70.0 & [55.0, 100.0] & 0.300 "
        "& $-30.0$ & $[-50.0, -20.0]$ & $0.500$ \\\\"
    )
    assert lines[7:9] == ["\\bottomrule", "\\end{tabular}"]
    assert all(line.startswith("%") for line in lines[9:])
    assert sum(line.count("{") - line.count("}") for line in lines) == 0


def test_the_table_as_csv_says_what_json_says() -> None:
    found = replace(compare_rows({"sam_fed": SAM_FED, "supervised": SUPERVISED}), layout="csv")
    lines = list(csv.DictReader(io.StringIO(found.text())))
    parts = ["all", "client_mean", "clients", "clients", "classes"]
    assert [line["part"] for line in lines] == 2 * parts
    row, pooled = found.rows[1], lines[5]
    assert (pooled["row"], pooled["seeds"], pooled["n"]) == ("supervised", "2", "3")
    for key, expected in (
        ("dice", row["dice"]),
        ("dice_low", row["dice_ci95"][0]),
        ("hd95_sd", row["hd95_sd"]),
        ("dice_difference", row["difference"]["dice"]),
        ("dice_difference_high", row["difference"]["dice_ci95"][1]),
        ("dice_p", row["difference"]["dice_p"]),
    ):
        assert float(pooled[key]) == pytest.approx(expected, rel=1e-5)
    assert (lines[0]["dice_p"], pooled["hd95_mm"], lines[7]["name"]) == ("", "", "a")


def test_layouts_exclude_each_other() -> None:
    assert choose_layout(csv=True, latex=False) == "csv"
    with pytest.raises(ConfigError, match="--csv and --latex: give one of them"):
        choose_layout(csv=True, latex=True)
