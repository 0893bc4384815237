"""The control port of a worker that runs for itself: fronts connect to it, one after the other."""

import socket
import ssl
import sys
from collections.abc import Iterator
from typing import NamedTuple

from pagewire.net.channel import Channel
from pagewire.net.tls import at, prepare, resolve, secure
from pagewire.serve.channel import WORKER_CODEC
from pagewire.serve.config import WorkerConfig

HANDSHAKE_S = 10.0  # for a front that connects to show its certificate


class Front(NamedTuple):
    channel: Channel
    kv_address: str  # where D listens for P's while this front is there; "": they are on this machine


def listen(role: str, address: str, config: WorkerConfig) -> Iterator[Front]:
    """Each is served alone: the next one waits until it is gone, and finds a worker without requests.

    address: HOST:PORT, port 0 is any. Raises ValueError, also when it can be reached from other machines and there is
    no TLS, or OSError.
    """
    family, where = resolve(f"tcp://{address}", config.tls)
    context = config.tls.context(server_side=True) if config.tls else None
    listener = socket.create_server(where, family=family)
    port = listener.getsockname()[1]
    print(f"pagewire: {role} waits for a front on {address.rpartition(':')[0]}:{port}", flush=True)
    return _accept(listener, context, config.kv_port)


def _accept(listener: socket.socket, context: ssl.SSLContext | None, kv_port: int) -> Iterator[Front]:
    while True:
        sock, peer = listener.accept()
        try:
            host = sock.getsockname()[0]
            prepare(sock)  # we beat, so a front whose machine is gone leaves something that is not acknowledged
            if context:
                sock = secure(context, sock, "front", server_side=True)
                sock.settimeout(HANDSHAKE_S)
                sock.do_handshake()
        except OSError as error:  # whoever it was: we wait for the next one
            print(f"refused {peer[0]}: {'TLS: ' if context else ''}{error}", file=sys.stderr, flush=True)
            sock.close()
            continue
        yield Front(Channel(sock, WORKER_CODEC, name=f"the front at {peer[0]}"), f"tcp://{at(host, kv_port)}")
