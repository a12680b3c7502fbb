"""Which names mean this machine alone, which addresses one customer, and the socket that the server listens on."""

from __future__ import annotations

import errno
import ipaddress
import socket

from porcelet.errors import CapacityError, InputError


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def network_of(address: str) -> str:
    """Whose address it is: an IPv4 address is one customer's, and so is an IPv6 network of 64 bits."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((known, 64), strict=False)) if known.version == 6 else address


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 takes a free one.

    Raises:
        InputError: this machine does not have the address `host`.
        CapacityError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        # Listening at once, because two sockets may be bound to one port as long as neither listens.
        return socket.create_server((host, port), family=family)
    except OSError as problem:
        if problem.errno == errno.EADDRINUSE:
            raise CapacityError(f"port {port} on {host} is taken; choose another one with --port") from problem
        raise InputError(f"cannot listen on {host} port {port}: {problem.strerror}; try another --port") from problem


def url(listener: socket.socket, scheme: str = "http") -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
