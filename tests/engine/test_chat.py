"""ChatTemplate renders what transformers renders, and blames the client in one error type."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.models import BPE

from roost_engine.chat import ChatTemplate, ChatTemplateError

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
# As models trained with transformers' assistant mask have it.
GENERATION = """{% set who = "nobody" %}
{% for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- generation -%}
        {% set who = message.role %}
<{{ who }}>{{ message.content }}
        {%- endgeneration -%}
    {%- else %}
[{{ message.role }}] {{ message.content }}
    {% endif %}
{% endfor %}
{{ who }}
"""
# Exercises trim_blocks, lstrip_blocks, bos_token, namespace, break, tojson and filters.
ELABORATE = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.role == 'stop' %}
        {% break %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
[{{ message.role | upper }}] {{ message.content | trim }} {{ {'<n>': ns.count, 'ü': [1]} | tojson }}
{% endfor %}
{% if add_generation_prompt %}
[ASSISTANT]
{% endif %}
"""
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "  And <b>3 & 3</b>?\n\n"},
    ],
    [{"role": "user", "content": "日本語 🌍 'quotes' \"double\" {{ not_code }} {% raw %}"}],
    [{"role": "user", "content": ""}],
    [
        {"role": "user", "content": "one"},
        {"role": "stop", "content": "two"},
        {"role": "user", "content": "x"},
    ],
]


@pytest.mark.parametrize("template", [CHATML, ELABORATE, GENERATION])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_renders_what_transformers_renders(template: str, messages: list[dict[str, Any]]) -> None:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=HfTokenizer(BPE()), **SPECIAL_TOKENS)

    actual = ChatTemplate(template, SPECIAL_TOKENS).render(messages)

    expected = hf.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert expected == actual


TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
]
WITH_TOOLS = """{% if tools %}<tools>{{ tools | tojson }}</tools>
{% endif %}
{% for message in messages %}
{{ message.role }}: {{ message.content }}
{% if message.tool_calls %}{% for call in message.tool_calls %}
<tool_call>{{ call.function.name }}({{ call.function.arguments | tojson }})</tool_call>
{% endfor %}{% endif %}
{% endfor %}
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
"""


@pytest.mark.parametrize("tools", [[], TOOLS])
def test_tools_and_variables_are_rendered_as_transformers_does(tools: list[dict[str, Any]]) -> None:
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=HfTokenizer(BPE()), **SPECIAL_TOKENS)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": "ü"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    template = ChatTemplate(WITH_TOOLS, SPECIAL_TOKENS)

    actual = template.render(messages, tools=tools, variables={"enable_thinking": False})

    assert actual == hf.apply_chat_template(
        messages,
        chat_template=WITH_TOOLS,
        tools=tools or None,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert template.takes_tools
    assert not ChatTemplate(CHATML).takes_tools


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_variables_of_the_engines_own_cannot_be_set(name: str) -> None:
    with pytest.raises(ChatTemplateError, match=name):
        ChatTemplate(CHATML, SPECIAL_TOKENS).render([], variables={name: "x"})


def test_what_a_template_writes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roost_engine.chat.MAX_PROMPT_CHARACTERS", 1000)
    source = "{% for i in range(30000) %}{% for j in range(30000) %}x{% endfor %}{% endfor %}"

    with pytest.raises(ChatTemplateError, match="more than 1000 characters"):
        ChatTemplate(source).render([])
    assert ChatTemplate("{% for i in range(1000) %}x{% endfor %}").render([]) == "x" * 1000


def test_strftime_now_is_there() -> None:
    actual = ChatTemplate("{{ strftime_now('%Y') }}").render([{"role": "user", "content": "x"}])

    assert actual.isdigit()


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].pop('role') }}"],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="refused the messages"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}])


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(ChatTemplateError, match="no chat template; use /v1/completions"):
        ChatTemplate(None).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x | no_such_filter }}", "{% for x in y %}" * 30 + "{% endfor %}" * 30],
    ids=lambda source: source[:20],
)
def test_a_broken_template_is_found_when_it_is_compiled(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template is broken"):
        ChatTemplate(source)
