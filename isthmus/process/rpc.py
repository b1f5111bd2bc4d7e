"""gRPC servers and channels with stated bounds: message sizes, concurrent calls, keepalive, ports that must be free."""

import socket

import grpc
import grpc.aio

from isthmus.errors import CannotStart
from isthmus.process.rpc_errors import ErrorMapper

PUBLIC_RECEIVE_BYTES = 32 << 20  # a 10 MB prompt still reaches validation, which names its field
INTERNAL_RECEIVE_BYTES = 64 << 20
_MAX_METADATA_BYTES = 16 << 10
_MAX_CONCURRENT_CALLS = 2048
_KEEPALIVE_MS = 1000  # a silent peer is lost after interval + timeout: 3 s
_KEEPALIVE_TIMEOUT_MS = 2000
_MIN_PING_INTERVAL_MS = 500  # the C core's default of 300 s answers faster pings with GOAWAY

_COMMON = [
    ("grpc.max_send_message_length", INTERNAL_RECEIVE_BYTES),
    ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),  # the core's minute would outlast the keepalive timeout
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = [
    *_COMMON,
    ("grpc.max_receive_message_length", INTERNAL_RECEIVE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


def create_server(*, max_receive_bytes: int = INTERNAL_RECEIVE_BYTES) -> grpc.aio.Server:
    """A server whose handlers may raise IsthmusError, sent as a status with details. Bind, then start it."""
    options = [
        *_COMMON,
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_concurrent_streams", _MAX_CONCURRENT_CALLS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        ("grpc.http2.max_ping_strikes", 0),  # bandwidth probes come on top of keepalive; neither is an attack
        ("grpc.so_reuseport", 0),  # or a taken port would go unnoticed
    ]
    return grpc.aio.server(interceptors=[ErrorMapper()], options=options)


def channel(address: str) -> grpc.aio.Channel:
    """A connection of its own to `address`: it reconnects by itself, retries no call, ignores HTTP proxies."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)


def bind_grpc(server: grpc.aio.Server, host: str, port: int) -> int:
    """The port bound, `port` itself unless that is 0. Raises CannotStart when it is taken."""
    bound_socket(host, port, "grpc_port").close()  # the C core's own report would be several lines on stderr
    shown = f"[{host}]" if ":" in host else host
    try:
        return server.add_insecure_port(f"{shown}:{port}")
    except RuntimeError as error:
        raise _port_taken(host, port, "grpc_port", str(error)) from error


def bound_socket(host: str, port: int, setting: str) -> socket.socket:
    """A bound TCP socket, not yet listening. Raises CannotStart naming `setting` or the host if it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        mend = "set --host to an address of this machine"
        raise CannotStart("host", f"given {host!r}: {error.strerror}", mend) from error
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _port_taken(host, port, setting, error.strerror or str(error)) from error
    return bound


def _port_taken(host: str, port: int, setting: str, problem: str) -> CannotStart:
    flag = "--" + setting.replace("_", "-")
    mend = f"stop what listens there, or set {flag} (ISTHMUS_{setting.upper()}) to another port, 0 for a free one"
    return CannotStart(setting, f"{host}:{port}: {problem}", mend)
