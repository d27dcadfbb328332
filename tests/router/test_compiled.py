"""What the compiled form of the router relies on (docs/decisions/0016)."""

from __future__ import annotations

import ast
import asyncio
import shutil
import sysconfig
import tomllib
from pathlib import Path

import pytest

import roost_router
from roost_router.compiled import is_compiled
from roost_router.http.downstream import Downstream
from roost_router.http.upstream import Upstream

ROOT = Path(__file__).parents[2]
HOOKS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
MODULES = HOOKS["wheel"]["hooks"]["custom"]["modules"]


@pytest.mark.parametrize("connection", [Downstream, Upstream])
def test_a_connection_has_all_that_asyncio_asks_of_a_protocol(connection):
    """The base class, which would have it, cannot be inherited from by compiled classes."""
    asked = {name for name in dir(asyncio.Protocol) if not name.startswith("_")}

    assert asked <= set(dir(connection))


@pytest.mark.parametrize("module", MODULES)
def test_what_is_compiled_decodes_into_no_struct_and_defines_no_error(module):
    """mypyc keeps neither the types of a struct's fields nor an error's class attributes."""
    tree = ast.parse((ROOT / "router" / module).read_text())

    decoders = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "Decoder"]
    errors = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "Error" in n.name]
    assert not decoders
    assert not errors


def test_an_install_is_compiled_where_there_is_a_compiler():
    has_compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
    is_installed = ROOT / "build" in Path(roost_router.__path__[0]).parents

    assert is_compiled() == (is_installed and has_compiler)
