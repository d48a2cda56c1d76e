from __future__ import annotations

import copy

import pytest
import torch

from tests.recipes.mini_vlm.tiny import build_tiny


@pytest.fixture(scope="session")
def built():
    torch.manual_seed(0)
    return build_tiny()


@pytest.fixture
def model(built):
    return copy.deepcopy(built[0])


@pytest.fixture
def tokenizer(built):
    return built[1]
