"""Which examples hypothesis tries (a busy machine fails none), threads, and the models that tests share."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tiny import changed

settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples in every run
settings.register_profile("search", print_blob=True, deadline=None)  # new ones
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """A test that sets the number of threads sets it for itself: more of them fight with another process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def shared_models() -> Iterator[None]:
    """Tests leave the tiny models, which all of them share, as they are; else others fail, in some orders."""
    yield
    assert not changed()
