"""Models of the Hugging Face hub, named `org/name` or `org/name@revision`: fetched into huggingface_hub's own cache.

That library reads its own settings: HF_HOME (where the cache lies), HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, and how many
seconds an answer may take: HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT.
"""

import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from isthmus.errors import CannotStart

CHECKED_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_FETCHED_FILES: Final = (*CHECKED_FILES, "*.safetensors")
_IGNORED: Final = ("*/*", "consolidated*")  # the same weights again, in another form
# A revision becomes part of a path in the cache.
_ID: Final = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)

_COMMIT: Final = re.compile("[0-9a-f]{40}")


class HubId(NamedTuple):
    """A model of the hub."""

    name: str  # org/name
    revision: str | None  # a branch, tag or commit; None: the main branch

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse_id(model: str) -> HubId | None:
    """The hub id that `model` is; None for a directory, even one named like a hub id, and for what is neither."""
    found = None if Path(model).is_dir() else _ID.fullmatch(model)
    return found and HubId(found["name"], found["revision"])


def model_name(model: str) -> str:
    """The name by which clients ask for the model that `--model` names."""
    return hub_id.name if (hub_id := parse_id(model)) else Path(model).name


def fetch(model_id: str, *, revision: str | None = None, files: Sequence[str] = _FETCHED_FILES) -> Path:
    """The directory in the cache, named for its commit, with those of `files` that the model has. Raises CannotStart.

    For a branch or tag the hub is asked which commit it stands for; when it does not answer, the last known one is
    taken. A commit that the cache holds needs no network.
    """
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if revision is not None and _COMMIT.fullmatch(revision):
        with suppress(CannotStart):
            return _snapshot(HubId(model_id, revision), files, local_files_only=True)
    return _snapshot(HubId(model_id, revision), files, local_files_only=False)


def _snapshot(hub_id: HubId, files: Sequence[str], *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    with named_failures(hub_id):
        folder = snapshot_download(
            hub_id.name,
            revision=hub_id.revision,
            allow_patterns=list(files),
            ignore_patterns=list(_IGNORED),
            local_files_only=local_files_only,
            library_name="isthmus",
        )
    return Path(folder)


@contextmanager
def named_failures(hub_id: HubId) -> Generator[None]:
    """While the block runs, what the library raises becomes CannotStart, and none of its requests waits forever."""
    from huggingface_hub import constants, errors, get_session

    hooks = get_session().event_hooks["request"]
    if _bound_wait not in hooks:
        hooks.append(_bound_wait)
    try:
        yield
    except errors.GatedRepoError as error:
        mend = f"accept its terms at {constants.ENDPOINT}/{hub_id.name}, then set HF_TOKEN or run 'hf auth login'"
        raise _refused(hub_id, "is gated: the hub does not give it to you", mend) from error
    except errors.RevisionNotFoundError as error:
        problem = f"does not exist: {hub_id.name} has no revision {hub_id.revision or 'main'!r}"
        raise _refused(hub_id, problem, "name a branch, a tag or a commit after the @") from error
    except errors.RepositoryNotFoundError as error:
        problem = f"is neither a directory here nor a model that {constants.ENDPOINT} shows you"
        raise _refused(hub_id, problem, "check the name; for a private model set HF_TOKEN") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(hub_id, error) from error
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        problem = f"has no readable safetensors weights: {_first_line(error)}"
        raise _refused(hub_id, problem, "choose a model published as safetensors") from error
    # The root of its HTTP library's errors; which library that is changes.
    except (errors.HTTPError, errors.XetDownloadError) as error:  # pyright: ignore[reportPrivateImportUsage]
        problem = f"could not be fetched from {constants.ENDPOINT}: {_first_line(error)}"
        raise _refused(hub_id, problem, "try again later; what has arrived is kept") from error
    except errors.HFValidationError as error:
        raise _refused(hub_id, f"is no hub id: {_first_line(error)}", "write org/name or org/name@revision") from error
    except OSError as error:
        problem = f"could not be stored in {constants.HF_HUB_CACHE}: {_first_line(error)}"
        raise _refused(hub_id, problem, "make room there, or set HF_HOME to a directory that has it") from error


def _bound_wait(request: Any) -> None:
    """Gives a request without a timeout one: the library looks up branches and lists files without any."""
    from huggingface_hub import constants

    waits = request.extensions.get("timeout", {})
    bounded = {part: constants.HF_HUB_ETAG_TIMEOUT if wait is None else wait for part, wait in waits.items()}
    request.extensions = {**request.extensions, "timeout": bounded}


def _unreachable(hub_id: HubId, error: Exception) -> CannotStart:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        problem = f"is not whole in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids fetching it"
        mend = f"fetch it where there is a network ('isthmus model path {hub_id}'), or unset HF_HUB_OFFLINE"
        return _refused(hub_id, problem, mend)
    status = getattr(getattr(error.__cause__, "response", None), "status_code", None)
    answer = f"answers {status}" if status else f"does not answer ({type(error.__cause__).__name__})"
    problem = f"is not whole in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} {answer}"
    return _refused(hub_id, problem, "check the network, or name a directory")


def _refused(hub_id: HubId, problem: str, mend: str) -> CannotStart:
    return CannotStart("model", f"'{hub_id}' {problem}", mend)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
