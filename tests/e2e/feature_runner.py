# SPDX-License-Identifier: Apache-2.0
"""Runs rounds of requests that use features of vLLM through a real engine and prints every answer as one line of JSON.

    python feature_runner.py '{"engine": {...LLM arguments...}, "rounds": [{"prompts": [[...]], "sampling": {...}}]}'
    python feature_runner.py @file

A round may have "lora" (a folder with an adapter), or "beam" (BeamSearchParams) in place of "sampling". An answer is
its "tokens" and, of each, what vLLM reports: {token: log-probability} as "logprobs"; of a beam, their "sum".
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    given = sys.argv[1]
    job = json.loads(Path(given[1:]).read_text() if given.startswith("@") else given)
    from vllm import LLM

    llm = LLM(**{"disable_log_stats": False, **job["engine"]})
    if job.get("profile"):
        llm.llm_engine.engine_core.engine_core.model_executor.collective_rpc(profile)
    report = {"rounds": [run_round(llm, round_) for round_ in job["rounds"]]}
    report["metrics"] = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    print("REPORT " + json.dumps(report))


def profile(wrapper) -> None:
    """What workers on GPUs do at start: it makes the buffer that a stage of a pipeline receives into.

    0.32's CPU worker leaves it out where it has nothing to compile and the cache's size is given, and then fails in the
    first step, whatever the cache dtype.
    """
    wrapper.worker.model_runner.profile_run()


def run_round(llm, round_) -> list[list[dict]]:
    """Answers of each prompt."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams

    prompts = [{"prompt_token_ids": prompt} for prompt in round_["prompts"]]
    lora = LoRARequest("adapter", 1, round_["lora"]) if "lora" in round_ else None
    if "beam" in round_:
        found = llm.beam_search(prompts, BeamSearchParams(**round_["beam"]), use_tqdm=False)
        return [
            [{"tokens": beam.tokens[len(prompt) :], "sum": beam.cum_logprob} for beam in output.sequences]
            for prompt, output in zip(round_["prompts"], found, strict=True)
        ]
    sampling = dict(round_["sampling"])
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = StructuredOutputsParams(**sampling["structured_outputs"])
    outputs = llm.generate(prompts, SamplingParams(**sampling), use_tqdm=False, lora_request=lora)
    return [
        [
            {
                "tokens": list(answer.token_ids),
                "cached": output.num_cached_tokens,
                "logprobs": reported(answer.logprobs),
                "prompt_logprobs": reported(output.prompt_logprobs),
            }
            for answer in output.outputs
        ]
        for output in outputs
    ]


def reported(positions) -> list[dict] | None:
    if positions is None:
        return None
    # A prompt's first token has no entry.
    return [{token: found.logprob for token, found in (place or {}).items()} for place in positions]


if __name__ == "__main__":
    main()
