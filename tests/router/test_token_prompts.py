"""From bodies to tokens and back to text blocks: as the engine has them, and never too much."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from tokenizer_folders import smollm2_folder, smollm2_tokenizer

from roost_engine.chat import ChatTemplate
from roost_router.index.text_chain import chain_bytes, text_chain
from roost_router.openai_request import CHAT_PATH, COMPLETIONS_PATH, read_routing_fields
from roost_router.tokens.prompt_text import (
    NotTokenisedError,
    Prompt,
    align,
    certain_given_tokens,
    certain_tokens,
    read_prompt,
)
from roost_router.tokens.segments import Boundary
from roost_router.tokens.template import Template
from roost_router.tokens.tokenizer_folder import FolderTokenizer
from roost_router.tokens.wire import Answer, Job
from roost_router.tokens.worker import tokenise
from roost_wire.token_chain import block_hashes

WORDS = [
    "river",
    "stone,",
    "user",
    "assistant",
    "It's",
    "42",
    "{x}",
    "Ünï",
    "日本",
    "a\nB",
    " ",
    ".",
]


@pytest.fixture(scope="module")
def tokenizer() -> FolderTokenizer:
    return FolderTokenizer(smollm2_folder())


def text(rng: Random, num_words: int) -> str:
    return " ".join(rng.choices(WORDS, k=num_words))


def chat(rng: Random, turns: int) -> list[dict[str, Any]]:
    roles = ["system", *["user", "assistant"] * turns]
    return [
        {"role": role, "content": text(rng, rng.choice((0, 1, 30, 300)))} for role in roles[:turns]
    ]


def body(messages: list[dict[str, Any]], **fields: Any) -> bytes:
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def answer(tokenizer: FolderTokenizer, path: str, sent: bytes, size: int = 16) -> Answer:
    found = tokenise({"m": tokenizer}, Job(path, sent, "m", [size]))
    assert found.error == ""
    return found


def engines_tokens(messages: list[dict[str, Any]]) -> list[int]:
    engine = smollm2_tokenizer()
    return engine.encode(ChatTemplate(engine.chat_template, engine.special_tokens).render(messages))


@pytest.mark.parametrize("seed", range(6))
def test_a_chat_has_the_tokens_that_the_engine_counts(tokenizer, seed):
    messages = chat(Random(seed), 7)
    engines = engines_tokens(messages)

    found = answer(tokenizer, CHAT_PATH, body(messages))

    assert found.num_prompt_tokens == len(engines)
    certain = max(found.num_tokens)
    assert certain > 0
    chain = block_hashes(engines[:certain], 16)
    assert found.token_chains[16] == b"".join(h.to_bytes(8, "little") for h in chain)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_certain_by_a_text_block_holds_for_all_prompts_that_share_it(tokenizer, seed):
    """Another prompt that begins with the same text blocks has the same tokens so far."""
    rng = Random(seed)
    messages = chat(rng, 5)
    place = rng.randrange(5)
    content = messages[place]["content"]
    changed = [
        *messages[:place],
        {**messages[place], "content": content[: rng.randrange(len(content) + 1)] + text(rng, 40)},
        *chat(rng, 3),
    ]
    chains = [
        text_chain(read_routing_fields(CHAT_PATH, body(one)).prompt) for one in (messages, changed)
    ]
    shared = sum(1 for ours, theirs in zip(*chains, strict=False) if ours == theirs)

    found = answer(tokenizer, CHAT_PATH, body(messages))
    other = answer(tokenizer, CHAT_PATH, body(changed))

    assert len(found.num_tokens) == len(chains[0])
    assert found.num_tokens == sorted(found.num_tokens)
    assert found.num_tokens[:shared] == other.num_tokens[:shared]
    if shared:
        certain = found.num_tokens[shared - 1]
        assert engines_tokens(messages)[:certain] == engines_tokens(changed)[:certain]


def test_most_of_a_long_prompt_is_certain(tokenizer):
    messages = [{"role": "user", "content": text(Random(9), 3000)}]

    found = answer(tokenizer, CHAT_PATH, body(messages))

    assert found.num_tokens[-1] >= 0.93 * found.num_prompt_tokens
    density = found.num_prompt_tokens / len(messages[0]["content"].encode())
    for place, certain in enumerate(found.num_tokens[8:], 8):
        assert certain >= 0.6 * chain_bytes(place) * density


def test_a_completion_has_its_own_tokens(tokenizer):
    prompt = text(Random(3), 500)
    sent = json.dumps({"model": "m", "prompt": prompt}).encode()

    found = answer(tokenizer, COMPLETIONS_PATH, sent)

    engines = smollm2_tokenizer().encode(prompt, add_special_tokens=True)
    assert found.num_prompt_tokens == len(engines)
    assert found.num_tokens[-1] >= 0.8 * len(engines)


def test_token_ids_need_no_tokenizer():
    tokens = list(range(300))
    sent = json.dumps({"model": "m", "prompt": tokens}).encode()
    canonical = read_routing_fields(COMPLETIONS_PATH, sent).prompt

    found = tokenise({}, Job(COMPLETIONS_PATH, sent, "m", [16, 32]))

    head = len(canonical) - 4 * 300
    assert found.num_tokens == [(chain_bytes(n) - head) // 4 for n in range(1, 5)]
    assert found.num_tokens == certain_given_tokens(canonical, 300)
    certain = found.num_tokens[-1]
    for size in (16, 32):
        chain = block_hashes(tokens[:certain], size)
        assert found.token_chains[size] == b"".join(h.to_bytes(8, "little") for h in chain)


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (CHAT_PATH, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        (CHAT_PATH, {"messages": [{"content": "x"}]}, "role"),
        (CHAT_PATH, {"messages": [{"role": "user", "content": 3}]}, "text"),
        (CHAT_PATH, {"messages": [], "chat_template": "x"}, "template of its own"),
        (CHAT_PATH, {"messages": [], "continue_final_message": True}, "continues"),
        (CHAT_PATH, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool call"),
        (CHAT_PATH, {"messages": [{"role": "u", "content": "x"}], "tools": [{}]}, "shows no tools"),
        (COMPLETIONS_PATH, {"prompt": ["a", "b"]}, "several"),
        (COMPLETIONS_PATH, {"prompt": [-1]}, "token ids"),
        ("/v1/embeddings", {"input": "x"}, "cache"),
        (COMPLETIONS_PATH, {"prompt": "\ud800"}, ""),
    ],
)
def test_what_only_a_replica_can_tokenise_is_refused_with_the_reason(
    tokenizer, path, fields, reason
):
    sent = json.dumps({"model": "m", **fields}).encode()

    found = tokenise({"m": tokenizer}, Job(path, sent, "m", [16]))

    assert reason in found.error
    assert found.error
    assert found.token_chains == {}


def test_a_content_is_not_found_in_what_stands_before_the_messages():
    tools = [{"type": "function", "function": {"name": "f" * 600}}]
    sent = body([{"role": "user", "content": "qwen"}], model="qwen", tools=tools)
    canonical = read_routing_fields(CHAT_PATH, sent).prompt

    known = align(canonical, read_prompt(CHAT_PATH, sent), "tools, qwen")

    assert len(known) >= 2
    assert set(known) == {0}  # no block reaches as far as the content


def test_a_content_that_a_template_leaves_out_ends_what_is_certain():
    template = Template("{% for m in messages %}{{ m.content | trim }}|{% endfor %}", {})
    hidden = Template("{% for m in messages %}[{{ m.content[:2] }}]{% endfor %}", {})
    contents = ["  first " + "a" * 300, "second " + "b" * 300, "third " + "c" * 300]
    sent = body([{"role": "user", "content": content} for content in contents])
    canonical, prompt = read_routing_fields(CHAT_PATH, sent).prompt, read_prompt(CHAT_PATH, sent)

    shown = align(canonical, prompt, template.render(prompt))
    not_shown = align(canonical, prompt, hidden.render(prompt))

    starts = [canonical.index(content.strip().encode()) for content in contents]
    assert shown == [256 - starts[0], 512 - starts[1] + 307, 768 - starts[2] + 307 + 308]
    assert not_shown == [0, 0, 0]


def test_half_a_character_is_not_shown():
    content = "é" * 400
    sent = body([{"role": "user", "content": content}])
    canonical = read_routing_fields(CHAT_PATH, sent).prompt
    start = canonical.index(content.encode())

    [first, second, third] = align(
        canonical, Prompt(messages=[{"content": content}]), "<" + content
    )

    assert first == 1 + (256 - start) // 2
    assert second == 1 + (512 - start) // 2
    assert third == 1 + (768 - start) // 2


def test_tokens_are_certain_once_the_boundary_behind_them_is_shown():
    boundaries = [Boundary(10, 3), Boundary(20, 7)]

    assert certain_tokens([0, 9, 10, 19, 20, 50], boundaries) == [0, 0, 3, 3, 7, 7]


TEMPLATES = [
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}",
    "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}{{ messages | tojson(indent=2) }}",
    "  {% if add_generation_prompt %}\n  x\n  {% endif %}\n{% generation %}g{% endgeneration %}",
    "{% for m in messages %}{% if m %}{% continue %}{% endif %}y{% endfor %}{{ enable_thinking }}",
    "{{ strftime_now('%Y') }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_render_as_the_engine_renders_them(source):
    messages = [{"role": "user", "content": " <é> "}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    variables = {"enable_thinking": False}
    special = {"bos_token": "<s>"}

    prompt = Prompt(messages=messages, variables=variables)
    if "tools" in source:
        prompt.tools = tools
    ours = Template(source, special).render(prompt)

    engines = ChatTemplate(source, special)
    assert ours == engines.render(messages, tools=prompt.tools or (), variables=variables)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
        ("{% for i in range(9000) %}{{ 'x' * 9999 }}{% endfor %}", "too much"),
    ],
)
def test_templates_that_refuse_or_run_wild_end_the_job_only(source, reason):
    with pytest.raises(NotTokenisedError, match=reason):
        Template(source, {}).render(Prompt(messages=[]))
