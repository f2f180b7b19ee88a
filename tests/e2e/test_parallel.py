# SPDX-License-Identifier: Apache-2.0
"""Layers over two workers, requests over two engines, on the CPU: what the model itself says, token by token.

Two workers with a share of the heads each are in test_tensor_parallel.py.
"""

import concurrent.futures
import json
import urllib.request

import pytest

from vllm_kvcompress.demo.server import Server

from .features_model import EVERYTHING, MAX_LEN, Oracle, make_model, prompts, run
from .test_features import GREEDY, check_greedy

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("parallel") / "model")


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.mark.feature("pipeline parallelism", "works", "not with eviction")
def test_two_stages(model, oracle):
    """Three layers on two workers, so that their shares differ; more prompts than steps take, chunked and repeated."""
    asked = prompts(700, 30, 300)
    report = run(
        model, "hadamard-int2", [{"prompts": asked, "sampling": GREEDY}] * 2,
        windows=EVERYTHING, profile=True, pipeline_parallel_size=2,
    )  # fmt: skip
    for answers, cached in zip(report["rounds"], ([0, 0, 0], [640, 0, 256]), strict=True):
        assert [answer["cached"] for (answer,) in answers] == cached
        for prompt, (answer,) in zip(asked, answers, strict=True):
            check_greedy(oracle, prompt, answer)


@pytest.mark.feature("data parallelism", "works", "each engine has pages, prefixes and episodes of its own")
def test_two_engines(model, oracle, tmp_path):
    """Behind one server, which gives each of them some of the requests."""
    arguments = ["--kv-cache-dtype", "hadamard-int2", "--data-parallel-size", "2", "--api-server-count", "1"]
    arguments += ["--max-model-len", str(MAX_LEN), "--dtype", "float32", "--enforce-eager"]
    arguments += ["--kv-cache-memory-bytes", str(64 << 20)]
    arguments += ["--additional-config", json.dumps({"kvcompress": EVERYTHING})]
    asked = prompts(*[200 + 20 * number for number in range(8)])

    with Server(str(model), arguments, tmp_path / "log") as server:
        server.wait_until_ready(300)

        def ask(prompt):
            body = {"model": str(model), "prompt": prompt, "return_token_ids": True, **GREEDY}
            request = urllib.request.Request(
                f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["choices"][0]

        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            choices = list(pool.map(ask, asked))
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
            metrics = answer.read().decode()
    for prompt, choice in zip(asked, choices, strict=True):
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        entries = [{token: logprob} for token, logprob in zip(tokens, logprobs, strict=True)]
        check_greedy(oracle, prompt, {"tokens": tokens, "logprobs": entries})
    read = {
        line.split('engine="')[1][0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith("vllm:prompt_tokens_total{")
    }
    assert len(read) == 2 and min(read.values()) > 0 and sum(read.values()) == sum(map(len, asked))
