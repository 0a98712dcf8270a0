"""The report: what a reader sees, that it stands alone, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image, ImageColor

from pipeline.config import parse_config
from pipeline.errors import ConfigError, DataError, StageError
from pipeline.results import curves
from pipeline.results.report import GalleryRow, RunSummary, load_run, render_report

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
VOID = {"meta", "img", "br", "hr", "link", "input", "use", "image"}


class _Reader(HTMLParser):
    """Text of every table's cells, all attributes, and whether each tag is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += " ".join(data.split()) + " "


def _summary(dice: float = 0.5, hd95: float = 10.0, **changes: Any) -> dict[str, Any]:
    return {
        "dice": dice,
        "iou": dice / 2,
        "hd95": hd95,
        "assd": hd95 / 2,
        "n": 12,
        "dice_ci95": [dice - 0.1, dice + 0.1],
        "hd95_ci95": [hd95 - 1, hd95 + 1],
        "hd95_defined": hd95 - 2,
        "assd_defined": None,
        **changes,
    }


def _metrics(method: str, pooled: dict[str, Any]) -> dict[str, Any]:
    mean = {name: pooled[name] for name in ("dice", "iou", "hd95", "assd")}
    test = {"pooled": pooled, "clients": {"site_a": _summary(0.125)}, "client_mean": mean}
    return {"method": method, "seed": 7, "rounds": 2, "test": test}


def _round(number: int, **client: Any) -> dict[str, Any]:
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
    "loss_kd": None,
    "agreement": 0.6,
    "coverage": 0.9,
    "from_sam": 0.05,
    "from_client": 0.01,
}


def _run(name: str = "one", method: str = "sam_fed", **changes: Any) -> RunSummary:
    """A run without rounds, so without figures, which take most of a report's time."""
    values: dict[str, Any] = {
        "params": "data:\n  image_size: 64\n",
        "history": [],
        "metrics": _metrics(method, changes.pop("pooled", _summary())),
        **changes,
    }
    config = parse_config(yaml.safe_load(values["params"]), source="test")
    return RunSummary(name, method, config=config, **values)


def _trained(name: str = "one") -> RunSummary:
    """A run with curves."""
    return _run(name, history=[_round(1, **FULL), _round(2, **FULL)])


def _row(size: int = 16, **changes: Any) -> GalleryRow:
    mask = np.zeros((size, size), dtype=np.uint8)
    mask[4:8, 4:8] = 1
    values: dict[str, Any] = {
        "caption": "site_a/img_1",
        "image": np.full((size, size, 3), 100, dtype=np.uint8),
        "truth": mask,
        "sam": mask.copy(),
        "client": mask.copy(),
        "weight": np.ones((size, size), dtype=np.float32),
        **changes,
    }
    return GalleryRow(**values)


def _cells(html: str, table: int) -> list[list[str]]:
    """Rows of a table, text with single spaces."""
    rows = _Reader(html).tables[table]
    return [[" ".join(cell.split()) for cell in row] for row in rows]


def _learning(html: str) -> str:
    """The section on the rounds."""
    return html.split("<h2>Learning")[1].split("<h2>Warnings")[0]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of all curves since, which are not turned into pictures."""
    figures: list[Figure] = []

    def keep(figure: Figure) -> str:
        figures.append(figure)
        return "data:image/png;base64,"

    monkeypatch.setattr(curves, "png_uri", keep)
    return figures


def _pngs(html: str) -> list[Image.Image]:
    found = re.findall(r'"data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(content))) for content in found]


def _write(folder: Path, run: RunSummary) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.yaml").write_text(run.params, encoding="utf-8")
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in run.history]
    (folder / "history.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(run.metrics), encoding="utf-8")
    return folder


def test_load_run_reads_what_was_written(tmp_path: Path) -> None:
    run = _trained("sam_fed")
    # A line separator within a string is no end of a line in JSON lines.
    run.history[0]["warnings"] = ["site_a\u2028low"]
    assert load_run(_write(tmp_path / "sam_fed", run)) == run


@pytest.mark.parametrize(
    ("file", "command"),
    [("history.jsonl", "federate"), ("params.yaml", "federate"), ("metrics.json", "evaluate")],
)
def test_load_run_names_the_stage_that_is_missing(tmp_path: Path, file: str, command: str) -> None:
    folder = _write(tmp_path / "run", _trained())
    (folder / file).unlink()
    with pytest.raises(StageError, match=rf"{file}: not found; run `samfed {command}` first"):
        load_run(folder)


def test_load_run_lists_the_models_of_clients(tmp_path: Path) -> None:
    for params, models in ((NETWORKS, ("b", "global")), ("data: {image_size: 64}\n", ())):
        run = _run("run", params=params, history=[_round(1)])
        folder = _write(tmp_path / f"{len(models)}" / "run", run)
        (folder / "models").mkdir()
        for name in ("global", "b"):
            (folder / "models" / f"{name}.safetensors").touch()
        assert load_run(folder).models == models


def test_load_run_refuses_damaged_files(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", _trained())
    history = (folder / "history.jsonl").read_text()
    (folder / "metrics.json").write_text('{"method": "sam_fed"}')
    with pytest.raises(DataError, match=r"metrics\.json: no method and test .*samfed evaluate"):
        load_run(folder)
    (folder / "history.jsonl").write_text(history + '{"round": 3, "cli')
    with pytest.raises(DataError, match=r"history\.jsonl: line 3 is no round"):
        load_run(folder)
    (folder / "params.yaml").write_text("data:\n  image_sise: 64\n")
    (folder / "history.jsonl").write_text(history)
    (folder / "metrics.json").write_text(json.dumps(_metrics("sam_fed", _summary())))
    with pytest.raises(ConfigError, match=r"params\.yaml: unknown key 'data\.image_sise'"):
        load_run(folder)
    (folder / "history.jsonl").write_text("")
    with pytest.raises(StageError, match=r"holds no round yet; run `samfed federate` first"):
        load_run(folder)


def test_headline_table() -> None:
    runs = [
        _run("base", "supervised", pooled=_summary(0.5, 20.0)),
        _run("ours", pooled=_summary(0.75, 10.0)),
    ]
    reader = _Reader(render_report(runs, [], title="T"))
    header, base, ours = [[" ".join(c.split()) for c in row] for row in reader.tables[0]]
    assert header[:5] == ["Run", "Dice", "IoU", "HD95, px", "ASSD, px"]
    assert base == [
        "base supervised, seed 7, 2 rounds, 64 px",
        *("0.500 0.400 to 0.600", "0.250", "20.0 19.0 to 21.0", "10.0", "18.0", "–", "12"),
    ]
    assert ours[1:5] == ["0.750 0.650 to 0.850", "0.375", "10.0 9.0 to 11.0", "5.0"]


def test_best_values_are_bold_ties_too_and_never_alone() -> None:
    def bold(*runs: RunSummary) -> list[str]:
        html = render_report(runs, [], title="T")
        return re.findall(r"<strong>([^<]*)</strong>", html)

    first, second = _run("a", pooled=_summary(0.5, 20.0)), _run("b", pooled=_summary(0.75, 10.0))
    assert bold(first, second) == ["0.750", "0.375", "10.0", "5.0", "8.0"]
    assert bold(second, _run("c", pooled=_summary(0.7501, 30.0))).count("0.750") == 2
    assert bold(first) == []


def test_distances_at_different_image_sizes_are_not_compared() -> None:
    small, large = _run("a"), _run("b", params="data:\n  image_size: 256\n")
    html = render_report([small, large], [], title="T")
    assert "The runs use different image sizes." in html
    assert "<strong>10.0</strong>" not in html
    assert "<strong>0.500</strong>" in html


def test_client_table_of_each_run() -> None:
    reader = _Reader(render_report([_run("a"), _run("b")], [], title="T"))
    assert len(reader.tables) == 3
    rows = [[" ".join(cell.split()) for cell in row] for row in reader.tables[2]]
    assert [row[0] for row in rows] == ["Client", "site_a", "Mean over clients", "All images"]
    assert rows[1][1:3] == ["0.125 0.025 to 0.225", "0.062"]


@pytest.mark.usefixtures("drawn")
def test_all_text_is_escaped() -> None:
    evil = "<b>x</b>\"'&$\\frac{"
    history = [_round(1, **FULL)]
    run = _run(evil, evil, params=f"# {evil}\ndata:\n  image_size: 64\n", history=history)
    run.history[0]["warnings"] = [evil]
    run.history[0]["clients"] = {evil: run.history[0]["clients"]["site_a"]}
    run.metrics["test"]["clients"] = {evil: _summary()}
    html = render_report([run], [_row(caption=evil)], title=evil)
    assert "<b>x" not in html
    assert evil not in html
    reader = _Reader(html)
    assert reader.open == []
    text = "".join(reader.texts)
    # The title twice; the run in every section; method, clients, warning, caption, parameters.
    assert text.count(evil) >= 12
    assert ("aria-label", f"Image: {evil}") in reader.attributes


@pytest.mark.usefixtures("drawn")
def test_stands_alone_without_network_or_script() -> None:
    html = render_report([_trained()], [_row()], title="T")
    reader = _Reader(html)
    assert not {"script", "link", "iframe", "object"} & set(reader.tags)
    assert "@import" not in html
    assert "url(" not in html
    assert "http" not in html
    links = [value for name, value in reader.attributes if name in ("src", "href")]
    ids = {value for name, value in reader.attributes if name == "id"}
    assert links
    assert all(v.startswith("data:image/png;base64,") or v[1:] in ids for v in links)


def test_same_input_same_bytes_and_no_version_in_figures() -> None:
    runs, gallery = [_trained()], [_row()]
    html = render_report(runs, gallery, title="T")
    assert html == render_report(runs, gallery, title="T")
    assert all("Software" not in image.info for image in _pngs(html))


def test_figures_keep_the_colours_of_their_legends() -> None:
    """They are stored with few colours."""
    history = [_round(number, **{**FULL, "loss_agree": 0.75}) for number in (1, 2)]
    for panel in curves.run_curves(history).panels:
        (picture,) = _pngs(f'"{panel.png}"')
        assert picture.mode == "P"
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        for key in panel.keys:
            distance = np.abs(pixels - ImageColor.getrgb(key.colour)).max(axis=2)
            assert distance.min() <= 12, (panel.title, key)


@pytest.mark.usefixtures("drawn")
def test_panels_without_data_are_left_out() -> None:
    html = render_report([_run("base", history=[_round(1), _round(2)])], [], title="T")
    assert "<b>Loss</b>" in html
    assert "whole loss" in html
    assert html.count("<b>") == html.count("<b>Loss</b>") + html.count("<b>sam_fed</b>")
    assert "Foreground agreement" not in html
    assert "distillation" not in _learning(html)
    full = render_report([_trained("full")], [], title="T")
    assert "Foreground agreement (Dice of SAM and client)</b>" in full
    assert "from SAM" in full


@pytest.mark.usefixtures("drawn")
def test_a_term_that_a_method_does_not_have_is_no_line() -> None:
    """Histories hold 0 for it."""
    history = [_round(1, loss_sup=1.25, loss_agree=0.0, loss_kd=0.0)]
    (panel,) = curves.run_curves(history).panels
    assert [key.label for key in panel.keys] == ["whole loss", "labelled images"]


def test_a_line_for_each_client_passes_over_rounds_it_sat_out(drawn: list[Figure]) -> None:
    """A value that is missing in a round with the client is a gap."""
    history = [_round(number, drift=0.01 * number) for number in (1, 2, 3, 4)]
    history[1]["clients"] = {"site_b": {"images": 3, "drift": 0.5}}
    history[2]["clients"]["site_a"]["drift"] = None
    shown = curves.run_curves(history)
    assert [panel.title for panel in shown.panels] == ["Loss", "Drift, % of the weights"]
    assert [key.label for key in shown.clients] == ["site_a", "site_b"]
    site_a, site_b = drawn[1].axes[0].lines
    np.testing.assert_equal(site_a.get_xdata(), [1, 3, 4])
    np.testing.assert_allclose(np.asarray(site_a.get_ydata()), [1, np.nan, 4])
    np.testing.assert_allclose(np.asarray(site_b.get_ydata()), [50])
    assert site_a.get_color() == shown.clients[0].colour


@pytest.mark.parametrize(("high", "scale"), [(19.0, "linear"), (21.0, "log")])
def test_norms_far_apart_are_on_a_log_scale(drawn: list[Figure], high: float, scale: str) -> None:
    history = [_round(1, gradient_norm=1.0), _round(2, gradient_norm=high)]
    assert [panel.title for panel in curves.run_curves(history).panels][1] == "Gradient norm"
    assert drawn[1].axes[0].get_yscale() == scale


def test_fusion_terms_of_clients_and_server(drawn: list[Figure]) -> None:
    fusion = {"fusion_loss": 3.0, "fusion_loss_seg": 1.0, "fusion_loss_kl": 0.2}
    history = [_round(1, **fusion, fusion_counted=0.5)]
    history[0]["server"] = {"loss": 5.0, "loss_seg": 2.0, "loss_kl": 0.3, "counted": 0.25}
    panels = curves.run_curves(history).panels[1:]
    assert [panel.title for panel in panels] == [
        "Fusion: loss on the public set",
        "Fusion: distance to the teacher (KL)",
        "Fusion: share of public images taught",
    ]
    values = [[float(line.get_ydata()[0]) for line in f.axes[0].lines] for f in drawn[1:]]
    assert values == [[1.0, 2.0], [0.2, 0.3], [0.5, 0.25]]  # the client's, the server's
    assert all([key.label for key in panel.keys] == ["server"] for panel in panels)


def test_fedmd_has_one_fusion_term_and_no_server_model(drawn: list[Figure]) -> None:
    history = [{**_round(1, fusion_loss=3.0), "server": {}}]
    panels = curves.run_curves(history).panels
    assert [panel.title for panel in panels] == ["Loss", "Fusion: loss on the public set"]
    assert panels[1].keys == []
    np.testing.assert_equal(drawn[1].axes[0].lines[0].get_ydata(), [3.0])


def test_a_history_with_gaps(drawn: list[Figure]) -> None:
    """A client misses a round, a value is not finite, nothing was validated."""
    first, second = _round(1, **FULL), _round(2, **{**FULL, "agreement": float("nan")})
    second["clients"]["site_b"] = {"images": 10, "loss": None}
    third = {"round": 3, "clients": {}, "val": {"dice": None}, "warnings": None, "seconds": None}
    first["val"] = second["val"] = {}
    html = render_report([_run(history=[first, second, third])], [], title="T")
    assert "were not validated during training" in html
    assert len(drawn) == 3
    assert [row[:3] for row in _cells(html, 2)[2:]] == [
        ["site_a", "78", "2"],
        ["site_b", "10", "1"],
    ]


@pytest.mark.usefixtures("drawn")
def test_many_clients_name_only_the_worst() -> None:
    clients = {
        f"c{i:02d}": {"images": 1, "loss": 1.0, "agreement": 0.9, "drift": 0.1} for i in range(30)
    }
    clients["c17"]["agreement"] = 0.1
    clients["c18"]["drift"] = 0.2
    shown = curves.run_curves([{**_round(1), "clients": clients}])
    labels = [[key.label for key in panel.keys] for panel in shown.panels[1:]]
    assert labels[0] == ["c17 (lowest at the end)", "others"]
    assert labels[1] == ["c18 (highest at the end)", "others"]
    assert shown.clients == []


COSTS = {"seconds": 1.0, "bytes_up": 2_000_000, "bytes_down": 4_000_000, "drift": 0.01}


@pytest.mark.usefixtures("drawn")
def test_table_of_clients() -> None:
    """Means over the rounds that a client took part in; the rest as in the last of these."""
    said = {
        "agreement": 0.25,
        "coverage": 0.5,
        "pseudo_label_dice": 0.75,
        "conflict_log_odds": -1.5,
    }
    history = [
        _round(1, **COSTS, **said),
        _round(2, **{**COSTS, "seconds": 2.0, "drift": 0.04}, **{**said, "agreement": 0.5}),
        _round(3),
    ]
    slow = {"images": 9, **COSTS, "seconds": 6.0, **said, "pseudo_label_dice": None}
    history[2]["clients"] = {"site_b": slow}
    run = _run(history=history)
    run.metrics["test"]["clients"]["site_c"] = _summary()
    html = render_report([run], [], title="T")
    top, head, *rows = _cells(html, 2)
    assert top == ["Client", "Images", "Rounds of 3", "a round, on average", "in its last round"]
    assert head == [
        *("Seconds", "MB up", "MB down", "Drift, %"),
        *("Agreement", "Kept", "Pseudo-label Dice", "Trust in SAM"),
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


@pytest.mark.usefixtures("drawn")
def test_columns_without_data_are_left_out_of_the_table_of_clients() -> None:
    html = render_report([_run(history=[_round(1, drift=0.01)])], [], title="T")
    top, head, row = _cells(html, 2)
    assert top == ["Client", "Images", "Rounds of 1", "a round, on average"]
    assert head == ["Drift, %"]
    assert row == ["site_a", "78", "1", "1.00"]


@pytest.mark.usefixtures("drawn")
def test_what_sets_a_run_apart_is_said() -> None:
    """Partial participation, the median, and each client's network."""
    history = [_round(1, fusion_loss_seg=1.0)]
    history[0]["server"] = {"loss_seg": 2.0}
    own = _run("own", params=NETWORKS, history=history, models=("site_a", "site_b", "site_c"))
    html = render_report([own], [], title="T")
    setting = "2 of 3 clients a round, clients’ own networks"
    assert _cells(html, 0)[1][0].endswith(f"64 px, {setting}")
    assert f"Setting: {setting}. The server's own network: unet, tu-lcnet_050, depth 4." in html
    assert [row[0] for row in _cells(html, 2)[2:]] == [
        "site_a unet, tu-resnet10t, depth 4",
        "site_b segformer, tu-regnetx_002, depth 5",
        "site_c unet, tu-resnet10t, depth 4",
    ]
    median = _run(params="data: {image_size: 64}\nfederate: {aggregation: median}\n")
    assert "64 px, coordinate median" in render_report([median], [], title="T")
    assert "Setting" not in render_report([_trained()], [], title="T")


@pytest.mark.usefixtures("drawn")
def test_warnings_are_listed_once_with_their_rounds() -> None:
    run = _run(history=[_round(i) for i in (1, 2, 3)])
    run.history[0]["warnings"] = ["site_a: low agreement"]
    run.history[2]["warnings"] = ["site_a: low agreement"]
    html = render_report([run], [], title="T")
    assert html.count("site_a: low agreement") == 1
    assert "(rounds 1, 3)" in html
    assert "None of the runs reported a warning." in render_report([_run()], [], title="T")


def test_gallery_panels() -> None:
    weight = np.zeros((16, 16), dtype=np.float32)
    weight[:, 8:] = 1
    html = render_report([_run()], [_row(weight=weight)], title="T")
    image, truth, sam, client, heat = _pngs(html)
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
    row = _row(truth=None, sam=None, weight=None)
    reader = _Reader(render_report([_run()], [row], title="T"))
    assert [cell.strip() for cell in reader.tables[-1][-1]] == ["", "–", "–", "", "–"]
    assert "Examples" not in render_report([_run()], [], title="T")


def test_classes_have_their_own_colours() -> None:
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8], mask[8:] = 1, 3
    html = render_report([_run()], [_row(truth=mask, sam=None)], title="T")
    assert all(f"class {k}" in html for k in (1, 2, 3))
    truth = _pngs(html)[1]
    assert truth.getpixel((50, 50)) == (0, 229, 255, 70)
    assert truth.getpixel((50, 300)) == (255, 79, 216, 70)


def test_large_noisy_galleries_stay_below_two_megabytes() -> None:
    rng = np.random.default_rng(0)
    rows = [
        _row(
            300,
            image=rng.integers(0, 256, (300, 300, 3), dtype=np.uint8),
            weight=rng.random((300, 300), dtype=np.float32),
        )
        for _ in range(12)
    ]
    assert len(render_report([_trained("a"), _trained("b")], rows, title="T")) < 2_000_000


def test_examples_shrink_where_curves_take_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many runs, whose curves leave little of the page's two megabytes."""
    monkeypatch.setattr(curves, "png_uri", lambda _: "x" * 500_000)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    rows = [_row(256, image=image, weight=rng.random((256, 256), dtype=np.float32))] * 12
    history = [{**_round(1, **FULL), "val": {}}]
    assert 1_500_000 < len(render_report([_run(history=history)], rows, title="T")) < 2_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((16, 16), np.uint8)}, r"image is uint8 \(16, 16\); expected uint8"),
        ({"client": np.zeros((8, 8), np.uint8)}, r"client is uint8 \(8, 8\)"),
        ({"sam": np.zeros((16, 16), np.int64)}, r"sam is int64 .* expected uint8 \(16, 16\)"),
        ({"weight": np.full((16, 16), 2, np.float32)}, "weight holds values outside 0..1"),
        ({"weight": np.full((16, 16), np.nan, np.float32)}, "weight holds values outside 0..1"),
    ],
)
def test_refuses_a_gallery_row_that_does_not_match(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_report([_run()], [_row(**changes)], title="T")


def test_refuses_no_runs() -> None:
    with pytest.raises(ValueError, match="no runs to report on"):
        render_report([], [], title="T")
