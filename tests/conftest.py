"""What several tests share: where reference numbers and real data lie, and tiny models."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def goldens() -> Path:
    """Folder of reference numbers made by independent programs."""
    folder = SHARED / "goldens"
    if not folder.is_dir():
        pytest.skip("the reference numbers (shared/goldens beside the checkout) are not here")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of third-party text and weights that the project does not ship."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the third-party data (shared/data beside the checkout) is not here")
    return folder
