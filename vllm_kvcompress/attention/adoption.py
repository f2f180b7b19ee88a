# SPDX-License-Identifier: Apache-2.0
"""Who else may have a request's blocks: nobody while it evicts; once it has finished, questions about its episode."""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from vllm_kvcompress.episodic.request import is_private


class AdoptsBlocks(SingleTypeKVCacheManager):
    """What both of our block managers do with blocks of requests that evict.

    The "external" tokens (vLLM's word for a KV connector's) of such a request lie in blocks that are there already.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._offers: dict[str, list[KVCacheBlock]] = {}

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        """Never shared by their hashes: pages hold other tokens than their place says, and all have seen less."""
        if not is_private(request):
            super().cache_blocks(request, *args, **kwargs)

    def offer(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """If the request is admitted in the scheduling step under way, it begins with these blocks, null where null."""
        self._offers[request_id] = blocks

    def withdraw_offers(self) -> None:
        """The scheduling step is over."""
        self._offers.clear()

    def offered(self, request_id: str) -> int:
        """Blocks, null ones among them, that the request would take over."""
        return len(self._offers.get(request_id, ()))

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        blocks, table = self._offers.pop(request_id), self.req_to_blocks[request_id]
        assert not table and num_local_computed_tokens == 0
        assert len(blocks) * self.block_size == num_external_computed_tokens
        self.block_pool.touch([block for block in blocks if not block.is_null])
        table.extend(blocks)
        self.num_cached_block[request_id] = len(table)
