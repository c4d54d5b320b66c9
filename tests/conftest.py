"""Fixtures that the frameworks' tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import TinyModel, save, tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """(kind of model, form) -> the folder of that checkpoint, which is written once."""
    root = tmp_path_factory.mktemp("checkpoints")
    models: dict[str, TinyModel] = {}

    def get(kind: str, form: str = "bf16") -> Path:
        folder = root / kind / form
        if not folder.exists():
            save(models.setdefault(kind, tiny_model(kind)), form, folder)
        return folder

    return get
