"""timm's LAMB without the rest of timm, which needs torchvision: only the folders of its packages are known here."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from unittest import mock


def _folder_alone(name: str, folder: str) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [folder]
    return package


def _load() -> type:
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        raise ImportError("timm is not installed")
    root = found.submodule_search_locations[0]
    alone = {"timm": _folder_alone("timm", root), "timm.optim": _folder_alone("timm.optim", f"{root}/optim")}
    with mock.patch.dict(sys.modules, alone):
        optimizer: type = importlib.import_module("timm.optim.lamb").Lamb
    return optimizer


Lamb = _load()
