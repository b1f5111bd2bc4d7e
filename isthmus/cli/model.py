"""`isthmus model path NAME`: where a checkpoint lies."""

import argparse
import sys

from isthmus.checkpoint import resolve_model


async def run(parsed: argparse.Namespace) -> int:
    sys.stdout.write(f"{resolve_model(parsed.name)}\n")
    return 0
