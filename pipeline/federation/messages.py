"""Requests to a client and its replies: all that crosses between a client and its server.

Tensors, numbers and strings only, so that ``plain_data.to_bytes`` takes every message anywhere. An
engine brings a request to its client, calls ``Client.answer``, and brings back the reply.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from pipeline.federation.agreement import Calibration
from pipeline.federation.compression import Packed
from pipeline.federation.schedule import Rates
from pipeline.stores.plain_data import Plain, State, tensors_of


@dataclass(frozen=True, kw_only=True)
class Message(Plain):
    """What every request and every reply says."""

    client: str  # to whom, or from whom
    round_number: int  # from 1

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, uncompressed."""
        return sum(value.nbytes for value in tensors_of(self).values())


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """A client's answer; which fields it fills, the request says."""

    metrics: dict[str, float | None] = field(default_factory=dict)  # means over images or steps
    images: int = 0  # behind the weights, or the metrics
    weights: State | Packed | None = None  # packed: an update of those received
    logits: Tensor | None = None  # (N, K+1, S, S) float16 on the round's noised copy of D_p
    features: Tensor | None = None  # (C+1, C) float64, sums over all images: ``DescribeRequest``
    seconds: float = 0.0  # of the client's own work
    fault: str = ""  # why there are no weights or logits; empty if nothing is wrong
    timed_out: bool = False  # an engine's word that stands for an answer that did not come


@dataclass(frozen=True, kw_only=True)
class Request(Message):
    """What every request says."""

    state_round: int  # the last round whose private state counts; 0 if the client never took part

    def reply(self, **content: Any) -> Reply:
        """Return a reply to this request."""
        return Reply(client=self.client, round_number=self.round_number, **content)

    def unanswered(self, seconds: float) -> Reply:
        """Return what stands for the answer of a client that had so many seconds for it."""
        fault = f"no answer within {seconds:g} s (federate.round_timeout_s)"
        return self.reply(fault=fault, timed_out=True)


@dataclass(frozen=True, kw_only=True)
class FitRequest(Request):
    """Train on your own images. The reply has weights, unless they are of an own network."""

    rates: Rates  # of the round
    weights: State | Packed | None = None  # of the broadcast model; None: start from your own
    calibration: Calibration | None = None  # on D_p, of the broadcast model; None: measure yours
    distilled: bool = False  # whether a ``DistilRequest`` of this round came before


@dataclass(frozen=True, kw_only=True)
class PredictRequest(Request):
    """Predict on the round's noised copy of D_p with your own network. The reply has logits."""


@dataclass(frozen=True, kw_only=True)
class DistilRequest(Request):
    """Train your own network on the server's logits. The reply has metrics."""

    rates: Rates  # of the round
    logits: Tensor  # (N, K+1, S, S) float16 on the round's noised copy of D_p


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Request):
    """Score a part of your images. The reply has the metric ``dice``, a mean over its images."""

    part: Literal["val", "test"] | None  # None: nothing is scored
    weights: State | Packed | None = None  # of the global model; None: your own
    calibration: Calibration | None = None  # as in ``FitRequest``, for examples alone
    final: bool = False  # the run is over: keep your example images, and your own model


@dataclass(frozen=True, kw_only=True)
class DescribeRequest(Request):
    """Say how your images look to the final model, once the run is over.

    Without ``statistics`` the reply has sums over the pooled features f of all training images:
    of f in the first row, of f f^T below; nothing where there are fewer than ``FEWEST_IMAGES``.
    With them it has the metric ``distance``, a 95th percentile over the validation images (without
    any, the training images).
    """

    weights: State  # of the global model
    statistics: Tensor | None = None  # (C+1, C) float64: mean, and below it the whitening matrix


AnyRequest = FitRequest | PredictRequest | DistilRequest | EvaluateRequest | DescribeRequest


@dataclass(frozen=True)
class ClientEntry(Plain):
    """What a client says of itself before the rounds: all that the server knows of it."""

    name: str  # the client's
    images: int  # how many it trains on
    val_images: int  # how many it is validated on
    flip_dice: float | None = None  # SAM's consistency on its images, from stage one
