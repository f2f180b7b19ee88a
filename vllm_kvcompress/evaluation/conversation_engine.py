# SPDX-License-Identifier: Apache-2.0
"""One format's engine for conversations: `python -m vllm_kvcompress.evaluation.conversation_engine JOB.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_kvcompress.episodic.request import EPISODE, KEEP
from vllm_kvcompress.evaluation.engine import EngineJob, Summary, describe, report_outcome

_NAME = "reading"
"""Of the kept pages: each reading replaces those of the one before."""


class Asked(BaseModel):
    """A question, in what follows its history."""

    model_config = ConfigDict(frozen=True)

    suffix: list[int]
    """Token ids after the history's"""
    gold: list[int]
    """Token ids of the answer to be scored"""


class Reading(BaseModel):
    """A history read once, under one way of eviction, and what is asked about it."""

    model_config = ConfigDict(frozen=True)

    history: int
    """Index into the job's histories"""
    extra_args: dict[str, Any]
    """As `SamplingParams.extra_args`; empty: the full cache"""
    asked: list[Asked]


class Reply(BaseModel):
    """What came of a question."""

    logprobs: list[float]
    """ln p of each gold token, given the true ones before it"""
    tokens: list[int]
    """The answer, greedily"""
    seconds: float
    """Of the reading, shared by its questions, and of asking them"""


class ConversationJob(EngineJob):
    """Readings, one after the other; histories.json and readings.json hold them."""

    sizes: list[int]
    """Tokens of each reading"""
    max_tokens: int
    """Of an answer"""
    stop_tokens: list[int]

    @property
    def replies_file(self) -> Path:
        """One line of JSON a question, reading by reading."""
        return self.folder / "replies.jsonl"

    def write(self, histories: list[list[int]], readings: list[Reading]) -> None:
        """Leave what `run_job` reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "histories.json").write_text(json.dumps(histories))
        (self.folder / "readings.json").write_text(json.dumps([reading.model_dump() for reading in readings]))

    def replies(self) -> list[Reply]:
        """Those that are there."""
        return [Reply.model_validate_json(line) for line in self.replies_file.read_text().splitlines()]


def run_job(job: ConversationJob) -> Summary:
    """Start the engine and answer every question, all of a reading at once."""
    from vllm import LLM

    histories = json.loads((job.folder / "histories.json").read_text())
    readings = [Reading.model_validate(one) for one in json.loads((job.folder / "readings.json").read_text())]
    started = time.perf_counter()
    llm = LLM(**job.engine_args)
    ready = time.perf_counter()
    with job.replies_file.open("w") as replies:
        for reading in readings:
            job.check_parent()
            for reply in _read(llm, job, histories[reading.history], reading):
                replies.write(reply.model_dump_json() + "\n")
            replies.flush()
            job.count_one()
    return Summary(
        start_seconds=ready - started,
        feed_seconds=time.perf_counter() - ready,
        largest_step=job.engine_args["max_num_batched_tokens"],
        **describe(llm),
    )


def _read(llm: Any, job: ConversationJob, history: list[int], reading: Reading) -> list[Reply]:
    """Read a history, keep it, and ask what there is to ask about it.

    Kept pages, or without eviction the prefix cache, spare every question the history. A gold token's probability is
    that of the only token allowed after what stands before it: log-probabilities are taken before that is looked at.
    """
    from vllm import SamplingParams

    begun = time.perf_counter()
    common: dict[str, Any] = {"temperature": 0, "detokenize": False}
    keep, take = ({**reading.extra_args, name: _NAME} if reading.extra_args else None for name in (KEEP, EPISODE))
    llm.generate(
        {"prompt_token_ids": history},
        SamplingParams(**common, max_tokens=2, ignore_eos=True, extra_args=keep),
        use_tqdm=False,
    )
    prompts: list[list[int]] = []
    sampling = []
    for one in reading.asked:
        prompts += [history + one.suffix + one.gold[:place] for place in range(len(one.gold))]
        sampling += [
            SamplingParams(**common, max_tokens=1, logprobs=0, allowed_token_ids=[token], extra_args=take)
            for token in one.gold
        ]
        prompts.append(history + one.suffix)
        sampling.append(
            SamplingParams(**common, max_tokens=job.max_tokens, stop_token_ids=job.stop_tokens, extra_args=take)
        )
    outputs = iter(llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False))
    found = []
    for one in reading.asked:
        logprobs = [next(outputs).outputs[0].logprobs[0][token].logprob for token in one.gold]
        answer = next(outputs).outputs[0].token_ids
        found.append((logprobs, [token for token in answer if token not in job.stop_tokens]))
    seconds = (time.perf_counter() - begun) / len(found)
    return [Reply(logprobs=logprobs, tokens=tokens, seconds=seconds) for logprobs, tokens in found]


def main(argv: list[str]) -> int:
    """Run the job of a file; on failure leave the reason in error.txt, for the parent to tell."""
    job = ConversationJob.model_validate_json(Path(argv[0]).read_text())
    return report_outcome(job, lambda: run_job(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
