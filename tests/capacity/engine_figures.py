# SPDX-License-Identifier: Apache-2.0
"""Starts an engine for each of the given arguments and prints what each reports of its KV cache, as a line of JSON.

python engine_figures.py '[{...LLM arguments...}, ...]'
"""

import json
import os
import sys

# In this process, one after the other: importing vLLM takes longer than starting such an engine.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    found = []
    for arguments in json.loads(sys.argv[1]):
        llm = LLM(enforce_eager=True, skip_tokenizer_init=True, **arguments)
        cache = llm.llm_engine.vllm_config.cache_config
        found.append([cache.num_gpu_blocks, cache.kv_cache_size_tokens, cache.kv_cache_max_concurrency])
        del llm
        cleanup_dist_env_and_memory()
    print("REPORT " + json.dumps(found))


if __name__ == "__main__":
    main()
