# SPDX-License-Identifier: Apache-2.0
"""`EpisodicChat` with the demo model in a real engine."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from dataclasses import asdict
from vllm import LLM, SamplingParams
from vllm_kvcompress.episodic.chat import EpisodicChat
from vllm_kvcompress.errors import KVCompressError

SETTINGS = {"episodic": {"budget": 512, "block_tokens": 256, "episodes": 3}, "recent_tokens": 64}
llm = LLM(sys.argv[1], kv_cache_dtype="turboquant-4", max_model_len=1536, max_num_batched_tokens=256, dtype="float32",
          enforce_eager=True, kv_cache_memory_bytes=128 << 20, block_size=128,  # its own, but asked for
          additional_config={"kvcompress": SETTINGS})
pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
free = pool.get_num_free_blocks()
report = {"answers": []}

def ask(question, **arguments):
    report["answers"].append(asdict(chat.ask(question, temperature=0, **arguments)))

chat = EpisodicChat(llm)
chat.append("user", "My name is Ada and I live in Lisbon.")
ask("Where do I live?", max_tokens=8, remember=False)
sampling = SamplingParams(temperature=0, max_tokens=8)
messages = [*chat.messages, {"role": "user", "content": "Where do I live?"}]
report["plain"] = llm.chat(messages, sampling, use_tqdm=False)[0].outputs[0].text
for turn in range(16):
    topic = ("the tomatoes in the greenhouse", "my violin lessons", "the ferry to the island")[turn // 2 % 3]
    chat.append("user", f"Let me tell you about {topic}, part {turn}: there is always something new about {topic}.")
    chat.append("assistant", f"What you say about {topic} is interesting, please go on.")
for _ in range(2):
    ask("What did I say about my violin lessons?", max_tokens=8, remember=False)
ask("Anything else?", max_tokens=1)  # ends while a compaction is due
chat.append("user", "word " * 1000)
try:
    chat.ask("Too long?")
except KVCompressError as error:
    report["error"] = str(error)
report["turns"], report["held"] = len(chat.messages), free - pool.get_num_free_blocks()
llm.llm_engine.engine_core.engine_core.scheduler.connector.reset_cache()
report["free"] = pool.get_num_free_blocks() == free
print("REPORT " + json.dumps(report))
"""


@pytest.mark.feature("eviction and episodes", "works")
def test_a_conversation(demo_model):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(demo_model)], capture_output=True, text=True, timeout=600, env=os.environ
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, f"the engine failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    report = json.loads(lines[0].removeprefix("REPORT "))
    short, violin, again, last = report["answers"]
    assert not short["evicted"] and short["text"] == report["plain"]
    assert violin["prompt_tokens"] > 512 + 256
    assert violin["evicted"] and violin["episodes"] == 3 and 0 <= violin["episode"] < 3
    assert violin == again and violin["reused"] % 128 == 0 and 512 < violin["reused"] < violin["prompt_tokens"]
    assert last["evicted"] and last["finish_reason"] == "length"
    assert report["turns"] == 1 + 32 + 2 + 1
    assert "leaves no room for an answer within max_model_len=1536" in report["error"]
    assert report["held"] > 0 and report["free"], "kept pages are all that is left, and they can be let go"
