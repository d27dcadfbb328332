"""Build hook: compile the router's data path with mypyc when a wheel is made (decisions/0016).

`pip install .` comes by here; an editable install does not: what is edited must be what runs.
Without a C compiler, or where compiling fails, the wheel holds the same modules as Python alone:
they do the same for more CPU. HATCH_BUILD_NO_HOOKS=true asks for that.

The modules are listed in pyproject.toml. Their sources stay in the wheel, for people and
tracebacks.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

setup(name="roost", packages=[], ext_modules=mypycify(
    {arguments!r}, opt_level="3", debug_level="0", group_name="roost_router"))
"""
_MYPY = ("--ignore-missing-imports", "--follow-imports=silent")
_REASON_LINES = 5


class CompileRouter(BuildHookInterface[Any]):
    """Adds the compiled modules to a wheel."""

    def dependencies(self) -> list[str]:
        """What compiling needs: the compiler, and the libraries whose types it reads."""
        return [self.config["compiler"], "setuptools", *self.metadata.core.dependencies]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the install is editable."""
        if version == "editable":
            return
        self._folder = Path(tempfile.mkdtemp(prefix="roost-compile-"))
        try:
            built = self._compile()
        except (OSError, subprocess.CalledProcessError) as error:
            parts = [getattr(error, part, None) or "" for part in ("stdout", "stderr")]
            said = "\n".join(parts).strip() or str(error)
            reason = "\n".join(said.strip().splitlines()[-_REASON_LINES:])
            self.app.display_warning(f"the router is not compiled, and costs more CPU: {reason}")
            return
        for path in built:
            build_data["force_include"][str(path)] = str(path.relative_to(self._folder / "built"))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """Remove what was built."""
        if version != "editable":
            shutil.rmtree(self._folder, ignore_errors=True)

    def _compile(self) -> list[Path]:
        """The extension modules, below a folder that stands for site-packages."""
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        if shutil.which(compiler) is None:
            raise OSError(f"there is no C compiler '{compiler}'")
        router = Path(self.root, "router")
        for package in ("roost_router", "roost_wire"):
            shutil.copytree(
                router / package, self._folder / package, ignore=shutil.ignore_patterns("*.so")
            )
        arguments = [*_MYPY, *self.config["modules"]]
        Path(self._folder, "setup.py").write_text(_SETUP.format(arguments=arguments))
        subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "built"],
            cwd=self._folder,
            check=True,
            capture_output=True,
            text=True,
        )
        return sorted(Path(self._folder, "built").rglob("*.so"))
