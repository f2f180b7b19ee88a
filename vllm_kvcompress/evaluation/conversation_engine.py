# SPDX-License-Identifier: Apache-2.0
"""One format's engine for conversations: `python -m vllm_kvcompress.evaluation.conversation_engine JOB.json`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_kvcompress.evaluation.engine import EngineJob, Summary, describe, report_outcome


class Request(BaseModel):
    """One prompt: a history, and what follows it."""

    model_config = ConfigDict(frozen=True)

    history: int
    """Index into the job's histories"""
    suffix: list[int]
    """Token ids after the history's"""
    gold: list[int] = []
    """Token ids after these, to be scored; empty: generate an answer"""
    extra_args: dict[str, Any] = {}
    """As `SamplingParams.extra_args`"""


class Reply(BaseModel):
    """What came of it."""

    logprobs: list[float] = []
    """ln p of each gold token, given the true ones before it"""
    tokens: list[int] = []
    """The answer, greedily"""
    seconds: float


class ConversationJob(EngineJob):
    """Requests, one after the other; histories.json and requests.json hold them."""

    max_tokens: int
    """Of an answer"""
    stop_tokens: list[int]

    @property
    def replies_file(self) -> Path:
        """One line of JSON a request."""
        return self.folder / "replies.jsonl"

    def write(self, histories: list[list[int]], requests: list[Request]) -> None:
        """Leave what `run_job` reads."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "histories.json").write_text(json.dumps(histories))
        (self.folder / "requests.json").write_text(json.dumps([request.model_dump() for request in requests]))

    def replies(self) -> list[Reply]:
        """Those that are there."""
        return [Reply.model_validate_json(line) for line in self.replies_file.read_text().splitlines()]


def run_job(job: ConversationJob) -> Summary:
    """Start the engine and answer every request, each alone in the engine."""
    from vllm import LLM, SamplingParams

    histories = json.loads((job.folder / "histories.json").read_text())
    requests = [Request.model_validate(one) for one in json.loads((job.folder / "requests.json").read_text())]
    started = time.perf_counter()
    llm = LLM(**job.engine_args)
    ready = time.perf_counter()
    with job.replies_file.open("w") as replies:
        for request in requests:
            job.check_parent()
            begun = time.perf_counter()
            prompt = histories[request.history] + request.suffix + request.gold
            sampling = SamplingParams(
                temperature=0,
                max_tokens=1 if request.gold else job.max_tokens,
                prompt_logprobs=0 if request.gold else None,
                stop_token_ids=job.stop_tokens,
                extra_args=request.extra_args or None,
                detokenize=False,
            )
            output = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)[0]
            seconds = time.perf_counter() - begun
            if request.gold:
                every: Any = output.prompt_logprobs  # a dict for each token, in which its own is
                scored = zip(every[-len(request.gold) :], request.gold, strict=True)
                logprobs = [entry[token].logprob for entry, token in scored]
                reply = Reply(logprobs=logprobs, seconds=seconds)
            else:
                tokens = [token for token in output.outputs[0].token_ids if token not in job.stop_tokens]
                reply = Reply(tokens=tokens, seconds=seconds)
            replies.write(reply.model_dump_json() + "\n")
            replies.flush()
            job.count_one()
    return Summary(
        start_seconds=ready - started,
        feed_seconds=time.perf_counter() - ready,
        largest_step=job.engine_args["max_num_batched_tokens"],
        **describe(llm),
    )


def main(argv: list[str]) -> int:
    """Run the job of a file; on failure leave the reason in error.txt, for the parent to tell."""
    job = ConversationJob.model_validate_json(Path(argv[0]).read_text())
    return report_outcome(job, lambda: run_job(job))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
