"""The same clients as a user of Flower's simulation engine would run them: FedAvg, and ray.

For ``engines.py``. A module of its own, so that ray's actors import it and keep what they loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from pipeline.config import Config
from pipeline.federation.client import Client
from pipeline.federation.inputs import load_inputs
from pipeline.federation.messages import EvaluateRequest, FitRequest
from pipeline.federation.schedule import Rates
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.runtime import resolve_device
from pipeline.segmentation.networks import State, build_model, get_state


def simulate(
    config: Config, round_is_over: Callable[[], None], *, cores: int
) -> tuple[list[float], float]:
    """Run all rounds.

    Returns:
        The CPU seconds of all clients, summed up to each round, and the MB of weights in a round.
    """
    clients, own = len(load_inputs(config).contexts), list[float]()
    server_app, first = ServerApp(), get_state(build_model(config, seed=0))

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(first),
            num_rounds=config.federate.rounds,
            evaluate_fn=lambda number, _: round_is_over() if number else None,
        )
        parts = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
        for number in range(1, config.federate.rounds + 1):
            means = sum(_number(part[number]["own"]) for part in parts)
            own.append((own[-1] if own else 0.0) + means * clients)

    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores},
    }
    run_simulation(server_app, client_app(config), clients, backend_config=backend)
    return own, 2 * clients * sum(value.nbytes for value in first.values()) / 1e6


def client_app(config: Config) -> ClientApp:
    """Return what Flower runs at each of its simulated nodes."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answered(config, message, context, FitRequest)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _answered(config, message, context, EvaluateRequest)

    return app


def _number(value: object) -> float:
    """Return a value of one of Flower's records that is a number."""
    assert isinstance(value, int | float)
    return float(value)


@dataclass
class _Hosted:
    """A client on one of ray's actors."""

    client: Client
    like: State  # of its network


_hosted: dict[int, _Hosted] = {}


def _host(config: Config, index: int) -> _Hosted:
    """Return a client of this process; its data is loaded once, as in samfed's own engines."""
    torch.set_num_threads(1)
    if index not in _hosted:
        inputs = load_inputs(config)
        networks = build_networks(config, resolve_device("cpu"))
        workplace = Workplace(config, inputs.public, networks)
        like = networks[config.model].state_dict()
        _hosted[index] = _Hosted(Client(inputs.contexts[index], workplace), like)
    return _hosted[index]


def _answered(
    config: Config, message: Message, context: Context, kind: type[FitRequest | EvaluateRequest]
) -> Message:
    hosted = _host(config, int(_number(context.node_config["partition-id"])))
    number = int(_number(message.content.config_records["config"]["server-round"]))
    given = message.content.array_records["arrays"].to_torch_state_dict()
    weights = {name: value.to(hosted.like[name].dtype) for name, value in given.items()}
    asked: dict[str, Any] = {"client": hosted.client.entry.name, "round_number": number}
    if kind is FitRequest:
        asked |= {"state_round": number - 1, "rates": Rates.of(config, number)}
        asked |= {"calibration": None}
    else:
        asked |= {"state_round": number, "part": "val"}
    began = time.thread_time()
    reply = hosted.client.answer(kind(**asked, weights=weights))
    spent = time.thread_time() - began
    content = RecordDict({"metrics": MetricRecord({"num-examples": reply.images, "own": spent})})
    if isinstance(reply.weights, dict):
        content["arrays"] = ArrayRecord(reply.weights)
    return Message(content=content, reply_to=message)
