"""Names of prompt prefixes: what they cover, what keeps them apart, and that tenants share no block."""

import hashlib
import struct

from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.steps import PrefillChunk, SamplingInput, ignore_stored
from isthmus.types import Request, SamplingParams
from tests.engine.engines import bundled_engine, prompt

LAYOUT = prefix_scope("layout")


def test_hashes_cover_full_strides_and_everything_before_them() -> None:
    hashes = prefix_hashes(range(35), 16, LAYOUT)
    assert [len(name) for name in hashes] == [16, 16]
    assert prefix_hashes(range(32), 16, LAYOUT) == hashes
    assert prefix_hashes([*range(31), 99], 16, LAYOUT)[0] == hashes[0]
    assert prefix_hashes([*range(31), 99], 16, LAYOUT)[1] != hashes[1]
    assert prefix_hashes([99, *range(1, 32)], 16, LAYOUT)[1] != hashes[1]
    assert not set(prefix_hashes(range(32), 16, prefix_scope("other"))) & set(hashes)
    assert prefix_hashes(range(15), 16, LAYOUT) == []


def test_every_field_of_a_scope_keeps_prefixes_apart() -> None:
    scopes = {
        LAYOUT,
        prefix_scope("layout", tenant="a"),
        prefix_scope("layout", cache_salt="a"),
        prefix_scope("layouta"),
        prefix_scope("layout", tenant="ab"),
        prefix_scope("layout", tenant="a", cache_salt="b"),  # as long, written one after the other, as the one before
        prefix_scope("layout", tenant="", cache_salt="ab"),
    }
    assert len(scopes) == 7
    assert len({prefix_hashes(range(16), 16, scope)[0] for scope in scopes}) == 7


def test_the_names_are_what_the_module_says() -> None:
    scope = hashlib.sha256(b"\0" + b"\x02\0\0\0kv" + b"\x03\0\0\0t\xc3\xa9" + b"\0\0\0\0").digest()
    assert prefix_scope("kv", tenant="té") == scope
    first = hashlib.sha256(b"\1" + scope + struct.pack("<2I", 7, 8)).digest()[:16]
    second = hashlib.sha256(b"\1" + first + struct.pack("<2I", 9, 10)).digest()[:16]
    assert prefix_hashes([7, 8, 9, 10, 11], 2, scope) == [first, second]


def test_a_router_names_prefixes_as_the_worker_names_its_blocks() -> None:
    engine, tokens = bundled_engine(), prompt(70, seed=9)
    blocks = engine.pool.allocate(engine.layout.num_blocks(len(tokens)))
    _, before = engine.pool.published()
    engine.publish_prompt(tokens, blocks, "tenant")
    _, after = engine.pool.published()
    engine.pool.release(blocks)
    scope = prefix_scope(engine.layout.fingerprint, tenant="tenant")  # a router has the fingerprint and the tenant
    assert set(after) - set(before) == set(prefix_hashes(tokens, engine.layout.block_size, scope))


def test_two_tenants_never_share_a_block() -> None:
    engine, tokens = bundled_engine(), tuple(prompt(100, seed=10))
    request = Request("r", 7, tokens, SamplingParams(max_tokens=1))
    blocks = engine.pool.allocate(engine.layout.num_blocks(len(tokens)))
    chunk = PrefillChunk(tokens, 0, blocks, needs_logits=True)
    engine.compute([chunk], [SamplingInput(request, ())], ignore_stored)
    engine.publish_prompt(tokens, blocks, "mine")
    assert engine.match_prompt(tokens, "yours") == []
    assert engine.match_prompt(tokens, "") == []
    again = engine.match_prompt(tokens, "mine")
    assert again == blocks[: len(tokens) // engine.layout.block_size]
    others = engine.pool.allocate(len(blocks))
    engine.publish_prompt(tokens, others, "yours")
    yours = engine.match_prompt(tokens, "yours")
    assert len(yours) == len(again)
    assert not set(yours) & set(again)
    for taken in (blocks, again, others, yours):
        engine.pool.release(taken)
