"""The version of this installation."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("vit-kernels")
except importlib.metadata.PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
