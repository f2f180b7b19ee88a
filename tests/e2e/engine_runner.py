# SPDX-License-Identifier: Apache-2.0
"""Runs rounds of token prompts through a real engine in this process and prints what happened as one line of JSON.

    python engine_runner.py '{"engine": {...LLM arguments...}, "rounds": [{"prompts": [[...]], "sampling": {...}}]}'
    python engine_runner.py @file

A process of its own per engine, with the engine core inside it, so that a test can look at the allocated pages and at
the block pool, and so that a crash is a test's failure and not the suite's. Workers are reached through the executor:
one is in this process too, several have processes of their own.
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main() -> None:
    given = sys.argv[1]
    job = json.loads(Path(given[1:]).read_text() if given.startswith("@") else given)
    from vllm import LLM, SamplingParams

    llm = LLM(**{"enforce_eager": True, "disable_log_stats": False, **job["engine"]})
    core = llm.llm_engine.engine_core.engine_core
    on_workers = core.model_executor.collective_rpc
    report = {"rounds": [], "summed": [], "caches": on_workers(caches)[0]}
    managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
    report["managers"] = [type(manager).__name__ for manager in managers]
    pool = core.scheduler.kv_cache_manager.block_pool
    report["num_blocks"], report["free_before"] = pool.num_gpu_blocks, pool.get_num_free_blocks()
    preemptions = count_preemptions(core.scheduler)
    lowest = watch_pool(pool)
    peaks = watch_pages(core.scheduler)
    if job.get("poison"):
        on_workers(poison_evicted_pages)
    on_workers(watch_positions)
    on_workers(watch_survivors)
    for number, round_ in enumerate(job["rounds"]):
        if number:
            report["summed"].append(on_workers(summed)[0])
        if round_.get("evict_windows"):
            evict_windows(pool)
        peaks.clear()
        extra_args = round_.get("extra_args") or [None] * len(round_["prompts"])
        sampling = [SamplingParams(**round_["sampling"], extra_args=extra) for extra in extra_args]
        prompts = [{"prompt_token_ids": prompt, **round_.get("inputs", {})} for prompt in round_["prompts"]]
        if round_.get("abort_after") is not None:
            report["rounds"].append(abort(llm.llm_engine, prompts, sampling, round_["abort_after"], pool))
            continue
        try:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        except ValueError as error:
            report["rounds"].append({"error": str(error), "type": type(error).__name__})
            continue
        report["rounds"].append(
            [
                {
                    "peak_pages": max(peaks.get(output.request_id.split("-")[0], [0])),
                    "peaks": peaks.get(output.request_id.split("-")[0]),
                    "tokens": list(output.outputs[0].token_ids),
                    "cached": output.num_cached_tokens,
                    "eviction": (output.kv_transfer_params or {}).get("kvcompress"),
                    "prompt_logprobs": chosen(output.prompt_logprobs, output.prompt_token_ids),
                    "logprobs": chosen(output.outputs[0].logprobs, output.outputs[0].token_ids),
                }
                for output in outputs
            ]
        )
    report["summed"].append(on_workers(summed)[0])
    if core.scheduler.connector is not None:
        report["totals"] = core.scheduler.connector.totals()
        core.scheduler.connector.reset_cache()
    report["preemptions"], report["last_position"] = preemptions[0], on_workers(last_position)[0]
    report["free_after"], report["lowest_free"] = pool.get_num_free_blocks(), lowest[0]
    if job.get("survivors"):
        report["survivors"] = on_workers(survivors)
    print("REPORT " + json.dumps(report))


def chosen(positions, tokens):
    """Log-probability of the token that stands at each position; None where vLLM gives none."""
    if positions is None:
        return None
    return [None if entry is None else entry[token].logprob for entry, token in zip(positions, tokens, strict=True)]


def caches(wrapper) -> dict:
    """Shape, dtype and bytes per page of every layer's allocated cache, read from the bound tensors."""
    context = wrapper.worker.model_runner.compilation_config.static_forward_context
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


def watch_pages(scheduler) -> dict[str, int]:
    """Most pages, null ones aside, that each request held after any step was scheduled; who holds a page is checked.

    One number a group of page layers. Request ids without the random part that vLLM appends to them.
    """
    peaks, original = {}, scheduler.schedule
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    managers = [manager for manager in managers if hasattr(manager, "begin_eviction")] or managers[:1]

    def schedule(*args, **kwargs):
        output = original(*args, **kwargs)
        for group, manager in enumerate(managers):
            look(group, manager)
        return output

    def look(group, manager):
        holders = {}
        for request_id, blocks in manager.req_to_blocks.items():
            held = [block for block in blocks if not block.is_null]
            for block in held:
                holders.setdefault(block.block_id, []).append(request_id)
                assert block.ref_cnt >= len(holders[block.block_id]), "a page of two owners that counts one"
            found = peaks.setdefault(request_id.split("-")[0], [0] * len(managers))
            found[group] = max(found[group], len(held))
            if request_id in getattr(manager, "_states", {}):
                assert all(block.block_hash is None for block in held), "published"
                about_an_episode = scheduler.connector._requests[request_id][1].episode is not None
                assert about_an_episode or all(block.ref_cnt == 1 for block in held), "shared"

    scheduler.schedule = schedule
    return peaks


def watch_positions(wrapper) -> None:
    """Remember the largest position that the model was ever run with (`last_position`)."""
    model = wrapper.worker.model_runner.model
    model.last_position = 0

    def look(module, args, kwargs):
        module.last_position = max(module.last_position, int(kwargs["positions"].max()))

    model.register_forward_pre_hook(look, with_kwargs=True)


def last_position(wrapper) -> int:
    return wrapper.worker.model_runner.model.last_position


def watch_survivors(wrapper) -> None:
    """Remember the slots that every compaction keeps (`survivors`), layer by layer: [own KV heads, M]."""
    from vllm_kvcompress.attention.impl import KVCompressImpl

    original = KVCompressImpl.compact
    wrapper.worker.survivors = []

    def compact(layers, table, targets, kept, is_first):
        original(layers, table, targets, kept, is_first)
        wrapper.worker.survivors += kept.tolist()

    KVCompressImpl.compact = staticmethod(compact)


def survivors(wrapper) -> list:
    return wrapper.worker.survivors


def summed(wrapper) -> int:
    """Requests whose scores the worker has; those that end are forgotten in the next step."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    return len(get_kv_transfer_group()._worker._summed) if has_kv_transfer_group() else 0


def poison_evicted_pages(wrapper) -> None:
    """Fill pages with 0xFF, NaN as a scale, from the moment that they are evicted or spilled: who reads them gives NaN.

    Slots of host memory as well, once they have been read.
    """
    import torch

    from vllm_kvcompress.episodic.connector import EvictionConnector
    from vllm_kvcompress.episodic.host import HostPages
    from vllm_kvcompress.episodic.store import EpisodeStore
    from vllm_kvcompress.episodic.worker import EvictionWorker

    spill, start_load_kv = EpisodeStore._spill, EvictionConnector.start_load_kv
    compact, store, load = EvictionWorker.compact, HostPages.store, HostPages.load
    nobodys = []  # of each copy to host memory, the blocks that no request has
    sources = set()  # of the step's compactions, which come after the copies
    context = wrapper.worker.model_runner.compilation_config.static_forward_context

    def compact_and_poison(self, order):
        compact(self, order)
        for part in order.parts:
            if part.targets != order.tables[part.group][: len(part.targets)]:
                continue  # of a stored episode: what this request lets go of is others' still
            freed = order.tables[part.group][order.nulls[part.group][1] : part.end]
            for name in self._groups[part.group][1]:
                cache = context[name].kv_cache
                # vLLM's own kernels read what follows a page's last token, with weight 0: finite, but seen otherwise.
                cache[freed] = 0xFF if cache.dtype == torch.uint8 else 100.0

    def watched_spill(self, name):
        blocks, before = (
            [block.block_id for block in self._entries[name].blocks if block.ref_cnt == 1],
            len(self._stores),
        )
        spill(self, name)
        nobodys.extend([(copy, blocks) for copy in self._stores[before:]])

    def store_and_poison(self, copy):
        store(self, copy)
        (blocks,) = [blocks for other, blocks in nobodys if other is copy]
        for pages in self._pages:
            pages[[block for block in blocks if block not in sources]] = 0xFF

    def load_and_poison(self, copy):
        load(self, copy)
        if self._pages[0].is_cuda:
            torch.cuda.synchronize()  # the copy is still under way
        self._slots[:, copy.slots] = 0xFF

    def watched_start_load_kv(self, *args, **kwargs):
        sources.clear()
        for order in self._get_connector_metadata().orders:
            sources.update(*order.tables.values())
        start_load_kv(self, *args, **kwargs)

    EpisodeStore._spill, EvictionConnector.start_load_kv = watched_spill, watched_start_load_kv
    EvictionWorker.compact, HostPages.store, HostPages.load = compact_and_poison, store_and_poison, load_and_poison


def abort(engine, prompts, sampling, steps, pool) -> dict:
    """Begin requests, end them after so many steps, and one step later see what they left behind."""
    names = [f"abort{index}" for index in range(len(prompts))]
    for name, prompt, params in zip(names, prompts, sampling, strict=True):
        engine.add_request(name, prompt, params)
    for _ in range(steps):
        engine.step()
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    unfinished = engine.has_unfinished_requests()
    engine.abort_request(names)
    engine.step()
    return {
        "held": held,
        "unfinished": unfinished,
        "free": pool.get_num_free_blocks(),
    }


def evict_windows(pool) -> None:
    """Forget every cached block of the companion group, as other requests' needs would sooner or later."""
    from vllm.v1.core.kv_cache_utils import get_group_id

    pool.evict_blocks({b.block_id for b in pool.blocks if b.block_hash is not None and get_group_id(b.block_hash) == 1})


if __name__ == "__main__":
    main()
