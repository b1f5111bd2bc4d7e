"""What can be written after `isthmus`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from isthmus.cli.stack import StackSpec


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Exits with status 2 and a usage line for what it does not understand."""
    parser = argparse.ArgumentParser(prog="isthmus", description="Serve a model with prefill and decode apart.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_up(commands.add_parser("up", help="run the local stack until Ctrl-C"))
    _add_generate(commands.add_parser("generate", help="stream the answer to a prompt"))
    _add_status(commands.add_parser("status", help="show pools, health and load of a running stack"))
    model = commands.add_parser("model", help="models in this checkout").add_subparsers(dest="action", required=True)
    model.add_parser("path", help="print a checkpoint's directory").add_argument(
        "name", help="'bundled', or a directory"
    )
    demo = commands.add_parser("demo", help="start a stack, stream a few prompts, print what was measured, stop it")
    _add_stack(demo)
    return parser.parse_args(argv)


def stack_spec(parsed: argparse.Namespace) -> StackSpec:
    """What `isthmus up` was asked for."""
    return StackSpec(
        num_prefill=parsed.prefill,
        num_decode=parsed.decode,
        num_routers=parsed.routers,
        model=_model(parsed.model),
        dtype=parsed.dtype,
        block_size=parsed.block_size,
        context_length=parsed.context_length,
        cache_bytes=parsed.cache_bytes,
        router_port=parsed.router_port,
        redis_url=parsed.redis_url,
        restart=not parsed.no_restart,
        log_level=parsed.log_level,
        ready_timeout_s=parsed.ready_timeout,
    )


def stack_flags(parsed: argparse.Namespace) -> list[str]:
    """The flags of `isthmus up` that make the stack `_add_stack` describes."""
    numbers = ["--prefill", str(parsed.prefill), "--decode", str(parsed.decode), "--block-size", str(parsed.block_size)]
    flags = [*numbers, "--model", _model(parsed.model), "--dtype", parsed.dtype]
    if parsed.context_length is not None:
        flags += ["--context-length", str(parsed.context_length)]
    if parsed.cache_bytes is not None:
        flags += ["--cache-bytes", parsed.cache_bytes]
    return flags


def _model(given: str) -> str:
    """Absolute: children run in the checkout's directory."""
    return given if given == "bundled" else str(Path(given).resolve())


def _add_stack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill workers [1]")
    parser.add_argument("--decode", type=_count, default=1, metavar="M", help="decode workers [1]")
    parser.add_argument("--model", default="bundled", metavar="DIR", help="checkpoint directory [bundled]")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of weights and cache [fp32]")
    parser.add_argument("--context-length", type=int, metavar="N", help="most tokens of a request [the model's]")
    parser.add_argument("--cache-bytes", metavar="SIZE", help="of each worker's cache, as 2GiB [256MiB]")
    parser.add_argument("--block-size", type=int, choices=[16, 32, 64], default=16, help="tokens in a block [16]")


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_stack(parser)
    parser.add_argument("--routers", type=_count, default=1, metavar="R", help="routers [1]")
    parser.add_argument("--router-port", type=_port, default=0, metavar="PORT", help="of the first router [a free one]")
    parser.add_argument("--redis-url", metavar="URL", help="a Redis that runs already [a server of the stack's own]")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="for logs and stack.json [a temporary one]")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="[info]")
    parser.add_argument("--ready-timeout", type=float, default=60.0, metavar="SECONDS", help="until all serve [60]")
    parser.add_argument("--no-restart", action="store_true", help="leave a child that died dead")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all serve, nothing else")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to go on from; '-' reads it from standard input")
    parser.add_argument("--router", metavar="ADDR", help="host:port of a router [a temporary stack]")
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


def _add_status(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--router", metavar="ADDR", help="host:port of a router [the newest local stack]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 64:
        raise argparse.ArgumentTypeError("1 to 64")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("0 to 65535")
    return value
