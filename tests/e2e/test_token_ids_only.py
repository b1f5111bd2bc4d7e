"""A model published without tokenizer.json speaks token ids; what needs text is refused by field."""

from pathlib import Path

import grpc
import pytest

from isthmus.checkpoint.directory import resolve_model
from isthmus.testing.stack import Stack, StackClient, request, running_stack

PROMPT = [5, 17, 300, 41, 8, 99]


@pytest.mark.e2e
async def test_ids_in_ids_out_and_no_text(tmp_path: Path, stack: Stack) -> None:
    bundled = resolve_model("bundled")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(bundled / name)
    asked = request(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)
    async with StackClient(stack.router) as client:
        expected = await client.generate(asked)
    with running_stack("--model", str(tmp_path)) as without:
        async with StackClient(without.router) as client:
            answer = await client.generate(asked)
            assert (answer.token_ids, answer.logprobs) == (expected.token_ids, expected.logprobs)
            assert (answer.text, expected.text == "") == ("", False)
            for message, field in (
                (request("some text", max_tokens=3), "prompt"),
                (request([("user", "a message")], max_tokens=3), "chat"),
                (request(PROMPT, max_tokens=3, stop=["x"]), "sampling.stop"),
            ):
                error = (await client.failing(message)).error
                assert error is not None
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert str(error.details()).startswith(field)
                assert "no tokenizer.json" in str(error.details())
