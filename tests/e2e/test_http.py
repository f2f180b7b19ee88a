# SPDX-License-Identifier: Apache-2.0
"""The OpenAI client against `vllm serve MODEL --kv-cache-dtype oscar-int2`, on the demo model."""

import concurrent.futures
import json
import os
import re
import subprocess
import sys
import time
import urllib.request

import openai
import pytest

from vllm_kvcompress import rotations
from vllm_kvcompress.demo.server import DEFAULT_ENVIRON, Server
from vllm_kvcompress.operations.metrics import METRICS, PREFIX

DTYPE = "oscar-int2"
MAX_LEN = 2048
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory):
    """(base URL, model name, log file) of a running server, started as the README types it."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--kv-cache-dtype", DTYPE, "--max-model-len", str(MAX_LEN)]
    arguments += ["--kv-cache-memory-bytes", str(256 << 20), "--enforce-eager"]
    with Server(str(demo_model), arguments, log) as running:
        running.wait_until_ready(300)
        yield f"{running.url}/v1", str(demo_model), log


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=server[0], api_key="none", timeout=600, max_retries=0)


def chat(client, server, **changes):
    arguments = {"model": server[1], "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    return client.chat.completions.create(**arguments | changes)


def metrics(server):
    """Our metrics by name without the prefix: value, and the labels of the last of that name."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(server[0].removesuffix("/v1") + "/metrics", timeout=60) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name.startswith(PREFIX)]
    found = {sample.name.removeprefix(PREFIX): (sample.value, sample.labels) for sample in samples}
    return {name: value for name, value in found.items() if not name.endswith("_created")}


def wait_for(server, condition, seconds=60):
    """Metrics that meet a condition: numbers reach the API server after the answer they belong to."""
    end = time.monotonic() + seconds
    while not condition(found := metrics(server)):
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def test_start_says_in_one_line_what_is_served(server):
    text = server[2].read_text()
    (line,) = re.findall(rf"KV cache format {DTYPE}: .*", text)
    assert "41 bytes per token, layer and KV head (16-bit: 256, 6.2x)" in line
    (tokens,) = re.findall(r"KV cache size: ([\d,]+) tokens", text)
    assert f", {tokens} tokens fit (" in line and f"requests of {MAX_LEN:,})" in line
    assert f"kvcompress/rotation.safetensors (fingerprint {fingerprint(server)})" in line
    assert line.endswith("attention kernels: torch (this engine runs on the CPU)")


def fingerprint(server):
    return rotations.read_metadata(f"{server[1]}/{rotations.ROTATION_BESIDE_MODEL}").fingerprint


def test_metrics(client, server):
    labels = {"model_name": server[1], "engine": "0"}
    found = metrics(server)
    assert found.keys() == {name + "_total" * (one.kind == "counter") for name, one in METRICS.items()} | {
        "compression_ratio",
        "info",
    }
    value, about = found.pop("info")
    assert value == 1 and about.items() >= {
        **labels, "format": DTYPE, "kernels": "torch", "bytes_per_token": "41", "rotation": fingerprint(server)
    }.items()  # fmt: skip
    assert all(one == labels for _, one in found.values())
    assert found["compression_ratio"][0] == pytest.approx(256 / 41)

    # Two prompts that begin with the same 512 tokens or more, in one chunk each: the second finds the sinks, but nobody
    # has kept the window before the place where they part.
    before = found["window_fallback_tokens_total"][0]
    start = "The rain fell softly on the old harbour town. " * 60
    client.completions.create(model=server[1], prompt=start + "Far " * 400, max_tokens=1)
    events = client.completions.create(
        model=server[1], prompt=start + "Near", max_tokens=1300, extra_body={"ignore_eos": True}, stream=True
    )
    next(iter(events))
    # 30 layers of 3 heads of 41 bytes: whole pages of 128 tokens
    page_bytes = 30 * 3 * 41 * 128
    running = wait_for(server, lambda found: found["compressed_bytes"][0] >= 4 * page_bytes)
    assert running["compressed_bytes"][0] % page_bytes == 0 < running["window_pages"][0] <= 38
    events.close()  # which ends the request, long before it would end by itself
    found = wait_for(server, lambda found: found["compressed_bytes"][0] == found["window_pages"][0] == 0)
    assert found["window_fallback_tokens_total"][0] - before == 256
    assert found["evicted_tokens_total"][0] == found["episodes_built_total"][0] == 0


def test_chat(client, server):
    assert "Paris" in chat(client, server).choices[0].message.content


@pytest.mark.feature("OpenAI HTTP server", "works")
def test_chat_equals_offline(client, server):
    """One request alone in the batch on either side, as many threads: the same steps, arithmetic and text."""
    script = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        "    model, dtype, length, messages = json.loads(sys.argv[1])\n"
        "    llm = LLM(model, kv_cache_dtype=dtype, max_model_len=length, kv_cache_memory_bytes=256 << 20,\n"
        "              enforce_eager=True)\n"
        "    out = llm.chat(messages, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)\n"
        "    print('TEXT ' + json.dumps(out[0].outputs[0].text))\n"
    )
    job = json.dumps([server[1], DTYPE, MAX_LEN, MESSAGES])
    environ = {**DEFAULT_ENVIRON, **os.environ}
    command = [sys.executable, "-c", script, job]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("TEXT ")]
    assert lines, done.stderr[-3000:]
    assert chat(client, server).choices[0].message.content == json.loads(lines[0].removeprefix("TEXT "))


def test_completion(client, server):
    out = client.completions.create(model=server[1], prompt="1, 2, 3, 4, 5, 6, 7,", max_tokens=8, temperature=0)
    assert out.choices[0].text.strip().startswith("8")
    assert out.usage.completion_tokens == 8


@pytest.mark.feature("OpenAI HTTP server", "works")
def test_streaming_gives_the_same_text(client, server):
    whole = chat(client, server).choices[0].message.content
    events = list(chat(client, server, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == whole
    assert len(events) > 3


def test_stop_strings(client, server):
    text = "One, two, three, four, five, six, seven"
    out = client.completions.create(
        model=server[1], prompt=f"{text}\n{text}\n{text}\n", max_tokens=40, temperature=0, stop=["four"]
    )
    assert out.choices[0].finish_reason == "stop"
    assert "four" not in out.choices[0].text and "three" in out.choices[0].text


def test_eight_concurrent_requests(client, server):
    """Eight different prompts of about 1000 tokens at once, past the windows, each answered about its own."""

    def ask(number):
        sentence = f"The secret number of this text is {number}. "
        prompt = sentence + "The rain fell softly on the old harbour town. " * 90 + sentence + "The secret number is"
        out = client.completions.create(model=server[1], prompt=prompt, max_tokens=4, temperature=0)
        return out.usage.prompt_tokens, out.choices[0].text

    numbers = [1000 + 777 * i for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, numbers))
    for number, (tokens, text) in zip(numbers, answers, strict=True):
        assert tokens > 900
        # A 135M model: the last sentence gives the number away; another request's pages would give another's.
        assert str(number)[:2] in text, (number, text)


def test_prompt_over_the_limit_is_a_400_and_the_server_lives(client, server):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=server[1], prompt="word " * (2 * MAX_LEN), max_tokens=4)
    assert caught.value.status_code == 400
    assert chat(client, server).choices[0].message.content


def test_eviction_where_the_server_does_not_is_a_400_and_the_server_lives(client, server):
    with pytest.raises(openai.BadRequestError, match="kvcompress_budget needs a server that evicts") as caught:
        chat(client, server, extra_body={"vllm_xargs": {"kvcompress_budget": 4096}})
    assert caught.value.status_code == 400
    assert chat(client, server).choices[0].message.content
