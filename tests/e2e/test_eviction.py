# SPDX-License-Identifier: Apache-2.0
"""Requests that keep a budget of pages, in real engines, beside others that keep everything.

Every page is overwritten with NaN as soon as it is evicted, and the runner looks at who holds which page after every
step (engine_runner.py): a page read too late, or by another request, is a NaN in somebody's log-probabilities.
"""

import json
import math
import os
import random
import secrets
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.episodic.policies import POLICIES, Layer, always_kept, select
from vllm_kvcompress.evaluation import epicache_reference
from vllm_kvcompress.formats import get_format
from vllm_kvcompress.rotations import (
    ROTATION_BESIDE_MODEL,
    LayerRotation,
    RotationMetadata,
    RotationSet,
    write_rotation,
)

RUNNER = Path(__file__).with_name("engine_runner.py")
VOCABULARY, MAX_LEN, PAGE = 512, 6144, 128
SINKS, RECENT, BLOCK = 32, 128, 512
ON_GPU = torch.cuda.is_available()
BUDGET = 512
# Of log-probabilities that two batches of the same requests give: what tests/e2e/test_engine.py allows.
SAME = 0.1
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
SCORED = {**GREEDY, "prompt_logprobs": 0}


@pytest.fixture(scope="module")
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def tiny_model(rng, tmp_path_factory):
    """A random Llama of 2 layers, 4 query and 2 KV heads of size 64, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(rng.getrandbits(30))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass
class Round:
    """Requests at once; `asks` are their extra arguments."""

    prompts: list[list[int]]
    asks: list[dict | None]
    sampling: dict
    abort_after: int | None = None
    salt: str | None = None


def run(
    model, folder, rounds: list[Round], block: int = BLOCK, host_memory: int = 0, survivors=False, **engine
) -> dict:
    """Outputs and observations of an engine of its own process."""
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        # 4 bits: what is left of the difference between two engines is what is tested.
        "kv_cache_dtype": "turboquant-4",
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 8 * block,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "dtype": "float32",
        "gpu_memory_utilization": 0.1,  # other engines may be there; the bytes are given
        "additional_config": {
            "kvcompress": {
                "sink_tokens": SINKS,
                "recent_tokens": RECENT,
                "episodic": {"budget": BUDGET, "block_tokens": block, "host_memory": host_memory},
            }
        },
    }
    job = {
        "engine": arguments | engine,
        "poison": True,
        "survivors": survivors,
        "rounds": [
            {
                "prompts": r.prompts,
                "extra_args": r.asks,
                "sampling": r.sampling,
                "abort_after": r.abort_after,
                "inputs": {} if r.salt is None else {"cache_salt": r.salt},
            }
            for r in rounds
        ],
    }
    file = folder / "job.json"
    file.write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(RUNNER), f"@{file}"], capture_output=True, text=True, timeout=900, env=os.environ
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, f"the engine failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[0].removeprefix("REPORT "))


def ask(policy: str, budget: int = BUDGET, guide: list[int] | None = None) -> dict:
    asked = {"kvcompress_budget": budget, "kvcompress_policy": policy}
    return asked if guide is None else {**asked, "kvcompress_guide": guide}


def numbers(outputs: list[dict], fields=("prompt_logprobs", "logprobs")) -> list[float]:
    return [x for out in outputs for name in fields for x in out[name] or () if x is not None]


def same_until_a_tie(found: dict, expected: dict) -> float:
    """Largest difference of the generated tokens' log-probabilities up to the first token that differs, it included."""
    worst = 0.0
    for a, b, x, y in zip(found["tokens"], expected["tokens"], found["logprobs"], expected["logprobs"], strict=True):
        worst = max(worst, abs(x - y) if abs(x - y) >= 0 else math.inf)
        if a != b:
            break
    return worst


def peak(budget: int, block: int) -> int:
    return budget // PAGE + block // PAGE + RECENT // PAGE + 2


@pytest.fixture(scope="module")
def many_rounds(tiny_model, rng, tmp_path_factory):
    """One engine, many rounds, by name; and the engine's own report."""

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    guide = prompt(64)
    alone, evicting = [prompt(n) for n in (700, 300, 1100)], [prompt(n) for n in (2000, 3500, 1300)]
    asks = [ask("keydiff"), ask("snapkv"), ask("epicache", guide=guide)]
    shared, short = prompt(1500), prompt(900)
    long = [prompt(n) for n in (2048, 3333, 6000)]
    rounds = {
        "long": Round(long, [ask("keydiff"), ask("snapkv"), ask("streaming", 640)], SCORED),
        "alone": Round(alone, [None] * 3, SCORED),
        "beside": Round([*alone, *evicting], [None] * 3 + asks, SCORED),
        "evicts first": Round([shared], [ask("snapkv")], GREEDY),
        "keeps": Round([shared], [None], GREEDY),
        "keeps again": Round([shared], [None], GREEDY),
        "refused": Round([shared], [ask("keydiff", 5)], GREEDY),
        "guide missing": Round([shared], [ask("epicache")], GREEDY),
        "evicts again": Round([shared], [ask("snapkv")], GREEDY),
        "large budget": Round([short], [ask("epicache", 4096, guide)], GREEDY),
        "no budget": Round([short], [None], GREEDY),
        "aborted": Round([prompt(3000), prompt(3000)], [ask("h2o"), None], GREEDY, abort_after=4),
        # The prompt ends so near the last position that the guide would reach past it.
        "to the end": Round([prompt(MAX_LEN - 10)], [ask("epicache", guide=guide)], GREEDY),
    }
    report = run(tiny_model, tmp_path_factory.mktemp("rounds"), list(rounds.values()))
    return dict(zip(rounds, report["rounds"], strict=True)), report


def test_pages_are_bounded_and_come_back(many_rounds):
    rounds, report = many_rounds
    for out, budget in zip(rounds["long"], (BUDGET, BUDGET, 640), strict=True):
        assert out["peak_pages"] <= peak(budget, BLOCK)
        # And more than a budget: the compaction is the last thing before a block is read.
        assert out["peak_pages"] >= budget // PAGE + BLOCK // PAGE
    # Alone in the engine too, where vLLM would read a prompt in steps of any length.
    for name in ("evicts first", "evicts again", "to the end"):
        assert BUDGET // PAGE + BLOCK // PAGE <= rounds[name][0]["peak_pages"] <= peak(BUDGET, BLOCK)
    assert rounds["keeps"][0]["peak_pages"] == 12
    assert report["free_after"] == report["free_before"]


@pytest.mark.feature("eviction and episodes", "works")
def test_no_page_is_read_after_it_was_evicted(many_rounds):
    rounds, _ = many_rounds
    for name, outputs in rounds.items():
        if isinstance(outputs, list):
            assert all(math.isfinite(x) for x in numbers(outputs)), name
            assert all(len(out["tokens"]) == 6 for out in outputs), name


def test_neighbours_that_evict_change_nothing(many_rounds):
    """The step holds a block of every request, so blocks are the same; what rounding leaves is far below a page's."""
    rounds, _ = many_rounds
    for found, expected in zip(rounds["beside"][:3], rounds["alone"], strict=True):
        pairs = list(zip(found["prompt_logprobs"][1:], expected["prompt_logprobs"][1:], strict=True))
        assert all(abs(x - y) < SAME for x, y in pairs)
        assert same_until_a_tie(found, expected) < SAME


def test_prefix_cache_is_neither_read_nor_published(many_rounds):
    rounds, _ = many_rounds
    cached = {name: rounds[name][0]["cached"] for name in ("evicts first", "keeps", "keeps again", "evicts again")}
    assert cached == {"evicts first": 0, "keeps": 0, "keeps again": 1408, "evicts again": 0}
    # The same arithmetic in other pages.
    for field in ("tokens", "logprobs"):
        assert rounds["evicts again"][0][field] == rounds["evicts first"][0][field]
        assert rounds["keeps"][0][field] != rounds["evicts first"][0][field] or field == "tokens"


def test_a_budget_that_holds_everything_changes_no_bit(many_rounds):
    rounds, _ = many_rounds
    large, none = rounds["large budget"][0], rounds["no budget"][0]
    assert (large["tokens"], large["logprobs"]) == (none["tokens"], none["logprobs"])
    assert large["cached"] == none["cached"] == 0


def test_bad_arguments_are_the_clients_error_and_the_engine_lives(many_rounds):
    rounds, _ = many_rounds
    assert rounds["refused"]["error"].startswith("kvcompress_budget=5 must be a whole number of tokens")
    assert "epicache needs kvcompress_guide" in rounds["guide missing"]["error"]


def test_aborted_while_the_prompt_is_read(many_rounds):
    rounds, report = many_rounds
    aborted = rounds["aborted"]
    assert aborted["unfinished"] and aborted["held"] > 20
    assert aborted["free"] == report["free_before"]
    assert report["summed"][list(rounds).index("to the end")] == 0, "its scores are forgotten"


def test_guides_do_not_reach_past_the_last_position(many_rounds):
    _, report = many_rounds
    assert report["last_position"] == MAX_LEN - 1


def test_preempted_requests_finish_as_if_undisturbed(tiny_model, rng, tmp_path):
    """A pool for two or three of six: prompts are begun anew, in the same blocks, beside others that keep all."""
    prompts = [[rng.randrange(3, VOCABULARY) for _ in range(n)] for n in (2600, 3000, 1100, 2800, 2048, 4000)]
    guide = prompts[0][:50]
    asks = [ask("h2o"), ask("snapkv"), None, ask("epicache", guide=guide), ask("h2o"), ask("keydiff", 900)]
    alone = [Round([p], [a], GREEDY) for p, a in zip(prompts, asks, strict=True)]
    rounds = [*alone, Round(prompts, asks, GREEDY), Round([guide], [None], GREEDY)]
    report = run(tiny_model, tmp_path, rounds, block=1024, enable_prefix_caching=False, num_gpu_blocks_override=90)
    assert report["preemptions"] > 0, "the pool must be too small"
    assert report["free_after"] == report["free_before"]
    assert max(report["summed"]) > 0 == report["summed"][-1]
    *undisturbed, crowded, _ = report["rounds"]
    for (expected,), found, asked in zip(undisturbed, crowded, asks, strict=True):
        assert same_until_a_tie(found, expected) < SAME
        if asked is not None:
            budget = -(-asked["kvcompress_budget"] // PAGE) * PAGE
            assert max(expected["peak_pages"], found["peak_pages"]) <= peak(budget, 1024)


# --- kept episodes in host memory -----------------------------------------------------------------------------------


BUILD = {**GREEDY, "max_tokens": 2}
# Of both layers and KV heads of the tiny model.
PAGE_BYTES = 2 * 2 * PAGE * get_format("turboquant-4").layout(64, PAGE).bytes_per_token
# Of a history that is longer than the budget: what is kept, a page that is not compacted yet, and the sinks.
EPISODE_BYTES = (BUDGET // PAGE + 1 + SINKS // 16) * PAGE_BYTES


def keep(name: str) -> list[dict]:
    return [{**ask("keydiff"), "kvcompress_keep": name}]


def about(name: str, budget: int = BUDGET) -> list[dict]:
    return [{**ask("keydiff", budget), "kvcompress_episode": name}]


@pytest.fixture(scope="module")
def spilled(tiny_model, rng, tmp_path_factory):
    """One engine whose host memory holds two episodes: rounds by name, and its own report."""

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(length)]

    def crowd() -> Round:
        """For which all that is kept must give way."""
        return Round([prompt(6000)], [None], GREEDY)

    first, second, third = prompt(2000), prompt(1900), prompt(1500)
    question, other, another = [*first, *prompt(40)], [*first, *prompt(25)], [*second, *prompt(60)]
    salted = [*third, *prompt(30)]
    rounds = {
        "build first": Round([first], keep("first"), BUILD),
        "kept": Round([question], about("first"), GREEDY),
        "crowd": crowd(),
        "restored": Round([question], about("first"), GREEDY),
        "kept again": Round([question], about("first"), GREEDY),
        "crowd again": crowd(),
        "another tenant": Round([question], about("first"), GREEDY, salt="another"),
        "another budget": Round([question], about("first", 640), GREEDY),
        "other words": Round([[1, *question[1:]]], about("first"), GREEDY),
        "two at once": Round([question, other], about("first") * 2, GREEDY),
        "build second": Round([second], keep("second"), BUILD),
        "second": Round([another], about("second"), GREEDY),
        "both give way": crowd(),
        "build third": Round([third], keep("third"), BUILD, salt="tenant"),
        "third": Round([salted], about("third"), GREEDY, salt="tenant"),
        "third gives way": crowd(),
        "first is lost": Round([question], about("first"), GREEDY),
        "second restored": Round([another], about("second"), GREEDY),
        "third of nobody": Round([salted], about("third"), GREEDY),
        "third restored": Round([salted], about("third"), GREEDY, salt="tenant"),
    }
    folder, memory = tmp_path_factory.mktemp("spilled"), 2 * EPISODE_BYTES + PAGE_BYTES
    report = run(tiny_model, folder, list(rounds.values()), host_memory=memory, num_gpu_blocks_override=110)
    return dict(zip(rounds, report["rounds"], strict=True)), report


def taken_over(output: dict) -> tuple[int, bool]:
    return output["eviction"]["reused_tokens"], output["eviction"]["restored"]


def test_an_episode_from_host_memory_answers_as_the_kept_one(spilled):
    rounds, report = spilled
    for name, expected, tokens in (
        ("restored", "kept", 1920), ("second restored", "second", 1792), ("third restored", "third", 1408),
    ):  # fmt: skip
        (found,), (kept,) = rounds[name], rounds[expected]
        assert taken_over(kept) == (tokens, False) and taken_over(found) == (tokens, True)
        # The same arithmetic in other pages.
        assert (found["tokens"], found["logprobs"]) == (kept["tokens"], kept["logprobs"])
        assert all(math.isfinite(x) for x in found["logprobs"])
    assert taken_over(rounds["kept again"][0]) == (1920, False), "once loaded it is kept"
    assert rounds["kept again"][0]["logprobs"] == rounds["kept"][0]["logprobs"]
    assert [taken_over(output) for output in rounds["two at once"]] == [(1920, True)] * 2
    assert same_until_a_tie(rounds["two at once"][0], rounds["kept"][0]) < SAME
    assert report["free_after"] == report["free_before"]


def test_a_spilled_episode_is_nobody_elses(spilled):
    rounds, _ = spilled
    for name in ("another tenant", "another budget", "other words", "third of nobody"):
        assert taken_over(rounds[name][0]) == (0, False), name
        assert all(math.isfinite(x) for x in rounds[name][0]["logprobs"])


def test_what_host_memory_has_no_room_for_is_read_again(spilled):
    rounds, _ = spilled
    assert taken_over(rounds["first is lost"][0]) == (0, False)
    assert all(math.isfinite(x) for x in rounds["first is lost"][0]["logprobs"])


def test_what_became_of_episodes_is_counted(spilled):
    rounds, report = spilled
    taken = [taken_over(output) for outputs in rounds.values() for output in outputs if output["eviction"]]
    assert report["preemptions"] == 0
    totals = report["totals"]
    assert totals["episodes_built"] == 3
    assert totals["episodes_reused"] == sum(tokens > 0 for tokens, _ in taken)
    assert totals["episodes_restored"] == sum(restored for _, restored in taken) == 5
    # Crowds come after the first, after it came back, and after both that are kept; the third takes the first's place.
    assert totals["episodes_spilled"] >= 5 and totals["episodes_lost"] >= 1
    assert totals["evicted_tokens"] % PAGE == 0 < totals["evicted_tokens"]


def test_questions_that_are_preempted_come_back_to_their_episodes(tiny_model, rng, tmp_path):
    """Five questions about three episodes, and long prompts, in a pool for about half of them.

    Of the first four, question, answer and what is left of the history (200, 150 and 127 tokens at most) are less than
    four pages, at which the first compaction comes: all that was kept is read to the end, and the answer is that of the
    question alone. The last compacts, a step sooner or later as there is room, and so may forget other tokens.
    """
    histories = {name: [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1100, 2500))] for name in "abc"}
    long = [[rng.randrange(3, VOCABULARY) for _ in range(3000)] for _ in range(2)]
    asked = [
        (name, [*histories[name], *long[0][:count]]) for name, count in zip("abcab", (20, 200, 5, 70, 400), strict=True)
    ]
    answer = {**GREEDY, "max_tokens": 150}
    built = [Round([history], keep(name), BUILD) for name, history in histories.items()]
    alone = [Round([prompt], about(name), answer) for name, prompt in asked]
    prompts, asks = [prompt for _, prompt in asked], [about(name)[0] for name, _ in asked]
    together = Round([*long, *prompts], [None, None, *asks], answer)
    report = run(
        tiny_model, tmp_path, [*built, *alone, together], host_memory=6 * EPISODE_BYTES,
        num_gpu_blocks_override=85, enable_prefix_caching=False,
    )  # fmt: skip
    assert not [outputs["error"] for outputs in report["rounds"] if isinstance(outputs, dict)]
    assert report["preemptions"] > 0, "the pool must be too small"
    assert report["free_after"] == report["free_before"]
    *undisturbed, crowded = report["rounds"][len(built) :]
    for (expected,), found, (name, _) in zip(undisturbed, crowded[2:], asked, strict=True):
        assert taken_over(found)[0] == taken_over(expected)[0] == len(histories[name]) // PAGE * PAGE
        assert all(math.isfinite(x) for x in found["logprobs"])
    for (expected,), found in zip(undisturbed[:4], crowded[2:6], strict=True):
        assert same_until_a_tie(found, expected) < SAME
    assert any(taken_over(found)[1] for found in crowded[2:])


# --- against the reference ----------------------------------------------------------------------------------------


LAYERS = 5
TOKENS = 4 * BLOCK + 256
CASES = [*((name, BUDGET) for name in POLICIES), ("epicache", 2 * BUDGET)]


@pytest.fixture(scope="module")
def real_weights(demo_model, tmp_path_factory):
    """The first layers of a trained model, with the tokens of one text for vocabulary; that text, and a guide prompt.

    Trained, so that heads look for something; few layers and words, because the rest adds time and no eviction.
    """
    return first_layers(demo_model, LAYERS, tmp_path_factory.mktemp("first-layers"))


def first_layers(demo_model, layers: int, folder: Path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    text = tokenizer((Path(__file__).parents[2] / "LICENSE").read_text())["input_ids"]  # never edited
    guide = tokenizer("You may reproduce the Work, provided that you give recipients a copy of")["input_ids"]
    words = sorted({*text, *guide})
    config = json.loads((demo_model / "config.json").read_text())
    config |= {"vocab_size": len(words), "num_hidden_layers": layers, "bos_token_id": 0, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, tensor in load_file(demo_model / "model.safetensors").items():
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers:
            weights[name] = (tensor[words] if "embed_tokens" in name or "lm_head" in name else tensor).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    index = {word: place for place, word in enumerate(words)}
    ids = [index[token] for token in text]
    return folder, ids[:TOKENS], [index[token] for token in guide]


def reference_logprobs(
    model,
    ids: torch.Tensor,
    name: str | None,
    budget: int | list[int],
    guide: torch.Tensor,
    recent_tokens: int = RECENT,
) -> torch.Tensor:
    """ln p of every token but the first, with the engine's timing: [len(ids) - 1]; `budget` of all or of each layer.

    Eviction comes before a block is read. It chooses among full pages that the recent window has left behind: those
    that the last one left and those that have come since; the others are scored (the softmax sees them) and stay.
    """
    cache, found = epicache_reference.Cache(), []
    budgets = [budget] * model.config.num_hidden_layers if isinstance(budget, int) else budget
    evicted_to = [0] * len(budgets)
    blocks: list[epicache_reference.Captured] = []  # queries since the last eviction
    for begin in range(0, len(ids), BLOCK):
        end = min(((-(-begin // PAGE) - 1) * PAGE + 1 - recent_tokens) // PAGE, -(-begin // PAGE) - 2)
        held = [end if not to else b // PAGE + end - to for b, to in zip(budgets, evicted_to, strict=True)]
        due = {
            i for i, (b, pages) in enumerate(zip(budgets, held, strict=True)) if name is not None and pages > b // PAGE
        }
        if name is not None and due:
            policy = POLICIES[name]
            if policy.queries == "guide":
                blocks = [epicache_reference.forward(model, guide, cache.branch())[1]]
            for index, layer in cache.layers.items():
                if index not in due and not policy.accumulates:
                    continue
                asked = torch.cat([queries[index] for queries in blocks])
                scores = policy.score(Layer(layer.key.transpose(0, 1), asked, layer.scale, layer.accumulated))
                layer.accumulated = scores if policy.accumulates else None
                if index not in due:
                    continue
                slots, sources, budget = layer.key.shape[1], held[index] * PAGE, budgets[index]
                recent = max(0, policy.recent(budget) - (slots - sources))
                protected = always_kept(sources, budget, leading=SINKS, recent=recent)
                kept = select(scores[:, :sources], budget, protected)
                layer.keep(torch.cat([kept, torch.arange(sources, slots).expand(len(kept), -1)], dim=1))
                evicted_to[index] = end
            blocks = []
        with torch.no_grad():
            hidden, queries = epicache_reference.forward(model, ids[begin : begin + BLOCK], cache)
            following = ids[begin + 1 : begin + BLOCK + 1]
            blocks.append(queries)
            logprobs = model.lm_head(hidden[: len(following)]).float().log_softmax(-1)
        found.append(logprobs.gather(-1, following.unsqueeze(-1)).squeeze(-1))
    return torch.cat(found)


def asked_for(name: str | None, budget: int, guide: list[int]):
    return None if name is None else ask(name, budget, guide if POLICIES[name].queries == "guide" else None)


@pytest.mark.feature("eviction and episodes", "works")
def test_the_engine_evicts_what_the_reference_evicts(real_weights, tmp_path):
    """Log-probabilities of a text in blocks, each read after an eviction, against the Hugging Face reference.

    With 4-bit pages the engine is off from the reference without any eviction too: by how much is measured in the same
    run, 0.059 nat. Evicting quantises keys a second time, which at most doubles the squared error, and near the
    threshold of a score other tokens are chosen, which matter least: within twice that in all (1.14 to 1.35 times
    measured; 1.52 with H2O, whose sums carry the error on). To another policy's reference or budget, quantisation and
    choice add up in squares: the nearest of the 56 pairs, EpiCache with 1024 tokens and no eviction, are 0.086 apart
    themselves, which makes 1.48 times an engine's distance from its own; the others are at 1.8 times and more.
    """
    from transformers import AutoModelForCausalLM

    from vllm_kvcompress.calibration.tap import NAME

    folder, ids, guide = real_weights
    cases: list[tuple[str | None, int]] = [(None, BUDGET), *CASES]
    asks = [asked_for(name, budget, guide) for name, budget in cases]
    rounds = [Round([ids], [asked], {**SCORED, "max_tokens": 1}) for asked in asks]
    report = run(folder, tmp_path, rounds)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    prompt, guide_ids = torch.tensor(ids), torch.tensor(guide)
    expected = [reference_logprobs(model, prompt, name, budget, guide_ids) for name, budget in cases]
    engine = [torch.tensor(outputs[0]["prompt_logprobs"][1:]) for outputs in report["rounds"]]
    # Up to here nothing has been evicted at any of the budgets.
    first = 3 * BLOCK
    distance = torch.tensor([[float((a - b)[first:].square().mean().sqrt()) for b in expected] for a in engine])
    print(f"engine (rows) against reference, root mean square in nat: {cases}\n{distance}")
    own = distance.diagonal()
    assert torch.isfinite(distance).all()
    assert (own <= 2 * own[0]).all()
    others = distance.masked_fill(torch.eye(len(cases), dtype=torch.bool), torch.inf)
    assert (others.amin(0) > 1.25 * own).all() and (others.amin(1) > 1.25 * own).all()
    # Before the first eviction all are the same text read in the same way.
    assert all(torch.equal(a[: 2 * BLOCK - 1], engine[0][: 2 * BLOCK - 1]) for a in engine)


def test_sixteen_bit_pages_evict_what_the_reference_evicts(real_weights, tmp_path):
    """vLLM's own cache and attention: nothing is rounded, so nothing but sums in another order is left (float32).

    Measured: 1e-5 nat with every policy, and without one. Cases are 0.086 and more apart (above); where two scores are
    as near as the rounding another token is kept, the least important of them. FlashAttention on a GPU needs 16 bits:
    there a quarter of what the nearest cases are apart is the bound.
    """
    from transformers import AutoModelForCausalLM

    from vllm_kvcompress.calibration.tap import NAME

    folder, ids, guide = real_weights
    cases: list[tuple[str | None, int]] = [(None, BUDGET), *CASES]
    asks = [asked_for(name, budget, guide) for name, budget in cases]
    rounds = [Round([ids], [asked], {**SCORED, "max_tokens": 1}) for asked in asks]
    dtype = "float16" if ON_GPU else "float32"
    report = run(folder, tmp_path, rounds, kv_cache_dtype="auto", dtype=dtype, block_size=PAGE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    prompt, guide_ids = torch.tensor(ids), torch.tensor(guide)
    for (name, budget), outputs in zip(cases, report["rounds"], strict=True):
        assert isinstance(outputs, list), outputs
        expected = reference_logprobs(model, prompt, name, budget, guide_ids, recent_tokens=0)
        found = torch.tensor(outputs[0]["prompt_logprobs"][1:])
        distance = float((found - expected).square().mean().sqrt())
        print(name, budget, distance)
        assert distance < (0.086 / 4 if ON_GPU else 1e-3)
        if name is not None:
            assert outputs[0]["peak_pages"] <= budget // PAGE + BLOCK // PAGE + 2
    assert report["free_after"] == report["free_before"]


def test_sums_follow_kept_pages(real_weights, tmp_path):
    """A text read over the pages kept of its beginning, which were spilled meanwhile: as if read at once.

    Without a recent window, which an episode does not keep, it is the same arithmetic: every layer keeps the same slots
    at every compaction, which it would not without the sums over what it was not asked to read again.
    """
    folder, ids, _ = real_weights
    beginning, middle, asked = ids[: 3 * BLOCK], ids[: 4 * BLOCK], ask("h2o")
    crowd = Round([ids[::-1] * 2], [None], GREEDY)
    rounds = [
        Round([ids], [asked], GREEDY),
        Round([beginning], [{**asked, "kvcompress_keep": "beginning"}], BUILD),
        crowd,
        Round([middle], [{**asked, "kvcompress_episode": "beginning", "kvcompress_keep": "middle"}], BUILD),
        crowd,
        Round([ids], [{**asked, "kvcompress_episode": "middle", "kvcompress_keep": "text"}], GREEDY),
    ]
    episodic = {"budget": BUDGET, "block_tokens": BLOCK, "host_memory": "16MiB"}
    settings = {"kvcompress": {"sink_tokens": SINKS, "recent_tokens": 0, "episodic": episodic}}
    report = run(folder, tmp_path, rounds, additional_config=settings, num_gpu_blocks_override=60, survivors=True)
    (at_once,), _, _, (second,), _, (third,) = report["rounds"]
    assert taken_over(second) == (len(beginning), True) and taken_over(third) == (len(middle), True)
    assert (third["tokens"], third["logprobs"]) == (at_once["tokens"], at_once["logprobs"])
    (kept,) = report["survivors"]
    assert len(kept) == 2 * 4 * LAYERS, "from two blocks on, after each and at the end"
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]
    # After each round: of a request that has just finished, or is kept.
    assert report["summed"] == [1, 1, 1, 2, 2, 3]


# --- budgets by layer ---------------------------------------------------------------------------------------------

PAGES_OF_LAYER = (4, 7, 2, 7, 4, 2)


@pytest.fixture(scope="module")
def layered(demo_model, tmp_path_factory):
    """Six layers, and a made-up profile that puts them in three classes, neither in their order nor next to each other.

    At alpha 1 and a budget of four pages: the least sensitive at the floor of a quarter, lifted to one beside that of
    the sinks; the others in proportion share what the floor leaves, 3.67 and 7.33 pages.
    """
    folder, ids, guide = first_layers(demo_model, 6, tmp_path_factory.mktemp("six-layers"))
    eye = torch.eye(64).expand(3, -1, -1)
    plain = LayerRotation(eye, eye, torch.zeros(3, 64), torch.ones(3), torch.ones(3))
    metadata = RotationMetadata(
        model="", fingerprint="", layer_ids=list(range(6)), num_kv_heads=3, num_query_heads=9, head_dim=64,
        source="calibrate", sensitivity=[0.5, 0.75, 0.25, 0.75, 0.5, 0.25],
    )  # fmt: skip
    write_rotation(folder / ROTATION_BESIDE_MODEL, RotationSet(metadata, dict.fromkeys(range(6), plain)))
    return folder, ids, guide


def test_layers_keep_budgets_of_their_own(layered, tmp_path):
    """Each class frees its own number of pages, and keeps what the reference with those budgets keeps.

    As `test_the_engine_evicts_what_the_reference_evicts`: within twice what 4-bit pages are off without eviction.
    """
    from transformers import AutoModelForCausalLM

    from vllm_kvcompress.calibration.tap import NAME

    folder, ids, guide = layered
    asked, history = ask("epicache", BUDGET, guide), 4 * BLOCK
    question = {**asked, "kvcompress_episode": "a"}
    scored = {**SCORED, "max_tokens": 1}
    rounds = [
        Round([ids], [None], scored),
        Round([ids], [asked], scored),
        Round([ids[:history]], [{**asked, "kvcompress_keep": "a"}], GREEDY),
        Round([ids], [question], GREEDY),
        Round([ids], [question], GREEDY),
        Round([ids[: history + 50], ids, ids], [question, question, None], GREEDY),
        Round([ids], [ask("h2o")], scored),
    ]
    settings = {"budget": BUDGET, "block_tokens": BLOCK, "layer_budgets": "sensitivity", "alpha": 1.0}
    settings = {"kvcompress": {"sink_tokens": SINKS, "recent_tokens": RECENT, "episodic": settings}}
    report = run(folder, tmp_path, rounds, additional_config=settings)
    assert sorted(report["managers"]) == ["PageManager"] * 3 + ["WindowManager"] * 3
    everything, evicting, kept, *asking, summing = report["rounds"]
    classes = sorted(set(PAGES_OF_LAYER))
    assert everything[0]["peaks"] == [-(-len(ids) // PAGE)] * 3
    for pages, most in zip(classes, sorted(evicting[0]["peaks"]), strict=True):
        assert pages + BLOCK // PAGE <= most <= peak(pages * PAGE, BLOCK)
    assert kept[0]["eviction"]["kept_tokens"] == history
    answers = [out for outputs in asking for out in outputs]
    assert [out["eviction"] and out["eviction"]["reused_tokens"] for out in answers] == [history] * 4 + [None]
    assert all(math.isfinite(x) for outputs in report["rounds"] for x in numbers(outputs))
    # What is kept is not written by those who ask.
    assert (answers[0]["tokens"], answers[0]["logprobs"]) == (answers[1]["tokens"], answers[1]["logprobs"])
    assert same_until_a_tie(answers[3], answers[0]) < SAME

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
    prompt, guide_ids = torch.tensor(ids), torch.tensor(guide)
    budgets = [pages * PAGE for pages in PAGES_OF_LAYER]
    cases: list[tuple[str | None, int | list[int]]] = [(None, BUDGET), ("epicache", budgets), ("epicache", BUDGET)]
    cases.append(("epicache", budgets[::-1]))
    expected = [reference_logprobs(model, prompt, name, budget, guide_ids) for name, budget in cases]
    engine = [torch.tensor(outputs[0]["prompt_logprobs"][1:]) for outputs in (everything, evicting)]
    first = 2 * BLOCK
    distance = torch.tensor([[float((a - b)[first:].square().mean().sqrt()) for b in expected] for a in engine])
    print(f"engine against reference, root mean square in nat: nothing evicted, by layer\n{distance}")
    own = distance[1, 1]
    assert own <= 2 * distance[0, 0]
    assert (distance[1, [0, 2, 3]] > 1.25 * own).all()

    # Classes evict at different blocks; scores add up from the first block on in all of them.
    wanted = reference_logprobs(model, prompt, "h2o", budgets, guide_ids)
    found = torch.tensor(summing[0]["prompt_logprobs"][1:])
    own = (found - wanted)[first:].square().mean().sqrt()
    print(f"h2o {own}")
    assert own <= 2 * distance[0, 0]
