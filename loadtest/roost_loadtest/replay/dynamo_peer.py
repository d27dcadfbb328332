"""Dynamo's frontend before mock engines, without etcd or NATS: found by files, spoken to by TCP.

    python3.11 -m venv dynamo
    dynamo/bin/pip install --no-deps ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
    dynamo/bin/pip install uvloop pydantic pyyaml prometheus-client msgspec aiohttp pyzmq packaging

(Without --no-deps pip asks for `aisimulate`, which PyPI has as a pointer to NVIDIA's index only.)

The frontend renders, tokenises and chooses a worker; a worker before each mock (dynamo_worker.py)
makes text of tokens again. So that a token is four bytes here as everywhere in a replay, the model
is a tokenizer of our own with a word for each four characters that prompts.py writes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from roost_loadtest.peers import Launch, ProcessGroup

_WORKER = Path(__file__).with_name("dynamo_worker.py")
_START_S = 60.0
_HEX = "0123456789abcdef"
_SPECIAL = ("<unk>", "<s>", "</s>")


class Engines(msgspec.Struct, frozen=True):
    """What stands behind it."""

    ports: Sequence[int]
    event_ports: Sequence[int]
    block_tokens: int
    kv_tokens: int


def version(python: Path) -> str:
    """Of the package in the environment of `python`."""
    found = python.absolute().parent.parent.glob("lib/python*/site-packages/ai_dynamo-*.dist-info")
    return next((path.name.split("-")[1].removesuffix(".dist") for path in found), "?")


def frontend_command(
    python: str, port: int, mode: str, folder: Path, block_tokens: int
) -> list[str]:
    """The frontend on `port`; `mode`: of its router, as kv or round-robin."""
    options = ["--http-host", "127.0.0.1", "--http-port", str(port), "--router-mode", mode or "kv"]
    options += ["--kv-cache-block-size", str(block_tokens)]
    options += ["--discovery-backend", "file", "--request-plane", "tcp"]
    return [*_environment(folder), python, "-m", "dynamo.frontend", *options]


def start_workers(
    stack: contextlib.ExitStack, python: str, engines: Engines, folder: Path
) -> list[int]:
    """A worker before each engine; they end with `stack`. Their process ids.

    PeerError if one of them is not there after a minute.
    """
    model = folder / "model"
    write_model(model)
    groups, files = [], []
    for number, (port, events) in enumerate(zip(engines.ports, engines.event_ports, strict=True)):
        files.append(folder / f"ready-{port}")
        config = {
            "model": str(model),
            "engine": port,
            "events": events,
            "block_tokens": engines.block_tokens,
            "num_blocks": engines.kv_tokens // engines.block_tokens,
            "ready": str(files[-1]),
        }
        command = [*_environment(folder), python, str(_WORKER), json.dumps(config)]
        group = ProcessGroup("dynamo-worker", Launch(command), folder / f"worker-{number}.log")
        stack.callback(group.stop)
        groups.append(group)
    deadline = time.monotonic() + _START_S
    while not all(file.exists() for file in files):
        for group in groups:
            if group.popen.poll() is not None or time.monotonic() > deadline:
                raise group.failed("is not ready")
        time.sleep(0.05)
    return [group.popen.pid for group in groups]


def write_model(folder: Path) -> None:
    """A model folder with a tokenizer of four characters a token, and no weights."""
    folder.mkdir(exist_ok=True)
    words = ["".join(four) for four in itertools.product(_HEX, repeat=4)]
    words += [f"{a}{b}{mark} " for a in _HEX for b in _HEX for mark in " ~"]
    vocabulary = {word: token for token, word in enumerate([*_SPECIAL, *words])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": word, "special": True, **special}
            for token, word in enumerate(_SPECIAL)
        ],
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": ".{1,4}"},
            "behavior": "Isolated",
            "invert": False,
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1_000_000,
        "chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": 1_000_000,
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
        "config.json": shape | ids,
        "generation_config.json": ids,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def _environment(folder: Path) -> list[str]:
    """The command before a command of Dynamo's: where they find each other."""
    return ["env", f"DYN_FILE_KV={folder / 'discovery'}", "DYN_LOG=error"]
