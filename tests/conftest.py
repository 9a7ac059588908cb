"""Shared set-up. That this file is here also puts `tests/` on the path, so that test files can import `helpers`."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread():
    torch.set_num_threads(1)
