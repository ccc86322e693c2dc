"""A model for the tests of this room."""

import pytest

from utils.models.loading import load_causal


@pytest.fixture
def model(model_folder):
    return load_causal(model_folder).eval()
