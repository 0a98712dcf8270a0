"""Everything that depends on ``federate.method``, as one row for each method.

``docs/method.md`` says where each comes from. A new method is a new row here and, where its target
is new, a rule in the table of ``federation/targets.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

Method = Literal[
    "start", "supervised", "adabn", "fedavg_ssl", "semifl", "fed_mean_teacher", "fedmd", "rc_rf",
    "sam_only", "sam_soft", "sam_fed", "shuffled", "oracle",
]  # fmt: skip

Target = Literal[
    "none", "batch_norm", "client", "received", "mean_teacher", "sam", "sam_soft", "agreement",
    "truth",
]  # fmt: skip
Exchange = Literal["none", "mean", "condensation"]
Networks = Literal["equal", "own", "any"]


@dataclass(frozen=True)
class MethodTraits:
    """What a method does, beside what all methods do alike."""

    # of the unlabelled term: none without one, batch_norm where images pass through that alone,
    # the client's own label at each step, the received model's fixed for the round, what the mean
    # of the client's last weights says, SAM's, the agreement of SAM and client, or the truth
    target: Target
    networks: Networks = "any"  # the clients it is for: with one network, with their own, or both
    exchange: Exchange = "none"  # between own networks: nothing, mean logits (FedMD), RC and RF
    shuffles_labels: bool = False  # the control: SAM's labels of the wrong images
    trains: bool = True  # in rounds; else a run ends with the first model
    tunes_at_server: bool = False  # the averaged model goes on with D_p alone (SemiFL)

    @property
    def uses_sam(self) -> bool:
        """Whether it reads the label stores."""
        return self.target in ("sam", "sam_soft", "agreement")

    @property
    def uses_agreement(self) -> bool:
        """Whether it weighs SAM against the client."""
        return self.target == "agreement"

    @property
    def needs_truth(self) -> bool:
        """Whether it trains on the clients' true masks, from ``prepare --with-oracle``."""
        return self.target == "truth"


_SAM_FED = MethodTraits("agreement", exchange="condensation")

METHODS: Mapping[Method, MethodTraits] = MappingProxyType(
    {
        "start": MethodTraits("none", trains=False),
        "supervised": MethodTraits("none"),
        "adabn": MethodTraits("batch_norm"),
        "fedavg_ssl": MethodTraits("client", networks="equal"),
        "semifl": MethodTraits("received", networks="equal", tunes_at_server=True),
        "fed_mean_teacher": MethodTraits("mean_teacher", networks="equal"),
        "fedmd": MethodTraits("client", networks="own", exchange="mean"),
        "rc_rf": MethodTraits("client", networks="own", exchange="condensation"),
        "sam_only": MethodTraits("sam"),
        "sam_soft": MethodTraits("sam_soft"),
        "sam_fed": _SAM_FED,
        "shuffled": replace(_SAM_FED, shuffles_labels=True),
        "oracle": MethodTraits("truth"),
    }
)


def methods_for(networks: Networks) -> tuple[Method, ...]:
    """Return the methods for clients with ``equal`` networks or with their ``own``."""
    return tuple(name for name, row in METHODS.items() if row.networks in (networks, "any"))
