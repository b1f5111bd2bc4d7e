"""The `isthmus` command: up, generate, status, explain, model, demo."""

import asyncio
import os
import sys
from collections.abc import Sequence

import grpc.aio

from isthmus.cli import arguments, demo, explain, generate, model, status, up
from isthmus.cli.supervisor import StackFailed
from isthmus.config import EXIT_CANNOT_START
from isthmus.errors import CannotStart, IsthmusError
from isthmus.process.rpc_errors import error_from_rpc

EXIT_UNREAD = 141  # as a shell reports SIGPIPE
_COMMANDS = {
    "up": up.run,
    "generate": generate.run,
    "status": status.run,
    "explain": explain.run,
    "demo": demo.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 when a request failed, 2 when something cannot start; one line on stderr says why."""
    parsed = arguments.parse(sys.argv[1:] if argv is None else argv)
    try:
        if parsed.command == "model":
            return model.run(parsed)
        arguments.pin_model(parsed)  # an event loop would keep Ctrl-C from ending a download
        return asyncio.run(_COMMANDS[parsed.command](parsed))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # who read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush fails too
        return EXIT_UNREAD
    except (CannotStart, StackFailed) as error:
        sys.stderr.write(f"isthmus {parsed.command}: {error}\n")
        return EXIT_CANNOT_START
    except grpc.aio.AioRpcError as error:
        return _refused(parsed.command, error_from_rpc(error))
    except IsthmusError as error:
        return _refused(parsed.command, error)


def _refused(command: str, error: IsthmusError) -> int:
    fields = ", ".join(violation.field for violation in error.violations)
    named = f" ({fields})" if fields else ""
    sys.stderr.write(f"isthmus {command}: {error.reason}{named}: {error.detail}\n")
    return 1
