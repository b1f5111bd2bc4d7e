"""Chat templates as models publish them give the text transformers gives; hostile ones end soon and small."""

import time
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from isthmus.errors import CannotStart, InvalidRequest
from isthmus.text.chat_template import ChatLimits, ChatTemplate
from isthmus.v1 import inference_pb2

RENDER: Any = render_jinja_template
CONTROLS = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<think>", "</think>", "<tool_response>", "[INST]", "[/INST]"]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

# The idioms of DeepSeek-R1 and V3.1, GLM-4.x, Qwen3, Mistral Small, Kimi-K2, and of templates used in training.
PUBLISHED = {
    "reasoning split off": (
        "{{ bos_token }}{% for m in messages %}{% set content = m['content'] %}{% if '</think>' in content %}"
        "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|' ~ m.role ~ '|>' + content }}{% endfor %}"
    ),
    "reasoning kept apart": (
        "{% macro visible(content) %}{% if content is string %}{{- content }}{% endif %}{% endmacro %}"
        "{%- set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set content = visible(m.content) %}{% set reasoning = '' %}"
        "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
        "{% elif '</think>' in content %}"
        "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ m.role }}{% if loop.index0 > ns.last and reasoning %}<think>{{ reasoning }}</think>{% endif %}{{ content }}"
        "{{ '/nothink' if enable_thinking is defined and not content.endswith('/nothink') }}{% endfor %}"
    ),
    "a beginning is looked for": (
        "{% for m in messages %}"
        "{% if m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>') %}"
        "tool{% else %}{{ m.content | replace('<think>', '') | trim }}{% endif %}{% endfor %}"
    ),
    "a date, tools, alternating roles": (
        "{%- set today = strftime_now('%Y') %}{{ bos_token + today }}"
        "{% if not tools is defined %}{% set tools = none %}"
        "{% elif tools is not none %}{{ raise_exception('tools') }}{% endif %}"
        "{% if documents is not none %}documents{% endif %}{{ unk_token is defined }}"
        "{%- set turns = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m == turns[-1] %}last{% endif %}{{ '[INST]' + m.content + '[/INST]' }}{% endfor %}"
    ),
    "what to train on, JSON": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ {'b': 'é<', 'a': 1} | tojson(separators=(',', ':'), sort_keys=true) }}{{ [1] | tojson(indent=2) }}"
        "{% endfor %}"
    ),
    "formats": (
        "{% for m in messages %}"
        "{{ '%02d' % loop.index ~ '{:>4}'.format(m.role) ~ '%s' | format(m.content) }}{% endfor %}"
    ),
}
CHATS = [
    ["a", "<think>\nhm\n</think>\n\nok", "b"],
    ["a", "</think>x</think>y"],
    ["<tool_response>1</tool_response>", "<tool_response", " <think> /nothink"],
    ["", " ", "\n < > [INST \U000f0000"],
]


def chat(contents: Sequence[str]) -> list[inference_pb2.ChatMessage]:
    roles = ("user", "assistant")
    return [inference_pb2.ChatMessage(role=roles[i % 2], content=content) for i, content in enumerate(contents)]


@pytest.mark.parametrize("contents", CHATS)
@pytest.mark.parametrize("source", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_idioms_give_the_text_transformers_gives(source: str, contents: list[str]) -> None:
    shown = ChatTemplate(source, VARIABLES, CONTROLS).render(chat(contents))
    messages = [{"role": message.role, "content": message.content} for message in chat(contents)]
    expected, _ = RENDER([messages], chat_template=source, add_generation_prompt=True, **VARIABLES)
    assert shown.plain(shown.text) == expected[0]


@pytest.mark.parametrize("content", ["<|user|>", "user|>", "|user|>", ">", "<<|user|>", " <|user|>"])
def test_no_control_token_stands_in_the_text_or_across_its_edge(content: str) -> None:
    source = "{% for m in messages %}<|{{ m.content }}<|{{ m.content | trim }}{% endfor %}"
    shown = ChatTemplate(source, VARIABLES, CONTROLS).render(chat([content]))
    assert not any(control in shown.text for control in CONTROLS)


LIMITS = ChatLimits(max_seconds=0.2)
BIG = "{% set a = 'x' * 60000 %}{% set b = 'y' * 60000 %}"
HOSTILE = {
    "width of a format": "{{ '%99999999d' % messages | length }}",
    "width of a format, folded": "{{ '%99999999999d' % 1 }}",
    "width from an argument": "{{ '%*d' % (99999999, 1) }}",
    "str.format": "{{ '{:>99999999999}'.format(messages | length) }}",
    "str.format, nested": "{{ '{:>{w}}'.format(1, w=99999999999) }}",
    "format filter": "{{ '%99999999d' | format(1) }}",
    "center": "{{ 'x' | center(99999999999) }}",
    "ljust": "{{ 'x'.ljust(99999999999) }}",
    "slice": "{{ [1] | slice(99999999) | list | length }}",
    "batch": "{{ [1] | batch(99999999999, 'x') | list | length }}",
    "indent": "{{ {'a': [1]} | tojson(indent=99999999999) }}",
    "replace": BIG + "{{ a.replace('x', b) | length }}",
    "replace filter": BIG + "{{ a | replace('x', b) | length }}",
    "join": BIG + "{{ b.join(a) | length }}",
    "join of a generator": BIG + "{{ a | map('upper') | join(b) | length }}",
    "sum": "{{ ([[1] * 60000] * 60000) | sum(start=[]) | length }}",
    "doubled lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled strings": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "blocks": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_soon_and_small(source: str) -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises((CannotStart, InvalidRequest)):
        ChatTemplate(source, {}, [], LIMITS).render(chat(["hi"]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < 64 << 20


class _Deaf(str):
    """Takes what interrupts it for an error of its own, as Jinja does in places."""

    __slots__ = ()

    def __str__(self) -> str:
        ends_at = time.perf_counter() + 3
        try:
            while time.perf_counter() < ends_at:
                continue
        except Exception:  # noqa: BLE001
            return "swallowed"
        return "x"


def test_the_watch_cannot_be_swallowed() -> None:
    template = ChatTemplate("{{ deaf }}", {"deaf": _Deaf("x")}, [], LIMITS)
    with pytest.raises(InvalidRequest, match="too long a rendering"):
        template.render(chat(["hi"]))
