"""The memory limit of a container is the limit, whatever the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from roost_engine.memory import usable_memory_bytes

MACHINE = 1 << 36


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SC_PHYS_PAGES": MACHINE // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, MACHINE),
        ({"memory.max": "max\n"}, MACHINE),
        ({"memory.max": "1000000\n"}, 1000000),
        ({"memory/memory.limit_in_bytes": "2000000\n"}, 2000000),
        ({"memory/memory.limit_in_bytes": f"{1 << 62}\n"}, MACHINE),  # version 1's "no limit"
        ({"a/b/memory.max": "max\n", "a/memory.max": "3000000\n"}, 3000000),
        ({"a/b/memory.max": "4000000\n", "a/memory.max": "5000000\n"}, 4000000),
        ({"other/memory.max": "6000000\n"}, MACHINE),
        ({"memory.max": "nonsense"}, MACHINE),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        write(tmp_path / "cgroup" / name, text)
    write(tmp_path / "own", "0::/a/b\n")

    assert usable_memory_bytes(tmp_path / "cgroup", tmp_path / "own") == expected


def test_nobody_need_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)

    assert usable_memory_bytes(tmp_path / "none", tmp_path / "own") is None


def test_a_group_outside_the_tree_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "own", "0::/../../outside\n")

    assert usable_memory_bytes(tmp_path / "cgroup", tmp_path / "own") == MACHINE
