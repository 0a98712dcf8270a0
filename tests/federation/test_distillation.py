"""Federated distillation: against hand-worked numbers and references written from the equations."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.federation.codistillation import (
    CONDENSATION_MIN_GRADE,
    BestClient,
    Consensus,
    MeanLogits,
    Teacher,
    distil,
    grades,
    noised_public,
    public_logits,
    structure_loss,
)
from pipeline.federation.local_update import optimiser_step
from pipeline.federation.streams import Streams
from pipeline.params import parse_config
from pipeline.segmentation.networks import build_model

SETTINGS = parse_config(
    {
        "data": {"image_size": 32},
        "model": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    },
    source="test",
)


def discs(count: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 of a bright disc, and its mask (N, 32, 32) uint8."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    centre = torch.randint(10, 22, (count, 2, 1, 1), generator=generator)
    mask = ((rows - centre[:, 0]) ** 2 + (cols - centre[:, 1]) ** 2 < 50).to(torch.uint8)
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
    return (mask[:, None] * 150 + noise).to(torch.uint8), mask


def logits_of(labels: Tensor, *, strength: float = 2.0, classes: int = 2) -> Tensor:
    """Float16 logits that say ``labels`` by ``strength`` above the other classes."""
    one_hot = nn.functional.one_hot(labels.long(), classes).movedim(-1, 1)
    return (one_hot * strength).half().contiguous()


def graded(logits: Tensor, labels: Tensor) -> Teacher:
    return Teacher(logits, labels, grades(logits, labels))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------- what crosses


def test_noise_is_a_function_of_its_seed() -> None:
    images, _ = discs(3)
    first, again = noised_public(images, seed=7), noised_public(images, seed=7)
    assert first.dtype == torch.float32
    assert first.is_contiguous()
    assert torch.equal(first, again)
    assert not torch.equal(first, noised_public(images, seed=8))


def test_noise_is_the_same_bytes_everywhere() -> None:
    """A pinned digest: clients with other processors or versions must not drift apart."""
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    found = hashlib.sha256(noised_public(images, seed=3).numpy().tobytes()).hexdigest()
    assert found == "b03dc40990157a75cd465878711abb7e8a03ec6ff6555ba725b21e39e51f7c36"


def test_noise_is_clipped_and_the_sum_is_not() -> None:
    """A normal clipped at two standard deviations has variance 0.9205."""
    white = torch.full((8, 3, 32, 32), 255, dtype=torch.uint8)
    noise = noised_public(white, seed=0).double() - 1
    assert float(noise.max()) == pytest.approx(0.2, abs=1e-6)
    assert float(noise.min()) == pytest.approx(-0.2, abs=1e-6)
    assert float(noise.mean()) == pytest.approx(0, abs=2e-3)
    assert float(noise.var()) == pytest.approx(0.009205, rel=0.03)
    assert float((noise.abs() < 0.1999).double().mean()) == pytest.approx(0.9545, abs=0.01)


def test_every_image_has_noise_of_its_own() -> None:
    noise = noised_public(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), seed=0)
    assert not torch.equal(noise[0], noise[1])


def test_logits_are_half_precision_of_the_evaluated_model() -> None:
    images, _ = discs(5)
    inputs = noised_public(images, seed=0)
    model = build_model(SETTINGS, seed=0)
    model.train()
    before = copy.deepcopy(model.state_dict())
    sent = public_logits(model, inputs, batch_size=2)
    assert (sent.dtype, sent.shape, sent.device.type) == (torch.float16, (5, 2, 32, 32), "cpu")
    for name, value in model.state_dict().items():  # batch norm has counted nothing
        assert torch.equal(value, before[name])
    with torch.no_grad():
        exact = model.eval()(inputs)
    assert torch.allclose(sent.float(), exact, rtol=2**-11, atol=1e-5)


def test_logits_survive_the_wire() -> None:
    images, labels = discs(3)
    sent = public_logits(build_model(SETTINGS, seed=0), noised_public(images, seed=0))
    read = safetensors.torch.load(safetensors.torch.save({"logits": sent}))["logits"]
    assert torch.equal(read, sent)
    assert torch.equal(grades(read, labels), grades(sent.float(), labels))


class Values(nn.Module):
    """Answers image i with ``values[i]`` everywhere, where the image is i everywhere."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.values[inputs[:, :2].long()]


def numbered(count: int) -> Tensor:
    return torch.arange(count).float()[:, None, None, None].expand(-1, 3, 4, 4)


def test_large_logits_are_clamped() -> None:
    sent = public_logits(Values([1e9, -1e9, 65504, 65505]), numbered(4))
    assert sent[:, 0, 0, 0].tolist() == [65504, -65504, 65504, 65504]


@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
def test_logits_that_are_not_finite_are_named(value: float, kind: str) -> None:
    with pytest.raises(ValueError, match=f"^logits of public image 4 hold {kind}$"):
        public_logits(Values([0, 1, 2, 3, value, value]), numbered(6), batch_size=3)


# --------------------------------------------------------------------------- on the server


def test_grades_by_hand() -> None:
    labels = torch.tensor([[[0, 1], [1, 1]], [[2, 2], [0, 0]]], dtype=torch.uint8)
    says = torch.tensor([[[0, 1], [0, 1]], [[2, 1], [1, 1]]])
    found = grades(logits_of(says, classes=3), labels)
    assert found.tolist() == [0.75, 0.25]
    assert found.dtype == torch.float32


def test_grades_of_many_images_keep_their_order() -> None:
    labels = torch.zeros(70, 2, 2, dtype=torch.uint8)
    says = torch.zeros(70, 2, 2, dtype=torch.uint8)
    says[40:, 0] = 1
    assert grades(logits_of(says), labels).tolist() == [1.0] * 40 + [0.5] * 30


def clients_by_grade(wanted: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Labels (N, 2, 4), and each client's logits with ``wanted[client][image]`` pixels right."""
    labels = torch.zeros(len(wanted[0]), 8, dtype=torch.uint8)
    clients = []
    for number, right in enumerate(wanted):
        says = torch.stack([(torch.arange(8) >= count).long() for count in right])
        # the strength tells the clients apart
        clients.append(logits_of(says.reshape(-1, 2, 4), strength=1.0 + number))
    return labels.reshape(-1, 2, 4), clients


def test_the_best_client_of_each_image() -> None:
    labels, clients = clients_by_grade([[8, 2, 5], [4, 6, 5], [7, 3, 6]])
    best = BestClient(labels, num_classes=1)
    for logits in clients:
        best.add(logits)
    result = best.result()
    assert result.grades.tolist() == [1.0, 0.75, 0.75]
    assert result.min_grade == CONDENSATION_MIN_GRADE
    for image, winner in enumerate((0, 1, 2)):
        assert torch.equal(result.logits[image], clients[winner][image])


def test_the_order_of_clients_does_not_matter_without_ties() -> None:
    labels, clients = clients_by_grade([[8, 2, 5], [4, 6, 1], [7, 3, 6]])
    results = []
    for order in itertools.permutations(clients):
        best = BestClient(labels, num_classes=1)
        for logits in order:
            best.add(logits)
        results.append(best.result())
    for result in results[1:]:
        assert torch.equal(result.logits, results[0].logits)
        assert torch.equal(result.grades, results[0].grades)


def test_on_ties_the_first_client_stays() -> None:
    labels, (first, second) = clients_by_grade([[5, 3], [5, 4]])
    best = BestClient(labels, num_classes=1)
    best.add(first)
    best.add(second)
    assert torch.equal(best.result().logits[0], first[0])
    assert torch.equal(best.result().logits[1], second[1])


def test_clients_logits_are_not_changed() -> None:
    labels, (first, second) = clients_by_grade([[5, 3], [6, 4]])
    kept = first.clone()
    best = BestClient(labels, num_classes=1)
    best.add(first)
    best.add(second)
    assert torch.equal(first, kept)


def test_the_consensus_is_the_mean() -> None:
    """Of 60000 three times and of 1, 2, 6: float16 sums would overflow."""
    mean = MeanLogits(torch.zeros(1, 1, 1), num_classes=1)
    for value in (1.0, 2.0, 6.0):
        mean.add(torch.tensor([60000.0, value], dtype=torch.float16).reshape(1, 2, 1, 1))
    result = mean.result()
    assert result.flatten().tolist() == [60000.0, 3.0]
    assert result.dtype == torch.float16


def with_value(value: float) -> Tensor:
    logits = torch.zeros(3, 2, 4, 4, dtype=torch.float16)
    logits[1, 0, 2, 3] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (with_value(0)[:2], "logits have shape (2, 2, 4, 4), expected (3, 2, 4, 4)"),
        (with_value(0)[:, :1], "logits have shape (3, 1, 4, 4), expected (3, 2, 4, 4)"),
        (with_value(0).float(), "logits are torch.float32, expected torch.float16"),
        (with_value(math.nan), "logits of public image 1 hold NaN"),
        (with_value(math.inf), "logits of public image 1 hold infinity"),
    ],
)
def test_unusable_logits_are_refused_and_change_nothing(logits: Tensor, message: str) -> None:
    labels = torch.zeros(3, 4, 4, dtype=torch.uint8)
    best, mean = BestClient(labels, num_classes=1), MeanLogits(labels, num_classes=1)
    good = logits_of(torch.eye(4, dtype=torch.uint8).expand(3, 4, 4))
    for taker in (best, mean):
        taker.add(good)
        with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
            taker.add(logits)
        assert str(error.value) == message
    assert torch.equal(best.result().logits, good)
    assert torch.equal(mean.result(), good)


# --------------------------------------------------------------------------- losses


def random_batch(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, a teacher's logits (4, C, 9, 40) and labels; wider than the window, and lower."""
    draw = generator(classes)
    logits = torch.randn(4, classes, 9, 40, generator=draw) * 2
    teacher = torch.randn(4, classes, 9, 40, generator=draw) * 2
    return logits, teacher, torch.randint(classes, (4, 9, 40), generator=draw)


def softmax_reference(logits: np.ndarray) -> np.ndarray:
    power = np.exp(logits - logits.max(axis=0))
    return power / power.sum(axis=0)


def structure_reference(logits: Tensor, labels: Tensor) -> float:
    """L_seg in float64, pixel by pixel."""
    cross_entropy, unequal = [], []
    for z, y in zip(logits.double().numpy(), labels.numpy(), strict=True):
        truth = np.stack([(y == k).astype(float) for k in range(len(z))])
        cross_entropy += [-np.log(softmax_reference(z)[truth == 1]).mean()]
        padded = np.pad(truth, ((0, 0), (15, 15), (15, 15)))
        weight = np.ones_like(truth)
        for k, row, column in np.ndindex(truth.shape):
            mean = padded[k, row : row + 31, column : column + 31].sum() / 31**2
            weight[k, row, column] += 5 * abs(mean - truth[k, row, column])
        p = 1 / (1 + np.exp(-z))
        overlap = (weight * p * truth).sum()
        union = (weight * (p + truth)).sum() - overlap
        unequal.append(1 - (overlap + 1) / (union + 1))
    return float(np.mean(cross_entropy) + np.mean(unequal))


def divergence_reference(student: Tensor, teacher: Tensor) -> list[float]:
    """KL of each image at temperature 2, mean over classes and pixels, in float64."""
    found = []
    for z, z_teacher in zip(student.double().numpy(), teacher.double().numpy(), strict=True):
        q, p = softmax_reference(z / 2), softmax_reference(z_teacher / 2)
        found.append(float((p * np.log(p / q)).mean()))
    return found


@pytest.mark.parametrize("classes", [2, 3])
def test_structure_loss_against_the_equation(classes: int) -> None:
    logits, _, labels = random_batch(classes)
    expected = structure_reference(logits, labels)
    assert float(structure_loss(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_structure_loss_by_hand() -> None:
    """One pixel, undecided: p = 1/2 in both channels.

    w = 1 + 5 (1 - 1/961) in the true channel, else 1; overlap w/2, union 3/2 w + 1/2 - w/2.
    """
    weight = 1 + 5 * (1 - 1 / 961)
    expected = math.log(2) + 1 - (weight / 2 + 1) / (weight + 1.5)
    found = structure_loss(torch.zeros(1, 2, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64))
    assert float(found) == pytest.approx(expected)


# one pixel; the student is undecided and thus says 0, the teacher says 1 with 4 : 1 at T = 2
UNDECIDED = torch.zeros(1, 2, 1, 1)
SURE = torch.tensor([0.0, 2 * math.log(4)]).reshape(1, 2, 1, 1)
ONE = torch.ones(1, 1, 1, dtype=torch.int64)
LOWEST = (CONDENSATION_MIN_GRADE, 0.0)  # of RC and of RF


def terms_of(
    logits: Tensor,
    labels: Tensor,
    teacher: tuple[Tensor, Tensor],
    lowest: float,
    weight: float = 10,
) -> SimpleNamespace:
    """Return the terms of a whole batch, of a teacher's logits and grades."""
    whole = Teacher(teacher[0], labels, teacher[1], min_grade=lowest, kl_weight=weight)
    return SimpleNamespace(**whole.terms(logits, torch.arange(len(logits))))


@pytest.mark.parametrize("lowest", LOWEST)
def test_divergence_by_hand(lowest: float) -> None:
    """Mean over the two classes of 0.2 ln(0.2 / 0.5) and 0.8 ln(0.8 / 0.5); ten times that."""
    terms = terms_of(UNDECIDED, ONE, (SURE, torch.ones(1)), lowest)
    expected = (0.2 * math.log(0.4) + 0.8 * math.log(1.6)) / 2
    assert float(terms.loss_kl) == pytest.approx(expected)
    assert float(terms.loss_seg) == float(structure_loss(UNDECIDED, ONE))
    assert float(terms.loss) == pytest.approx(float(terms.loss_seg) + 10 * expected)
    assert float(terms.counted) == 1


@pytest.mark.parametrize("lowest", LOWEST)
def test_images_that_do_not_count_lower_the_mean(lowest: float) -> None:
    """The second image is graded 0, so its teacher is not believed: half of one image's KL."""
    both = terms_of(
        UNDECIDED.expand(2, -1, -1, -1),
        ONE.expand(2, -1, -1),
        (SURE.expand(2, -1, -1, -1), torch.tensor([1.0, 0.0])),
        lowest,
    )
    one = terms_of(UNDECIDED, ONE, (SURE, torch.ones(1)), lowest)
    assert float(both.loss_kl) == pytest.approx(float(one.loss_kl) / 2)
    assert float(both.counted) == 0.5


@pytest.mark.parametrize(
    ("right", "teacher", "condensed", "fused"),
    [
        (0, 1.0, True, True),
        (2, 0.76, True, True),
        (2, 0.75, False, True),  # RC wants more than 0.75
        (2, 0.6, False, True),
        (2, 0.5, False, False),  # a tie
        (2, 0.4, False, False),
        (4, 1.0, False, False),  # a tie at the top
        (4, 0.9, False, False),  # the model is better than its teacher
    ],
)
def test_when_a_teacher_counts(right: int, teacher: float, condensed: bool, fused: bool) -> None:
    """The model's own grade is ``right`` of 4 pixels."""
    labels = torch.ones(1, 2, 2, dtype=torch.int64)
    own = logits_of((torch.arange(4) < right).reshape(1, 2, 2)).float()
    marked = logits_of(labels, strength=9), torch.tensor([teacher])
    for lowest, counts in zip(LOWEST, (condensed, fused), strict=True):
        terms = terms_of(own, labels, marked, lowest)
        assert bool(terms.counted) is counts
        assert (float(terms.loss_kl) > 0) is counts


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("lowest", LOWEST)
def test_whole_losses_against_the_equations(lowest: float, classes: int) -> None:
    """Random logits are right on about one pixel in ``classes``."""
    logits, teacher, labels = random_batch(classes)
    marks = torch.tensor([0.8, 0.1, 0.99, 0.74])
    own = [
        float((z.argmax(axis=0) == y).mean())
        for z, y in zip(logits.numpy(), labels.numpy(), strict=True)
    ]
    counts = [g > lowest and g > mine for g, mine in zip(marks.tolist(), own, strict=True)]
    divergences = divergence_reference(logits, teacher)
    divergence = sum(d for d, c in zip(divergences, counts, strict=True) if c) / 4
    terms = terms_of(logits, labels, (teacher, marks), lowest, 3.0)
    assert sum(counts) == (2 if lowest else 3)
    assert float(terms.loss_kl) == pytest.approx(divergence, rel=1e-5)
    expected = structure_reference(logits, labels) + 3 * divergence
    assert float(terms.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("lowest", LOWEST)
def test_weight_zero_is_exactly_the_segmentation_loss(lowest: float) -> None:
    logits, teacher, labels = random_batch(2)
    gradients = []
    for name in ("with", "without"):
        z = logits.clone().requires_grad_()
        value = structure_loss(z, labels)
        if name == "with":
            terms = terms_of(z, labels, (teacher, torch.ones(4)), lowest, 0.0)
            assert float(terms.loss_kl.detach()) > 0
            assert torch.equal(terms.loss, value)
            value = terms.loss
        gradients += torch.autograd.grad(value, z)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("lowest", LOWEST)
def test_extreme_teachers_stay_finite(lowest: float) -> None:
    """Clamped float16 logits: exp underflows, 0 log 0 is 0. KL is ln 2 / 2 against an undecided."""
    extreme = torch.tensor([-65504.0, 65504.0]).reshape(1, 2, 1, 1).half()
    terms = terms_of(UNDECIDED, ONE, (extreme, torch.ones(1)), lowest)
    assert float(terms.loss_kl) == pytest.approx(math.log(2) / 2)


def test_digest_by_hand() -> None:
    """|1 - 3|, |2 - 2|, |0 + 1|, |5 - 4|: mean 1."""
    consensus = Consensus(torch.tensor([3.0, 2.0, -1.0, 4.0]).reshape(1, 2, 1, 2).half())
    logits = torch.tensor([1.0, 2.0, 0.0, 5.0]).reshape(1, 2, 1, 2)
    assert float(consensus.terms(logits, torch.tensor([0]))["loss"]) == 1.0


# --------------------------------------------------------------------------- training


def learn(
    model: nn.Module,
    inputs: Tensor,
    teacher: Teacher | Consensus,
    *,
    seed: int = 0,
    rate: float = 3e-3,
    epochs: int = 1,
    batch_size: int = 2,
) -> dict[str, float]:
    changes = {"fusion_epochs": epochs, "labelled_batch": batch_size, "weight_decay": 0.01}
    settings = SETTINGS.federate.model_copy(update=changes)
    return distil(
        model, teacher, inputs, learning_rate=rate, streams=Streams(seed), settings=settings
    )


def distance(model: nn.Module, inputs: Tensor, teacher: Tensor) -> float:
    """Return the model's mean KL to ``teacher`` on D_p, in evaluation mode."""
    return float(np.mean(divergence_reference(public_logits(model, inputs), teacher)))


@pytest.mark.parametrize("lowest", LOWEST)
def test_a_model_learns_from_a_better_one(lowest: float) -> None:
    """The teacher is right but unsure, so labels alone, which want certainty, lead elsewhere."""
    images, labels = discs(6)
    inputs = noised_public(images, seed=0)
    unsure = logits_of(labels, strength=2.0)
    teacher = replace(graded(unsure, labels), min_grade=lowest)
    after, reports = {}, {}
    for weight in (0.0, 10.0):
        model = build_model(SETTINGS, seed=0)
        before = distance(model, inputs, unsure)
        weighed = replace(teacher, kl_weight=weight)
        reports[weight] = learn(model, inputs, weighed, epochs=20, batch_size=3)
        after[weight] = distance(model, inputs, unsure)
    assert after[10.0] < 0.4 * before
    assert after[10.0] < 0.2 * after[0.0]
    for weight, report in reports.items():
        assert list(report) == ["loss", "loss_seg", "loss_kl", "counted"]
        expected = report["loss_seg"] + weight * report["loss_kl"]
        assert report["loss"] == pytest.approx(expected, rel=1e-5)
        assert 0 < report["counted"] <= 1


def test_a_model_digests_the_consensus() -> None:
    images, labels = discs(6)
    inputs = noised_public(images, seed=0)
    consensus = logits_of(labels, strength=3.0)
    model = build_model(SETTINGS, seed=0)

    def off() -> float:
        return float((public_logits(model, inputs).float() - consensus.float()).abs().mean())

    before = off()
    report = learn(model, inputs, Consensus(consensus), epochs=12, batch_size=3)
    assert off() < 0.5 * before
    assert list(report) == ["loss"]


class Tiny(nn.Module):
    """A network with dropout and with batch norm over one pixel, which notes the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Conv2d(3, 4, 3, padding=1)
            self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Dropout(0.5))
            self.head = nn.Conv2d(4, 2, 1)
        self.seen: list[list[float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen.append(inputs[:, 0, 0, 0].tolist())
        features = self.body(inputs)
        answer: Tensor = self.head(features + self.pooled(features))
        return answer


def run_tiny(count: int, batch_size: int) -> Tiny:
    labels = torch.zeros(count, 4, 4, dtype=torch.uint8)
    model = Tiny()
    teacher = graded(logits_of(labels), labels)
    learn(model, numbered(count), teacher, epochs=2, batch_size=batch_size)
    return model


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(5, 2, [2, 3]), (5, 4, [5]), (6, 4, [4, 2]), (6, 2, [2, 2, 2]), (3, 8, [3])],
)
def test_no_batch_of_one(count: int, batch_size: int, sizes: list[int]) -> None:
    """Batch norm over one pixel refuses to train on one image; every epoch sees all images."""
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        Tiny().train()(numbered(1))
    seen = run_tiny(count, batch_size).seen
    assert [len(batch) for batch in seen] == sizes * 2
    for epoch in (seen[: len(sizes)], seen[len(sizes) :]):
        assert sorted(itertools.chain(*epoch)) == list(range(count))


def test_epochs_are_shuffled() -> None:
    first, second = run_tiny(32, 32).seen
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_same_bytes_whatever_was_drawn_before(labelled: bool) -> None:
    """Dropout draws from torch's global generator, which is put back as it was."""
    labels = torch.zeros(5, 4, 4, dtype=torch.uint8)
    logits = logits_of(labels)
    teacher = graded(logits, labels) if labelled else Consensus(logits)
    states, reports = [], []
    for drawn, seed in ((0, 1), (7, 1), (0, 2)):
        torch.rand(drawn)
        before = torch.get_rng_state()
        model = Tiny()
        reports.append(learn(model, numbered(5), teacher, seed=seed, epochs=2))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert reports[0] == reports[1]
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_diagnostics_are_means_over_images() -> None:
    """Batches of 2 and 3; the model, which stays undecided, says 0 and is wrong everywhere."""
    model = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    labels = torch.ones(5, 1, 1, dtype=torch.uint8)
    marks = torch.tensor([1.0, 0, 0.9, 0.8, 0.7])
    teacher = Teacher(SURE.expand(5, -1, -1, -1).half(), labels, marks, min_grade=0.75)
    report = learn(model, torch.zeros(5, 3, 1, 1), teacher, epochs=2, rate=0.0)
    one = terms_of(UNDECIDED, ONE, (SURE.half(), torch.ones(1)), CONDENSATION_MIN_GRADE)
    assert report["counted"] == pytest.approx(3 / 5)
    assert report["loss_seg"] == pytest.approx(float(one.loss_seg))
    assert report["loss_kl"] == pytest.approx(float(one.loss_kl) * 3 / 5)


def test_gradients_are_clipped() -> None:
    """One plain step of rate 1 moves the weights by the clipped gradient."""
    model = nn.Conv2d(3, 2, 1)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    norm = optimiser_step(model, plain, model(torch.full((2, 3, 4, 4), 1e3)).abs().mean())
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(5.0, rel=1e-4)
    assert float(norm) > 5


def test_a_models_own_logits_can_teach() -> None:
    """Round's end: logits from evaluation under no gradient go into the next model's training."""
    images, labels = discs(4)
    inputs = noised_public(images, seed=0)
    best = BestClient(labels, num_classes=1)
    for seed in (1, 2):
        best.add(public_logits(build_model(SETTINGS, seed=seed), inputs))
    server, client = (build_model(SETTINGS, seed=seed) for seed in (0, 1))
    learn(server, inputs, best.result())
    answer = graded(public_logits(server, inputs), labels)
    report = learn(client, inputs, answer)
    assert all(math.isfinite(value) for value in report.values())
