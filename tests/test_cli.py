"""The command line: every command, its exit code, and exactly one line for what goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Project, answer, call, fails, listing
from typer.main import get_command
from typer.testing import CliRunner

import cli
from pipeline.console import command
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError

ROOT = Path(__file__).parent.parent
APP: Any = get_command(cli.app)
COMMANDS = sorted(APP.commands)
FAMILIES = {
    name: sorted(found.commands)
    for name, found in APP.commands.items()
    if hasattr(found, "commands")
}
MEMBERS = [f"{family} {name}" for family, names in FAMILIES.items() for name in names]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, dict[str, Any]]:
    """A project on which every stage ran, and what each printed; tests only read it."""
    project = Project(tmp_path_factory.mktemp("project"))
    said = {}
    for stage in (
        ("synth", project.images),
        ("prepare", "--with-oracle"),
        ("finetune-sam",),
        ("evaluate-sam",),
        ("precompute-sam",),
        ("federate",),
        ("evaluate",),
        ("report",),
    ):
        said[str(stage[0])] = answer(*stage, *project.options)
    return project, said


@pytest.fixture
def project(finished: tuple[Project, dict[str, Any]], tmp_path: Path) -> Project:
    """A copy of the finished project that a test may change."""
    copy = Project(tmp_path)
    shutil.copytree(finished[0].cache, copy.cache)
    shutil.copytree(finished[0].images, copy.images)
    return copy


# --------------------------------------------------------------------------- help


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("command", sorted({*COMMANDS, *MEMBERS} - {*FAMILIES}))
def test_every_command_has_help(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert "--debug" in result.stdout
    assert "--json" in result.stdout
    assert "--progress" in result.stdout


def test_help_explains_what_a_command_is_given_by_position() -> None:
    for name in (*COMMANDS, *MEMBERS):
        words, found = name.split(), APP
        for word in words:
            found = found.commands[word]
        for parameter in found.params:
            if parameter.param_type_name == "argument":
                shown = re.sub(r"[\s│]+", " ", call(*words, "--help").stdout)
                assert parameter.help, (name, parameter.name)
                assert parameter.help in shown, (name, parameter.name)


def test_help_of_a_family_names_its_commands() -> None:
    assert {"cache", "public", "teacher"} <= {*FAMILIES}
    for family, names in FAMILIES.items():
        text = call(family, "--help").stdout
        assert all(f" {name} " in text for name in names)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; import cli\n"
        "assert CliRunner().invoke(cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'zarr', 'numpy', 'pydantic', 'PIL', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_version() -> None:
    assert call("--version").stdout.startswith("samfed 0.")


def test_one_line_from_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "prepare", "--set", f"data.root={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {tmp_path / 'images'}: no such folder; expected images/<id>.png|jpg|tif|bmp in "
        "data.root\n"
    )


# --------------------------------------------------------------------------- the chain


def test_a_read_only_cache_is_evaluated_and_reported(
    finished: tuple[Project, dict[str, Any]], tmp_path: Path
) -> None:
    """With ``--out`` nothing is written to it, not even a lock; the same scores as with it."""
    project, _ = finished
    before, page = listing(project.cache), tmp_path / "page.html"
    answer("evaluate", *project.options, "--out", tmp_path)
    answer("evaluate-sam", *project.options, "--out", tmp_path)
    answer("report", *project.options, "--scores", tmp_path, "--out", page)
    assert listing(project.cache) == before
    run = project.cache / "runs" / "sam_fed"
    for name in ("metrics.json", "per_image.csv", "rounds.csv"):
        assert (tmp_path / "sam_fed" / name).read_bytes() == (run / name).read_bytes()
    for name in ("evaluate-sam.html", "evaluate-sam.json"):
        assert (tmp_path / name).read_bytes() == (project.cache / name).read_bytes()
    assert page.read_bytes() == (run / "report.html").read_bytes()


def test_every_stage_answers_in_json(finished: tuple[Project, dict[str, Any]]) -> None:
    project, said = finished
    assert said["synth"] == {"folder": str(project.images), "images": 32}
    prepared = dict(said["prepare"])
    assert prepared.pop("data.root")["images"] == 32
    assert sum(prepared["server"].values()) <= 6
    assert len(prepared) == 5
    assert said["finetune-sam"]["variant"] == "vit_t"
    assert 0 <= said["evaluate-sam"]["dice"] <= 1
    assert list(said["evaluate-sam"]["teachers"]) == ["adapted", "points"]
    assert (project.cache / "evaluate-sam.html").is_file()
    assert said["precompute-sam"]["failed"] == []
    assert said["precompute-sam"]["already_labelled"] == 0
    assert set(said["precompute-sam"]["statistics"]) == set(prepared)
    assert said["precompute-sam"]["labelled"] == sum(
        splits.get("calibration", splits["train"]) for splits in prepared.values()
    )
    assert said["federate"]["rounds"] == 2
    assert said["evaluate"]["method"] == "sam_fed"
    assert Path(said["report"]["report"]).is_file()


def test_every_stage_answers_in_words(project: Project) -> None:
    assert call("prepare", *project.options).stdout.startswith("32 images, 32 masks, ")
    again = call("precompute-sam", *project.options)
    assert again.stdout.startswith("0 images labelled, ")
    owners = [line.split()[0] for line in again.stdout.splitlines()[2:]]
    assert owners == ["server", "site_a", "site_b", "site_c", "site_d"]
    table = call("evaluate-sam", *project.options).stdout
    assert "adapted" in table
    assert table.endswith(f"{project.cache}/evaluate-sam.html\n")
    assert again.stderr == ""  # no bars where no terminal is
    assert "Dice" in call("evaluate", *project.options).stdout


def test_inconsistent_labels_are_a_warning(project: Project) -> None:
    settings = ("--set", "precompute.warn_consistency=1")
    result = call("precompute-sam", *project.options, *settings)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()  # one epoch makes no teacher that is blind to mirrors
    assert line.startswith("WARNING: SAM contradicts itself: ")
    named = set(re.findall(r"(\w+) \(0\.\d\d\)", line))
    assert named
    assert named <= {"server", "site_a", "site_b", "site_c", "site_d"}


def test_a_store_made_by_another_teacher_is_moved_aside(project: Project) -> None:
    answer("finetune-sam", *project.options, "--set", "seed=1")
    said = call("precompute-sam", *project.options, "--client", "site_a", "--json")
    notices = json.loads(said.stdout)["notices"]
    assert len(notices) == 2  # the server's calibration part, and site_a
    for owner, notice in zip(("server", "site_a"), notices, strict=True):
        store = project.cache / "sam" / f"{owner}.zarr"
        assert notice.startswith(f"{store}: adapter_sha256 is ")
        assert f"; moved the old labels to {project.cache / 'archive' / owner}/" in notice


# --------------------------------------------------------------------------- too early


@pytest.mark.parametrize(
    ("stage", "gone", "file", "needed"),
    [
        ("finetune-sam", "partition.json", "partition.json", "prepare"),
        ("evaluate-sam", "partition.json", "partition.json", "prepare"),
        ("precompute-sam", "partition.json", "partition.json", "prepare"),
        ("federate", "partition.json", "partition.json", "prepare"),
        ("evaluate", "partition.json", "partition.json", "prepare"),
        ("federate", "images", "images/server/train.zarr", "prepare"),
        ("evaluate-sam", "teacher", "teacher/card.json", "finetune-sam"),
        ("precompute-sam", "teacher", "teacher/card.json", "finetune-sam"),
        ("federate", "sam", "sam/server.zarr", "precompute-sam"),
        ("evaluate", "runs", "runs/sam_fed/params.yaml", "federate"),
        ("report", "runs", "runs/sam_fed/params.yaml", "federate"),
        ("report", "runs/sam_fed/metrics.json", "runs/sam_fed/metrics.json", "evaluate"),
    ],
)
def test_a_stage_before_the_one_it_needs(
    project: Project, stage: str, gone: str, file: str, needed: str
) -> None:
    lost = project.cache / gone
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    before = listing(project.cache)
    assert fails(4, stage, *project.options) == (
        f"{project.cache / file}: not found; run `samfed {needed}` first"
    )
    assert listing(project.cache) == before


def test_the_ceiling_without_its_labels(project: Project) -> None:
    shutil.rmtree(project.cache / "oracle")
    assert fails(4, "federate", *project.options, "--set", "federate.method=oracle") == (
        f"{project.cache}/oracle/site_a.zarr: not found; run `samfed prepare --with-oracle` first"
    )


# --------------------------------------------------------------------------- one line


def test_bad_key(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert fails(2, "prepare", *project.options, "--set", "cache.rot=x") == (
        "--set cache.rot: unknown key 'cache.rot' (nearest: cache.root); expected one of root"
    )
    assert not project.cache.exists()


def test_no_settings(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"
    assert fails(2, "federate", "--params", missing) == (
        f"{missing}: no such file; run in the project's folder or pass --params"
    )


def test_without_a_settings_file_the_defaults_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("cache", "info")
    assert result.exit_code == 0
    assert "no params.yaml in the current folder; the defaults serve" in result.stderr
    (tmp_path / "params.yaml").symlink_to("nowhere")
    assert fails(2, "cache", "info").startswith("params.yaml: no such file; ")


@pytest.mark.parametrize(
    ("command", "where"),
    [
        (("predict", "sam_fed", "", "--out", "p"), "empty text after sam_fed"),
        (("predict", "", "a.png", "--out", "p"), "empty text after predict"),
        (("predict", "sam_fed", "a.png", "--out", ""), "empty text after --out"),
        (("report", "--out="), "--out="),
        (("cache", "info", "--params", ""), "empty text after --params"),
    ],
)
def test_empty_text_is_no_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(2, *command)
    assert line == f"{where}: found none, expected a value; is a variable unset?"
    assert listing(tmp_path) == {}


def test_missing_data_root(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert fails(3, "prepare", *project.options) == (
        f"{project.images}/images: no such folder; expected images/<id>.png|jpg|tif|bmp in "
        "data.root"
    )
    assert not project.cache.exists()


def test_unknown_client(project: Project) -> None:
    before = listing(project.cache)
    assert fails(2, "precompute-sam", *project.options, "--client", "site_x") == (
        "--client site_x: no such client; expected one of site_a, site_b, site_c, site_d"
    )
    assert listing(project.cache) == before


@pytest.mark.parametrize(
    "command", [("evaluate", "--name"), ("report", "--name"), ("report",), ("compare",)]
)
def test_unknown_run(project: Project, command: tuple[str, ...]) -> None:
    before, runs = listing(project.cache), project.cache / "runs"
    assert fails(4, *command, "other", *project.options) == (
        f"other: no such row or run in {runs}; found sam_fed"
        if command == ("compare",)
        else f"{runs}/other/params.yaml: not found; run `samfed federate` first"
    )
    assert fails(2, *command, "../x", *project.options) == (
        "run '../x': expected the name of a folder under cache/runs"
    )
    assert listing(project.cache) == before


def test_compare(project: Project) -> None:
    """Two seeds of one method beside one run of another; nothing but the output is written."""
    for seed in (0, 1):
        name = ("--name", f"supervised-seed{seed}")
        settings = ("--set", "federate.method=supervised", "--set", f"seed={seed}")
        answer("federate", *project.options, *settings, *name)
        answer("evaluate", *project.options, *name)
    before, out = listing(project.cache), project.folder / "docs" / "table.md"
    result = call("compare", *project.options, "--output", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == "WARNING: rows have different seeds: supervised 0, 1; sam_fed 0\n"
    assert result.stdout == out.read_text()
    rows = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert [line.split(" | ")[0] for line in rows] == ["| `supervised`", "| `sam_fed`"] * 2
    for option, begin in (("--csv", "row,method,"), ("--latex", "% \\usepackage{booktabs}\n")):
        said = call("compare", *project.options, option)
        assert said.stdout.startswith(begin)
    page = project.folder / "both.html"
    answer("report", "sam_fed", "supervised-seed1", *project.options, "--out", page)
    assert page.read_text().count('class="show-truth"') == 2
    found = answer("compare", "sam_fed", "supervised-seed1", *project.options)
    assert [row["seeds"] for row in found["rows"]] == [[0], [1]]
    for row, name in zip(found["rows"], ("sam_fed", "supervised-seed1"), strict=True):
        test = json.loads((project.cache / "runs" / name / "metrics.json").read_text())["test"]
        for key in ("dice", "hd95"):
            assert row[key] == pytest.approx(test["pooled"][key], abs=1e-4)
            assert row["client_mean"][key] == pytest.approx(test["client_mean"][key], abs=1e-4)
        if row["seeds"] == [0]:  # the bootstrap's own seed, so the same resamples
            assert row["dice_ci95"] == pytest.approx(test["pooled"]["dice_ci95"], abs=1e-4)
    assert 0 < found["rows"][1]["difference"]["dice_p"] <= 1
    assert listing(project.cache) == before


def test_compare_what_is_not_there(project: Project, tmp_path: Path) -> None:
    folder = project.cache / "runs"
    assert fails(4, "compare", "other", *project.options) == (
        f"other: no such row or run in {folder}; found sam_fed"
    )
    assert fails(2, "compare", *project.options, "--reference", "oracle") == (
        "--reference oracle: no such row; found sam_fed"
    )
    assert fails(2, "compare", *project.options, "--output", tmp_path) == (
        f"--output {tmp_path}: is a folder; expected a file to write"
    )
    shutil.rmtree(folder)
    assert fails(4, "compare", *project.options) == (
        f"{folder}: found no evaluated run; run `samfed evaluate` first"
    )


def test_vit_b_without_its_checkpoint(project: Project) -> None:
    before = listing(project.cache)
    settings = (*project.options, "--set", "sam.variant=vit_b")
    assert fails(2, "finetune-sam", *settings) == (
        "sam.checkpoint: vit_b needs a checkpoint; give the path of one (`samfed fetch` gets the "
        "official ones)"
    )
    missing = project.folder / "sam_vit_b.pth"
    assert fails(3, "finetune-sam", *settings, "--set", f"sam.checkpoint={missing}") == (
        f"{missing}: no such checkpoint; check sam.checkpoint in params.yaml"
    )
    assert listing(project.cache) == before


def test_labels_of_another_size(project: Project) -> None:
    before = listing(project.cache)
    text = fails(5, "federate", *project.options, "--set", "data.image_size=48")
    assert "32" in text
    assert "48" in text
    assert listing(project.cache) == before


def test_a_teacher_of_another_kind(project: Project) -> None:
    card = project.cache / "teacher" / "card.json"
    card.write_text(card.read_text().replace('"vit_t"', '"vit_b"'))
    assert fails(5, "precompute-sam", *project.options) == (
        f"{project.cache}/teacher: variant is vit_b, the settings ask for vit_t; "
        "run `samfed finetune-sam`"
    )


def test_a_damaged_label_store(project: Project) -> None:
    shard = project.cache / "sam" / "site_b.zarr" / "masks" / "c.0.0.0"
    damaged = bytearray(shard.read_bytes())
    damaged[8] ^= 4
    shard.write_bytes(bytes(damaged))
    text = fails(5, "federate", *project.options, "--restart")
    assert text.startswith(f"{project.cache}/sam/site_b.zarr: masks rows 0..")
    assert " are damaged; " in text


def test_a_damaged_store_is_verified_and_repaired(project: Project) -> None:
    store = project.cache / "sam" / "site_b.zarr"
    before = listing(project.cache / "sam")
    found = answer("cache", "verify", *project.options)
    every = [*project.cache.glob("images/*/*.zarr"), *project.cache.glob("sam/*.zarr")]
    every += project.cache.glob("oracle/*.zarr")
    assert (found["faults"], found["stores"], found["skipped"]) == ([], len(every), [])
    with writer_lock(project.cache / "locks" / "sam-site_b.lock"):
        result = call("cache", "verify", *project.options)
    assert result.exit_code == 0
    skipped, summary = result.stdout.splitlines()
    assert skipped.startswith(f"{store}: not read; ")
    assert summary == f"{len(every) - 1} stores read, 1 skipped, 0 faults"
    shard = store / "masks" / "c.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    (project.cache / "images" / "site_c" / "val.zarr" / "images" / "zarr.json").unlink()
    result = call("cache", "verify", *project.options, "--json")
    assert result.exit_code == 5
    rows = json.loads(result.stdout)["faults"][1].pop("rows")
    other = f"{project.cache}/images/site_c/val.zarr: images/zarr.json: missing"
    assert result.stderr.splitlines() == [
        f"error: {other}",
        f"error: {store}: masks rows 0..{rows[1]}: damaged",
    ]
    result = call("cache", "repair", *project.options)
    assert result.exit_code == 5
    assert result.stdout.splitlines() == [
        f"{store}: masks rows 0..{rows[1]}: damaged; mended",
        f"1 fault mended, {rows[1] + 1} images labelled",
    ]
    assert result.stderr == f"error: {other}; run `samfed prepare` again\n"
    assert listing(project.cache / "sam") == before
    shard.unlink()
    answer("prepare", *project.options, "--with-oracle")
    text = fails(2, "cache", "repair", "--scheduler", "no.json", *project.options)
    assert text.startswith("--scheduler no.json: no address of a dask scheduler")
    assert answer("precompute-sam", *project.options)["labelled"] == rows[1] + 1
    assert listing(project.cache / "sam") == before
    assert answer("cache", "repair", *project.options)["remaining"] == []
    assert answer("cache", "verify", *project.options)["faults"] == []


@pytest.mark.parametrize("command", ["precompute-sam", "cache repair"])
def test_one_place_to_label(project: Project, command: str) -> None:
    where = ("--scheduler", "tcp://127.0.0.1:1", "--workers", "2")
    text = fails(2, *command.split(), *where, *project.options)
    assert text == "--scheduler and --workers: give one of them"


def test_cache_info(project: Project) -> None:
    found = answer("cache", "info", *project.options)
    assert [store["state"] for store in found["stores"]] == ["complete"] * 5
    assert found["archive"] == []
    text = call("cache", "info", *project.options).stdout
    assert text.count("complete; of the present teacher and partition") == 5


def test_cache_prune_asks_first(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    prune = ("cache", "prune", *project.options)
    assert call(*prune).stdout == "nothing to remove\n"
    aside = project.cache / "archive" / "site_a" / "x.zarr"
    aside.mkdir(parents=True)
    (aside / "zarr.json").write_text("{}")
    line = f"{aside}: 0.0 MiB, moved aside"
    cannot = "cache prune: cannot ask here; give --yes to remove, --dry-run to list"
    assert fails(2, *prune) == cannot
    assert fails(2, *prune, "--json") == cannot
    assert call(*prune, "--dry-run").stdout == f"{line}\n"
    monkeypatch.setattr("pipeline.console.can_ask", lambda: True)
    for said, code in (("n\n", 1), ("y\n", 0)):
        assert aside.is_dir()
        result = call(*prune, stdin=said)
        assert result.exit_code == code
        assert result.stderr.startswith(f"{line}\nRemove all of these? [y/N]: ")
    assert result.stdout == f"{line}\n1 removed\n"
    assert not aside.exists()
    assert answer(*prune, "--yes") == {"found": [], "removed": 0}


def test_a_store_that_another_process_writes(project: Project) -> None:
    with writer_lock(project.cache / "locks" / "sam-site_a.lock"):
        text = fails(5, "precompute-sam", *project.options, "--client", "site_a")
    assert text.startswith(f"{project.cache}/locks/sam-site_a.lock: process ")
    assert text.endswith(" holds this lock; wait for it or stop it")


def test_resume_and_restart(project: Project) -> None:
    assert fails(2, "federate", *project.options, "--resume", "--restart") == (
        "--resume and --restart: give one of them"
    )
    run = project.cache / "runs" / "new"
    assert fails(2, "federate", *project.options, "--resume", "--name", "new") == (
        f"--resume: found no checkpoint in {run}; leave --resume out"
    )
    assert not run.exists()


def test_an_unknown_method_of_the_demo(tmp_path: Path) -> None:
    assert fails(2, "demo", "--out", tmp_path / "demo", "--method", "magic") == (
        "--method magic: no such method; expected one of start, supervised, adabn, fedavg_ssl, "
        "semifl, fed_mean_teacher, fedmd, rc_rf, sam_only, sam_soft, sam_fed, shuffled, oracle"
    )
    text = fails(2, "demo", "--out", tmp_path / "demo", "--method", "rc_rf")
    assert "rc_rf is for clients with networks of their own; list them in model.clients" in text
    assert not (tmp_path / "demo").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(project: Project) -> None:
    cache = project.params / "below"  # a file is no folder, for root too
    text = fails(1, "prepare", *project.options, "--set", f"cache.root={cache}")
    assert text == (
        f"{cache}: Not a directory; check the path, its permissions and the space left on the disk"
    )


@pytest.mark.parametrize("at", [0, -1])
def test_a_damaged_image_leaves_nothing_half_written(project: Project, at: int) -> None:
    path = sorted((project.images / "images").iterdir())[at]
    path.write_bytes(path.read_bytes()[:60])
    before = listing(project.cache)
    text = fails(3, "prepare", *project.options)
    assert text.startswith(f"{path}: ")
    assert text.endswith("; replace or remove it")
    assert listing(project.cache) == before


def test_an_image_changed_after_prepare(project: Project) -> None:
    """Stage one labels the others, names this one, and says so with its exit code."""
    partition = json.loads((project.cache / "partition.json").read_text())
    image = partition["images"][partition["clients"]["site_a"]["train"][0]]["image"]
    shutil.rmtree(project.cache / "sam" / "site_a.zarr")
    path = project.images / image
    path.write_bytes(path.read_bytes() + b"\0")
    result = call("precompute-sam", *project.options, "--client", "site_a", "--json")
    assert result.exit_code == 6
    assert result.stderr.splitlines() == [
        f"error: {path}: changed since `samfed prepare`; run `samfed prepare` again",
        "error: 1 images have no label; the others are done",
    ]
    said = json.loads(result.stdout)
    assert said["labelled"] == len(partition["clients"]["site_a"]["train"]) - 1
    text = fails(4, "federate", *project.options)
    assert text.endswith(" rows are labelled; run `samfed precompute-sam` to finish it")


def test_json_has_no_bare_nan_and_keeps_the_order() -> None:
    """The one no reader of JSON but Python's would take; by the other, classes have their order."""

    class Odd:
        def text(self) -> str:
            return "nan"

        def as_json(self) -> dict[str, Any]:
            return {"interval": [0.5, float("inf")], "dice": float("nan")}

    app = typer.Typer()
    command(app, params_file=False)(lambda config: Odd())
    result = CliRunner().invoke(app, ["--json"])
    assert result.stdout == '{"interval": [0.5, null], "dice": null}\n'


def test_debug_shows_the_exception(tmp_path: Path) -> None:
    result = call("prepare", "--params", tmp_path / "none.yaml", "--debug")
    assert isinstance(result.exception, ConfigError)
    command = [sys.executable, "-m", "cli", "prepare", "--params", "none.yaml", "--debug"]
    real = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert real.returncode == 1
    assert "Traceback (most recent call last)" in real.stderr
    assert "ConfigError: none.yaml: no such file" in real.stderr


def test_interrupted(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.data.prepare.prepare", interrupt)
    result = call("prepare", *project.options)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: run the same command again to continue\n"


def test_locks_of_another_host_are_listed_then_cleared(tmp_path: Path) -> None:
    project = Project(tmp_path)
    lock = project.cache / "locks" / "prepare.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    holders = {str(lock): "process 7 on host 'elsewhere'"}
    assert answer("cache", "unlock", *project.options) == {"cleared": False, "locks": holders}
    assert lock.read_bytes()
    yes = ("cache", "unlock", "--yes")
    assert answer(*yes, *project.options) == {"cleared": True, "locks": holders}
    assert lock.read_bytes() == b""
