"""The model's chat template, run in a sandbox with bounds; no message can pass for one of the model's control tokens.

Contents are marked before the template sees them: a guard, a character that occurs nowhere else, stands before the
first visible character and after every character that begins a control token. So no control token can begin in a
content, nor run from the template's own text into one; split first, drop the guards after, and contents are plain text.
"""

import json
import re
import sys
import time
from collections.abc import Generator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn, Protocol, cast

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.errors import CannotStart, InvalidRequest

ROLES = ("system", "user", "assistant")
_GUARDS = range(0xF0000, 0xFFFFE)  # private use: no meaning of its own, not white space
_MAX_PRODUCT = 1 << 16
# What a template's own expressions may raise; everything else is our bug.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip


class ChatMessage(Protocol):
    """isthmus.v1.ChatMessage has this shape."""

    @property
    def role(self) -> str: ...

    @property
    def content(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ChatLimits:
    max_messages: int = 1024
    max_characters: int = 1 << 21  # of the rendered chat, and of every string on the way to it
    max_seconds: float = 1.0  # of the rendering thread's own time


@dataclass(frozen=True, slots=True)
class GuardedText:
    text: str
    guard: str

    def plain(self, part: str) -> str:
        return part.replace(self.guard, "")


_DEFAULT_LIMITS = ChatLimits()


class ChatTemplate:
    """Compiled once; `render` may be called from any thread."""

    def __init__(
        self, source: str, variables: Mapping[str, str], controls: Sequence[str], limits: ChatLimits = _DEFAULT_LIMITS
    ):
        """`variables`: bos_token and the like; `controls`: the control tokens. Raises CannotStart."""
        self._limits = limits
        self._variables = dict(variables)
        openings = re.escape("".join(sorted({control[0] for control in controls})))
        self._opening = re.compile(f"[{openings}]") if openings else None
        self._known = set(source).union(*variables.values(), *controls)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CannotStart("chat_template", f"cannot compile: {error}", "repair the model's template") from error

    def render(self, messages: Sequence[ChatMessage]) -> GuardedText:
        """Raises InvalidRequest for bad messages, for a chat the template refuses, and beyond the limits."""
        self._check(messages)
        guard = self._choose_guard(messages)
        shown = [{"role": message.role, "content": self._guarded(message.content, guard)} for message in messages]
        variables = {**self._variables, "messages": shown, "add_generation_prompt": True}
        try:
            return GuardedText(self._run(variables), guard)
        except _OverLimit as error:
            allowed = f"what renders within {self._limits.max_seconds} s to {self._limits.max_characters} characters"
            raise InvalidRequest.of("chat", str(error), allowed) from None
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest.of("chat", str(error), "a chat the model's template accepts") from error

    def _run(self, variables: Mapping[str, object]) -> str:
        parts: list[str] = []
        num_characters = 0
        with _bounded(self._limits):
            for part in self._template.generate(variables):
                num_characters += len(part)
                if num_characters > self._limits.max_characters:
                    raise _OverLimit("too long an output")
                parts.append(part)
        return "".join(parts)

    def _check(self, messages: Sequence[ChatMessage]) -> None:
        if not 1 <= len(messages) <= self._limits.max_messages:
            raise InvalidRequest.of("chat.messages", len(messages), f"1 to {self._limits.max_messages} messages")
        num_characters = 0
        for i, message in enumerate(messages):
            if message.role not in ROLES:
                raise InvalidRequest.of(f"chat.messages[{i}].role", message.role, ", ".join(ROLES))
            num_characters += len(message.content)
        if num_characters > self._limits.max_characters:
            allowed = f"at most {self._limits.max_characters} in all messages"
            raise InvalidRequest.of("chat.messages", f"{num_characters} characters", allowed)

    def _choose_guard(self, messages: Sequence[ChatMessage]) -> str:
        used = self._known.union(*(message.content for message in messages))
        for code in _GUARDS:
            if chr(code) not in used:
                return chr(code)
        raise InvalidRequest.of("chat.messages", "every private-use character", "text that leaves one of them free")

    def _guarded(self, content: str, guard: str) -> str:
        if self._opening is not None:
            content = self._opening.sub(rf"\g<0>{guard}", content)
        return re.sub(r"^(\s*)(?=\S)", rf"\g<1>{guard}", content)


class _OverLimit(Exception):
    """A template ran into a bound."""


@contextmanager
def _bounded(limits: ChatLimits) -> Generator[None]:
    """Watches every line and return value of Python code in this thread: a template cannot loop or grow unseen."""
    deadline = time.thread_time() + limits.max_seconds

    def watch(frame: FrameType, event: str, value: object) -> Any:
        if time.thread_time() > deadline:
            raise _OverLimit("too long a rendering")
        if event == "return" and isinstance(value, str) and len(value) > limits.max_characters:
            raise _OverLimit("too long a string")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


class _Environment(ImmutableSandboxedEnvironment):
    """Products and powers are sized before they are made; other growth is a return value that `_bounded` sees."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        size = _size(left) * (right if operator == "**" and isinstance(right, int) else 1) + _size(right)
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            size = _size(left) * right if isinstance(right, int) else left * _size(right)  # a sequence repeated
        if size > _MAX_PRODUCT:
            raise _OverLimit("too large a product")
        return super().call_binop(context, operator, left, right)


def _size(value: object) -> int:
    """Bits of a number, elements of a sequence."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sized) else 1


def _environment() -> _Environment:
    """Set up as transformers does, so that published templates give the same text."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _to_json
    cast("dict[str, object]", environment.globals)["raise_exception"] = _refuse
    return environment


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
