"""Model files to memory: GGUF and Hugging Face folders."""

from roost_engine.loader.errors import ModelFileError
from roost_engine.loader.load import LoadedModel, load_model

__all__ = ["LoadedModel", "ModelFileError", "load_model"]
