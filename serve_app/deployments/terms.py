"""The terms of now: Serve's `user_config`, which changes while a replica runs.

A replica does not start on terms that cannot be read. One that runs keeps those it has, and says so: for a slip in a
price Serve would replace it, by one that cannot start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from serve_app.core.settings import Terms

logger = logging.getLogger(__name__)


class LiveTerms:
    def __init__(self) -> None:
        self.now = Terms()
        self._read = False
        self._tell: Callable[[Terms], None] | None = None

    def follow(self, tell: Callable[[Terms], None]) -> None:
        """tell: called with each change."""
        self._tell = tell

    def read(self, user_config: dict[str, Any]) -> None:
        """Raises ValidationError if there is nothing better to go by."""
        try:
            self.now = Terms.model_validate(user_config)
        except ValidationError as error:
            if not self._read:
                raise
            faults = "; ".join(f"{'.'.join(map(str, it['loc']))}: {it['msg']}" for it in error.errors())
            logger.error("the new user_config cannot be read, so the old terms stay: %s", faults)
            return
        if self._read:
            logger.info("new terms: rate card %s", self.now.rates.version)
        self._read = True
        if self._tell is not None:
            self._tell(self.now)
