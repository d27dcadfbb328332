"""Tokenizer folders for tests, as `--tokenizer` takes them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from roost.tokenizer_folder import write_tokenizer_folder
from roost_engine.loader.gguf import GgufFile
from roost_engine.loader.gguf_tokenizer import read_tokenizer
from roost_engine.loader.load import resolve
from roost_engine.tokenizer import Tokenizer


@functools.cache
def smollm2_tokenizer() -> Tokenizer:
    """The engine's."""
    return read_tokenizer(GgufFile(resolve("smollm2")))


@functools.cache
def smollm2_folder() -> Path:
    """The same in files. Kept until the process ends."""
    folder = Path(_KEPT.name) / "smollm2"
    write_tokenizer_folder(resolve("smollm2"), folder)
    return folder


def write_folder(folder: Path, tokenizer_json: str, template: str | None = None) -> Path:
    """A folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


_KEPT = tempfile.TemporaryDirectory(prefix="roost-tokenizers-")
