"""The client library: generation as a stream that outlives routers and workers. `Client` blocks, `AsyncClient` awaits.

Errors are the types of isthmus/errors.py. See docs/client.md.
"""

from isthmus.client.asyncio_client import AsyncClient
from isthmus.client.asyncio_stream import AsyncStream
from isthmus.client.blocking_client import Client
from isthmus.client.blocking_stream import Stream
from isthmus.client.generation import Chunk, Generation
from isthmus.client.options import RETENTION_S, GenerateOptions, Message

__all__ = [
    "RETENTION_S",
    "AsyncClient",
    "AsyncStream",
    "Chunk",
    "Client",
    "GenerateOptions",
    "Generation",
    "Message",
    "Stream",
]
