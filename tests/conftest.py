"""Caches and results of tests stay in their own folders."""

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data_dir"))
    for name in ("MODEL_PATH", "DATA_PATH", "OUTPUT_DIR"):
        monkeypatch.delenv(name, raising=False)
