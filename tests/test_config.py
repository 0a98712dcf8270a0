"""``params.yaml``: what is read, and what a wrong key or value is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config, deciding_settings
from pipeline.errors import ConfigError
from pipeline.params import RENAMED, load_config, parse_config
from pipeline.segmentation.networks import build_model

PARAMS = Path(__file__).parent.parent / "params.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def leaves(value: Any, prefix: str = "") -> set[str]:
    if not isinstance(value, dict):
        return {prefix}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}")}


def test_the_repositorys_params_are_the_defaults() -> None:
    assert load_config(PARAMS) == Config()


def test_the_repositorys_params_spell_out_every_key() -> None:
    assert leaves(yaml.safe_load(PARAMS.read_text())) == leaves(Config().model_dump())


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((PARAMS.parent / "benchmarks").glob("*.yaml")) if p.name != "dvc.yaml"],
    ids=lambda path: path.name,
)
def test_the_benchmarks_settings_are_valid_and_their_networks_exist(path: Path) -> None:
    config = load_config(path)
    without = config.model.model_copy(update={"encoder_weights": None})
    build_model(config, seed=0, network=without)


def test_the_benchmarks_own_networks_are_valid() -> None:
    stages = yaml.safe_load((PARAMS.parent / "benchmarks" / "dvc.yaml").read_text())
    (networks,) = (entry["networks"] for entry in stages["vars"] if "networks" in entry)
    config = load_config(None, (f"model.clients={networks}", "data.image_size=128"))
    assert len(config.model.clients) == 4
    for network in config.model.clients:
        build_model(config, seed=0, network=network.model_copy(update={"encoder_weights": None}))


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == Config()
    assert load_config(None) == Config()


def test_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "precompute: {batch: 4}\n")
    assert message(path) == (
        f"{path}: unknown key 'precompute.batch'; expected one of "
        "backend, batch_size, precision, device, readers, threads, warn_consistency, warn_empty"
    )


def test_an_unknown_key_of_a_clients_network_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {clients: [{encoder: x}, {encoder_name: y}]}\n")
    assert message(path) == (
        f"{path}: unknown key 'model.clients.1.encoder_name'; expected one of "
        "architecture, encoder, encoder_depth, decoder_channels, encoder_weights"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["federate.method=rc_rf"], "rc_rf is for clients with networks of their own; list them"),
        (["federate.method=fedmd"], "fedmd is for clients with networks of their own; list them"),
        (
            ["federate.method=semifl", "model.clients=[{architecture: fpn}]"],
            "semifl averages weights, which clients with networks of their own",
        ),
        (
            ["federate.aggregation=median", "model.clients=[{architecture: fpn}]"],
            "aggregation median averages weights, which clients with networks of their own",
        ),
    ],
)
def test_a_method_that_the_clients_networks_do_not_allow(
    overrides: list[str], expected: str
) -> None:
    assert expected in message(None, *overrides)


def test_unknown_section_lists_the_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "federat: {rounds: 4}\n")
    assert message(path) == (
        f"{path}: unknown key 'federat'; expected one of seed, data, cache, synth, partition, sam, "
        "precompute, model, agreement, federate"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "federate: {rounds: many}",
            "federate.rounds: found 'many', input should be a valid integer, unable to parse "
            "string as an integer",
        ),
        ("federate: {rounds: 0}", "federate.rounds: found 0, input should be greater than 0"),
        ("seed: -1", "seed: found -1, input should be greater than or equal to 0"),
        (
            "data: {image_size: 40}",
            "data.image_size: found 40, input should be a multiple of 16",
        ),
        (
            "partition: {test_fraction: 1.5}",
            "partition.test_fraction: found 1.5, input should be less than or equal to 1",
        ),
        (
            "partition: {test_fraction: 0.6, val_fraction: 0.4}",
            "partition: val_fraction + test_fraction must leave something to train on",
        ),
        (
            "partition: {scheme: sizes}",
            "partition: scheme 'sizes' needs partition.sizes, e.g. [120, 80, 40]",
        ),
        (
            "partition: {sizes: [3, 0]}",
            "partition.sizes.1: found 0, input should be greater than 0",
        ),
        (
            "agreement: {rule: vote}",
            "agreement.rule: found 'vote', input should be 'adaptive', 'consensus', 'confident', "
            "'soft', 'sam_only' or 'client_only'",
        ),
        (
            "data:",
            "data: found None, input should be a valid dictionary or instance of DataConfig",
        ),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = write(tmp_path, text)
    assert message(path) == f"{path}: {expected}"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_of_an_earlier_version_names_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    section, key = old.split(".")
    path = write(tmp_path, f"{section}: {{{key}: 1}}\n")
    assert message(path) == f"{path}: unknown key '{old}'; it is now called {new}"
    assert message(None, f"{old}=1") == f"settings: unknown key '{old}'; it is now called {new}"
    assert new in {leaf.removeprefix(".") for leaf in leaves(Config().model_dump())}


@pytest.mark.parametrize(("text", "found"), [("[1, 2]", "list"), ("seed", "str"), ("7", "int")])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, text)
    assert message(path) == f"{path}: found {found}, expected sections of keys"


def test_invalid_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 0\ndata:\n  root: [a, b\n  image_size: 64\n")
    assert message(path) == f"{path}: not valid YAML at line 4; expected sections of keys"


@pytest.mark.parametrize("value", ["2024-99-99", "1" * 5000, "[" * 1000, "!!float x", "!!int ''"])
def test_a_value_on_which_the_yaml_library_stumbles(tmp_path: Path, value: str) -> None:
    """It raises errors that are none of its own there."""
    path = write(tmp_path, f"seed: {value}")
    assert message(path).startswith(f"{path}: not valid YAML")
    assert message(None, f"seed={value}").startswith(f"--set seed={value}: not valid YAML")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"seed: \xff\xfe\n")
    assert message(path) == f"{path}: not valid YAML; expected sections of keys"


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert message(path) == (f"{path}: no such file; run in the project's folder or pass --params")


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\nfederate: {rounds: 5}\n")
    config = load_config(
        path,
        (
            "federate.rounds=7",
            "federate.learning_rate=1e-3",  # a string to YAML 1.1, a number to us
            "partition.scheme=sizes",
            "partition.sizes=[3, 2]",
            "partition.server_site=null",
            "sam={variant: vit_b, epochs: 2}",
            "data.root=a=b",
        ),
    )
    assert config.seed == 3
    assert config.federate.rounds == 7
    assert config.federate.learning_rate == 1e-3
    assert config.partition.sizes == (3, 2)
    assert config.partition.server_site is None
    assert (config.sam.variant, config.sam.epochs) == ("vit_b", 2)
    assert config.data.root == Path("a=b")


@pytest.mark.parametrize("override", ["federate.rounds", "=5", "federate..rounds=5", ".=1", ""])
def test_an_override_without_key_or_value(override: str) -> None:
    assert message(None, override) == (
        f"--set {override}: expected section.key=value, e.g. federate.rounds=5"
    )


def test_an_override_that_is_no_yaml() -> None:
    assert message(None, "partition.sizes=[1, 2") == (
        "--set partition.sizes=[1, 2: not valid YAML at line 1; expected a value, e.g. 5 or [1, 2]"
    )


def test_an_override_below_a_value(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\n")
    assert message(path, "seed.x=1") == "--set seed.x=1: 'seed' is a value, not a section"


def test_an_override_with_an_unknown_key() -> None:
    assert message(None, "cache.folder=x") == (
        "settings: unknown key 'cache.folder'; expected one of root"
    )


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]


def test_what_is_written_is_read_back() -> None:
    config = Config()
    raw = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert parse_config(raw, source="copy") == config


# --------------------------------------------------------------------------- what decides a result

FIRST_MODEL = [
    "data.num_classes",
    "data.image_size",
    "federate.pretrain_steps",
    "federate.labelled_batch",
    "federate.learning_rate",
    "federate.weight_decay",
]
ROUNDS = [
    "model.architecture",
    "model.encoder",
    "model.encoder_depth",
    "model.decoder_channels",
    "model.encoder_weights",
    "model.clients",
    "agreement.rule",
    "agreement.threshold",
    "agreement.calibrate",
    "agreement.min_threshold",
    "agreement.max_threshold",
    "agreement.foreground_prior",
    "agreement.momentum",
    "federate.method",
    "federate.rounds",
    "federate.clients_per_round",
    "federate.aggregation",
    "federate.local_steps",
    "federate.unlabelled_batch",
    "federate.unlabelled_weight",
    "federate.ramp_rounds",
    "federate.kd_weight",
    "federate.kd_temperature",
    "federate.confidence_threshold",
    "federate.fusion_epochs",
    "federate.fusion_weight",
    "federate.fusion_warmup_rounds",
]
REPETITION = ["seed", "federate.threads", "federate.device"]  # of one experiment
AUDIT = ["federate.audit"]
TEACHER = [f"sam.{key}" for key in Config().sam.model_dump()]  # rounds depend on its labels
NOTHING = [
    "data.mask_pattern",
    "data.root",
    "cache.root",
    *(f"synth.{key}" for key in Config().synth.model_dump()),
    *(
        f"partition.{key}" for key in Config().partition.model_dump()
    ),  # what it drew counts: partition.json's digest
    *(f"precompute.{key}" for key in Config().precompute.model_dump()),
    "agreement.warn_agreement",
    "agreement.warn_coverage",
    "federate.name",
    "federate.link_mbit",
    "federate.warn_drift",
]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("run", [*FIRST_MODEL, *ROUNDS, *REPETITION, *AUDIT]),
        ("first_model", [*FIRST_MODEL, *REPETITION]),
        ("experiment", [*FIRST_MODEL, *ROUNDS, *TEACHER]),
    ],
)
def test_what_decides_a_result(what: Any, expected: list[str]) -> None:
    assert sorted(deciding_settings(Config(), what)) == sorted(expected)


def test_every_setting_is_on_one_of_these_lists() -> None:
    listed = [*FIRST_MODEL, *ROUNDS, *REPETITION, *AUDIT, *TEACHER, *NOTHING]
    every = (leaf.removeprefix(".") for leaf in leaves(Config().model_dump()))
    assert sorted(listed) == sorted(every)


def test_weights_on_disk_decide_by_content_in_a_run_and_by_name_in_an_experiment(
    tmp_path: Path,
) -> None:
    files = tmp_path / "a" / "w.safetensors", tmp_path / "b" / "w.safetensors"
    found = []
    for number, path in enumerate(files):
        path.parent.mkdir()
        path.write_bytes(bytes([number]))
        config = load_config(None, (f"model.encoder_weights={path}",))
        found.append([deciding_settings(config, what) for what in ("run", "experiment")])
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1]
