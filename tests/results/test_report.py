"""The report: what a reader sees, that it stands alone, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import copy_cache
from page_reader import Page, pictures
from PIL import ImageColor

from pipeline.config import Config
from pipeline.errors import CorruptStoreError, StageError
from pipeline.federation.examples import Example, save_examples
from pipeline.federation.runs import RunFolder
from pipeline.params import parse_config
from pipeline.results.colours import DARK, GREY, LIGHT
from pipeline.results.curves import CURVES, Panel, run_curves
from pipeline.results.evaluate import evaluate
from pipeline.results.finished import Evaluation, FinishedRun, read_run
from pipeline.results.gallery import GalleryImage
from pipeline.results.pages import Key, figure_uri
from pipeline.results.report import MAX_EXAMPLES, render_report, write_report

NETWORKS = """\
data:
  image_size: 64
model:
  encoder: tu-lcnet_050
  clients:
    - {encoder: tu-resnet10t}
    - {architecture: segformer, encoder: tu-regnetx_002, encoder_depth: 5}
federate:
  clients_per_round: 2
"""


def summary(dice: float = 0.5, hd95: float = 10.0, **changes: Any) -> dict[str, Any]:
    return {
        "dice": dice,
        "iou": dice / 2,
        "hd95": hd95,
        "assd": hd95 / 2,
        "n": 12,
        "dice_ci95": [dice - 0.1, dice + 0.1],
        "hd95_ci95": [hd95 - 1, hd95 + 1],
        "nsd": dice / 4,
        "classes": {"foreground": {}},
        "groups": {"n": 12},
        **changes,
    }


def round_of(number: int, **client: Any) -> dict[str, Any]:
    return {
        "round": number,
        "unlabelled_weight": 1.0,
        "clients": {"site_a": {"images": 78, "loss": 1.25, **client}},
        "val": {"dice": 0.5, "clients": {"site_a": 0.5}},
        "warnings": [],
        "seconds": 2.0,
    }


FULL = {
    "loss_sup": 0.5,
    "loss_agree": 0.5,
    "agreement": 0.6,
    "coverage": 0.9,
    "from_sam": 0.05,
    "from_client": 0.01,
}


OWNED = {"splits": {"train": 7, "test": 3}, "groups": 5, "masks": 3, "sites": ["north", "south"]}


def run(name: str = "one", method: str = "sam_fed", **changes: Any) -> FinishedRun:
    """A run without rounds unless ``history`` is given."""
    pooled = changes.pop("pooled", summary())
    mean = {key: pooled[key] for key in ("dice", "iou", "hd95", "assd", "nsd")}
    tested = changes.pop("tested", {"site_a": summary(0.125)})
    history = changes.pop("history", [])
    took_part = {client for entry in history for client in entry["clients"]}
    params = changes.pop("params", "data: {image_size: 64}\n")
    values: dict[str, Any] = {
        "config": parse_config(yaml.safe_load(params), source="test"),
        "clients": tuple(sorted({*tested, *took_part})),
        "history": history,
        "evaluation": Evaluation(
            method,
            7,
            2,
            {"pooled": pooled, "clients": tested, "client_mean": mean},
            {"px": 2.0, "mm": 2.0},
            changes.pop("data", {"server": OWNED, **dict.fromkeys(tested, OWNED)}),
            changes.pop("teacher", None),
        ),
        "partition": "a" * 64,
        "images": (),
        "scores": np.zeros((0, 8)),
        **changes,
    }
    return FinishedRun(name, **values)


def trained(name: str = "one") -> FinishedRun:
    """A run with curves."""
    return run(name, history=[round_of(1, **FULL), round_of(2, **FULL)])


def example(size: int = 16, **changes: Any) -> Example:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[4:8, 4:8] = 1
    values: dict[str, Any] = {
        "caption": "site_a/img_1",
        "image": np.full((size, size, 3), 100, dtype=np.uint8),
        "truth": mask,
        "sam": mask.copy(),
        "prediction": mask.copy(),
        "target": np.ones((size, size), dtype=np.float32),
        **changes,
    }
    return Example(**values)


def render(*runs: FinishedRun, examples: Any = (), title: str = "T") -> str:
    """The report, but for its figures' pixels, which take most of its time."""
    empty = "data:image/png;base64,"
    with mock.patch("pipeline.results.pages.figure_uri", return_value=empty):
        return render_report(runs, examples, title=title)


# --------------------------------------------------------------------------- a run on disk


def test_report_of_a_run(shared_pipeline: Config, tmp_path: Path) -> None:
    """Only the run's folder is read: the rest of the cache is not there."""
    config = copy_cache(shared_pipeline, tmp_path, ("runs",))
    folder = RunFolder(config.cache.root / "runs" / "sam_fed")
    save_examples(folder.path / "examples.safetensors", [example(32)])
    save_examples(folder.path / "clients" / "site_a" / "examples.safetensors", [example(32)])
    report = write_report([folder])
    assert report.text() == str(folder.path / "report.html")
    assert report.as_json() == {"report": report.text()}
    html = report.path.read_text()
    page = Page(html)
    assert page.open == []
    assert len(pictures(html)) >= 5 + 2 * 5  # curves; image, truth, SAM, client and weight of two
    for curve in CURVES[:3]:
        assert f"<b>{curve.title}</b>" in html
    for shown in ("Gradient norm", "Drift, %", "MB up", "Coverage", "SAM's bias"):
        assert shown in html
    assert "http" not in html
    found = read_run(folder)
    assert found.name == "sam_fed"
    assert found.clients == ("site_a", "site_b", "site_c", "site_d")
    assert len(found.images) == len(found.scores) == found.evaluation.test["pooled"]["n"]
    before = report.path.read_bytes()
    assert write_report([folder]).path.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "fault", "command"),
    [
        ("params.yaml", "not found", "federate"),
        ("history.jsonl", "holds no round yet", "federate"),
        ("metrics.json", "not found", "evaluate"),
        ("per_image.csv", "not found", "evaluate"),
        ("sam_fed", "no example images", "federate"),
    ],
)
def test_a_run_that_is_not_whole_names_the_stage(
    shared_pipeline: Config, tmp_path: Path, file: str, fault: str, command: str
) -> None:
    folder = RunFolder(copy_cache(shared_pipeline, tmp_path, ("runs",)).cache.root / "runs/sam_fed")
    lost = [folder.path / file] if "." in file else [*folder.path.rglob("examples.safetensors")]
    for path in lost:
        path.unlink()
    with pytest.raises(StageError, match=rf"{file}: {fault}; run `samfed {command}` first$"):
        write_report([folder])


def test_settings_of_another_network_than_the_weights(
    shared_pipeline: Config, tmp_path: Path
) -> None:
    """As ``params.yaml`` has them where its end is lost."""
    config = copy_cache(shared_pipeline, tmp_path)
    path = config.cache.root / "runs/sam_fed/params.yaml"
    path.write_text(f"data: {{image_size: 32}}\ncache: {{root: {config.cache.root}}}\n")
    with pytest.raises(CorruptStoreError) as caught:
        evaluate(config, RunFolder(path.parent))
    assert str(caught.value) == (
        f"{path}: found settings of another network than that of the run's weights; run `samfed "
        "federate`, which wrote it"
    )


# --------------------------------------------------------------------------- tables


SIX = tuple(("site_a", f"i{number}", f"p{number}") for number in range(6))


def scored(name: str, *dice: float, **changes: Any) -> FinishedRun:
    """A run with these Dice of ``SIX`` images, each of its own patient; HD95 is 10 throughout."""
    rows = [(each, each / 2, 10.0, 5.0, 0.5, *3 * (np.nan,)) for each in dice]
    pooled = summary(float(np.mean(dice)), n=6)
    return run(name, pooled=pooled, images=SIX, scores=np.array(rows), **changes)


def test_headline_table() -> None:
    runs = [run("base", "supervised", pooled=summary(0.5, 20.0)), run("ours")]
    header, base, _ = Page(render(*runs)).cells(0)
    assert header == ["Run", "Dice", "IoU", "HD95, px", "ASSD, px", "NSD, 2 px", "Images"]
    assert base == [
        "base supervised, seed 7, 2 rounds, 64 px",
        *("0.500 0.400 to 0.600", "0.250", "20.0 19.0 to 21.0", "10.0", "0.125", "12"),
    ]


def bold(*runs: FinishedRun) -> list[str]:
    return re.findall(r"<strong>([^<]*)</strong>", render(*runs))


def test_the_best_value_is_bold_only_where_the_paired_test_holds() -> None:
    """Six patients of one sign: p = 2 / 2^6 = 0.031; a tie has p = 1, and so has HD95 here."""
    good, bad = scored("good", *[0.8] * 6), scored("bad", *[0.6] * 6)
    assert bold(bad, good) == ["0.800", "0.400"]
    _, first, second = Page(render(bad, good)).cells(0)
    assert first[1].endswith("p = 0.031")
    assert second[1].endswith("best")
    assert (first[3], second[3]) == ("10.0 9.0 to 11.0 best", "10.0 9.0 to 11.0 p = 1.000")
    close = scored("close", *[0.9, 0.9, 0.9, 0.5, 0.9, 0.9])  # better on the mean, not everywhere
    assert bold(good, close) == []
    assert bold(bad, good, close) == []  # the best differs from one of the two alone
    assert bold(good) == []


def test_runs_that_cannot_be_compared_have_no_test() -> None:
    """Another image size: distances are in other pixels; the page says why nothing is bold."""
    params = "data: {image_size: 256}\n"
    html = render(scored("a", *[0.8] * 6), scored("b", *[0.6] * 6, params=params))
    assert "data.image_size is 64 and 256" in html
    assert "<strong>0.800</strong>" not in html
    assert "p = 0.0" not in html


def test_every_class_has_its_line_and_its_name() -> None:
    classes = {"liver": {**summary(0.5), "n": 9}, "<tumour>": {"n": 0, **dict.fromkeys(("dice",))}}
    groups = {**summary(0.6), "n": 4, "dice_sd": 0.125}
    groups["classes"] = {name: {"n": 3, "dice": 0.375, "dice_sd": None} for name in classes}
    more = {"class_mean": summary(0.5), "groups": groups, "empty_images": 2}
    pooled = summary(0.7, classes=classes, absent_as_right={"dice": 0.875}, **more)
    params = "data: {image_size: 64, num_classes: 2, class_names: [liver, <tumour>]}\n"
    mask = np.array([[0, 1], [2, 2]], np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    html = render(run(pooled=pooled, params=params), examples=[example(truth=mask)])
    rows, patients = map(Page(html).cells, (1, 2))
    assert [(row[0], row[-1]) for row in rows[1:]] == [
        ("liver", "9"),
        ("<tumour>", "0"),
        ("Mean over classes", "–"),
    ]
    assert [(row[0], row[1], row[-1]) for row in patients[1:]] == [
        ("one Dice SD 0.125", "0.600 0.500 to 0.700", "4"),
        ("one, liver Dice SD –", "0.375", "3"),
        ("one, <tumour> Dice SD –", "0.375", "3"),
    ]
    assert rows[2][1:6] == ["–"] * 5
    assert "would be a Dice of 0.875" in " ".join(html.split())
    assert "</i>&lt;tumour&gt;</span>" in html  # the legend


def test_distances_are_in_mm_where_every_run_knows_them() -> None:
    in_mm = run("a", pooled=summary(hd95_mm=1.25, assd_mm=0.5, nsd_mm=0.75))
    header, row = Page(render(in_mm)).cells(0)
    assert header[3:6] == ["HD95, mm", "ASSD, mm", "NSD, 2 mm"]
    assert row[3:6] == ["1.2", "0.5", "0.750"]
    assert Page(render(in_mm, run("b"))).cells(0)[0][3] == "HD95, px"


def test_a_client_with_one_patient_has_no_interval_and_a_warning() -> None:
    html = render(run(tested={"one": summary(0.125, dice_ci95=None, hd95_ci95=None)}))
    assert Page(html).cells(1)[1][1] == "0.125"
    assert "so without an interval: one" in html.split('id="results"')[0]


@pytest.mark.parametrize(("dice", "warned"), [((0.2, 0.3, 0.2), True), ((0.2, 0.3, 0.26), False)])
def test_falling_validation_dice_is_a_warning(dice: tuple[float, ...], warned: bool) -> None:
    history = [round_of(number, **FULL) for number in range(1, len(dice) + 1)]
    for entry, value in zip(history, dice, strict=True):
        entry["val"]["dice"] = value
    html = render(run(history=history))
    assert ("validation Dice fell from 0.300 in round 2 to 0.200 in round 3" in html) is warned


def test_data_and_teacher() -> None:
    teacher = {
        "variant": "vit_b",
        "prompt": "none",
        "train_images": 24,
        "calibration_images": 6,
        "calibration_dice": 0.9375,
        "dice": 0.875,
        "dice_ci95": [0.5, 1.0],
        "ece": 0.0625,
        "empty": 0.25,
    }
    html = render(run("a", teacher=teacher), run("b", teacher=teacher), run("c"))
    rows = next(rows for rows in map(Page(html).cells, range(9)) if rows[0][0] == "Owner")
    assert rows[1] == ["server", "north, south", "7", "–", "3", "3", "5"]
    text = " ".join(html.split())
    assert "adapted on 24 images of the server: Dice <b>0.938</b> on 6 images" in text
    assert "calibration error 0.062, 25 % empty masks. Learnt from by a, b." in text


def pictured(rank: str = "worst", client: str = "site_a", dice: float = 0.25) -> GalleryImage:
    shown = example()
    image = (shown.image, shown.truth, shown.prediction)
    return GalleryImage(client, f"img<{rank}>", rank, dice, 12.5, *image)


def test_test_images_are_named_and_can_be_switched() -> None:
    gallery = (pictured(), pictured("best", dice=0.75))
    html = render(run("a", gallery=gallery), run("b", gallery=gallery[:1]))
    page = Page(html)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert (
        sum(
            label.startswith("Worst test image of site_a, img<worst>: Dice 0.25")
            for label in labels
        )
        == 2
    )
    assert "<b>best</b> img&lt;best&gt;<br>Dice 0.750, HD95 12.5 px" in html
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    switches = [value for name, value in page.attributes if name == "for"]
    assert switches == ["prediction1", "truth1", "prediction2", "truth2"]
    assert set(switches) <= set(ids)
    # the outline alone is white; the prediction is a tint with its outline
    prediction, truth = pictures(html)[:2]
    assert truth.getpixel((4 * 22, 4 * 22)) == (255, 255, 255, 255)
    assert truth.getpixel((6 * 22, 6 * 22)) == (0, 0, 0, 0)
    assert prediction.getpixel((6 * 22, 6 * 22)) == (0, 229, 255, 70)


def test_client_table_of_each_run() -> None:
    page = Page(render(run("a"), run("b")))
    for table in (1, 2):
        rows = page.cells(table)
        assert [row[0] for row in rows] == ["Client", "site_a", "Mean over clients", "All images"]
        assert rows[1][1:3] == ["0.125 0.025 to 0.225", "0.062"]


COSTS = {"seconds": 1.0, "bytes_up": 2_000_000, "bytes_down": 4_000_000, "drift": 0.01}


def test_table_of_clients() -> None:
    """Means over the rounds that a client took part in; the rest as in the last of these."""
    said = {
        "agreement": 0.25,
        "coverage": 0.5,
        "pseudo_label_dice": 0.75,
        "sam_bias": -1.5,
    }
    history = [
        round_of(1, **COSTS, **said),
        round_of(2, **{**COSTS, "seconds": 2.0, "drift": 0.04}, **{**said, "agreement": 0.5}),
        round_of(3),
    ]
    slow = {"images": 9, **COSTS, "seconds": 6.0, **said, "pseudo_label_dice": None}
    history[2]["clients"] = {"site_b": slow}
    html = render(run(history=history, tested={"site_a": summary(), "site_c": summary()}))
    top, head, *rows = Page(html).cells(3)
    assert top == ["Client", "Images", "Rounds of 3", "a round, on average", "in its last round"]
    assert head == [
        *("Seconds", "MB up", "MB down", "Drift, %"),
        *("Agreement", "Coverage", "Pseudo-label Dice", "SAM's bias"),
    ]
    assert rows == [
        ["site_a", "78", "2", "1.50", "2.00", "4.00", "2.50", "0.50", "0.50", "0.75", "-1.50"],
        ["site_b", "9", "1", "6.00", "2.00", "4.00", "1.00", "0.25", "0.50", "–", "-1.50"],
        ["site_c", "–", "0", *"–" * 8],
    ]
    bars = re.findall(r'class="bar" style="width:(\d+)%"', html)
    assert bars == [
        *("25", "100", "100", "100", "50", "50", "75"),
        *("100", "100", "100", "40"),
        *("25", "50"),
    ]


def test_columns_without_data_are_left_out_of_the_table_of_clients() -> None:
    top, head, row = Page(render(run(history=[round_of(1, drift=0.01)]))).cells(3)
    assert top == ["Client", "Images", "Rounds of 1", "a round, on average"]
    assert head == ["Drift, %"]
    assert row == ["site_a", "78", "1", "1.00"]


def test_what_sets_a_run_apart_is_said() -> None:
    """Partial participation, the median, and each client's network."""
    history = [round_of(1, fusion_loss_seg=1.0)]
    history[0]["server"] = {"loss_seg": 2.0}
    own = run("own", params=NETWORKS, history=history, clients=("site_a", "site_b", "site_c"))
    html = render(own)
    setting = "2 of 3 clients a round, clients’ own networks"
    assert Page(html).cells(0)[1][0].endswith(f"64 px, {setting}")
    assert f"Setting: {setting}. The server's own network: unet, tu-lcnet_050, depth 4." in html
    assert [row[0] for row in Page(html).cells(3)[2:]] == [
        "site_a unet, tu-resnet10t, depth 4",
        "site_b segformer, tu-regnetx_002, depth 5",
        "site_c unet, tu-resnet10t, depth 4",
    ]
    median = run(params="data: {image_size: 64}\nfederate: {aggregation: median}\n")
    assert "64 px, coordinate median" in render(median)
    assert "Setting" not in render(trained())


def test_warnings_are_listed_once_with_their_rounds() -> None:
    warned = run(history=[round_of(i) for i in (1, 2, 3)])
    for number in (0, 2):
        warned.history[number]["warnings"] = ["site_a: low agreement"]
    html = render(warned)
    assert html.count("site_a: low agreement") == 1
    assert "(rounds 1, 3)" in html
    assert "None of the runs reported a warning." in render(run())


# --------------------------------------------------------------------------- the page


def test_all_text_is_escaped() -> None:
    evil = "<b>x</b>\"'&$\\frac{"
    history = [round_of(1, **FULL)]
    history[0]["warnings"] = [evil]
    history[0]["clients"] = {evil: history[0]["clients"]["site_a"]}
    named = run(evil, evil, history=history, tested={evil: summary()})
    html = render(named, examples=[example(caption=evil)], title=evil)
    assert "<b>x" not in html
    assert evil not in html
    page = Page(html)
    assert page.open == []
    # The title twice; the run in every section; method, clients, warning, caption.
    assert "".join(page.texts).count(evil) >= 11
    assert ("aria-label", f"Image: {evil}") in page.attributes


def test_stands_alone_without_network_or_script() -> None:
    html = render(trained(), examples=[example()])
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not any(word in html for word in ("@import", "url(", "http"))
    links = [value for name, value in page.attributes if name in ("src", "href")]
    ids = {value for name, value in page.attributes if name == "id"}
    assert links
    assert all(v.startswith("data:image/png;base64,") or v[1:] in ids for v in links)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    values = [value / 255 for value in ImageColor.getrgb(colour)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_in_both_themes(theme: dict[str, str]) -> None:
    for text in ("ink", "soft", "accent"):
        for ground in ("page", "shade", "warn"):
            dark, light = sorted(luminance(theme[name]) for name in (text, ground))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def test_what_a_screen_reader_and_a_keyboard_need() -> None:
    """Named pictures, headings of rows and columns, tables that can be scrolled without a mouse."""
    html = render(trained(), run("b", gallery=(pictured(),)), examples=[example()])
    for tag, needed in (("img", "alt="), ("svg", "aria-label="), ("th", "scope=")):
        found = re.findall(rf"<{tag}\b[^>]*>", html)
        assert found
        assert all(needed in each for each in found), tag
    scrolled = re.findall(r'<div class="scroll"[^>]*>', html)
    assert all('tabindex="0"' in each and 'role="region"' in each for each in scrolled)
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = [value[1:] for name, value in page.attributes if name == "href" and value[0] == "#"]
    assert set(links) <= set(ids)


def test_same_input_same_bytes_and_no_version_in_figures() -> None:
    html = render_report([trained()], [example()], title="T")
    assert html == render_report([trained()], [example()], title="T")
    assert all("Software" not in image.info for image in pictures(html))


def test_refuses_no_runs() -> None:
    with pytest.raises(ValueError, match="no runs to report on"):
        render()


# --------------------------------------------------------------------------- curves


def test_figures_keep_the_colours_of_their_legends() -> None:
    """They are stored with few colours."""
    history = [round_of(number, **{**FULL, "loss_agree": 0.75}) for number in (1, 2)]
    for panel in run_curves(history)[0]:
        (picture,) = pictures(f'"{figure_uri(panel.figure)}"')
        assert picture.mode == "P"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        for key in panel.keys:
            distance = np.abs(pixels - ImageColor.getrgb(key.colour)).max(axis=2)
            assert distance.min() <= 12, (panel.title, key)


def test_panels_without_data_are_left_out() -> None:
    html = render(run("base", history=[round_of(1), round_of(2)]))
    learning = html.split('<h2 id="learning"')[1].split('<h2 id="calibration"')[0]
    assert re.findall("<b>([^<]*)</b>", learning) == ["Loss"]
    assert "whole loss" in learning
    assert "distillation" not in learning
    full = render(trained("full"))
    assert "Foreground agreement (Dice of SAM and client)</b>" in full
    assert "from SAM" in full


def test_a_term_that_a_method_does_not_have_is_no_line() -> None:
    """Histories hold 0 for it."""
    history = [round_of(1, loss_sup=1.25, loss_agree=0.0)]
    ((panel,), _) = run_curves(history)
    assert [key.label for key in panel.keys] == ["whole loss", "labelled images"]


def lines(panel: Panel) -> list[tuple[list[float], list[float]]]:
    """The rounds and values of each line of a panel."""
    (axes,) = panel.figure.axes
    return [tuple(np.asarray(line.get_data()).round(9).tolist()) for line in axes.lines]


def test_a_line_for_each_client_passes_over_rounds_without_a_value() -> None:
    """Whether it sat them out or had none."""
    history = [round_of(number, drift=0.01 * number) for number in (1, 2, 3, 4)]
    history[1]["clients"] = {"site_b": {"images": 3, "drift": 0.5}}
    history[2]["clients"]["site_a"]["drift"] = None
    (loss, drift), clients = run_curves(history)
    assert [loss.title, drift.title] == ["Loss", "Drift, % of the weights"]
    assert [key.label for key in clients] == ["site_a", "site_b"]
    assert lines(drift) == [([1, 4], [1, 4]), ([2], [50])]
    assert drift.figure.axes[0].lines[0].get_color() == clients[0].colour


def test_fusion_terms_of_clients_and_server() -> None:
    fusion = {"fusion_loss": 3.0, "fusion_loss_seg": 1.0, "fusion_loss_kl": 0.2}
    history = [round_of(1, **fusion, fusion_counted=0.5)]
    history[0]["server"] = {"loss": 5.0, "loss_seg": 2.0, "loss_kl": 0.3, "counted": 0.25}
    panels = run_curves(history)[0][1:]
    assert [panel.title for panel in panels] == [
        "Fusion: loss on the public set",
        "Fusion: distance to the teacher (KL)",
        "Fusion: share of public images taught",
    ]
    values = [[drawn for _, (drawn,) in lines(panel)] for panel in panels]
    assert values == [[3.0, 5.0], [0.2, 0.3], [0.5, 0.25]]  # the client's, the server's
    assert all([key.label for key in panel.keys] == ["server"] for panel in panels)


def test_fedmd_has_one_fusion_term_and_no_server_model() -> None:
    panels, _ = run_curves([{**round_of(1, fusion_loss=3.0), "server": {}}])
    assert [panel.title for panel in panels] == ["Loss", "Fusion: loss on the public set"]
    assert panels[1].keys == []
    assert lines(panels[1]) == [([1], [3.0])]


def test_a_history_with_gaps() -> None:
    """A client misses a round, a value is not finite, nothing was validated."""
    first, second = round_of(1, **FULL), round_of(2, **{**FULL, "agreement": float("nan")})
    second["clients"]["site_b"] = {"images": 10, "loss": None}
    third = {"round": 3, "clients": {}, "val": {"dice": None}, "warnings": None, "seconds": None}
    first["val"] = second["val"] = {}
    html = render(run(history=[first, second, third]))
    assert "were not validated during training" in html
    assert len(re.findall("<figure>", html)) == 3
    assert [row[:3] for row in Page(html).cells(3)[2:]] == [
        ["site_a", "78", "2"],
        ["site_b", "10", "1"],
    ]


def test_many_clients_are_lines_of_one_grey() -> None:
    clients = {f"c{i:02d}": {"images": 1, "loss": 1.0, "drift": 0.1} for i in range(30)}
    (_, drift), shared = run_curves([{**round_of(1), "clients": clients}])
    assert shared == [Key("each client", GREY)]
    assert {line.get_color() for line in drift.figure.axes[0].lines} == {GREY}
    assert len(lines(drift)) == 30


# --------------------------------------------------------------------------- examples


def test_panels_of_an_example() -> None:
    target = np.zeros((16, 16), dtype=np.float32)
    target[:, 8:] = 1
    image, truth, sam, client, heat = pictures(render(run(), examples=[example(target=target)]))
    assert image.size == (16, 16)
    assert image.getpixel((0, 0)) == (100, 100, 100)
    assert truth.mode == "RGBA"
    assert truth.size == (352, 352)  # 22 px for one
    assert truth.getpixel((0, 0)) == (0, 0, 0, 0)
    assert truth.getpixel((4 * 22, 4 * 22)) == (0, 229, 255, 255)  # outline
    assert truth.getpixel((6 * 22, 6 * 22)) == (0, 229, 255, 70)  # tint
    for panel in (sam, client):
        assert panel.getpixel((4 * 22, 6 * 22)) == (255, 255, 255, 255)  # true outline
        assert panel.getpixel((4 * 22 + 1, 6 * 22)) == (0, 229, 255, 255)
    assert heat.convert("RGB").getpixel((0, 0)) == (68, 1, 84)  # viridis at 0
    assert heat.convert("RGB").getpixel((15, 0)) == (253, 231, 36)  # and at 1


def test_missing_panels_are_dashes() -> None:
    page = Page(render(run(), examples=[example(truth=None, sam=None, target=None)]))
    assert [cell.strip() for cell in page.tables[-1][-1]] == ["", "–", "–", "", "–"]
    assert "Examples" not in render(run())


def test_classes_have_their_own_colours() -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8], mask[8:] = 1, 3
    three = run(params="data: {image_size: 64, num_classes: 3}\n")
    html = render(three, examples=[example(truth=mask, sam=None)])
    assert all(f"class {k}" in html for k in (1, 2, 3))
    truth = pictures(html)[1]
    assert truth.getpixel((50, 50)) == (0, 229, 255, 70)
    assert truth.getpixel((50, 300)) == (255, 79, 216, 70)


def test_large_noisy_examples_stay_below_two_megabytes() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)
    noisy = example(300, image=image, target=rng.random((300, 300), dtype=np.float32))
    html = render(run(), examples=[noisy] * (MAX_EXAMPLES + 50))
    assert html.count('class="caption"') == MAX_EXAMPLES
    assert 1_000_000 < len(html) < 1_800_000  # and the rest for curves
