"""Makes servers on this machine look far away: a TCP proxy that delays and "loses" what it carries.

    python tests/support/distant.py --host 10.77.0.1 --ports 7001,7101 \
        --round_trip_ms 10 --loss 0.001

Listens at `host` on a free port for each of the ports, to which it connects there, too. For
machines whose kernel has no netem. TCP itself never loses anything: a lost segment shows as a delay
of one more round trip (fast retransmission), and so it does here.
"""

import argparse
import asyncio
import json
import random
import socket

_CHUNK_BYTES = 256 * 1024
_SEGMENT_BYTES = 1448


async def carry(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    one_way_seconds: float,
    loss: float,
) -> None:
    """Hands on what comes, each chunk so much later, in order."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)

    async def deliver() -> None:
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not chunk:
                writer.close()
                return
            writer.write(chunk)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    try:
        while True:
            chunk = await reader.read(_CHUNK_BYTES)
            segments = -(-len(chunk) // _SEGMENT_BYTES)
            lost = random.random() > (1.0 - loss) ** segments
            await queue.put((loop.time() + one_way_seconds * (3 if lost else 1), chunk))
            if not chunk:
                break
        await delivery
    except OSError:  # an end of the connection is gone: so is the other soon
        delivery.cancel()
        writer.close()


async def serve(host: str, port: int, one_way_seconds: float, loss: float) -> asyncio.Server:
    """Carries every connection to a port of its own both ways to and from `port`."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        for each in (writer, far_writer):
            each.get_extra_info('socket').setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(
            carry(reader, far_writer, one_way_seconds, loss),
            carry(far_reader, writer, one_way_seconds, loss),
        )

    return await asyncio.start_server(connected, host, limit=_CHUNK_BYTES)


async def main() -> None:
    """Tells which port stands for which, and serves them until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--host', required=True, help='address to listen on')
    parser.add_argument('--ports', required=True, help='separated by commas')
    parser.add_argument('--round_trip_ms', type=float, default=0.0, help='added to each round trip')
    parser.add_argument('--loss', type=float, default=0.0, help='probability of a segment')
    arguments = parser.parse_args()
    one_way = arguments.round_trip_ms / 2000.0
    servers = {
        port: await serve(arguments.host, int(port), one_way, arguments.loss)
        for port in arguments.ports.split(',')
    }
    ports = {port: server.sockets[0].getsockname()[1] for port, server in servers.items()}
    print(f'listening {json.dumps(ports)}', flush=True)
    await asyncio.Event().wait()


if __name__ == '__main__':
    asyncio.run(main())
