# SPDX-License-Identifier: Apache-2.0
"""Long chat histories over HTTP: an ordinary client, a server with `episodic` settings, the demo model."""

import json
import re
import time
import urllib.request

import openai
import pytest

from vllm_kvcompress.demo.server import Server
from vllm_kvcompress.operations.metrics import METRICS, PREFIX
from vllm_kvcompress.serving.middleware import HEADER

BUDGET, BLOCK = 512, 256
SETTINGS = {
    "sink_tokens": 32,
    "recent_tokens": 64,
    "episodic": {"budget": BUDGET, "block_tokens": BLOCK, "episodes": 2},
}
TOPICS = ("the tomatoes in my greenhouse", "learning to play the violin")
HISTORY = [{"role": "system", "content": "You listen well."}]
for turn in range(26):
    topic = TOPICS[turn // 7 % 2]
    HISTORY += [
        {"role": "user", "content": f"Number {turn}: today something new happened with {topic}, let me tell you."},
        {"role": "assistant", "content": f"Please tell me more about {topic}; I would like to hear it."},
    ]
SHORT = [HISTORY[1], HISTORY[2], {"role": "user", "content": "What did I tell you about?"}]


@pytest.fixture(scope="module")
def server(demo_model, tmp_path_factory):
    arguments = ["--kv-cache-dtype", "turboquant-4", "--max-model-len", "2048", "--enforce-eager", "--dtype", "float32"]
    arguments += ["--kv-cache-memory-bytes", str(128 << 20), "--max-num-batched-tokens", str(BLOCK)]
    arguments += ["--additional-config", json.dumps({"kvcompress": SETTINGS})]
    with Server(str(demo_model), arguments, tmp_path_factory.mktemp("server") / "log") as running:
        running.wait_until_ready(300)
        yield running.url, str(demo_model)


@pytest.fixture
def ask(server):
    client = openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=600, max_retries=0)

    def ask(messages, **extra):
        """(header or None, response)"""
        raw = client.chat.completions.with_raw_response.create(
            model=server[1], messages=messages, max_tokens=8, temperature=0, extra_body=extra
        )
        return raw.headers.get(HEADER.decode()), raw.parse()

    return ask


def test_a_short_history_is_left_alone(ask):
    header, response = ask(SHORT)
    assert header is None and response.usage.prompt_tokens < BUDGET
    assert not (response.model_extra or {}).get("kv_transfer_params")


def test_a_long_history_is_read_once_and_its_pages_answer_again(ask):
    question = {"role": "user", "content": "What did I say about learning to play the violin?"}
    header, first = ask([*HISTORY, question])
    assert re.fullmatch(r"[12]/2; built", header) and first.usage.prompt_tokens > BUDGET + BLOCK
    report = first.model_extra["kv_transfer_params"]["kvcompress"]
    # All whole pages of the history; the question, and what is left of the history, are new.
    assert report["reused_tokens"] % 128 == 0 and 0 < first.usage.prompt_tokens - report["reused_tokens"] < BLOCK
    assert report["pages"] < first.usage.prompt_tokens // 128
    again, second = ask([*HISTORY, question])
    assert again == header.replace("built", "reused")
    assert second.choices[0].message.content == first.choices[0].message.content
    assert second.model_extra["kv_transfer_params"]["kvcompress"] == report
    # Another tenant's question about the same words.
    other, third = ask([*HISTORY, question], cache_salt="tenant")
    assert other == header and third.choices[0].message.content == first.choices[0].message.content


def test_metrics_count_what_became_of_histories(server, ask):
    question = {"role": "user", "content": "What did I say about learning to play the violin?"}

    def counted():
        """What our metrics say, once they say it twice: they reach the API server after the answer."""
        found: dict = {}
        while True:
            with urllib.request.urlopen(f"{server[0]}/metrics", timeout=60) as response:
                lines = response.read().decode().splitlines()
            pairs = [line.rsplit(" ", 1) for line in lines if line.startswith(PREFIX)]
            before, found = found, {name.removeprefix(PREFIX).split("{")[0]: float(value) for name, value in pairs}
            if found == before:
                return {name: found[name + "_total" * (METRICS[name].kind == "counter")] for name in METRICS}
            time.sleep(2)

    def grown(salt):
        before = counted()
        _, response = ask([*HISTORY, question], cache_salt=salt)
        after = counted()
        return {name: after[name] - before[name] for name in METRICS}, response.usage.prompt_tokens

    built, tokens = grown("metrics")
    assert built["episodes_built"] == built["episodes_reused"] == built["kept_episodes"] == 1
    assert built["compressed_bytes"] > 0
    # What does not fit in the budget, but for the recent window and pages that are not full; and the question's share.
    assert built["evicted_tokens"] % 128 == 0 and 0 < built["evicted_tokens"] < tokens - BUDGET
    again, _ = grown("metrics")
    assert again["episodes_reused"] == 1 and again["episodes_built"] == again["kept_episodes"] == 0
    assert all(built[name] == again[name] == 0 for name in ("episodes_spilled", "episodes_lost", "episodes_restored"))
    # Of a history that was kept, only the sinks are in 16 bits.
    assert built["window_fallback_tokens"] == again["window_fallback_tokens"] == SETTINGS["recent_tokens"]
    assert again["compressed_bytes"] == again["window_pages"] == 0 < built["window_pages"]


def test_a_streamed_answer_says_its_episode_too(server):
    body = {"model": server[1], "messages": [*HISTORY, SHORT[-1]], "max_tokens": 4, "temperature": 0, "stream": True}
    request = urllib.request.Request(
        f"{server[0]}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        assert re.fullmatch(r"[12]/2; (built|reused)", response.headers[HEADER.decode()])
        assert response.read().decode().rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"kvcompress_budget": 64}, "kvcompress_budget=64"),
        ({"kvcompress_budget": 512, "kvcompress_policy": "lru"}, "kvcompress_policy='lru'"),
        ({"kvcompress_nothing": 1}, "kvcompress_nothing=1"),
    ],
)
@pytest.mark.parametrize("messages", [SHORT, [*HISTORY, SHORT[-1]]], ids=["short", "long"])
def test_a_wrong_argument_is_the_clients_error_and_the_server_lives_on(ask, messages, arguments, words):
    with pytest.raises(openai.BadRequestError, match=words):
        ask(messages, vllm_xargs=arguments)
    ask(SHORT)
