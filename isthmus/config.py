"""Settings of every process: flags over environment over a TOML file over defaults. Only this reads the environment."""

import argparse
import os
import socket
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from isthmus.errors import CannotStart
from isthmus.failpoints import Failpoints

EXIT_CANNOT_START = 2  # the status of a process that CannotStart ended
ENV_PREFIX = "ISTHMUS_"
_CONFIG_FILE = "config"  # --config, ISTHMUS_CONFIG
_WILDCARD_HOSTS = ("", "0.0.0.0", "::")


def _is_block_size(value: int) -> int:
    if value not in (16, 32, 64):
        raise ValueError("a block size divides the tile of 64 tokens: 16, 32 or 64")
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 24)]
Size = Annotated[ByteSize, Field(ge=1, le=1 << 50)]
BlockSize = Annotated[int, AfterValidator(_is_block_size)]


class ServiceConfig(BaseModel):
    """What every service is told. Frozen: settings do not change while a process lives."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    role: ClassVar[str] = ""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]{0,64}$", description="shown in status and logs [ROLE-HOSTNAME]")
    host: str = Field("127.0.0.1", min_length=1, max_length=253, description="address to listen on")
    advertise_host: str = Field(
        "", max_length=253, description="host that peers connect to [host, or the host's name if that is a wildcard]"
    )
    grpc_port: Port = Field(0, description="gRPC port, 0-65535; 0: a free one")
    http_port: Port = Field(0, description="HTTP port of /livez, /readyz and /metrics, 0-65535; 0: a free one")
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="redis://, rediss:// or unix:// URL")
    model: str = Field("bundled", min_length=1, description="checkpoint directory, hub id (org/name@rev) or 'bundled'")
    context_length: Count | None = Field(None, description="most tokens of a request [as many as the model allows]")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="debug, info, warning or error")
    failpoints: str = Field("", description="for tests: name=ACTION[@N], joined by ';'; see docs/development.md")

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("name"):
            return values
        name = f"{cls.role}-{socket.gethostname()}"
        return {**values, "name": name[:64]}

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: str) -> str:
        if not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("the URL starts with redis://, rediss:// or unix://")
        return value

    @field_validator("failpoints")
    @classmethod
    def _are_failpoints(cls, value: str) -> str:
        Failpoints.parse(value)
        return value

    @property
    def reachable_host(self) -> str:
        """The host other processes are told."""
        return self.advertise_host or (socket.gethostname() if self.host in _WILDCARD_HOSTS else self.host)

    @property
    def redis_shown(self) -> str:
        """The Redis URL without its credentials, for messages."""
        scheme, _, rest = self.redis_url.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"


class WorkerConfig(ServiceConfig):
    """What both kinds of worker are told."""

    dtype: Literal["fp32", "bf16"] = Field("fp32", description="of weights and cache: fp32 or bf16")
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu or cuda: the first GPU that torch sees")
    cache_dtype: Literal["auto", "fp8"] = Field("auto", description="of the cache: auto (as dtype), or fp8 on a GPU")
    block_size: BlockSize = Field(16, description="tokens in a cache block: 16, 32 or 64")
    num_blocks: Count | None = Field(None, description="blocks in the cache [as many as cache_bytes holds]")
    cache_bytes: Size | None = Field(
        None,
        description="bytes of the cache; KiB, MiB, GiB are understood"
        " [256 MiB on the CPU; on a GPU what the memory profile leaves]",
    )
    heartbeat_s: Seconds = Field(0.5, description="seconds between renewals of the lease")
    lease_s: Seconds = Field(3.0, description="seconds the lease in Redis lasts; more than twice heartbeat_s")
    fill_timeout_s: Seconds = Field(10.0, description="seconds for a request's blocks to arrive")

    @field_validator("lease_s")
    @classmethod
    def _outlasts_heartbeats(cls, value: float, info: ValidationInfo) -> float:
        if value <= 2 * info.data.get("heartbeat_s", 0.0):
            raise ValueError("a lease must outlast two heartbeats (heartbeat_s)")
        return value


class PrefillConfig(WorkerConfig):
    role: ClassVar[str] = "prefill"

    tile_budget: Count | None = Field(
        None, description="tokens computed in one step [a layer of it takes <= 100 ms; on a GPU 8192]"
    )


class DecodeConfig(WorkerConfig):
    role: ClassVar[str] = "decode"

    zmq_port: Port = Field(0, description="ZeroMQ port that blocks arrive on, 0-65535; 0: a free one")
    max_batch: Count = Field(64, description="sequences decoded in one step")


class RouterConfig(ServiceConfig):
    role: ClassVar[str] = "router"

    max_queue: Count = Field(256, description="requests that wait for a worker; more are refused")
    max_streams: Count = Field(512, description="requests in flight; more wait in the queue")
    queue_timeout_s: Seconds = Field(10.0, description="seconds a request waits for a worker")
    max_prompt_bytes: Size = Field(ByteSize(1 << 20), description="bytes of a prompt's text; KiB, MiB are understood")
    max_timeout_s: Seconds = Field(600.0, description="seconds; longer deadlines are cut to it")
    default_timeout_s: Seconds = Field(
        600.0, validate_default=True, description="seconds, for calls without a deadline; at most max_timeout_s"
    )

    @field_validator("default_timeout_s")
    @classmethod
    def _within_max(cls, value: float, info: ValidationInfo) -> float:
        return min(value, info.data.get("max_timeout_s", value))


ConfigT = TypeVar("ConfigT", bound=ServiceConfig)
_ALL: tuple[type[ServiceConfig], ...] = (RouterConfig, PrefillConfig, DecodeConfig)


def load(config_class: type[ConfigT], argv: Sequence[str], env: Mapping[str, str] | None = None) -> ConfigT:
    """The settings of one process. Raises CannotStart naming the setting, what was given and how to mend it."""
    flags = _read_flags(config_class, argv)
    environment = _read_environment(os.environ if env is None else env)
    path = flags.pop(_CONFIG_FILE, None) or environment.pop(_CONFIG_FILE, None)
    file = _read_file(Path(path), config_class) if path else {}
    known = {name: value for name, value in environment.items() if name in config_class.model_fields}
    try:
        return config_class.model_validate({**file, **known, **flags})
    except ValidationError as error:
        raise _cannot_start(config_class, error) from error


def runtime_dir() -> Path:
    """Where this user's running stacks are noted: in $XDG_RUNTIME_DIR, else in the temporary directory."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "isthmus" if base else Path(tempfile.gettempdir()) / f"isthmus-{os.getuid()}"


def checkout_root() -> Path:
    """The directory that holds the import roots."""
    return Path(__file__).resolve().parents[1]


def worker_environment() -> dict[str, str]:
    """For children: ours, but by default one OpenMP thread (spinning teams collapse) and no chatter of the C core."""
    return {"OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR", **os.environ, "PYTHONUNBUFFERED": "1"}


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CannotStart("command line", message, "see --help")


def _read_flags(config_class: type[ServiceConfig], argv: Sequence[str]) -> dict[str, str]:
    program = Path(sys.argv[0]).parent.name if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name
    about = f"Each flag is also an environment variable ({ENV_PREFIX}GRPC_PORT) and a key of the TOML file (grpc_port)."
    parser = _Parser(prog=program, description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file: top-level keys for all, a table [{config_class.role}] for this role",
    )
    for name, field in config_class.model_fields.items():
        shown = "" if field.default in (None, "") else f" [{field.default}]"
        parser.add_argument(_flag(name), metavar="VALUE", help=f"{field.description}{shown}".replace("%", "%%"))
    return vars(parser.parse_args(argv))


def _known_fields() -> set[str]:
    return {_CONFIG_FILE, *(name for config_class in _ALL for name in config_class.model_fields)}


def _read_environment(env: Mapping[str, str]) -> dict[str, str]:
    """One environment may serve every role (as in a compose file): other roles' keys pass, unknown ones are refused."""
    names = [name for name in env if name.startswith(ENV_PREFIX) and env[name]]
    values = {name.removeprefix(ENV_PREFIX).lower(): env[name] for name in names}
    for key in values.keys() - _known_fields():
        raise CannotStart(ENV_PREFIX + key.upper(), "no such setting", "unset it, or see --help for the names")
    return values


def _read_file(path: Path, config_class: type[ServiceConfig]) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CannotStart("--config", f"{path}: {error}", "give a readable TOML file") from error
    tables = {role.role: content.pop(role.role, {}) for role in _ALL}
    for key in content.keys() - _known_fields():
        raise CannotStart(f"{key} in {path}", "no such setting", "remove it, or see --help for the names")
    own = tables[config_class.role]
    if not isinstance(own, dict):
        raise CannotStart(f"{config_class.role} in {path}", "not a table", f"write [{config_class.role}]")
    shared = {key: value for key, value in content.items() if key in config_class.model_fields}
    return {**shared, **own}


def _cannot_start(config_class: type[ServiceConfig], error: ValidationError) -> CannotStart:
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else "settings"
    field = config_class.model_fields.get(name)
    if field is None:
        return CannotStart(name, "no such setting", "remove it, or see --help for the names")
    given = "a URL" if name == "redis_url" else repr(first["input"])[:80]
    problem = f"given {given}: {first['msg'].removeprefix('Value error, ')}"
    return CannotStart(name, problem, f"set {_flag(name)} or {ENV_PREFIX}{name.upper()} ({field.description})")
