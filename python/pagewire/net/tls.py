"""TLS 1.3 both ways: each side's certificate is of one CA, and names the role that the other expects of it. In clear
only on this machine.
"""

import errno
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# seconds, but the last: one that is gone without a word is noticed within half a minute, and one that takes nothing of
# what we send within a minute
_OPTIONS = {
    socket.TCP_NODELAY: 1, socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4,
    socket.TCP_USER_TIMEOUT: 60_000,
}  # fmt: skip
DOMAIN = ".pagewire"  # of the DNS name in a certificate: prefill.pagewire, decode.pagewire, front.pagewire


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files: the CA that both sides trust, our certificate of it, and its key."""

    ca: str
    certificate: str
    key: str

    def context(self, server_side: bool) -> ssl.SSLContext:
        """Raises ValueError when the files are no such thing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server_side else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.sslsocket_class = _RoleSocket
        if server_side:
            context.num_tickets = 0  # each connection shows its certificate
        try:
            what = f"a CA's certificate in {self.ca}"
            context.load_verify_locations(self.ca)
            what = f"a certificate in {self.certificate} and its key, without a password, in {self.key}"
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
        except OSError as error:
            raise ValueError(f"TLS: expected {what}: {error.strerror or error}") from error
        return context


def at(host: str, port: int) -> str:
    """As in an address: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(address: str, tls: Tls | None, flags: int = 0) -> tuple[socket.AddressFamily, Any]:
    """The first address of tcp://host:port. Raises ValueError, also when it may not be used without TLS."""
    try:
        parts = urlsplit(address)
        if parts.scheme != "tcp" or not parts.hostname or parts.port is None or parts.path:
            raise ValueError
        found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM, flags=flags)
    except (ValueError, OSError) as error:
        host = "an IP address" if flags & socket.AI_NUMERICHOST else "a host or IP address"
        raise ValueError(f"address: expected tcp://host:port with {host}, got {address}") from error
    family, _, _, _, where = found[0]
    if not tls and not ipaddress.ip_address(where[0]).is_loopback:
        raise ValueError(f"{address}: expected TLS (a CA, a certificate and a key), or a loopback address")
    return family, where


def prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _OPTIONS.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def secure(context: ssl.SSLContext, sock: socket.socket, role: str, server_side: bool) -> ssl.SSLSocket:
    """Takes `sock`, a server's connected, a client's not yet. Hands are not shaken before `do_handshake`, which a
    `Channel` calls; it raises OSError unless the other side's certificate is for `role`.
    """
    sock.setblocking(False)
    host = None if server_side else role + DOMAIN
    secured = context.wrap_socket(
        sock, server_side=server_side, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=True
    )
    assert isinstance(secured, _RoleSocket)
    secured.role = role
    return secured


def expect_role(certificate: dict[str, Any] | None, role: str) -> None:
    """certificate: verified, as `getpeercert` gives it. Raises ssl.SSLCertVerificationError."""
    names = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "DNS"]
    if role + DOMAIN not in names:
        got = ", ".join(names)[:200] or "one without a DNS name"
        raise ssl.SSLCertVerificationError(1, f"expected a certificate for {role}{DOMAIN}, got {got}")


class _RoleSocket(ssl.SSLSocket):
    role = ""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except ssl.SSLCertVerificationError as error:
            raise ssl.SSLCertVerificationError(1, f"expected a certificate for {self.role}{DOMAIN}: {error}") from error
        except OSError as error:
            if error.errno != errno.ENOTCONN or self.server_side:
                raise
            if failed := self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(failed, os.strerror(failed)) from error
            raise ssl.SSLWantWriteError("connecting") from error
        expect_role(self.getpeercert(), self.role)
