"""The model's chat template, run in a sandbox with bounds; no message can pass for one of the model's control tokens.

The content of each message is marked before the template sees it. The mark is the guard: a character that occurs
nowhere else. It stands before the first visible character of a content, and after every character that begins a control
token. Therefore no control token can begin inside a content, and none can run from the template's own text into one.
Whoever reads the rendered text first splits it at the control tokens and then drops the guards; what is left of the
contents is plain text. The strings that the template itself looks for in contents (`'</think>' in content`) are marked
in the same way, so that they are still found.
"""

import datetime
import functools
import json
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import BuiltinMethodType, FrameType
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.errors import CannotStart, InvalidRequest
from isthmus.v1.inference_pb2 import ChatMessage

ROLES = ("system", "user", "assistant")
_GUARDS = range(0xF0000, 0xFFFFE)  # private use: no meaning of its own, not white space
_SEARCHES = {"split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "count",
             "replace", "removeprefix", "removesuffix"}  # fmt: skip
_MAX_PRODUCT = 1 << 16  # of numbers' bits or a repetition; also the largest width
_MAX_WORK = 1 << 28  # characters that one call of C code may make of its arguments
_WIDE = re.compile(r"\d{5}|\*")  # widths in a format string
# What a template's own expressions may raise; everything else is our bug.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChatLimits:
    """Bounds of one rendering."""

    max_messages: int = 1024
    max_characters: int = 1 << 21  # of the rendered chat, and of every string on the way to it
    max_seconds: float = 1.0  # of the rendering thread's own time


@dataclass(frozen=True, slots=True)
class GuardedText:
    """A rendered chat whose contents carry guards."""

    text: str
    guard: str  # one character

    def plain(self, part: str) -> str:
        """A part of the text without its guards."""
        return part.replace(self.guard, "")


_DEFAULT_LIMITS = ChatLimits()


class ChatTemplate:
    """A template that was compiled once. It does not change; any thread may render."""

    def __init__(
        self, source: str, variables: Mapping[str, str], controls: Sequence[str], limits: ChatLimits = _DEFAULT_LIMITS
    ):
        """`variables`: the named tokens, as bos_token. `controls`: the control tokens' texts.

        Raises CannotStart when the template cannot be compiled.
        """
        self._limits = limits
        self._source = source
        self._variables: dict[str, object] = {**variables, "tools": None, "documents": None}
        self._environment = _environment()
        openings = {control[0] for control in controls}
        # An opening has its guard behind it: none is needed before, unless it alone could end a control token.
        unguarded = re.escape("".join(openings - {control[-1] for control in controls}))
        self._opening = re.compile(f"[{re.escape(''.join(openings))}]" if openings else "(?!)")
        self._beginning = re.compile(rf"^(\s*)(?=[^\s{unguarded}])")
        self._known = set(source).union(*variables.values(), *controls)
        self._compiled = functools.lru_cache(maxsize=2)(self._compile)  # by guard: nearly always the first
        try:
            with _bounded(replace(limits, max_seconds=10 * limits.max_seconds)):
                self._compiled(self._choose_guard(()))
        except (*_TEMPLATE_ERRORS, SyntaxError, _OverLimit) as error:
            raise CannotStart("chat_template", f"cannot compile: {error}", "repair the model's template") from error

    def render(self, messages: Sequence[ChatMessage]) -> GuardedText:
        """The chat's text, up to where the model's answer begins.

        Raises InvalidRequest for bad messages, for a chat that the template refuses, and for one beyond the limits.
        """
        self._check(messages)
        guard = self._choose_guard(messages)
        shown = [{"role": message.role, "content": self._guarded(message.content, guard)} for message in messages]
        variables = {**self._variables, "messages": shown, "add_generation_prompt": True}
        try:
            return GuardedText(self._run(self._compiled(guard), variables), guard)
        except _OverLimit as error:
            allowed = f"what renders within {self._limits.max_seconds} s to {self._limits.max_characters} characters"
            raise InvalidRequest.of("chat", str(error), allowed) from None
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest.of("chat", str(error), "a chat the model's template accepts") from error

    def _compile(self, guard: str) -> jinja2.Template:
        tree = self._environment.parse(self._source)
        for node in tree.find_all((nodes.Compare, nodes.Call, nodes.Filter)):
            for sought in _sought(node):
                if isinstance(sought, nodes.Const) and isinstance(sought.value, str):
                    sought.value = self._opening.sub(rf"\g<0>{guard}", sought.value)
        code = self._environment.compile(tree)
        return jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))

    def _run(self, template: jinja2.Template, variables: Mapping[str, object]) -> str:
        parts: list[str] = []
        num_characters = 0
        with _bounded(self._limits):
            for part in template.generate(variables):
                num_characters += len(part)
                if num_characters > self._limits.max_characters:
                    raise _OverLimit("too long an output")
                parts.append(part)
        return "".join(parts)

    def _check(self, messages: Sequence[ChatMessage]) -> None:
        if not 1 <= len(messages) <= self._limits.max_messages:
            raise InvalidRequest.of("chat.messages", len(messages), f"1 to {self._limits.max_messages} messages")
        for i, message in enumerate(messages):
            if message.role not in ROLES:
                raise InvalidRequest.of(f"chat.messages[{i}].role", message.role, ", ".join(ROLES))
        num_characters = sum(len(message.content) for message in messages)
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
        return self._beginning.sub(rf"\g<1>{guard}", self._opening.sub(rf"\g<0>{guard}", content))


def _sought(node: nodes.Compare | nodes.Call | nodes.Filter) -> list[nodes.Expr]:
    """The operands of a comparison; what a method or filter looks for."""
    if isinstance(node, nodes.Compare):
        return [node.expr, *(operand.expr for operand in node.ops)]
    name = node.name if isinstance(node, nodes.Filter) else getattr(node.node, "attr", None)
    return node.args[:1] if name in _SEARCHES else []


class _OverLimit(BaseException):
    """A template ran into a bound.

    It is no Exception: Jinja swallows those in places, and the watch is gone once it has raised.
    """


@contextmanager
def _bounded(limits: ChatLimits) -> Generator[None]:
    """While the block runs, every line and every return value of Python code in this thread is watched.

    So a template can neither loop without an end nor grow a value without a bound. Raises _OverLimit.
    """
    deadline = time.thread_time() + limits.max_seconds

    def watch(frame: FrameType, event: str, value: object) -> Any:
        if time.thread_time() > deadline:
            raise _OverLimit("too long a rendering")
        if event == "return" and isinstance(value, str | list | tuple) and len(value) > limits.max_characters:
            raise _OverLimit("too long a string")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox that sizes what C code could make huge before it is made.

    Anything else that grows is a return value of Python code, which `_bounded` sees.
    """

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        if isinstance(method, BuiltinMethodType):
            _bound_work(method.__name__, method.__self__, *args, *kwargs.values())
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator in "+%":
            if operator == "%" and isinstance(left, str):
                _bound_work("format", left, *(right if isinstance(right, tuple) else (right,)))
            return super().call_binop(context, operator, left, right)
        size = _size(left) * (right if operator == "**" and isinstance(right, int) else 1) + _size(right)
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            size = _size(left) * right if isinstance(right, int) else left * _size(right)  # a sequence repeated
        if size > _MAX_PRODUCT:
            raise _OverLimit("too large a product")
        return super().call_binop(context, operator, left, right)


def _size(value: object) -> int:
    """The bits of a number or the elements of a sequence; 1 for anything else."""
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, Sized) else 1


def _bound_work(name: str, *values: object) -> None:
    """Raises _OverLimit for a call of C code that could make too much. It comes before the call: C code is not watched.

    The sizes of texts and sequences are multiplied, since one may be inserted into another as often as it is long. A
    number may be a width or a count, and is bounded by itself.
    """
    if name.startswith("format") and isinstance(values[0], str) and _WIDE.search(values[0]):
        raise _OverLimit("too wide a format")
    work = 1
    for value in values:
        if isinstance(value, int) and value > _MAX_PRODUCT:
            raise _OverLimit("too large a number")
        if isinstance(value, str | list | tuple | Iterator):
            work *= _MAX_PRODUCT if isinstance(value, Iterator) else max(1, len(value))
    if work > _MAX_WORK:
        raise _OverLimit("too much text")


def _sized(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _bound_work(name, *args, *kwargs.values())
        return function(*args, **kwargs)

    return bounded


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on: here just its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> _Environment:
    """Set up as transformers does, so that published templates give the same text."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
    filters = {**environment.filters, "tojson": _to_json}
    del filters["sum"]  # of lists: unbounded, and numbers need none
    environment.filters = {name: _sized(name, function) for name, function in filters.items()}
    names = cast("dict[str, object]", environment.globals)
    names.update(raise_exception=_refuse, strftime_now=lambda pattern: datetime.datetime.now().strftime(pattern))
    return environment


def _to_json(
    value: object, *, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
