"""ZeroMQ sockets with the bounds every one of this package has: heartbeats, handshake, message size, no reconnect."""

import zmq

from isthmus.errors import CannotStart
from kv_transfer.frames import MAX_BODY_BYTES

_BOUNDS = {
    zmq.MAXMSGSIZE: MAX_BODY_BYTES,
    zmq.HANDSHAKE_IVL: 2000,  # ms
    zmq.HEARTBEAT_IVL: 500,
    zmq.HEARTBEAT_TIMEOUT: 1500,
    zmq.LINGER: 0,
    zmq.RECONNECT_IVL: -1,  # never: a broken link is not mended behind our back, its transfers fail
}
_ROUTER_RECEIVE_HWM = 32  # messages a connection may queue before TCP pushes back
_ANSWERS_HWM = 4096  # small frames
_UNBOUNDED = 0  # in messages: credit bounds the bytes

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


def bind_router(host: str, port: int) -> tuple[Context, Socket]:
    """A bound ROUTER in a context of its own. Raises CannotStart."""
    context: Context = zmq.Context(io_threads=1)
    socket = _bounded(context.socket(zmq.ROUTER), send_hwm=_ANSWERS_HWM, receive_hwm=_ROUTER_RECEIVE_HWM)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    try:
        socket.bind(f"tcp://{host}:{port or '*'}")
    except zmq.ZMQError as error:
        socket.close()
        context.term()
        raise CannotStart("zmq_port", f"{host}:{port}: {error}", "choose a free port, or 0") from error
    return context, socket


def open_dealer(context: Context) -> Socket:
    """Not connected yet."""
    return _bounded(context.socket(zmq.DEALER), send_hwm=_UNBOUNDED, receive_hwm=_ANSWERS_HWM)


def _bounded(socket: Socket, *, send_hwm: int, receive_hwm: int) -> Socket:
    for option, value in {**_BOUNDS, zmq.SNDHWM: send_hwm, zmq.RCVHWM: receive_hwm}.items():
        socket.setsockopt(option, value)
    return socket
