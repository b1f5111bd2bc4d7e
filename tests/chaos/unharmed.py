"""What every chaos test claims: streams that run while something is done to the stack are as on a quiet one."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from isthmus.testing.stack import Stack
from tests.chaos.evidence import KEEP, SEED, keep, logged_errors
from tests.chaos.faults import Injected
from tests.chaos.history import Oracle, Record, violations
from tests.chaos.ledgers import read_ledgers, save_ledgers
from tests.chaos.load import Load, clients_of, learn_oracles, specs
from tests.chaos.quiet import until_quiet
from tests.chaos.silence import Silence, silences, table

QUIET_WITHIN_S = 5.0
STREAM_TTL_S = 30.0  # of the hint where a finished stream is kept, and of what a killed process leaves


@dataclass(slots=True)
class Run:
    """One run under faults; the block appends to `faults`, the silences are there after it."""

    records: list[Record]
    faults: list[Injected] = field(default_factory=list[Injected])
    silences: list[Silence] = field(default_factory=list[Silence])


@asynccontextmanager
async def unharmed_load(stack: Stack, expected: dict[str, Oracle], *, num_users: int) -> AsyncIterator[Run]:
    """The block does its harm and notes it; at its end users finish what they began, then the stack holds nothing.

    Prints the silences. What fails, or any run with CHAOS_KEEP, leaves its evidence in a directory that it names.
    """
    asked = specs()
    async with AsyncExitStack() as opened:
        clients = [await opened.enter_async_context(client) for client in clients_of(stack)]
        await learn_oracles(clients[0], asked, expected)
        load = Load(clients, asked, random.Random(SEED), num_users)
        run = Run(load.records)
        try:
            async with load:
                yield run
            await save_ledgers(stack)
            run.silences = silences(run.records, run.faults, read_ledgers(stack.logs))
            print(f"\n{load.volume()}, CHAOS_SEED={SEED}\n{table(run.silences)}")
            problems = violations(run.records, expected) + logged_errors(stack.logs)
            assert not problems, f"{len(problems)} problems:\n" + "\n".join(problems[:10])
            await until_quiet(stack, QUIET_WITHIN_S, max_ttl_s=STREAM_TTL_S)
        except BaseException:
            print(f"CHAOS_SEED={SEED}; evidence in {await keep(stack, run.records, run.faults, expected)}")
            raise
        if KEEP:
            print(f"evidence in {await keep(stack, run.records, run.faults, expected)}")
