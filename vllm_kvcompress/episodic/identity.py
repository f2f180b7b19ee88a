# SPDX-License-Identifier: Apache-2.0
"""What tells conversations apart: a chain of hashes over the turns, one more with each turn.

Two histories have the same digest at turn t if and only if they, the tenant's salt and the settings are the same up to
and including t. A change in the middle of a history therefore changes every digest behind it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from vllm_kvcompress.episodic.segment import Utterance


def digest(*parts: str) -> str:
    """32 hex digits of the parts in order; where one ends and the next begins matters."""
    # Escaped to ASCII, which also takes text that is not valid Unicode.
    return hashlib.sha256(json.dumps(parts).encode("ascii")).hexdigest()[:32]


def turn_digests(utterances: Iterable[Utterance], root: str) -> list[str]:
    """The digest of the history up to and including each turn, empty turns too.

    Args:
        root: digest of what must be shared besides the history: salt, settings, embedder.
    """
    digests = [root]
    for turn in utterances:
        digests.append(digest(digests[-1], turn.speaker, turn.text, turn.rest))
    return digests[1:]
