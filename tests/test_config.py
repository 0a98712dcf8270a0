"""``params.yaml``: what is read, and what a wrong key or value is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import Config
from pipeline.deciding import deciding_settings
from pipeline.errors import ConfigError
from pipeline.params import REMOVED, RENAMED, load_config, parse_config, with_settings
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
    assert load_config(PARAMS, folder=Path()) == Config()


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
    assert load_config(write(tmp_path, ""), folder=Path()) == Config()
    assert load_config(None) == Config()


def test_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "precompute: {batch: 4}\n")
    assert message(path) == (
        f"{path}: unknown key 'precompute.batch' (nearest: precompute.batch_size); expected one of "
        "backend, batch_size, precision, device, compile, attention, residual, views, "
        "probabilities, readers, threads, warn_consistency, warn_empty"
    )


def test_an_unknown_key_of_a_clients_network_lists_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {clients: [{encoder: x}, {encoder_name: y}]}\n")
    assert message(path) == (
        f"{path}: unknown key 'model.clients.1.encoder_name' (nearest: model.clients.1.encoder); "
        "expected one of "
        "architecture, encoder, encoder_depth, decoder_channels, encoder_weights, normalisation"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["federate.method=rc_rf"], "rc_rf is for clients with networks of their own; list them"),
        (["federate.method=fedmd"], "fedmd is for clients with networks of their own; list them"),
        (
            ["federate.method=semifl", "model.clients=[{architecture: fpn}]"],
            "semifl builds on averaged weights, which clients with networks of their own",
        ),
        (
            ["federate.aggregation=median", "model.clients=[{architecture: fpn}]"],
            "aggregation median builds on averaged weights, which clients with networks of",
        ),
        (
            ["federate.server_optimizer=fedadam", "model.clients=[{architecture: fpn}]"],
            "federate.server_optimizer fedadam builds on averaged weights, which clients",
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
        f"{path}: unknown key 'federat' (nearest: federate); expected one of seed, data, cache, "
        "synth, partition, sam, precompute, model, augment, agreement, federate, privacy, evaluate"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "federate: {rounds: many}",
            "federate.rounds: found 'many', expected a whole number",
        ),
        ("federate: {rounds: 0}", "federate.rounds: found 0, expected more than 0"),
        ("federate: {rounds: 2.5}", "federate.rounds: found 2.5, expected a whole number"),
        ("federate: {audit: perhaps}", "federate.audit: found 'perhaps', expected true or false"),
        (
            "federate: {round_timeout_s: abc}",
            "federate.round_timeout_s: found 'abc', expected a number or null",
        ),
        (
            "federate: {sites: north}",
            "federate.sites: found 'north', expected a list, e.g. [north]",
        ),
        ("seed: -1", "seed: found -1, expected 0 or more"),
        ("data: {image_size: 40}", "data.image_size: found 40, expected a multiple of 16"),
        (
            "partition: {test_fraction: 1.5}",
            "partition.test_fraction: found 1.5, expected 1.0 or less",
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
            "partition.sizes.1: found 0, expected more than 0",
        ),
        (
            "agreement: {rule: vote}",
            "agreement.rule: found 'vote', expected 'adaptive', 'consensus', 'confident', 'soft', "
            "'sam_only', 'sam_soft' or 'client_only'",
        ),
        ("data:", "data: found None, expected keys and their values"),
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
    assert message(None, f"{old}=1") == (
        f"--set {old}: unknown key '{old}'; it is now called {new}"
    )
    assert new in {leaf.removeprefix(".") for leaf in leaves(Config().model_dump())}


@pytest.mark.parametrize(("old", "instead"), REMOVED.items())
def test_a_key_that_is_gone_names_what_does_its_work(
    tmp_path: Path, old: str, instead: str
) -> None:
    section, key = old.split(".")
    expected = f"unknown key '{old}'; it was removed: {instead}"
    path = write(tmp_path, f"{section}: {{{key}: 1}}\n")
    assert message(path) == f"{path}: {expected}"
    assert message(None, f"{old}=1") == f"--set {old}: {expected}"
    assert old not in {leaf.removeprefix(".") for leaf in leaves(Config().model_dump())}


@pytest.mark.parametrize(
    ("text", "found"),
    [("[1, 2]", "list"), ("[]", "list"), ("seed", "str"), ("7", "int"), ("false", "bool")],
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, found: str) -> None:
    path = write(tmp_path, text)
    assert message(path) == f"{path}: found {found}, expected sections of keys"


def test_invalid_yaml_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 0\ndata:\n  root: [a, b\n  image_size: 64\n")
    assert message(path) == f"{path}: not valid YAML at line 4; expected sections of keys"


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 1000, "!!float x", "!!int ''"])
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
    assert load_config(None, ("precompute.views=4",)).precompute.views == 4


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "cache.folder=x",
            "--set cache.folder: unknown key 'cache.folder'; expected one of root",
        ),
        (
            "federate.rounds=many",
            "--set federate.rounds: found 'many', expected a whole number",
        ),
        (
            "precompute.views=3",
            "--set precompute.views: found 3, expected 1, 2, 4 or 8",
        ),
        (
            "data.image_sise=64",
            "--set data.image_sise: unknown key 'data.image_sise' (nearest: data.image_size); "
            "expected one of root, mask_pattern,",
        ),
        (
            "data.server_images=3",
            "--set data.server_images: unknown key 'data.server_images' (nearest: "
            "partition.server_images); expected one of root, ",
        ),
        (
            "model.encoder=tu-hf-hub:someone/something",
            "--set model.encoder: found 'tu-hf-hub:someone/something', expected the name of an "
            "encoder: letters, digits and _ . - alone",
        ),
        (
            "model.clients=[{encoder: 3}]",
            "--set model.clients: model.clients.0.encoder: found 3, expected text; write it in "
            "quotes",
        ),
        (
            "partition.test_fraction=0.95",
            "settings with --set: partition: val_fraction + test_fraction must leave something to "
            "train on",
        ),
    ],
)
def test_what_is_wrong_with_an_override_names_it(override: str, expected: str) -> None:
    assert message(None, override).startswith(expected)


def test_what_is_wrong_in_the_file_is_not_blamed_on_an_override(tmp_path: Path) -> None:
    path = write(tmp_path, "federate: {round: 3}\n")
    assert message(path, "federate.rounds=2", "seed=1").startswith(f"{path}: unknown key ")


# --------------------------------------------------------------------------- text and paths


@pytest.mark.parametrize("text", ["exp #1", "2024-11-26", "007", "no", "[a", "{a}", "'q'", "null"])
def test_text_and_paths_of_an_override_are_taken_as_they_stand(text: str) -> None:
    config = load_config(None, (f"federate.name={text}", f"data.root=/x/{text}"))
    assert config.federate.name == text
    assert str(config.data.root) == f"/x/{text}"
    assert with_settings(Config(), "--name", federate={"name": text}).federate.name == text


@pytest.mark.parametrize("text", ["null", "~", ""])
def test_text_that_may_be_missing_can_be_taken_away(text: str) -> None:
    keys = ("partition.server_site", "partition.file", "sam.checkpoint", "model.encoder_weights")
    config = load_config(None, tuple(f"{key}={text}" for key in keys))
    assert config.partition.server_site is None
    assert config.sam.checkpoint is None


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "a\nb", "x" * 300, "C:\\x"])
def test_a_name_that_cannot_be_a_folder(name: str) -> None:
    assert message(None, f"federate.name={name}").startswith("--set federate.name: found ")


@pytest.mark.parametrize("name", ["server", "Server", " north", "north ", "", "../x", "a/b"])
def test_a_name_that_no_site_can_have(name: str) -> None:
    assert message(None, f"federate.sites=['{name}', south]") == (
        f"--set federate.sites: federate.sites.0: found '{name}', expected the name of a site: no "
        "slash or colon, no leading dot, no space around it, and not 'server'"
    )


@pytest.mark.parametrize("names", ["north, north", "north, North", "straße, STRASSE"])
def test_sites_of_one_name(names: str) -> None:
    text = message(None, f"federate.sites=[{names}, south]")
    assert text.startswith("--set federate.sites: found ")
    end = f"expected each site once, but {names} are one name, or differ in case alone"
    assert text.endswith(end)


def test_a_date_is_no_value_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, "federate: {name: 2024-11-26}")
    assert load_config(path).federate.name == "2024-11-26"


def test_a_number_where_text_belongs_says_how_to_write_it(tmp_path: Path) -> None:
    path = write(tmp_path, "federate: {name: 007}")
    assert message(path) == (f"{path}: federate.name: found 7, expected text; write it in quotes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 0\ndata: {}\nseed: 1\n", "'seed' is given at line 1 and at line 3"),
        ("data:\n  root: a\n  root: b\n", "'root' is given at line 2 and at line 3"),
        ("data: {root: a}\ndata: {image_size: 32}", "'data' is given at line 1 and at line 2"),
        ("model: {clients: [{encoder: a, encoder: b}]}", "'encoder' is given at line 1 and"),
    ],
)
def test_a_key_given_twice_names_both_lines(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    assert message(path).startswith(f"{path}: {expected}")
    assert message(path).endswith("; keep one of them")


def test_merged_keys_may_be_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {clients: [&n {encoder: a}, {<<: *n, encoder: b}]}")
    assert [each.encoder for each in load_config(path).model.clients] == ["a", "b"]


def test_paths_in_a_file_are_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    path = write(
        folder,
        "data: {root: ../images}\n"
        "model: {clients: [&n {encoder: a, encoder_weights: w}, *n]}\n"
        "sam: {checkpoint: /abs/sam.pth}\n",
    )
    monkeypatch.chdir(tmp_path)
    for given in (path, Path("study/params.yaml")):
        config = load_config(given, ("partition.file=p.json",))
        assert config.data.root.resolve() == tmp_path / "images"
        assert config.cache.root.resolve() == folder / "cache"  # a default, and the same everywhere
        weights = [each.encoder_weights for each in config.model.clients]
        assert [each and each.resolve() for each in weights] == [folder / "w"] * 2
        assert config.sam.checkpoint == Path("/abs/sam.pth")
        assert config.partition.file == Path("p.json")
    monkeypatch.chdir(folder)
    assert load_config(Path("params.yaml")).cache.root == Path("cache")


# --------------------------------------------------------------------------- limits


def numbers(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number that a setting may be, with its schema; not those that are one of several."""
    for section in (schema, *schema["$defs"].values()):
        for key, value in section["properties"].items():
            for kind in (value, value.get("items", {}), *value.get("anyOf", ())):
                if kind.get("type") in ("integer", "number") and "enum" not in kind:
                    yield key, kind


def test_every_whole_number_has_limits() -> None:
    found = [each for each in numbers(Config.model_json_schema()) if each[1]["type"] == "integer"]
    assert len(found) > 20
    for key, kind in found:
        assert {"minimum", "exclusiveMinimum"} & set(kind), key
        assert {"maximum", "exclusiveMaximum"} & set(kind), key


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_that_is_not_finite(value: str) -> None:
    for key in ("sam.learning_rate", "agreement.threshold", "federate.fusion_weight"):
        text = message(None, f"{key}={value}")
        assert text.startswith(f"--set {key}: found ")
        assert ", expected " in text
        assert "input" not in text


def test_a_seed_that_numpy_does_not_take() -> None:
    assert message(None, f"seed={10**22}") == (
        f"--set seed: found {10**22}, expected less than 4294967296"
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
    *(f"augment.{key}" for key in Config().augment.model_dump()),
    "data.num_classes",
    "data.image_size",
    "federate.precision",
    "federate.pretrain_steps",
    "federate.pretrain_learning_rate",
    "federate.labelled_batch",
    "federate.weight_decay",
]
ROUNDS = [
    "model.architecture",
    "model.encoder",
    "model.encoder_depth",
    "model.decoder_channels",
    "model.encoder_weights",
    "model.normalisation",
    "model.clients",
    "agreement.rule",
    "agreement.threshold",
    "agreement.calibrate",
    "federate.method",
    "federate.rounds",
    "federate.clients_per_round",
    "federate.aggregation",
    "federate.byzantine",
    "federate.server_optimizer",
    "federate.server_learning_rate",
    "federate.server_momentum",
    "federate.server_beta2",
    "federate.server_tau",
    "federate.proximal_weight",
    "federate.compression",
    "federate.sites",
    "privacy.mode",
    "privacy.clip_norm",
    "privacy.noise_multiplier",
    "federate.local_steps",
    "federate.learning_rate",
    "federate.average_rounds",
    "federate.unlabelled_batch",
    "federate.unlabelled_weight",
    "federate.ramp_rounds",
    "federate.confidence_threshold",
    "federate.fusion_epochs",
    "federate.fusion_weight",
    "federate.fusion_warmup_rounds",
]
REPETITION = ["seed", "federate.threads", "federate.device"]  # of one experiment
AUDIT = ["federate.audit", "privacy.delta"]
# rounds depend on its labels
TEACHER = [*(f"sam.{key}" for key in Config().sam.model_dump()), "precompute.views"]
NOTHING = [
    "data.class_names",
    "data.mask_pattern",
    "data.root",
    "cache.root",
    *(f"synth.{key}" for key in Config().synth.model_dump()),
    *(
        f"partition.{key}" for key in Config().partition.model_dump()
    ),  # what it drew counts: partition.json's digest
    *(f"precompute.{key}" for key in Config().precompute.model_dump() if key != "views"),
    "agreement.warn_agreement",
    "agreement.warn_coverage",
    "federate.name",
    "federate.min_clients",
    "federate.round_timeout_s",
    "federate.link_mbit",
    "federate.warn_drift",
    *(f"evaluate.{key}" for key in Config().evaluate.model_dump()),
]


def test_names_of_classes() -> None:
    """One for each class, or none; then they go by their numbers."""

    def classes(*settings: str) -> tuple[str, ...]:
        return load_config(None, settings).data.classes

    assert (classes(), classes("data.num_classes=2")) == (("foreground",), ("class 1", "class 2"))
    two = ("data.num_classes=2", "data.class_names=[liver, tumour]")
    assert classes(*two) == ("liver", "tumour")
    assert "class_names has 2 names; expected one for each of 1 classes" in message(None, two[1])
    for names, fault in (("[a, ' ']", "none of them empty"), ("[a, a]", "different names")):
        assert fault in message(None, two[0], f"data.class_names={names}")


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
