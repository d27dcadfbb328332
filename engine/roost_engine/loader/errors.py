"""The one error of loading: a model file, folder or nickname that cannot be served.

The operator's fault (wrong path, damaged download, a model we do not implement), never a
client's: it is raised while a replica starts, before it listens.
"""

from __future__ import annotations

from pathlib import Path


class ModelFileError(Exception):
    """A model source is missing, damaged or of a kind the engine does not implement.

    The message starts with the source, so that it can be shown as it is.
    """

    def __init__(self, source: str | Path, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
        self.source = source
        self.problem = problem
