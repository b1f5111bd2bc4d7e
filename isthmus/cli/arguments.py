"""What can be written after `isthmus`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from isthmus.checkpoint.directory import BUNDLED
from isthmus.checkpoint.hub import parse_id
from isthmus.cli.hub_model import pinned
from isthmus.cli.stack_plan import StackSpec
from isthmus.errors import CannotStart


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Exits with status 2 and a usage line for what it does not understand."""
    parser = argparse.ArgumentParser(prog="isthmus", description="Serve a model with prefill and decode apart.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_up(commands.add_parser("up", help="run the local stack until Ctrl-C"))
    _add_generate(commands.add_parser("generate", help="stream the answer to a prompt"))
    _add_status(commands.add_parser("status", help="show pools, health and load of a running stack"))
    _add_explain(commands.add_parser("explain", help="show what became of one request, in every process"))
    _add_model(commands.add_parser("model", help="fetch a model, or tell whether it can be served"))
    demo = commands.add_parser("demo", help="start a stack, stream a few prompts, print what was measured, stop it")
    _add_stack(demo)
    return parser.parse_args(argv)


def pin_model(parsed: argparse.Namespace) -> None:
    """Fetches a hub model that a local stack is to serve, and names its commit to all processes. Raises CannotStart."""
    if parsed.command in ("up", "demo") or (parsed.command == "generate" and parsed.router is None):
        parsed.model = pinned(parsed.model)


def stack_spec(parsed: argparse.Namespace) -> StackSpec:
    """What `isthmus up` was asked for. Raises CannotStart."""
    if parsed.device == "cuda" and parsed.cache_bytes is None:
        problem = "all workers of a local stack are on one GPU, and a worker alone would take what it has"
        raise CannotStart("--cache-bytes", problem, "say how much each may use, as --cache-bytes 8GiB")
    return StackSpec(
        num_prefill=parsed.prefill,
        num_decode=parsed.decode,
        num_routers=parsed.routers,
        model=_model(parsed.model),
        dtype=parsed.dtype,
        device=parsed.device,
        block_size=parsed.block_size,
        context_length=parsed.context_length,
        cache_bytes=parsed.cache_bytes,
        router_port=parsed.router_port,
        redis_url=parsed.redis_url,
        restart=not parsed.no_restart,
        log_level=parsed.log_level,
        ready_timeout_s=parsed.ready_timeout or (60.0 if parsed.model == BUNDLED else 900.0),
    )


def stack_flags(parsed: argparse.Namespace) -> list[str]:
    """The flags of `isthmus up` that make the stack `_add_stack` describes."""
    numbers = ["--prefill", str(parsed.prefill), "--decode", str(parsed.decode), "--block-size", str(parsed.block_size)]
    flags = [*numbers, "--model", _model(parsed.model), "--dtype", parsed.dtype, "--device", parsed.device]
    if parsed.context_length is not None:
        flags += ["--context-length", str(parsed.context_length)]
    if parsed.cache_bytes is not None:
        flags += ["--cache-bytes", parsed.cache_bytes]
    return flags


def _model(given: str) -> str:
    """Absolute: children run in the checkout's directory."""
    return given if given == BUNDLED or parse_id(given) else str(Path(given).resolve())


def _add_stack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill workers [1]")
    parser.add_argument("--decode", type=_count, default=1, metavar="M", help="decode workers [1]")
    parser.add_argument("--model", default="bundled", metavar="MODEL", help="directory or hub id (org/name) [bundled]")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and cache [fp32]")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the workers; cuda: one GPU [cpu]")
    parser.add_argument("--context-length", type=int, metavar="N", help="most tokens of a request [the model's]")
    parser.add_argument("--cache-bytes", metavar="SIZE", help="of each worker's cache, as 2GiB [256MiB; cuda: say it]")
    parser.add_argument("--block-size", type=int, choices=[16, 32, 64], default=16, help="tokens in a block [16]")


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_stack(parser)
    parser.add_argument("--routers", type=_count, default=1, metavar="R", help="routers [1]")
    parser.add_argument("--router-port", type=_port, default=0, metavar="PORT", help="of the first router [a free one]")
    parser.add_argument("--redis-url", metavar="URL", help="a Redis that runs already [a server of the stack's own]")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="for logs and stack.json [a temporary one]")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="[info]")
    parser.add_argument(
        "--ready-timeout", type=float, metavar="SECONDS", help="until all serve [60; 900 unless bundled]"
    )
    parser.add_argument("--no-restart", action="store_true", help="leave a child that died dead")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all serve, nothing else")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to go on from; '-' reads it from standard input")
    parser.add_argument("--router", metavar="ADDR[,ADDR]", help="host:port of routers [a temporary stack]")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="[to the end of the context]")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest token [1.0]")
    parser.add_argument("--top-p", type=float, metavar="P", help="[1.0]")
    parser.add_argument("--top-k", type=int, metavar="K", help="[off]")
    parser.add_argument("--seed", type=int, metavar="S", help="[one is minted and shown under --json]")
    parser.add_argument("--logprobs", type=int, metavar="K", help="the token's own and the top K, under --json")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; can be repeated")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="[600]")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    _add_stack(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    path = actions.add_parser("path", help="print a checkpoint's directory; a hub model is fetched")
    check = actions.add_parser("check", help="sizes, room for the cache, and every reason why it cannot be served")
    for action in (path, check):
        action.add_argument("model", help="a directory, a hub id (org/name or org/name@revision), or 'bundled'")
    check.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and cache [fp32]")
    check.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda keeps FP8 as stored [cpu]")
    check.add_argument("--cache-dtype", choices=["auto", "fp8"], default="auto", help="auto: as --dtype [auto]")
    check.add_argument("--memory", type=_size, metavar="SIZE", help="a worker may use, as 24GiB [this machine's]")
    check.add_argument("--block-size", type=int, choices=[16, 32, 64], default=16, help="tokens in a block [16]")
    check.add_argument("--context-length", type=int, metavar="N", help="most tokens of a request [the model's]")
    check.add_argument("--json", action="store_true", help="print one JSON object")


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router", metavar="ADDR", help="host:port of a router [the newest local stack]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("request_id", metavar="REQUEST_ID", help="as `accepted` and `generate --json` give it")
    parser.add_argument("--router", metavar="ADDR[,ADDR]", help="host:port of routers [the newest local stack]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("1 to 64")
    return value


def _size(text: str) -> int:
    try:
        return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        raise argparse.ArgumentTypeError("a number of bytes, as 24GiB") from error


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("0 to 65535")
    return value
