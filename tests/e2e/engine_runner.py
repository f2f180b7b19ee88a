# SPDX-License-Identifier: Apache-2.0
"""Runs rounds of token prompts through a real engine in this process and prints what happened as one line of JSON.

    python engine_runner.py '{"engine": {...LLM arguments...}, "rounds": [{"prompts": [[...]], "sampling": {...}}]}'

A process of its own per engine, with the engine core and worker inside it, so that a test can look at the allocated
pages and at the block pool, and so that a crash is a test's failure and not the suite's.
"""

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    job = json.loads(sys.argv[1])
    from vllm import LLM, SamplingParams

    llm = LLM(**{"enforce_eager": True, "disable_log_stats": False, **job["engine"]})
    core = llm.llm_engine.engine_core.engine_core
    report = {"rounds": [], "caches": caches(core)}
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    report["managers"] = [type(manager).__name__ for manager in managers]
    pool = core.scheduler.kv_cache_manager.block_pool
    report["num_blocks"], report["free_before"] = pool.num_gpu_blocks, pool.get_num_free_blocks()
    preemptions = count_preemptions(core.scheduler)
    lowest = watch_pool(pool)
    for round_ in job["rounds"]:
        if round_.get("evict_windows"):
            evict_windows(pool)
        sampling = SamplingParams(**round_["sampling"])
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in round_["prompts"]], sampling, use_tqdm=False)
        report["rounds"].append(
            [
                {
                    "tokens": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens,
                    "prompt_logprobs": chosen(output.prompt_logprobs, output.prompt_token_ids),
                    "logprobs": chosen(output.outputs[0].logprobs, output.outputs[0].token_ids),
                }
                for output in outputs
            ]
        )
    report["preemptions"] = preemptions[0]
    report["free_after"], report["lowest_free"] = pool.get_num_free_blocks(), lowest[0]
    print("REPORT " + json.dumps(report))


def chosen(positions, tokens):
    """Log-probability of the token that stands at each position; None where vLLM gives none."""
    if positions is None:
        return None
    return [None if entry is None else entry[token].logprob for entry, token in zip(positions, tokens, strict=True)]


def caches(core) -> dict:
    """Shape, dtype and bytes per page of every layer's allocated cache, read from the bound tensors."""
    runner = core.model_executor.driver_worker.worker.model_runner
    context = runner.compilation_config.static_forward_context
    return {
        name: {
            "shape": list(layer.kv_cache.shape),
            "dtype": str(layer.kv_cache.dtype),
            "page_stride": layer.kv_cache.stride(0) * layer.kv_cache.element_size(),
            "storage_bytes": layer.kv_cache.untyped_storage().nbytes(),
        }
        for name, layer in context.items()
    }


def count_preemptions(scheduler) -> list[int]:
    count, original = [0], scheduler._preempt_request

    def preempt(*args, **kwargs):
        count[0] += 1
        return original(*args, **kwargs)

    scheduler._preempt_request = preempt
    return count


def watch_pool(pool) -> list[int]:
    lowest, original = [pool.get_num_free_blocks()], pool.get_new_blocks

    def get_new_blocks(*args, **kwargs):
        blocks = original(*args, **kwargs)
        lowest[0] = min(lowest[0], pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = get_new_blocks
    return lowest


def evict_windows(pool) -> None:
    """Forget every cached block of the companion group, as other requests' needs would sooner or later."""
    from vllm.v1.core.kv_cache_utils import get_group_id

    pool.evict_blocks({b.block_id for b in pool.blocks if b.block_hash is not None and get_group_id(b.block_hash) == 1})


if __name__ == "__main__":
    main()
