"""What hostile clients cost, by rule of aggregation: Dice over images that nobody trains on.

    python benchmarks/hostile.py [--clients 5] [--hostile 1] [--params FILE] [--steps 8]
                                 [--rounds 4] [--rows honest "sign flipped" ...] [--rules krum ...]

Clients draw from one pool, so that they differ by chance alone; labels are the truth, spoilt a
little (``inputs.py``), for every client but label-flipping ones. Others train as everybody does
and send something else: the change of the model with its sign flipped, a hundred times the change,
or noise ten times as long as the change. Without ``--params`` images are generated ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from inputs import prepare_with_labels
from torch import Tensor

from pipeline.config import AggregationName, Config
from pipeline.data.synthetic import write_dataset
from pipeline.errors import SamfedError
from pipeline.federation.engines import InProcess, in_process
from pipeline.federation.inputs import ClientContext
from pipeline.federation.messages import AnyRequest, FitRequest, Reply
from pipeline.federation.server import federate
from pipeline.federation.workplace import Workplace
from pipeline.params import load_config, with_settings

#: How a hostile client replaces the change of an entry.
ATTACKS: dict[str, Callable[[Tensor], Tensor]] = {
    "sign flipped": lambda change: -change,
    "scaled x 100": lambda change: 100 * change,
    "noise": lambda change: 10 * change.square().mean().sqrt() * torch.randn(change.shape),
}
RULES = get_args(AggregationName)
ROWS = ("honest", *ATTACKS, "labels flipped")


@dataclass
class Hostile:
    """Clients of this process, some of whom send another change than theirs."""

    inner: InProcess
    names: Sequence[str]
    attack: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        self.entries = self.inner.entries

    def run(self, requests: Iterable[AnyRequest]) -> Iterator[Reply]:
        """Yield the replies."""
        for request in requests:
            (reply,) = self.inner.run([request])
            if isinstance(request, FitRequest) and reply.client in self.names:
                before, after = request.weights, reply.weights
                if isinstance(before, dict) and isinstance(after, dict):  # not compressed
                    reply = replace(reply, weights=self._instead(before, after))
            yield reply

    def _instead(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: old + self.attack(after[name] - old) if old.is_floating_point() else after[name]
            for name, old in before.items()
        }


def settings(args: argparse.Namespace, folder: Path) -> Config:
    """Return the settings of all runs, with the data generated where no file names any."""
    config = load_config(args.params, ("partition.server_site=null",))
    small: dict[str, Any] = {"data": {"image_size": 64}}
    if args.params is None:
        write_dataset(folder / "data", images_per_site=80, size_px=64, seed=0)
        small["data"]["root"] = folder / "data"
    partition = {
        "scheme": "iid",
        "clients": args.clients,
        "server_images": 100,
        "val_fraction": 0.25,
    }
    federated = {
        "method": "sam_only",
        "byzantine": args.hostile,
        "rounds": args.rounds,
        "local_steps": args.steps,
        "pretrain_steps": 60,
        "learning_rate": 1e-3,
        "labelled_batch": 4,
        "unlabelled_batch": 4,
        "link_mbit": 1e6,  # few steps a round deserve a warning, which is not the point here
        "threads": 1,
        "device": "cpu",
    }
    return with_settings(config, "benchmark", partition=partition, federate=federated, **small)


def dice(config: Config, hostile: int, attack: Callable[[Tensor], Tensor] | None) -> str:
    """Run the rounds; return the validation Dice of the last two, or that the run stopped."""
    torch.manual_seed(0)

    @contextmanager
    def connect(contexts: Sequence[ClientContext], workplace: Workplace) -> Iterator[Any]:
        with in_process(contexts, workplace) as inner:
            names = [context.name for context in contexts[len(contexts) - hostile :]]
            yield inner if attack is None else Hostile(inner, names, attack)

    try:
        run = federate(config, mode="restart", connect=connect)
    except SamfedError as error:
        return f"stopped ({error})"[:40]
    return f"{statistics.mean(entry['val']['dice'] for entry in run.history()[-2:]):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--hostile", type=int, default=1)
    parser.add_argument("--params", type=Path)
    parser.add_argument("--steps", type=int, default=8, help="of each client in a round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args, Path(folder))
        honest = with_settings(config, "benchmark", cache={"root": Path(folder) / "honest"})
        liars = with_settings(config, "benchmark", cache={"root": Path(folder) / "flipped"})
        prepare_with_labels(honest)
        prepare_with_labels(liars, flipped=args.hostile)
        print(f"| {args.hostile} of {args.clients} clients | {' | '.join(args.rules)} |")
        print(f"|{'---|' * (len(args.rules) + 1)}")
        for name in args.rows:
            attack = ATTACKS.get(name)
            base = liars if name == "labels flipped" else honest
            row = [
                dice(
                    with_settings(base, "benchmark", federate={"aggregation": rule, "name": rule}),
                    args.hostile,
                    attack,
                )
                for rule in args.rules
            ]
            print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
