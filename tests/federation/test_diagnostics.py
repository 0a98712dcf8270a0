"""What a round reports, and the warnings that name a client or its link."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.config import Config
from pipeline.doubts import Doubt, untold
from pipeline.federation.diagnostics import (
    client_doubts,
    drifts,
    link_warnings,
    round_note,
)
from pipeline.federation.rounds import finite
from pipeline.federation.schedule import Rates, participants
from pipeline.params import parse_config


def settings(**federate: Any) -> Config:
    return parse_config({"federate": federate}, source="test")


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "agreement": 0.8,
        "coverage": 0.9,
        "drift": 0.01,
        "seconds": 10.0,
        "bytes_up": 1_000_000,
        "bytes_down": 1_000_000,
    } | changes


def lines(doubts: list[Doubt]) -> list[str]:
    return [doubt.text for doubt in doubts]


def test_a_good_client_is_not_mentioned() -> None:
    assert client_doubts(settings(), {"a": entry()}) == []


def test_poor_agreement_and_few_pixels_name_the_clients() -> None:
    reports = {
        "a": entry(agreement=0.2, coverage=0.1),
        "b": entry(),
        "c": entry(agreement=0.2999),  # which is not 0.30
        "d": entry(agreement=None),
    }
    assert lines(client_doubts(settings(), reports)) == [
        "foreground Dice of SAM and client is below 0.30: a (0.20), c (0.29); look at SAM's labels "
        "there with `samfed cache show`",
    ]
    hard = parse_config({"agreement": {"rule": "consensus"}}, source="test")
    assert lines(client_doubts(hard, reports))[1:] == [
        "share of pixels kept is below 0.30: a (0.10); another agreement.rule keeps more, or a "
        "lower agreement.threshold if it has one",
    ]
    assert client_doubts(settings(method="sam_only"), reports) == []


def test_labels_that_do_harm_are_named_once_with_teacher_class_and_numbers() -> None:
    """All clients measure the same on the server's images, unless their networks are their own."""
    harm = entry(target_dice_1=0.31, model_dice_1=0.48, target_gain_1=-0.15)
    kind = (
        "labels of foreground are not used, as on the calibration part targets made with the help "
        "of vit_t are worse than the model alone"
    )
    advice = "a better teacher would help, see `samfed evaluate-sam`"
    shared = client_doubts(settings(), {"a": harm, "b": harm})
    assert lines(shared) == [f"{kind}: all clients (Dice 0.31, the model 0.48); {advice}"]
    later = client_doubts(settings(), {"a": harm | {"model_dice_1": 0.5}})
    assert untold(later, lines(shared)) == []
    own = parse_config({"model": {"clients": [{}]}}, source="test")
    found = client_doubts(own, {"a": harm, "b": entry()})
    assert lines(found) == [f"{kind}: a (Dice 0.31, the model 0.48); {advice}"]
    assert client_doubts(settings(method="sam_soft"), {"a": harm}) == []
    no_guard = parse_config({"agreement": {"rule": "sam_soft"}}, source="test")
    assert client_doubts(no_guard, {"a": harm}) == []
    assert client_doubts(settings(), {"a": harm | {"target_gain_1": -0.05}}) == []
    assert client_doubts(settings(), {"a": entry(target_gain_1=-0.15, model_dice_1=0.4)}) == []


def test_a_warning_comes_once_a_run_for_each_client_and_kind() -> None:
    told = ["foreground Dice of SAM and client is below 0.30: a (0.25), site b (0.10); look"]
    poor = entry(agreement=0.2, coverage=0.1)
    hard = parse_config({"agreement": {"rule": "consensus"}}, source="test")
    doubts = client_doubts(hard, {"a": poor, "aa": poor, "b": poor, "site b": poor})
    found = untold(doubts, told)
    assert [line.split(";")[0] for line in found] == [
        "foreground Dice of SAM and client is below 0.30: aa (0.20), b (0.20)",
        "share of pixels kept is below 0.30: a (0.10), aa (0.10), b (0.10), site b (0.10)",
    ]
    assert untold(doubts, told + found) == []


def test_a_link_slower_than_computing_by_hand() -> None:
    """2 MB are 16 Mbit: 16 s at 1 Mbit/s; 20 MB 160 s. One line names the slowest of them."""
    clients = {"a": entry(), "b": entry(bytes_up=19_000_000), "c": entry(seconds=17.0)}
    assert link_warnings(settings(link_mbit=1.0), clients) == [
        "on a link of 1 Mbit/s (federate.link_mbit) 2 of 3 clients would wait longer than they "
        "compute, e.g. b 160 s a round, computing 10 s; raise federate.local_steps, or set "
        "federate.compression"
    ]
    packed = link_warnings(settings(link_mbit=1.0, compression="int8"), clients)
    assert packed[0].endswith("; raise federate.local_steps")
    assert link_warnings(settings(link_mbit=16.0), clients) == []


def test_a_link_that_nobody_waits_for_is_not_mentioned() -> None:
    """24.4 MB take 2.0 s, computing 1.4 s: a toy run."""
    toy = entry(bytes_up=12_200_000, bytes_down=12_200_000, seconds=1.4)
    assert link_warnings(settings(), {"a": toy}) == []


def test_clients_that_drift_are_named() -> None:
    clients = {name: entry(drift=drift) for name, drift in zip("abcd", (1, 1, 1, 3.1), strict=True)}
    (line,) = lines(drifts(settings(), clients))
    assert line.startswith(
        "clients changed the model more than 3 times as much as the median client: d (310.0%); "
        "the median client changed it by 100.0%; look at"
    )
    assert drifts(settings(warn_drift=4.0), clients) == []
    assert drifts(settings(), {name: clients[name] for name in "ad"}) == []
    broken = clients | {"d": entry(drift=math.nan)}
    assert drifts(settings(), broken) == []


def test_what_is_not_finite_becomes_null() -> None:
    assert finite({"a": math.nan, "b": math.inf, "c": 1.5, "d": None, "e": 7}) == {
        "a": None,
        "b": None,
        "c": 1.5,
        "d": None,
        "e": 7,
    }


def test_participants_are_drawn_anew_and_repeatably() -> None:
    config = settings(clients_per_round=3)
    names = [f"client_{index}" for index in range(10)]
    drawn = [participants(config, names, number) for number in range(1, 40)]
    assert drawn == [participants(config, names, number) for number in range(1, 40)]
    assert all(len(set(each)) == 3 and list(each) == sorted(each) for each in drawn)
    assert {name for each in drawn for name in each} == set(names)
    assert len({tuple(each) for each in drawn}) > 20
    assert list(participants(settings(), names, 1)) == names
    assert list(participants(config, names[:2], 1)) == names[:2]


def test_schedules_by_hand() -> None:
    config = settings(ramp_rounds=4, unlabelled_weight=2.0)
    rates = [Rates.of(config, number) for number in (1, 2, 4, 9)]
    assert [rate.unlabelled_weight for rate in rates] == [0.5, 1.0, 2.0, 2.0]
    assert Rates.of(settings(ramp_rounds=0), 1).unlabelled_weight == 1.0
    slow = settings(learning_rate=1e-3, pretrain_learning_rate=4e-3, rounds=4)
    assert [Rates.of(slow, number).learning_rate for number in (1, 3)] == pytest.approx(
        [1e-3, 5.25e-4]
    )
    warm = settings(fusion_warmup_rounds=2, fusion_weight=7.0)
    assert [Rates.of(warm, number).kl_weight for number in (1, 2, 3)] == [0.0, 0.0, 7.0]


def test_a_round_in_a_few_words() -> None:
    clients = {"a": {"agreement": 0.5, "coverage": 0.8}, "b": {"agreement": 0.7, "coverage": None}}
    entry = {"val": {"dice": 0.654}, "clients": clients}
    assert round_note(entry) == "Dice 0.65, agreement 0.60, coverage 0.80"
    assert round_note({"val": {"dice": None}, "clients": {"a": {"loss": 1.0}}}) == ""
