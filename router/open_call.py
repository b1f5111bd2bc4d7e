"""Calls from what clients send, or from a decode worker's record: validated, tokenised, seeded."""

from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.config import RouterConfig
from isthmus.convert import request_from_proto
from isthmus.errors import InvalidRequest
from isthmus.ids import SystemIds
from isthmus.text.workers import TextWorkers
from isthmus.types import Request
from isthmus.v1 import inference_pb2
from router.attendance import Attendance
from router.call import Call
from router.delivery import Delivery, Timeline
from router.placement import DecodePlace
from router.validate import ModelFacts, check_chat, check_request, complete_sampling, parse_request, retention_s


@dataclass(frozen=True, slots=True)
class CallOpener:
    model: ModelFacts
    text: TextWorkers

    async def generate(self, raw: bytes, attendance: Attendance, config: RouterConfig) -> Call:
        """Raises InvalidRequest and its kin before anything is held."""
        message = parse_request(raw, config.max_prompt_bytes)
        check_request(message, self.model)
        token_ids = await encode(self.text, message)
        field = message.WhichOneof("input") or "prompt"
        sampling = complete_sampling(message.sampling, len(token_ids), self.model, prompt_field=field)
        request = Request(
            request_id=SystemIds().request_id(),
            seed=message.sampling.seed if message.sampling.HasField("seed") else SystemIds().seed(),
            prompt_token_ids=tuple(token_ids),
            sampling=sampling,
            eos_token_ids=self.model.eos_token_ids,
            tenant=message.tenant,
            priority=message.priority,
        )
        call = self._call(request, attendance, message.emitted_token_ids)
        call.client_request_id, call.retention_s = message.client_request_id, retention_s(message)
        return call

    def resume(self, place: DecodePlace, next_index: int, attendance: Attendance) -> Call:
        """Of a stream that was attached; its record says the rest."""
        attached = place.stream.attached
        request = request_from_proto(attached.request)
        call = self._call(request, attendance, request.emitted_token_ids[:next_index])
        call.retention_s, call.counter = attached.retention_s, attached.attach.counter
        return call

    def _call(self, request: Request, attendance: Attendance, emitted_token_ids: Sequence[int]) -> Call:
        sampling = request.sampling
        detokenizer = self.text.tokenizer.detokenizer(sampling.stop, include_stop=sampling.include_stop)
        delivery = Delivery(request, self.model.context_length, detokenizer)
        delivery.restore(emitted_token_ids)
        return Call(
            request=request,
            client_request_id="",
            delivery=delivery,
            timeline=Timeline(attendance.received_at),
            life=attendance.life,
            deadline=attendance.received_at + attendance.timeout_s,
            write=attendance.write,
        )


async def encode(
    text: TextWorkers, message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest
) -> Sequence[int]:
    if isinstance(message, inference_pb2.GenerateRequest) and message.HasField("token_ids"):
        return message.token_ids.ids
    if message.HasField("prompt"):
        return await text.encode(message.prompt)
    if message.HasField("chat"):
        check_chat(message.chat)
        return await text.encode_chat(message.chat)
    raise InvalidRequest.of("input", None, "one of prompt, chat")
