"""A tokenizer worker: a process that renders and encodes prompts, one after the other.

    python -m roost_router.tokens.worker MODEL=FOLDER ...

Reads jobs from its standard input and writes answers to its standard output (wire.py), until the
input ends, which it does when the router is gone, however that went. It gives way to whoever needs
the CPU more: nothing waits for it.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import msgspec

from roost_router.index.token_knowledge import hash_prompt
from roost_router.openai_request import read_routing_fields
from roost_router.tokens.prompt_text import (
    align,
    certain_given_tokens,
    certain_tokens,
    read_prompt,
)
from roost_router.tokens.tokenizer_folder import FolderTokenizer, TokenizerError
from roost_router.tokens.wire import LENGTH, Answer, Hello, Job, pack

_NICE = 10


def tokenise(tokenizers: Mapping[str, FolderTokenizer], job: Job) -> Answer:
    """The answer to a job. O(bytes), of which only new text is encoded."""
    try:
        canonical = read_routing_fields(job.path, job.body).prompt
        prompt = read_prompt(job.path, job.body)
        if prompt.token_ids is not None:
            tokens = array("I", prompt.token_ids)
            certain = certain_given_tokens(canonical, len(tokens))
        else:
            tokenizer = tokenizers[job.model]
            text = tokenizer.render(prompt)
            tokens, boundaries = tokenizer.encode(
                text, adds_special_tokens=prompt.adds_special_tokens
            )
            certain = certain_tokens(align(canonical, prompt, text), boundaries)
    # A client's text meets a library and a template here; the router counts what fails.
    except Exception as error:  # noqa: BLE001
        return Answer(error=str(error) or type(error).__name__)
    known = tokens[: max(certain, default=0)]
    chains = hash_prompt(known, job.block_sizes, job.adapter, prompt.cache_salt)
    packed = {size: chain.tobytes() for size, chain in chains.items()}
    return Answer("", len(tokens), packed, certain)


def serve(tokenizers: Mapping[str, FolderTokenizer], jobs: BinaryIO, answers: BinaryIO) -> None:
    """Answer jobs until there are no more."""
    decode = msgspec.msgpack.Decoder(Job).decode
    while len(length := jobs.read(LENGTH.size)) == LENGTH.size:
        job = decode(jobs.read(LENGTH.unpack(length)[0]))
        answers.write(pack(tokenise(tokenizers, job)))
        answers.flush()


def main(arguments: list[str]) -> int:
    """Load what `arguments` name, say hello, serve. 2 if something cannot be loaded."""
    os.nice(_NICE)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    try:
        named = [argument.partition("=")[::2] for argument in arguments]
        tokenizers = {model: FolderTokenizer(Path(folder)) for model, folder in named}
    except (TokenizerError, OSError) as error:
        answers.write(pack(Hello(str(error))))
        answers.flush()
        return 2
    answers.write(pack(Hello()))
    answers.flush()
    serve(tokenizers, sys.stdin.buffer, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
