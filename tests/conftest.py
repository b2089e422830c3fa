"""Shared fixtures: the tiny offline model (built once a session); clips are in `clips`."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

import clips  # noqa: F401  # makes the folder of clips before tests start processes that use it
from omnimem.backbones import Backbone, load_backbone
from omnimem.backbones.qwen2_5_omni.tiny import build_tiny

# Thousands of tiny operations run far faster without a second thread to wait for; child processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection: every full collection would scan them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let libraries that check for leaks at exit find none."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep nothing in the cache folder of whoever runs the tests."""
    os.environ["OMNIMEM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny(tiny_path: Path) -> Backbone:
    """Tiny model in float32; tests that change weights load their own."""
    return load_backbone(tiny_path, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="session")
def tiny64(tiny_path: Path) -> Backbone:
    """Tiny model in float64, for comparisons to 1e-12."""
    return load_backbone(tiny_path, dtype=torch.float64, device="cpu")
