"""Keys as this process uses them: of files, read at the start and on SIGHUP, and of the store.

Reading again changes all or nothing: a file that cannot be used is logged and the keys stay what
they were, so that a slip in an editor locks nobody out and lets nobody in.

With `--api-keys-redis` clients' keys are those of the file, if one is given, and those that the
store was last known to have: none at first.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from roost_router.config import ConfigError, RouterConfig
from roost_router.keys import KeyFileError, KeyRing, parse_keys
from roost_router.quotas import Quotas

_KEY = re.compile(r"[!-~]+")
_log = logging.getLogger(__name__)


class Access:
    """Who may come in, and what the router shows replicas. None: no key is asked for."""

    def __init__(self, config: RouterConfig, now: Callable[[], float] = time.monotonic) -> None:
        """Read all files of `config`. Raises ConfigError: file and line, never a key."""
        self.quotas: Final = Quotas()
        self._now: Final = now
        self._config = config
        self.version = 0  # grows whenever keys may have changed
        self.api_keys: KeyRing | None
        self.admin_keys: KeyRing | None
        self.replica_key: str | None
        self._published: KeyRing | None = None
        self._read()

    @property
    def is_complete(self) -> bool:
        """Whether all keys of clients are known: False until the store was read."""
        return self._published is not None or not self._config.api_keys_redis

    def published(self, keys: KeyRing) -> None:
        """The store has other keys now."""
        self._published = keys
        self._join()

    def replica_authorization(self) -> str | None:
        """Value of the Authorization header of the router's own requests to replicas."""
        return None if self.replica_key is None else f"Bearer {self.replica_key}"

    def reload(self) -> None:
        """Read the files again; keep what was if one of them cannot be used."""
        try:
            self._read()
        except ConfigError as error:
            _log.error("keys stay as they were: %s", error)
        else:
            _log.info("keys read again")

    def _read(self) -> None:
        config = self._config
        api_keys, admin_keys = _keys(config.api_keys_file), _keys(config.admin_keys_file)
        self.replica_key = _replica_key(config.replica_key_file)
        self._file_keys, self.admin_keys = api_keys, admin_keys
        self._join()

    def _join(self) -> None:
        self.api_keys = self._file_keys
        if self._config.api_keys_redis:
            nobody = KeyRing({})
            self.api_keys = (self._file_keys or nobody).with_those_of(self._published or nobody)
        self.quotas.set_limits({} if self.api_keys is None else self.api_keys.limits, self._now())
        self.version += 1


def _keys(path: Path | None) -> KeyRing | None:
    if path is None:
        return None
    try:
        return parse_keys(_text(path))
    except KeyFileError as error:
        raise ConfigError(f"{path}: {error}") from None


def _replica_key(path: Path | None) -> str | None:
    if path is None:
        return None
    key = _text(path).strip()
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{path}: a replica's key is one line of visible ASCII characters")
    return key


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file") from None
