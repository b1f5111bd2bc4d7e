"""A core takes messages, the time and ids, and returns messages: nothing in it waits, reads a clock or rolls dice.

Every file of the packages is a core or plain data, unless it stands here as a driver or a root, with what it may use.
"""

PACKAGES = ("isthmus", "router", "prefill_service", "decode_service", "kv_transfer")

# What makes a file a driver: kind -> modules, and names as they are written.
KINDS: dict[str, set[str]] = {
    "loop": {"asyncio"},
    "thread": {"threading", "queue", "concurrent", "_thread"},
    "process": {"subprocess", "multiprocessing", "signal"},
    "clock": {"time", "datetime", "sched"},
    "chance": {"random", "secrets", "uuid"},
    "socket": {"socket", "select", "selectors", "socketserver", "zmq", "http", "urllib", "httpx", "huggingface_hub"},
    "grpc": {"grpc"},
    "redis": {"redis"},
    "server": {"uvicorn", "starlette"},
}
NAMES: dict[str, str] = {
    "SystemClock": "clock",
    "SystemIds": "chance",
    "os.urandom": "chance",
    "os.getrandom": "chance",
    "os.eventfd": "thread",
    "os.fork": "process",
    "os.kill": "process",
}
