"""What only the command line asks of the hub: the commit to pin, and the headers of weight files not fetched."""

from pathlib import Path

from isthmus.checkpoint.directory import TensorEntry
from isthmus.checkpoint.hub import HubId, fetch, named_failures, parse_id


def pinned(model: str) -> str:
    """A hub id with the commit it stands for now, fetched, so that processes started with it need no network.

    Anything else is returned as it is. Raises CannotStart.
    """
    hub_id = parse_id(model)
    return model if hub_id is None else f"{hub_id.name}@{fetch(hub_id.name, revision=hub_id.revision).name}"


def fetch_headers(model_id: str, *, revision: str | None = None) -> dict[str, TensorEntry]:
    """Name to entry, by ranged reads of each file's start; no weights are fetched. Raises CannotStart."""
    from huggingface_hub import get_safetensors_metadata

    with named_failures(HubId(model_id, revision)):
        files = get_safetensors_metadata(model_id, revision=revision).files_metadata
    return {
        name: TensorEntry(
            Path(file), tensor.dtype, tuple(tensor.shape), tensor.data_offsets[1] - tensor.data_offsets[0]
        )
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }
