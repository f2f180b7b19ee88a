# SPDX-License-Identifier: Apache-2.0
"""vLLM worker extension that scores the positions of one prompt at a time (`worker_extension_cls`, both vLLM versions).

A forward hook on the model sees what each engine step fed and the final hidden states. It needs eager mode (a replayed
CUDA graph calls no hook) and one request at a time (rows then map to positions without the model runner's books).
Without data parallelism an eager step has no padding rows (0.32, 0.33: V1 and V2 runners).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_kvcompress.evaluation.metrics import Rows, score_rows


class Recording:
    """Scores of one prompt, filled step by step on the model's device: a step never waits for the device."""

    def __init__(self, tokens: torch.Tensor, start: int, stop: int, reference: torch.Tensor | None, feed: int) -> None:
        self.tokens = tokens  # [N + 1] int64: N tokens fed, the last only predicted
        self.start, self.stop = start, stop
        self.reference = reference  # [stop - start, D] hidden states of the reference engine
        self.feed = feed
        self.fed = 0
        self.largest_step = 0
        self.rows: list[Rows] = []
        self.hidden: list[torch.Tensor] = []
        # What the engine did feed, [2, N] int64 ids and positions: compared with `tokens` once, at the end.
        self.seen = torch.full((2, len(tokens) - 1), -1, dtype=torch.int64, device=tokens.device)

    def record(self, model: Any, ids: torch.Tensor, positions: torch.Tensor, hidden: torch.Tensor) -> None:
        """One engine step. ids, positions: [T]; hidden: [T, D]; T may include padding rows at the end."""
        # At most `feed` rows are the prompt's. If the engine fed fewer or more, the next step's positions tell.
        count = min(len(ids), self.feed, len(self.tokens) - 1 - self.fed)
        if count == 0:
            return  # The engine may run ahead by a step it throws away.
        first, self.fed = self.fed, self.fed + count
        self.largest_step = max(self.largest_step, count)
        self.seen[0, first : self.fed] = ids[:count]
        self.seen[1, first : self.fed] = positions[:count]
        low, high = max(first, self.start), min(self.fed, self.stop)
        if low >= high:
            return
        mine = hidden[low - first : high - first]
        targets = self.tokens[low + 1 : high + 1]
        if self.reference is None:
            # A copy: the engine may reuse the memory in its next step.
            self.hidden.append(mine.clone())
            logits = model.compute_logits(mine)
            scored = None if logits is None else score_rows(logits, targets)
        else:
            theirs = self.reference[low - self.start : high - self.start].to(mine.dtype)
            # One call for both: a float32 head may convert its whole weight every time it is used.
            logits = model.compute_logits(torch.cat((mine, theirs)))
            scored = None if logits is None else score_rows(logits[: high - low], targets, logits[high - low :])
        if scored is not None:  # None on tensor-parallel ranks that do not gather logits
            self.rows.append(scored)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything recorded, by name, each over the scored rows, on the CPU.

        Raises:
            RuntimeError: the engine fed something else than the prompt in steps of `feed`, or a figure is not finite.
        """
        self._check_fed()
        named = {"hidden": torch.cat(self.hidden).cpu()} if self.hidden else {}
        for name in ("logprob", "top1", "kl", "agree"):
            parts = [getattr(rows, name) for rows in self.rows]
            if parts and parts[0] is not None:
                named[name] = torch.cat(parts).cpu()
        for name in ("logprob", "kl"):
            bad = torch.nonzero(~named[name].isfinite()) if name in named else torch.empty(0)
            if len(bad):
                raise RuntimeError(
                    f"evaluation: {len(bad)} of {len(named[name])} predictions are not finite, "
                    f"the first at position {self.start + int(bad[0])}"
                )
        return named

    def _check_fed(self) -> None:
        ids, positions = self.seen[:, : self.fed].cpu()
        wrong = torch.nonzero((ids != self.tokens[: self.fed].cpu()) | (positions != torch.arange(self.fed)))
        if len(wrong):
            at = int(wrong[0])
            raise RuntimeError(
                f"evaluation: the engine fed position {int(positions[at])} where the prompt goes on at {at} (a step of "
                f"more than --feed {self.feed} tokens, a preemption, or another request in the batch?)"
            )
        if self.fed != len(self.tokens) - 1:
            raise RuntimeError(f"evaluation: the engine fed {self.fed} of {len(self.tokens) - 1} tokens")


class EvaluationRecorder:
    """Mixed into vLLM's worker; its methods are called through `LLM.collective_rpc`."""

    def kvcompress_eval_begin(
        self, tokens: list[int], start: int, stop: int, reference_file: str | None, feed: int
    ) -> None:
        """Record the next request, which feeds tokens[:-1]; rows start..stop are scored."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        device = next(model.parameters()).device
        reference = None if reference_file is None else load_file(reference_file)["hidden"].to(device)
        recording = Recording(torch.tensor(tokens, device=device), start, stop, reference, feed)

        def hook(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            named = dict(zip(("input_ids", "positions"), args, strict=False)) | kwargs
            ids, positions = named["input_ids"], named["positions"]
            if ids is None or not isinstance(output, torch.Tensor):
                raise RuntimeError("evaluation: only decoders fed with token ids, without pipeline parallelism")
            # Models with several position axes (M-RoPE) repeat the text position in each.
            recording.record(module, ids, positions.reshape(-1, positions.shape[-1])[0], output)

        self._kvcompress_eval = recording, model.register_forward_hook(hook, with_kwargs=True)

    def kvcompress_eval_end(self, result_file: str) -> int:
        """Write what was recorded (the first rank does); returns the tokens of the largest step."""
        recording, handle = self._kvcompress_eval
        handle.remove()
        del self._kvcompress_eval
        if getattr(self, "rank", 0) == 0:
            # Whole or not at all: another engine may be waiting for the file.
            partial = Path(result_file).with_suffix(".part")
            save_file(recording.tensors(), partial)
            partial.replace(result_file)
        return recording.largest_step
