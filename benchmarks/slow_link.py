"""Stage two over a slow link: two sites at 1 Mbit/s with 300 ms there and as long back.

    python benchmarks/slow_link.py [--mbit 1] [--ms 300] [--rounds 2] [--compression int8]

A proxy between the sites' nodes and the SuperLink holds every byte back. The run has to name the
link in a warning (``federate.link_mbit`` says how fast it is), to end, and to end with the bytes of
a run in one process. Settings, data and nodes are those of ``engines.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from engines import lay_out, nodes, settings, with_sites

from pipeline.federation.flower.launch import launch
from pipeline.federation.flower.local import HERE, deployed, free_port
from pipeline.federation.server import federate
from pipeline.params import with_settings

_PIECE = 2048  # bytes that are held back together
_AHEAD_SECONDS = 0.2  # of a link's time that are read before their turn, as a modem's buffer does


class Direction:
    """One direction of a link, which all its connections share."""

    def __init__(self, mbit: float, ms: float) -> None:
        self._rate, self._latency, self._free = mbit * 1e6 / 8, ms / 1e3, 0.0
        self.bytes = 0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bring what is read to the other end, late and in order, until it ends."""
        clock = asyncio.get_running_loop().time
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, piece = await waiting.get()
                await asyncio.sleep(max(0.0, due - clock()))
                if not piece:
                    writer.close()
                    return
                writer.write(piece)
                await writer.drain()

        delivering = asyncio.create_task(deliver())
        try:
            while not delivering.done():
                piece = await reader.read(_PIECE)
                self.bytes += len(piece)
                self._free = max(self._free, clock()) + len(piece) / self._rate
                await waiting.put((self._free + self._latency, piece))
                if not piece:
                    break
                await asyncio.sleep(max(0.0, self._free - clock() - _AHEAD_SECONDS))
            await delivering
        except ConnectionError:  # one end is gone, and so is the connection
            delivering.cancel()
            writer.close()


@contextmanager
def slow_link(address: str, mbit: float, ms: float) -> Iterator[tuple[str, list[Direction]]]:
    """Yield the address of a proxy before ``address``, and its directions: there, back."""
    host, _, port = address.rpartition(":")
    there, back = Direction(mbit, ms), Direction(mbit, ms)
    here, loop = free_port(), asyncio.new_event_loop()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        with suppress(asyncio.CancelledError):  # the link ends, which asyncio's streams would log
            await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))

    async def end_all() -> None:
        """End what is on its way, which nobody waits for any more."""
        under_way = asyncio.all_tasks() - {asyncio.current_task()}
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    loop.run_until_complete(asyncio.start_server(connected, HERE, here))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"{HERE}:{here}", [there, back]
    finally:
        asyncio.run_coroutine_threadsafe(end_all(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbit", type=float, default=1.0)
    parser.add_argument("--ms", type=float, default=300.0, help="each way")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compression", default="none")
    options = parser.parse_args()
    options.as_params = False
    torch.set_num_threads(1)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        link = {"link_mbit": options.mbit, "compression": options.compression}
        config = with_settings(settings(folder, 2, options), "benchmark", federate=link)
        lay_out(config, 2)
        (folder / "flower").mkdir()
        deployment = stack.enter_context(deployed(folder / "flower"))
        address, ways = stack.enter_context(
            slow_link(deployment.link.address, options.mbit, options.ms)
        )
        stack.enter_context(nodes(config, deployment, folder, address))
        began = time.perf_counter()
        slow = launch(with_sites(config, "slow"), deployment.link)
        seconds = time.perf_counter() - began
        here = federate(with_settings(config, "benchmark", federate={"name": "here"}))
        same = slow.model_path.read_bytes() == here.model_path.read_bytes()
        for entry in slow.history():
            print(f"round {entry['round']}: {entry['seconds']:.0f} s, {entry['warnings']}")
        traffic = ", ".join(f"{way.bytes / 1e6:.2f} MB" for way in ways)
        print(f"{seconds:.0f} s in all; {traffic} there and back; the same model: {same}")


if __name__ == "__main__":
    main()
