# SPDX-License-Identifier: Apache-2.0
"""vLLM's log, for commands that start no engine."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without vLLM's log, which goes to stdout and would be about an engine that is not started."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
