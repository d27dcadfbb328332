"""A GGUF file's tokenizer as the folder that `--tokenizer` takes.

The router reads Hugging Face folders only (roost_router/tokens/tokenizer_folder.py), the engine
reads GGUF too. Here, where both may be imported, the one becomes the other. Needs the extra
`engine`, not torch.
"""

from __future__ import annotations

import json
from pathlib import Path


def write_tokenizer_folder(gguf: Path, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja of `gguf` to `folder`.

    Raises ModelFileError for a file that is no model, or whose tokenizer the engine does not know.
    """
    from roost_engine.loader.gguf import GgufFile
    from roost_engine.loader.gguf_tokenizer import read_tokenizer

    tokenizer = read_tokenizer(GgufFile(gguf))
    backend = tokenizer._backend  # noqa: SLF001 - nobody else wants it whole
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    settings = json.dumps(dict(tokenizer.special_tokens))
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
