# SPDX-License-Identifier: Apache-2.0
"""What a model family was measured to need. Data: settings override every field.

Sources: of windows the OSCAR repository's examples and its README tables (GPQA against bf16 for the windows tried); of
alpha EpiCache (arXiv 2509.17396).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_SINK_TOKENS = 64
DEFAULT_RECENT_TOKENS = 256


@dataclass(frozen=True)
class Recipe:
    pattern: str
    """Regular expression, matched case-insensitively anywhere in the model's name or folder."""
    sink_tokens: int
    recent_tokens: int
    reason: str


RECIPES = (
    Recipe(r"qwen3-8b", 128, 2048, "GPQA 58.1 = bf16 at 128/2048; 55.6 at 128/1024"),
    Recipe(r"qwen3-30b-a3b", 128, 1024, "GPQA 62.1 against bf16 61.0; 55.6 at 64/256"),
    Recipe(r"glm-5\.2", 64, 512, "GPQA -2.0 at 64/512 (not significant), -5.6 at 64/256"),
)


def windows_for(model: str) -> tuple[int, int]:
    """(sink_tokens, recent_tokens) for a model name or path; the defaults where no recipe matches."""
    for recipe in RECIPES:
        if re.search(recipe.pattern, model, re.IGNORECASE):
            return recipe.sink_tokens, recipe.recent_tokens
    return DEFAULT_SINK_TOKENS, DEFAULT_RECENT_TOKENS


def alpha_for(model: str) -> float:
    """Sharpness of budgets by layer (`policies.layer_budgets`) for a model name or path."""
    return 1.3 if re.search("qwen", model, re.IGNORECASE) else 1.1
