"""The benchmark's corruptions do what their level says, and its scores what their formula says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import agreement_noise
import noise
from agreement_noise import COLUMNS, CORRUPTIONS, FAIR, Draw, Truth, measure, score
from noise import Errors, Masks, predict

SIDE = 32


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def squares(count: int = 12, side: int = SIDE) -> Masks:
    """Return a square of half the image's side in the middle of each image."""
    masks = np.zeros((count, side, side), dtype=np.bool_)
    masks[:, side // 4 : -side // 4, side // 4 : -side // 4] = True
    return masks


def logit(probability: NDArray[np.float32]) -> NDArray[np.float64]:
    """Infinite at 0 and 1."""
    return torch.logit(torch.from_numpy(probability).double()).numpy()


def test_distance_is_half_a_pixel_beside_the_boundary() -> None:
    mask = np.zeros((4, 6), dtype=np.bool_)
    mask[:, 3:] = True
    assert noise.signed_distance(mask)[0].tolist() == [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert (noise.signed_distance(np.zeros((4, 4), np.bool_)) == -4).all()
    assert (noise.signed_distance(np.ones((4, 4), np.bool_)) == 4).all()


def test_boundaries_grow_shrink_or_move_by_so_many_pixels() -> None:
    """Half planes, seen in a column: the edge at 16 goes to 13, 19 or somewhere between."""
    masks = np.zeros((60, SIDE, SIDE), dtype=np.bool_)
    masks[:, :, 16:] = True
    edges = SIDE - noise.shift_boundary(masks, 3, rng())[:, SIDE // 2].sum(axis=1)
    grown, shrunk = edges == 13, edges == 19
    assert grown.sum() >= 12
    assert shrunk.sum() >= 12
    moved = ~grown & ~shrunk
    assert moved.sum() >= 10
    assert (edges[moved] > 13).all()


def test_moved_objects_keep_their_size() -> None:
    """The kinds by the generator's first draw: 0 grows, 1 shrinks, 2 moves."""
    masks = squares()
    out = noise.shift_boundary(masks, 4, rng())
    kinds = rng().integers(3, size=len(masks))
    sizes = out.sum(axis=(1, 2))
    assert (sizes[kinds == 0] > masks[0].sum()).all()
    assert (sizes[kinds == 1] == 8 * 8).all()
    assert np.abs(sizes[kinds == 2] - masks[0].sum()).max() <= 2 * 16
    assert not (out[kinds == 2] == masks[0]).all(axis=(1, 2)).any()


def test_so_many_objects_are_missed() -> None:
    masks = squares()
    out = noise.miss_objects(masks, 0.25, rng())
    empty = ~out.any(axis=(1, 2))
    assert empty.sum() == 3
    assert (out[~empty] == masks[~empty]).all()
    worse = noise.miss_objects(masks, 0.5, rng())
    assert not worse[empty].any(), "a higher level adds to a lower one"


def test_invented_objects_lie_elsewhere() -> None:
    truth = np.zeros((8, 64, 64), dtype=np.bool_)
    truth[:, 4:20, 4:20] = True
    out = noise.invent_objects(truth, 0.5, rng(), truth=truth)
    extra = out & ~truth
    changed = extra.any(axis=(1, 2))
    assert changed.sum() == 4
    assert (out & truth == truth).all()
    assert (extra[changed].sum(axis=(1, 2)) > 64).all()  # a third of a disc of radius 8, at least
    y, x = np.nonzero(extra.any(axis=0))
    nearest = np.hypot(np.maximum(y - 19, 0), np.maximum(x - 19, 0)).min()
    assert nearest >= 2


def test_where_nothing_fits_an_invented_object_leaves_the_true_one_alone() -> None:
    truth = np.ones((1, SIDE, SIDE), dtype=np.bool_)
    truth[0, :2, :2] = False
    out = noise.invent_objects(truth, 1.0, rng(), truth=truth)
    assert out[0].all(), "the corner is filled, nothing else was free"


def test_flips_are_independent_of_the_label() -> None:
    masks = squares(40)
    flipped = noise.flip_pixels(masks, 0.2, rng()) != masks
    for part in (flipped[masks], flipped[~masks]):
        assert float(part.mean()) == pytest.approx(0.2, abs=0.015)
    assert (noise.flip_pixels(masks, 0.0, rng()) == masks).all()
    assert (noise.flip_pixels(masks, 1.0, rng()) == ~masks).all()


def test_confidence_grows_with_the_distance() -> None:
    logits = noise.confidence_logits(squares(50), rng())
    row = np.median(logits[:, SIDE // 2], axis=0)  # of exp(n / 2), the median is 1
    expected = [min((8 - i - 0.5) / 0.6, 6.0) for i in range(8)]
    assert row[:8] == pytest.approx(expected, rel=0.25)
    assert (logits > 0).all()


def test_a_source_without_errors_is_right_and_sharpness_multiplies_its_logits() -> None:
    truth = squares()
    plain = predict(truth, Errors(), rng())
    assert ((plain > 0.5) == truth).all()
    sharp = predict(truth, Errors(sharpness=0.5), rng())
    near = np.abs(logit(plain)) < 8  # float32 holds no more above
    assert logit(sharp)[near] == pytest.approx(0.5 * logit(plain)[near], rel=1e-3, abs=1e-3)


def test_errors_are_less_sure_by_the_documented_factor() -> None:
    """Flips alone: each image's wrong pixels have u times the logit that they have when right."""
    truth = squares()
    right, wrong = predict(truth, Errors(), rng()), predict(truth, Errors(flips=0.1), rng())
    flipped = (wrong > 0.5) != truth
    assert 0.07 < flipped.mean() < 0.13
    assert (right[~flipped] == wrong[~flipped]).all()
    sure, less = np.abs(logit(right)), np.abs(logit(wrong))
    low, high = noise.DOUBT
    for image in range(len(truth)):
        where = flipped[image] & (sure[image] < 8)
        factors = less[image][where] / sure[image][where]
        assert low - 1e-3 <= factors.min()
        assert factors.max() <= high + 1e-3
        assert np.ptp(factors) < 1e-2, "one number an image"


def test_same_seed_same_source_and_another_seed_differs() -> None:
    errors = Errors(shift=2, missed=0.2, invented=0.3, flips=0.05)
    first, second = (predict(squares(), errors, rng(1)) for _ in range(2))
    assert (first == second).all()
    assert (predict(squares(), errors, rng(2)) != first).any()


def test_scores_by_hand() -> None:
    """Truth 1 1 0 0; targets right, wrong, wrong, right; the last is dropped."""
    truth = torch.tensor([[[1, 1, 0, 0]]])
    target = torch.tensor([[[1, 0, 1, 0]]])
    weight = torch.tensor([[[0.8, 0.5, 0.4, 0.0]]])
    scores = score(target, weight, truth)
    assert scores == pytest.approx(
        {
            "precision": 0.8 / 1.7,
            "recall": 0.8 / 4,
            "foreground_precision": 0.8 / 1.2,
            "foreground_recall": 0.8 / 2,
            "dice": 2 * 0.8 / (1.2 + 2),
            "dice_kept": 2 * 1 / (2 + 2),
            "coverage": 3 / 4,
        }
    )
    p, r = scores["foreground_precision"], scores["foreground_recall"]
    assert scores["dice"] == pytest.approx(2 * p * r / (p + r))


def test_nothing_kept_is_no_error_and_finds_nothing() -> None:
    truth = torch.tensor([[[1, 0]]])
    scores = score(truth, torch.zeros(1, 1, 2), truth)
    assert (scores["precision"], scores["foreground_precision"]) == (1.0, 1.0)
    assert (scores["dice"], scores["recall"], scores["coverage"]) == (0.0, 0.0, 0.0)


def test_the_source_that_is_named_errs() -> None:
    by_name = {corruption.name: corruption for corruption in CORRUPTIONS}
    case = by_name["flipped pixels"].case(0.3, "SAM")
    assert (case.sam, case.client) == (Errors(flips=0.3), Errors())
    case = by_name["mix, calibrated at 1"].case(0.0, "client")
    assert (case.sam, case.client, case.calibrated) == (FAIR, Errors(), FAIR)


def test_a_source_without_errors_gives_perfect_labels() -> None:
    """SAM is right, the client flips a third: `sam_only` scores 1, `consensus` errs nowhere."""
    truth = Truth(squares(8), squares(6), tuple("abcdef"))
    case = CORRUPTIONS[0].case(0.3, "client")
    scores = measure(Draw(truth, 0), case)
    assert list(scores) == list(COLUMNS)
    assert scores["sam_only"]["dice"] == 1.0
    assert scores["consensus"]["precision"] == 1.0
    assert scores["consensus"]["foreground_recall"] == pytest.approx(0.7, abs=0.05)
    assert scores["adaptive"]["dice"] > scores["client_only"]["dice"]
    assert (
        scores["adaptive"]["sam_inverse_temperature"]
        > scores["adaptive"]["client_inverse_temperature"]
    )


def test_summary_by_hand() -> None:
    """Two corruptions, two rows and one: each corruption counts alike."""

    def row(corruption: str, adaptive: float, others: float) -> dict[str, object]:
        dice = dict.fromkeys(agreement_noise.COLUMNS, others) | {"adaptive": adaptive}
        scores = {column: {"dice": value} for column, value in dice.items()}
        return {"corruption": corruption, "scores": scores}

    lines = agreement_noise.summary([row("x", 0.5, 0.7), row("x", 0.9, 0.8), row("y", 0.3, 0.2)])
    assert "| `adaptive` | 0.500 | 0.700 | 0.300 | 0.200 |" in lines.splitlines()
    assert "| `soft` | 0.475 | 0.750 | 0.200 | 0.100 |" in lines.splitlines()


def test_calibration_part_shares_no_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    scan = agreement_noise.scan
    monkeypatch.setattr(agreement_noise, "scan", lambda root: seen.setdefault("all", scan(root)))
    truth = agreement_noise.load_truth(6)
    assert len(truth.unlabelled) + len(truth.calibration) == len(seen["all"].images) == 24
    assert len(truth.groups) == len(truth.calibration)
    inside = [r for r in seen["all"].images.values() if r.group in truth.groups]
    assert len(inside) == len(truth.calibration)
    assert truth.unlabelled.any(axis=(1, 2)).all()


def test_the_command_prints_tables_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(agreement_noise, "CORRUPTIONS", (CORRUPTIONS[0], CORRUPTIONS[-1]))
    truth = Truth(squares(6), squares(4), tuple("abcd"))
    monkeypatch.setattr(agreement_noise, "load_truth", lambda images_per_site: truth)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    figure = tmp_path / "figure.png"
    agreement_noise.main(["--quick", "--figure", str(figure)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| corruption | level | wrong | `adaptive` |")
    assert sum(line.startswith("| flipped pixels (share) | 0.3 |") for line in printed) == 6
    with Image.open(figure) as picture:
        assert picture.size[0] > 800
    agreement_noise.main(["--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["level"] for row in rows] == [0] * 3 + [0.3] * 3 + [1 / 8] * 3 + [8] * 3
    assert rows[0]["scores"]["sam_only"]["dice"] == 1.0
