"""What every test stands on: no network, and a logger of ours that no other test has touched."""

import logging
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # here, before anything imports the hub's client: it reads this once


@pytest.fixture(autouse=True)
def our_logger_as_it_was() -> None:
    """A deployment made in this process has it write to Serve's logger, too, and later tests would see all twice."""
    ours = logging.getLogger("serve_app")
    for handler in [*ours.handlers]:
        ours.removeHandler(handler)
    ours.setLevel(logging.NOTSET)
