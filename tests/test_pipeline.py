"""The whole pipeline on tiny data: it runs, and a second time gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_config, write_params
from PIL import Image

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.data.prepare import prepare
from pipeline.errors import ConfigError, DataError, IdentityError, SamfedError, StageError
from pipeline.federation.averaging import Averaging
from pipeline.federation.inputs import load_inputs
from pipeline.federation.runs import Checkpoint, RunFolder
from pipeline.federation.server import federate
from pipeline.federation.views import ClientData
from pipeline.labelling.precompute import precompute
from pipeline.results.evaluate import _write_rounds, evaluate
from pipeline.results.evaluate_teacher import evaluate_teacher
from pipeline.results.final_models import FinalModels
from pipeline.results.gallery import build_gallery
from pipeline.results.report import load_run, render_report
from pipeline.sam.finetune import finetune
from pipeline.stores.label_store import LabelStore


def run_all(config: Config) -> RunFolder:
    prepare(config, with_oracle=True)
    finetune(config)
    evaluate_teacher(config)
    precompute(config)
    run = federate(config)
    evaluate(config, run)
    return run


def digest(folder: Path, *, leave_out: tuple[str, ...] = ()) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in leave_out
    }


@pytest.fixture(scope="module")
def finished(
    tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, RunFolder]:
    config = tiny_config(tiny_images, tmp_path_factory.mktemp("first"))
    return config, run_all(config)


def with_method(config: Config, method: str) -> Config:
    settings = config.federate.model_copy(update={"method": method, "name": method})
    return config.model_copy(update={"federate": settings})


def test_a_second_run_gives_the_same_bytes(
    finished: tuple[Config, RunFolder], tiny_images: Path, tmp_path: Path
) -> None:
    config, _ = finished
    again = tiny_config(tiny_images, tmp_path / "second")
    run_all(again)
    # history and rounds.csv hold seconds and params.yaml the cache's path; all else is the same
    skipped = ("history.jsonl", "rounds.csv", "params.yaml")
    first = digest(config.cache.root, leave_out=skipped)
    second = digest(again.cache.root, leave_out=skipped)
    assert any(name.startswith("sam/") for name in first)
    assert "runs/sam_fed/models/global.safetensors" in first
    assert "runs/sam_fed/metrics.json" in first
    assert {k: v for k, v in first.items() if k in second} == second


def test_the_input_folder_is_only_read(
    finished: tuple[Config, RunFolder], tiny_images: Path, tmp_path: Path
) -> None:
    before = digest(tiny_images)
    prepare(tiny_config(tiny_images, tmp_path))
    assert digest(tiny_images) == before


def test_another_seed_gives_another_model(
    finished: tuple[Config, RunFolder], tiny_images: Path, tmp_path: Path
) -> None:
    _, run = finished
    other = tiny_config(tiny_images, tmp_path, seed=1)
    assert run_all(other).model_path.read_bytes() != run.model_path.read_bytes()


@pytest.mark.parametrize(
    "method", ["supervised", "fedavg_ssl", "semifl", "sam_only", "shuffled", "oracle"]
)
def test_every_method_runs(finished: tuple[Config, RunFolder], method: str) -> None:
    config = with_method(finished[0], method)
    run = federate(config)
    metrics = evaluate(config, run)
    assert metrics["method"] == method
    assert 0 <= metrics["test"]["pooled"]["dice"] <= 1
    assert len(run.history()) == config.federate.rounds
    assert run.model_path.read_bytes() != finished[1].model_path.read_bytes()


def test_history_tells_what_agreement_did(finished: tuple[Config, RunFolder]) -> None:
    history = finished[1].history()
    assert [entry["round"] for entry in history] == [1, 2]
    for entry in history:
        for client in entry["clients"].values():
            assert 0 <= client["agreement"] <= 1
            assert 0 <= client["from_sam"] + client["from_client"] <= client["coverage"] <= 1
            assert client["loss"] == pytest.approx(
                client["loss_sup"]
                + entry["unlabelled_weight"] * client["loss_agree"]
                + finished[0].federate.kd_weight * client["loss_kd"],
                rel=1e-4,
            )


def test_stopping_after_any_round_changes_nothing(
    finished: tuple[Config, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = finished
    settings = config.federate.model_copy(update={"name": "stopped"})
    again = config.model_copy(update={"federate": settings})
    real, calls = Averaging.play, []

    def stop_in_round_two(self: Averaging, before: Checkpoint, number: int) -> object:
        calls.append(number)
        if number == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return real(self, before, number)

    monkeypatch.setattr(Averaging, "play", stop_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        federate(again)
    resumed = federate(again, mode="resume")
    assert calls == [1, 2, 2]  # round 1 was not computed again
    assert resumed.model_path.read_bytes() == run.model_path.read_bytes()


def test_kill_9_between_rounds_changes_nothing(
    finished: tuple[Config, RunFolder], tmp_path: Path
) -> None:
    """Killed twice, wherever it then is, and continued: the bytes of a run that never stopped."""

    def named(name: str) -> Config:
        settings = finished[0].federate.model_copy(update={"name": name, "rounds": 12})
        return finished[0].model_copy(update={"federate": settings})

    whole = federate(named("whole"))
    params = write_params(tmp_path / "params.yaml", named("killed"))
    killed = RunFolder(whole.path.parent / "killed")
    for number in (2, 5):
        command = [sys.executable, "-m", "cli", "federate", "--params", str(params)]
        with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as process:
            while len(killed.history()) < number and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not killed.model_path.exists()
    assert federate(named("killed"), mode="resume").model_path.read_bytes() == (
        whole.model_path.read_bytes()
    )
    assert [entry["round"] for entry in killed.history()] == [*range(1, 13)]


def test_labels_are_computed_once(finished: tuple[Config, RunFolder]) -> None:
    config, _ = finished
    before = digest(config.cache.root / "sam")
    result = precompute(config)
    assert result.labelled == 0
    assert result.already_labelled > 0
    assert digest(config.cache.root / "sam") == before


def test_a_clients_training_store_holds_no_labels(finished: tuple[Config, RunFolder]) -> None:
    images = finished[0].cache.root / "images"
    clients = [folder for folder in images.iterdir() if folder.name != "server"]
    assert len(clients) == 4
    for folder in clients:
        assert not (folder / "train.zarr" / "labels").exists()
        assert (folder / "test.zarr" / "labels").is_dir()


def test_report_shows_truth_sam_and_client(finished: tuple[Config, RunFolder]) -> None:
    config, run = finished
    rows = build_gallery(config, run)
    assert rows[0].truth is not None
    assert all(row.sam is not None and row.weight is not None for row in rows)
    page = render_report([load_run(run.path)], rows, title="tiny")
    assert "sam_fed" in page
    for shown in ("Foreground agreement", "Gradient norm", "Drift, %", "MB up", "Trust in SAM"):
        assert shown in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_metrics_file_has_the_promised_shape(finished: tuple[Config, RunFolder]) -> None:
    metrics = json.loads((finished[1].path / "metrics.json").read_text())
    assert set(metrics) == {"method", "seed", "rounds", "test"}
    assert set(metrics["test"]) == {"pooled", "clients", "client_mean"}
    assert {"dice", "iou", "hd95", "assd", "n"} <= set(metrics["test"]["pooled"])
    assert metrics["test"]["pooled"]["n"] == sum(
        client["n"] for client in metrics["test"]["clients"].values()
    )


def test_rounds_as_a_table(tmp_path: Path) -> None:
    """Means and sums over the clients of a round; what nobody reported is empty."""
    said = {"loss": 1.0, "agreement": 0.5, "coverage": None, "drift": 0.25, "gradient_norm": 2.0}
    sent = {"bytes_up": 12_345_678, "bytes_down": 3}
    clients = {"a": {**said, **sent}, "b": {**sent, "loss": 3.0, "pseudo_label_dice": 0.75}}
    history = [
        {"round": 1, "clients": clients, "val": {"dice": 0.5}, "seconds": 1.5},
        {"round": 2, "clients": {"b": {"loss": 2.0}}, "val": {"dice": None}, "seconds": 2.5},
    ]
    _write_rounds(tmp_path / "rounds.csv", history)
    assert (tmp_path / "rounds.csv").read_text().splitlines() == [
        "round,val_dice,loss,agreement,coverage,pseudo_label_dice,gradient_norm,drift,"
        "bytes_up,bytes_down,seconds",
        "1,0.5,2,0.5,,0.75,2,0.25,24691356,6,1.5",
        "2,,2,,,,,,,,2.5",
    ]


def test_two_classes_grey_images_and_a_partition_read_back(
    tiny_images: Path, tmp_path: Path
) -> None:
    """Another data set: 16-bit grey TIFFs, two foreground classes, Dirichlet clients."""
    root = tmp_path / "other"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for path in sorted((tiny_images / "images").iterdir())[:20]:
        grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(root / "images" / f"{path.stem}.tif")
        mask = (np.asarray(Image.open(tiny_images / "masks" / path.name)) > 0).astype(np.uint8)
        mask[:, mask.shape[1] // 2 :] *= 2
        Image.fromarray(mask).save(root / "masks" / path.name)
    drawn = {"scheme": "dirichlet", "clients": 2, "alpha": 50.0}
    config = tiny_config(root, tmp_path / "cache", data={"num_classes": 2}, partition=drawn)
    run = run_all(config)
    store = LabelStore(config.cache.root / "sam" / "client_00.zarr")
    assert store.identity.num_classes == 2
    assert store.read().masks.max() <= 2
    assert len(build_gallery(config, run)) > 0
    read_back = tiny_config(
        root,
        tmp_path / "again",
        data={"num_classes": 2},
        partition={"file": str(config.cache.root / "partition.json")},
    )
    assert prepare(read_back).partition == load_partition(config.cache.root / "partition.json")


def test_labels_of_an_older_teacher_are_refused(
    finished: tuple[Config, RunFolder], tiny_images: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_images, tmp_path)
    prepare(config)
    finetune(config)
    precompute(config)
    other = tiny_config(tiny_images, tmp_path, sam={"lora_rank": 3})
    finetune(other)
    with pytest.raises(IdentityError, match=r"adapter_sha256 is .*run `samfed precompute-sam`"):
        federate(other)
    old = digest(config.cache.root / "sam")
    precompute(other)
    assert digest(config.cache.root / "sam") != old
    federate(other)
    finetune(config)
    result = precompute(config)  # the first teacher's labels are taken back, not computed again
    assert result.labelled == 0
    assert digest(config.cache.root / "sam") == old


def test_a_client_that_sends_nan_is_rejected_and_named(
    finished: tuple[Config, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished[0].model_copy(
        update={"federate": finished[0].federate.model_copy(update={"name": "nan", "rounds": 1})}
    )
    from pipeline.federation import averaging

    real = averaging.local_update
    broken = {"site_b"}

    def update(model: object, weights: object, client: ClientData, *rest: object, **more: object):  # type: ignore[no-untyped-def]
        result = real(model, weights, client, *rest, **more)  # type: ignore[arg-type]
        if client.name in broken:
            next(iter(result.weights.values())).fill_(float("nan"))
        return result

    monkeypatch.setattr(averaging, "local_update", update)
    run = federate(config)
    warnings = run.history()[0]["warnings"]
    assert any(w.startswith("site_b: update rejected, 'encoder.") for w in warnings)
    assert all(bool(v.isfinite().all()) for v in run.load_model().values())

    broken |= {"site_a", "site_c", "site_d"}
    again = config.model_copy(
        update={"federate": config.federate.model_copy(update={"name": "all_nan"})}
    )
    with pytest.raises(SamfedError, match="no client sent a usable update"):
        federate(again)


def test_a_changed_partition_is_noticed_everywhere(tiny_images: Path, tmp_path: Path) -> None:
    """Another split makes training images of test images: nothing older may go on with it."""
    config = tiny_config(tiny_images, tmp_path)
    run = run_all(config)
    other = tiny_config(tiny_images, tmp_path, seed=1)
    prepare(other)
    for stage in (precompute, evaluate_teacher, federate):
        with pytest.raises(IdentityError, match="adapted on another server set; run `samfed fin"):
            stage(other)
    with pytest.raises(IdentityError, match=r"made on another partition than .*partition\.json"):
        evaluate(other, run)
    with pytest.raises(IdentityError, match="made on another partition"):
        build_gallery(other, run)


def test_another_number_of_classes_is_noticed(
    finished: tuple[Config, RunFolder],
) -> None:
    config = finished[0]
    other = config.model_copy(update={"data": config.data.model_copy(update={"num_classes": 2})})
    with pytest.raises(IdentityError, match="num_classes is 1, the settings ask for 2"):
        precompute(other)
    with pytest.raises(IdentityError, match="num_classes is 1, the run asks for 2"):
        federate(with_method(other, "supervised"))


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


def test_lost_history_starts_the_run_again(finished: tuple[Config, RunFolder]) -> None:
    settings = finished[0].federate.model_copy(update={"name": "lost"})
    config = finished[0].model_copy(update={"federate": settings})
    run = federate(config)
    model, rounds = run.model_path.read_bytes(), len(run.history())
    (run.path / "history.jsonl").unlink()
    again = federate(config)
    assert len(again.history()) == rounds
    assert again.model_path.read_bytes() == model


def test_clients_that_sit_out_keep_their_state(finished: tuple[Config, RunFolder]) -> None:
    settings = finished[0].federate.model_copy(update={"name": "some", "clients_per_round": 2})
    run = federate(finished[0].model_copy(update={"federate": settings}))
    assert [len(entry["clients"]) for entry in run.history()] == [2, 2]
    assert run.model_path.read_bytes() != finished[1].model_path.read_bytes()
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    seen = {name for entry in run.history() for name in entry["clients"]}
    for name, state in checkpoint.client_states.items():
        assert bool(state[:2].any()) == (name in seen)  # class confidences start at 0


def test_the_median_is_another_model(finished: tuple[Config, RunFolder]) -> None:
    settings = finished[0].federate.model_copy(update={"name": "median", "aggregation": "median"})
    run = federate(finished[0].model_copy(update={"federate": settings}))
    assert run.model_path.read_bytes() != finished[1].model_path.read_bytes()


def test_an_audit_reports_and_changes_nothing(finished: tuple[Config, RunFolder]) -> None:
    settings = finished[0].federate.model_copy(update={"name": "audit", "audit": True})
    run = federate(finished[0].model_copy(update={"federate": settings}))
    assert run.model_path.read_bytes() == finished[1].model_path.read_bytes()
    for entry in run.history():
        for client in entry["clients"].values():
            assert 0 <= client["pseudo_label_dice"] <= 1
    assert "pseudo_label_dice" not in finished[1].history()[0]["clients"]["site_a"]


def test_history_tells_what_a_round_costs(finished: tuple[Config, RunFolder]) -> None:
    sent = sum(value.nbytes for value in finished[1].load_model().values())
    for entry in finished[1].history():
        for client in entry["clients"].values():
            assert client["bytes_up"] == client["bytes_down"] == sent
            assert 0 < client["seconds"] <= entry["seconds"]
            assert client["gradient_norm"] > 0
            assert client["drift"] > 0
            assert {
                "sam_inverse_temperature",
                "client_inverse_temperature",
                "conflict_log_odds",
            } <= set(client)


def test_inconsistent_sam_is_named_in_the_first_round(finished: tuple[Config, RunFolder]) -> None:
    config = finished[0]
    store = LabelStore(config.cache.root / "sam" / "site_b.zarr")
    assert store.statistics is not None
    min_threshold = config.precompute.model_copy(
        update={"warn_consistency": store.statistics["flip_dice"] + 1e-6}
    )
    strict = config.model_copy(update={"precompute": min_threshold})
    named = strict.federate.model_copy(update={"name": "doubts"})
    history = federate(strict.model_copy(update={"federate": named})).history()
    assert any(w.startswith("site_b: SAM is inconsistent") for w in history[0]["warnings"])
    assert not any("inconsistent" in w for w in history[1]["warnings"])


def test_what_only_warns_does_not_end_a_run(finished: tuple[Config, RunFolder]) -> None:
    config, run = finished
    lenient = config.model_copy(
        update={
            "federate": config.federate.model_copy(update={"warn_drift": 9.0, "link_mbit": 1.0}),
            "agreement": config.agreement.model_copy(
                update={"warn_agreement": 0.01, "warn_coverage": 0.01}
            ),
        }
    )
    assert load_inputs(lenient).fingerprint == load_inputs(config).fingerprint
    assert federate(lenient, mode="resume").history() == run.history()
    stricter = config.agreement.model_copy(update={"max_threshold": 0.9})
    other = config.model_copy(update={"agreement": stricter})
    assert load_inputs(other).fingerprint != load_inputs(config).fingerprint


def test_truth_is_read_only_where_it_scores_something(tiny_images: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_images, tmp_path, federate={"audit": True, "method": "fedavg_ssl"})
    prepare(config)
    with pytest.raises(StageError, match="prepare --with-oracle"):
        federate(config)
    supervised = with_method(config, "supervised")  # it has no pseudo-labels
    federate(supervised)
    prepare(config, with_oracle=True)
    run = federate(config)
    prepare(config)  # takes the truth away again
    assert build_gallery(config, run)  # which shows none of it


def test_a_final_model_needs_no_pretrained_weights(
    finished: tuple[Config, RunFolder], tmp_path: Path
) -> None:
    """They were the start; a run that is evaluated elsewhere has weights of its own."""
    _, run = finished
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    made = yaml.safe_load((copy.path / "params.yaml").read_text())
    made["model"]["encoder_weights"] = str(tmp_path / "gone.safetensors")
    (copy.path / "params.yaml").write_text(yaml.safe_dump(made))
    model = FinalModels(copy, copy.config(), ["site_a"]).of("site_a")
    for name, value in run.load_model().items():
        assert torch.equal(model.state_dict()[name], value)
