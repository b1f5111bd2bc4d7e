"""Settings: precedence, bounds, and refusals that say how to mend them."""

from pathlib import Path

import pytest

from isthmus.config import DecodeConfig, PrefillConfig, RouterConfig, load
from isthmus.errors import CannotStart


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path):
    file = tmp_path / "isthmus.toml"
    file.write_text(
        'max_batch = 8\nblock_size = 32\nmax_queue = 9\nlog_level = "error"\n[decode]\nlog_level = "debug"\n'
    )
    env = {"ISTHMUS_BLOCK_SIZE": "64", "ISTHMUS_MAX_BATCH": "16", "ISTHMUS_MAX_QUEUE": "5", "ISTHMUS_DTYPE": ""}
    config = load(DecodeConfig, ["--config", str(file), "--max-batch", "4"], env)
    assert (config.max_batch, config.block_size, config.log_level, config.dtype) == (4, 64, "debug", "fp32")


def test_sizes_take_units():
    assert load(DecodeConfig, ["--cache-bytes", "3MiB"], {}).cache_bytes == 3 << 20


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--block-size", "17"], "block_size: given '17': .*16, 32 or 64"),
        (["--grpc-port", "65536"], "grpc_port: given '65536'.*--grpc-port or ISTHMUS_GRPC_PORT"),
        (["--grpc-port", "-1"], "grpc_port"),
        (["--dtype", "fp8"], "dtype: given 'fp8'.*fp32 or bf16"),
        (["--cache-bytes", "0"], "cache_bytes"),
        (["--num-blocks", "none"], "num_blocks"),
        (["--lease-s", "nan"], "lease_s"),
        (["--lease-s", "0.9"], "two heartbeats"),
        (["--name", "a b"], "name"),
        (["--redis-url", "http://me:secret@there"], "redis_url: given a URL"),
        (["--failpoints", "decode.step=explode"], "decode.step=explode"),
        (["--block", "16"], "command line: unrecognized"),
        (["--config", "/nonexistent/x.toml"], "--config"),
    ],
)
def test_bad_flag_is_refused_with_its_mend(argv: list[str], shown: str):
    with pytest.raises(CannotStart, match=shown) as caught:
        load(DecodeConfig, argv, {})
    assert "To mend it: " in caught.value.detail
    assert "secret" not in caught.value.detail


def test_misspelt_environment_is_refused_but_other_roles_keys_pass():
    load(PrefillConfig, [], {"ISTHMUS_MAX_QUEUE": "5"})
    with pytest.raises(CannotStart, match="ISTHMUS_BLOCKSIZE: no such setting"):
        load(PrefillConfig, [], {"ISTHMUS_BLOCKSIZE": "16"})


@pytest.mark.parametrize("content", ["x = ", "blocksize = 16", "[router]\nblock_size = 16", "router = 1", "\x00"])
def test_bad_file_is_refused(content: str, tmp_path: Path):
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(CannotStart):
        load(RouterConfig, [], {"ISTHMUS_CONFIG": str(file)})


def test_default_timeout_is_at_most_the_maximum():
    assert load(RouterConfig, ["--max-timeout-s", "5"], {}).default_timeout_s == 5


def test_wildcard_host_is_not_what_peers_are_told():
    assert load(RouterConfig, [], {}).reachable_host == "127.0.0.1"
    assert load(RouterConfig, ["--host", "0.0.0.0"], {}).reachable_host != "0.0.0.0"
    assert load(RouterConfig, ["--host", "0.0.0.0", "--advertise-host", "r1"], {}).reachable_host == "r1"


def test_redis_url_is_shown_without_its_password():
    assert load(RouterConfig, ["--redis-url", "redis://u:pw@h:1/0"], {}).redis_shown == "redis://h:1/0"


def test_help_names_flags_with_their_units(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        load(DecodeConfig, ["--help"], {})
    out = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--block-size VALUE tokens in a cache block: 16, 32 or 64 [16]" in out
