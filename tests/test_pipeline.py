"""The whole pipeline on tiny data: it runs, and a second time gives the same bytes."""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    digest,
    run_stages,
    tiny_config,
    write_params,
)
from forks import Forks
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, DataError, IdentityError, StageError
from pipeline.federation.inputs import load_client, load_inputs
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import EXAMPLES, LIKENESS, federate
from pipeline.federation.targets import sam_distribution
from pipeline.labelling.precompute import precompute
from pipeline.labelling.quality import statistics
from pipeline.results.evaluate import evaluate, final_model, round_table
from pipeline.results.evaluate_teacher import evaluate_teacher
from pipeline.results.gallery import load_gallery
from pipeline.results.report import write_report
from pipeline.sam.finetune import finetune
from pipeline.stores.label_store import LabelStore
from pipeline.stores.optional_arrays import read_levels


@pytest.fixture
def run(shared_pipeline: Config) -> RunFolder:
    """The run that all tests share; tests only read it."""
    return RunFolder(shared_pipeline.cache.root / "runs" / "sam_fed")


def changed(config: Config, name: str, **federate: object) -> Config:
    """Return ``config`` for a run of another name, with some keys of ``federate`` replaced."""
    settings = config.federate.model_copy(update={"name": name, **federate})
    return config.model_copy(update={"federate": settings})


def test_a_second_run_gives_the_same_bytes(
    shared_pipeline: Config, tiny_images: Path, tmp_path: Path
) -> None:
    again = tiny_config(tiny_images, tmp_path / "second")
    images = digest(tiny_images)
    run_stages(again)
    assert digest(tiny_images) == images  # the input folder is only read
    # history, rounds.csv and what was sent hold times, params.yaml the cache's path; all else is
    # the same
    sent = [path.name for path in (again.cache.root / "sent").rglob("*.jsonl")]
    skipped = ("history.jsonl", "rounds.csv", "params.yaml", *sent)
    first = digest(shared_pipeline.cache.root, leave_out=skipped)
    assert any(name.startswith("sam/") for name in first)
    assert "runs/sam_fed/models/global.safetensors" in first
    assert "runs/sam_fed/metrics.json" in first
    assert digest(again.cache.root, leave_out=skipped) == first


def test_another_seed_gives_another_model(labelled: Config, run: RunFolder) -> None:
    other = federate(labelled.model_copy(update={"seed": 1}))
    assert other.model_path.read_bytes() != run.model_path.read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        "supervised", "adabn", "fedavg_ssl", "semifl", "fed_mean_teacher", "sam_only", "sam_soft",
        "shuffled", "oracle",
    ],
)  # fmt: skip
def test_every_method_runs(
    shared_pipeline: Config, labelled: Config, run: RunFolder, method: str
) -> None:
    config = changed(labelled, method, method=method)
    other = federate(config)
    found = evaluate(config, other)
    assert found.method == method
    assert 0 <= found.test["pooled"]["dice"] <= 1
    assert len(other.history()) == config.federate.rounds
    assert other.model_path.read_bytes() != run.model_path.read_bytes()


def test_history_tells_what_agreement_did(run: RunFolder) -> None:
    history = run.history()
    assert [entry["round"] for entry in history] == [1, 2]
    for entry in history:
        for client in entry["clients"].values():
            assert 0 <= client["agreement"] <= 1
            assert 0 <= client["from_sam"] + client["from_client"] <= client["coverage"] <= 1
            assert client["loss"] == pytest.approx(
                client["loss_sup"] + entry["unlabelled_weight"] * client["loss_agree"], rel=1e-4
            )


def test_stopping_after_a_round_changes_nothing(labelled: Config, run: RunFolder) -> None:
    rounds, told = list[int](), list[dict[str, object]]()
    shown: dict[str, list[int]] = defaultdict(list)

    def stop(what: str, done: int, total: int, note: str = "") -> None:
        shown[what].append(done)
        if what.endswith("rounds"):
            rounds.append(done)
            if rounds == [0, 1]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(labelled, progress=stop)
    resumed = federate(labelled, mode="resume", progress=stop, track=told.append)
    assert told == resumed.history()  # round 1 too
    assert rounds == [0, 1, 1, 2]  # round 1 was not computed again
    assert shown[EXAMPLES] == [0, 1, 2, 3, 4]  # what comes after the rounds may take minutes
    assert shown[LIKENESS] == [0, 1, 2, 3, 4]  # too few images to be asked for their sums
    assert resumed.model_path.read_bytes() == run.model_path.read_bytes()
    history = resumed.path / "history.jsonl"
    history.write_bytes(history.read_bytes().splitlines(keepends=True)[0])
    kept = digest(resumed.path)
    with pytest.raises(DataError, match=r"found 1 rounds, expected at least 2, .* --restart`"):
        federate(labelled)
    assert digest(resumed.path) == kept  # a damaged history costs no checkpoint


def test_kill_9_between_rounds_changes_nothing(
    labelled: Config, tmp_path: Path, forks: Forks
) -> None:
    """Killed twice, wherever it then is, and continued: the bytes of a run that never stopped."""
    whole = federate(changed(labelled, "whole", rounds=6, local_steps=1))
    config = changed(labelled, "killed", rounds=6, local_steps=1)
    params = write_params(tmp_path / "params.yaml", config)
    killed = RunFolder(whole.path.parent / "killed")
    for number in (1, 3):
        process = forks.start("samfed", "federate", "--params", params)
        while len(killed.history()) < number and process.is_running():
            time.sleep(0.01)
        process.kill(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not killed.model_path.exists()
    assert federate(config, mode="resume").model_path.read_bytes() == whole.model_path.read_bytes()
    assert [entry["round"] for entry in killed.history()] == [*range(1, 7)]


def test_labels_are_computed_once(labelled: Config) -> None:
    before = digest(labelled.cache.root / "sam")
    result = precompute(labelled)
    assert result.labelled == 0
    assert result.already_labelled > 0
    assert digest(labelled.cache.root / "sam") == before


def test_a_clients_training_store_holds_no_labels(shared_pipeline: Config) -> None:
    images = shared_pipeline.cache.root / "images"
    clients = [folder for folder in images.iterdir() if folder.name != "server"]
    assert len(clients) == 4
    for folder in clients:
        assert not (folder / "train.zarr" / "labels").exists()
        assert (folder / "test.zarr" / "labels").is_dir()


def test_metrics_file_has_the_promised_shape(run: RunFolder) -> None:
    metrics = json.loads((run.path / "metrics.json").read_text())
    assert set(metrics) == {
        *("method", "seed", "rounds", "test", "tolerance", "data", "teacher", "format")
    }
    # of this very teacher, as evaluate-sam measured it
    assert metrics["teacher"]["ece"] > 0
    owned = {owner: of["splits"] for owner, of in metrics["data"].items()}
    partition = load_partition(run.path.parents[1] / "partition.json")
    assert owned == {
        owner: {split: len(ids) for split, ids in partition.splits(owner).items()}
        for owner in partition.owners
    }
    shown = {
        (each.client, each.image_id) for each in load_gallery(run.path / "gallery.safetensors")
    }
    tested = {(name, i) for name, part in partition.clients.items() for i in part.test}
    assert shown <= tested
    assert {client for client, _ in shown} == {client for client, _ in tested}
    assert set(metrics["test"]) == {"pooled", "clients", "client_mean"}
    assert {"dice", "iou", "hd95", "assd", "n"} <= set(metrics["test"]["pooled"])
    assert metrics["test"]["pooled"]["n"] == sum(
        client["n"] for client in metrics["test"]["clients"].values()
    )


def test_rounds_as_a_table() -> None:
    """Means and sums over the clients of a round; what nobody reported is empty."""
    said = {"loss": 1.0, "agreement": 0.5, "coverage": None, "drift": 0.25, "gradient_norm": 2.0}
    sent = {"bytes_up": 12_345_678, "bytes_down": 3}
    clients = {"a": {**said, **sent}, "b": {**sent, "loss": 3.0, "pseudo_label_dice": 0.75}}
    history = [
        {"round": 1, "clients": clients, "val": {"dice": 0.5}, "seconds": 1.5},
        {"round": 2, "clients": {"b": {"loss": 2.0}}, "val": {"dice": None}, "seconds": 2.5},
    ]
    assert round_table(history).splitlines() == [
        "round,val_dice,loss,agreement,coverage,pseudo_label_dice,gradient_norm,drift,"
        "bytes_up,bytes_down,seconds",
        "1,0.5,2,0.5,,0.75,2,0.25,24691356,6,1.5",
        "2,,2,,,,,,,,2.5",
    ]


def check_scores_of_two_classes(config: Config) -> None:
    """Every class has its scores, every patient a line, and distances are in mm too."""
    folder = config.cache.root / "runs" / "sam_fed"
    test = json.loads((folder / "metrics.json").read_text())["test"]
    pooled = test["pooled"]
    images, groups = (
        list(csv.DictReader((folder / f"per_{kind}.csv").read_text().splitlines()))
        for kind in ("image", "group")
    )
    for found in (pooled, pooled["groups"], *test["clients"].values()):
        assert list(found["classes"]) == ["west", "east"]  # not by name
    in_mm = [client["hd95_mm"] for client in test["clients"].values()]
    assert test["client_mean"]["hd95_mm"] == pytest.approx(np.mean(in_mm))
    assert len(images) == sum(int(group["images"]) for group in groups) == 2 * len(groups)
    assert pooled["groups"]["n"] == len(groups)
    for name, scores in pooled["classes"].items():
        dice = [float(line[f"{name}: dice"]) for line in images]
        assert scores["n"] == sum(not math.isnan(each) for each in dice)
        assert scores["dice"] == pytest.approx(np.nanmean(dice), abs=1e-5)
    # 48 rows of 0.5 mm and 48 or more columns of 2 mm are squashed to 32 x 32 pixels
    entry = load_partition(config.cache.root / "partition.json").images[images[0]["image_id"]]
    with Image.open(config.data.root / entry.image) as image:
        assert entry.size_mm == (image.height * 0.5, image.width * 2)
        low, high = image.height * 0.5 / 32, image.width * 2 / 32
    for line in images:
        px, mm = float(line["hd95"]), float(line["hd95_mm"])
        assert low * px <= mm + 1e-4 <= high * px + 1e-3


def test_two_classes_grey_images_and_a_partition_read_back(
    tiny_images: Path, tmp_path: Path
) -> None:
    """Another data set: 16-bit grey TIFFs of known size, patients, two classes, drawn clients."""
    root = tmp_path / "other"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for path in sorted((tiny_images / "images").iterdir())[:20]:
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(root / "images" / f"{path.stem}.tif")
        mask = (np.asarray(Image.open(tiny_images / "masks" / path.name)) > 0).astype(np.uint8)
        mask[:, mask.shape[1] // 2 :] *= 2
        Image.fromarray(mask).save(root / "masks" / path.name)
    ids = sorted(path.stem for path in (root / "images").iterdir())
    sites = [f"{image_id},north,p{number // 2}" for number, image_id in enumerate(ids)]
    (root / "sites.csv").write_text("\n".join(["image_id,site,group", *sites]))
    spacing = [f"{image_id},0.5,2" for image_id in ids]
    (root / "spacing.csv").write_text("\n".join(["image_id,row_mm,column_mm", *spacing]))
    drawn = {"scheme": "dirichlet", "clients": 2, "alpha": 50.0}
    data = {"num_classes": 2, "class_names": ["west", "east"]}
    config = tiny_config(root, tmp_path / "cache", data=data, partition=drawn)
    run_stages(config)
    check_scores_of_two_classes(config)
    store = LabelStore(config.cache.root / "sam" / "client_00.zarr")
    assert store.identity.num_classes == 2
    assert store.read().masks.max() <= 2
    check_probabilities_of_two_classes(config, store)
    report = write_report([RunFolder(config.cache.root / "runs" / "sam_fed")])
    assert report.path.is_file()
    read_back = tiny_config(
        root,
        tmp_path / "again",
        data=data,
        partition={"file": str(config.cache.root / "partition.json")},
    )
    assert prepare(read_back).partition == load_partition(config.cache.root / "partition.json")


def check_probabilities_of_two_classes(config: Config, store: LabelStore) -> None:
    """Stage one keeps every class's, rounds read them, and a run without them is another one."""
    inputs = load_inputs(config)
    client, *_ = inputs.contexts
    given = load_client(client)
    assert np.array_equal(given.probabilities, read_levels(store.path, range(len(store))))
    distribution = sam_distribution(given, 3)
    assert torch.equal(distribution.argmax(dim=1), given.masks.long())
    rest = 1 - distribution.amax(dim=1)
    assert (rest - 2 * distribution.amin(dim=1)).max() > 0.1, "the other two do not share evenly"

    shuffled = config.model_copy(update={"seed": 1})  # seed 0 leaves these few where they are
    shuffled = changed(shuffled, "shuffled", method="shuffled")
    control = load_client(replace(client, config=shuffled))
    assert not torch.equal(control.masks, given.masks)
    assert torch.equal(sam_distribution(control, 3).argmax(dim=1), control.masks.long())

    without = {"probabilities": False}
    plain = config.model_copy(update={"precompute": config.precompute.model_copy(update=without)})
    assert load_inputs(plain).fingerprint != inputs.fingerprint
    assert load_client(replace(client, config=plain)).probabilities is None

    for other, reads in (("sam_only", False), ("sam_soft", True)):
        asked = changed(config, other, method=other)
        assert (load_client(replace(client, config=asked)).probabilities is not None) == reads
    bare = changed(plain, "sam_only", method="sam_only")
    only = changed(config, "sam_only", method="sam_only")
    assert load_inputs(bare).fingerprint == load_inputs(only).fingerprint


def test_labels_of_an_older_teacher_are_refused(labelled: Config, run: RunFolder) -> None:
    other = labelled.model_copy(update={"sam": labelled.sam.model_copy(update={"lora_rank": 3})})
    finetune(other)
    with pytest.raises(IdentityError, match=r"adapter_sha256 is .*run `samfed precompute-sam`"):
        federate(other)
    old = digest(labelled.cache.root / "sam")
    precompute(other)
    assert digest(labelled.cache.root / "sam") != old
    assert federate(other).model_path.read_bytes() != run.model_path.read_bytes()
    finetune(labelled)
    result = precompute(labelled)  # the first teacher's labels are taken back, not computed again
    assert result.labelled == 0
    assert digest(labelled.cache.root / "sam") == old


def test_a_changed_partition_is_noticed_everywhere(finished: Config) -> None:
    """Another split makes training images of test images: nothing older may go on with it."""
    other = finished.model_copy(update={"seed": 1})
    prepare(other)
    for stage in (precompute, evaluate_teacher, federate):
        with pytest.raises(IdentityError, match="adapted on another server set; run `samfed fin"):
            stage(other)
    run = RunFolder(finished.cache.root / "runs" / "sam_fed")
    with pytest.raises(IdentityError, match=r"made on another partition than .*partition\.json"):
        evaluate(other, run)


def test_another_number_of_classes_is_noticed(labelled: Config) -> None:
    data = labelled.data.model_copy(update={"num_classes": 2})
    other = labelled.model_copy(update={"data": data})
    with pytest.raises(IdentityError, match="num_classes is 1, the settings ask for 2"):
        precompute(other)
    with pytest.raises(IdentityError, match="num_classes is 1, the run asks for 2"):
        federate(changed(other, "supervised", method="supervised"))


def test_a_mask_that_changed_since_prepare_is_noticed(tiny_images: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(tiny_images, root)
    config = tiny_config(root, tmp_path / "cache")
    partition = prepare(config).partition
    entry = partition.images[partition.server.train[0]]
    assert entry.mask is not None
    mask = np.asarray(Image.open(root / entry.mask))
    Image.fromarray(255 - mask).save(root / entry.mask)
    with pytest.raises(DataError, match=r"changed since `samfed prepare`"):
        finetune(config)


def test_the_input_folder_is_never_the_cache(tiny_images: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(tiny_images, root)
    before = digest(root)
    for cache in (root, root / "images", root / "images" / "deep"):
        with pytest.raises(ConfigError, match=r"lies in data\.root"):
            prepare(tiny_config(root, cache))
    assert digest(root) == before


def test_a_lost_history_is_an_error_and_a_restart_its_way_out(
    finished: Config, run: RunFolder
) -> None:
    (finished.cache.root / "runs" / "sam_fed" / "history.jsonl").unlink()
    with pytest.raises(DataError, match=r"found 0 rounds, expected at least 2, .* --restart`"):
        federate(finished)
    again = federate(finished, mode="restart")
    assert len(again.history()) == len(run.history())
    assert again.model_path.read_bytes() == run.model_path.read_bytes()


def test_clients_that_sit_out_keep_their_state(labelled: Config, run: RunFolder) -> None:
    some = federate(changed(labelled, "some", clients_per_round=2))
    assert [len(entry["clients"]) for entry in some.history()] == [2, 2]
    assert some.model_path.read_bytes() != run.model_path.read_bytes()
    checkpoint = some.load_checkpoint()
    assert checkpoint is not None
    last = {name: entry["round"] for entry in some.history() for name in entry["clients"]}
    assert checkpoint.client_rounds == last
    kept = {
        path.parent.name
        for number, name in ((number, name) for name, number in last.items())
        for path in (some.path / "clients" / name).glob(f"round_{number:04d}.safetensors")
    }
    assert kept == set(last)


def test_the_median_is_another_model(labelled: Config, run: RunFolder) -> None:
    median = federate(changed(labelled, "median", aggregation="median"))
    assert median.model_path.read_bytes() != run.model_path.read_bytes()


def test_an_audit_reports_and_changes_nothing(labelled: Config, run: RunFolder) -> None:
    audited = federate(changed(labelled, "audit", audit=True))
    assert audited.model_path.read_bytes() == run.model_path.read_bytes()
    for entry in audited.history():
        for client in entry["clients"].values():
            assert 0 <= client["pseudo_label_dice"] <= 1
    assert "pseudo_label_dice" not in run.history()[0]["clients"]["site_a"]


def test_history_tells_what_a_round_costs(run: RunFolder) -> None:
    sent = sum(value.nbytes for value in run.load_model().values())
    for entry in run.history():
        for client in entry["clients"].values():
            assert client["bytes_up"] == client["bytes_down"] == sent
            assert 0 < client["seconds"] <= entry["seconds"]
            assert client["gradient_norm"] > 0
            assert client["drift"] > 0
            assert {
                "sam_inverse_temperature",
                "client_inverse_temperature",
                "sam_bias",
            } <= set(client)


def test_inconsistent_sam_is_named_in_the_first_round(labelled: Config) -> None:
    store = LabelStore(labelled.cache.root / "sam" / "site_b.zarr")
    found = statistics(store.quality())
    assert found is not None
    limit = found["flip_dice"] + 1e-6
    strict = labelled.precompute.model_copy(update={"warn_consistency": limit})
    history = federate(labelled.model_copy(update={"precompute": strict})).history()
    (warning,) = (w for w in history[0]["warnings"] if w.startswith("SAM contradicts itself"))
    assert " site_b (0." in warning
    assert not any("contradicts" in w for w in history[1]["warnings"])


def test_what_only_warns_does_not_end_a_run(finished: Config, run: RunFolder) -> None:
    lenient = finished.model_copy(
        update={
            "federate": finished.federate.model_copy(update={"warn_drift": 9.0, "link_mbit": 1.0}),
            "agreement": finished.agreement.model_copy(
                update={"warn_agreement": 0.01, "warn_coverage": 0.01}
            ),
        }
    )
    fingerprint = load_inputs(finished).fingerprint
    assert load_inputs(lenient).fingerprint == fingerprint
    assert federate(lenient, mode="resume").history() == run.history()
    stricter = finished.agreement.model_copy(update={"calibrate": False})
    other = finished.model_copy(update={"agreement": stricter})
    assert load_inputs(other).fingerprint != fingerprint


def test_truth_is_read_only_where_it_scores_something(prepared: Config) -> None:
    config = changed(prepared, "audited", method="fedavg_ssl", audit=True, rounds=1)
    prepare(config)
    with pytest.raises(StageError, match="prepare --with-oracle"):
        federate(config)
    federate(changed(config, "supervised", method="supervised"))  # it has no pseudo-labels
    prepare(config, with_oracle=True)
    federate(config)


def test_a_final_model_needs_no_pretrained_weights(run: RunFolder, tmp_path: Path) -> None:
    """They were the start; a run that is evaluated elsewhere has weights of its own."""
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    made = yaml.safe_load((copy.path / "params.yaml").read_text())
    made["model"]["encoder_weights"] = str(tmp_path / "gone.safetensors")
    (copy.path / "params.yaml").write_text(yaml.safe_dump(made))
    model = final_model(copy, copy.config())
    for name, value in run.load_model().items():
        assert torch.equal(model.state_dict()[name], value)
