# SPDX-License-Identifier: Apache-2.0
"""`EpisodicChat` against an engine that only takes notes, with a token for each word."""

import json
import random
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError

from vllm_kvcompress.episodic.chat import EpisodicChat
from vllm_kvcompress.episodic.cluster import GUIDE_INSTRUCTION
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.episodic.template import ChatTemplate, common_tokens
from vllm_kvcompress.errors import KVCompressError

# Words of one topic are in windows of that topic alone.
_LINES = """\
garden: tomato seedling compost trellis watering greenhouse pruning harvest soil basil
music: violin rehearsal sonata orchestra tempo melody concert cello encore chord
travel: passport ferry hostel luggage itinerary mountain harbour ticket border train"""
TOPICS = {topic: words.split() for topic, words in (line.split(": ") for line in _LINES.splitlines())}
BLOCK = 256


class WordTokenizer:
    """Numbers words in the order in which they are first seen."""

    def __init__(self):
        self.ids = {}

    def __call__(self, text, add_special_tokens, verbose):
        assert not add_special_tokens
        text.encode()  # as a real one: half of a UTF-16 pair is no text
        return {"input_ids": [self.ids.setdefault(word, len(self.ids)) for word in text.split()]}

    def text(self, ids):
        words = list(self.ids)
        return " ".join(words[token] for token in ids)

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        if not messages or messages[-1].get("content") == "refuse me":
            raise TemplateError("no such turn")
        text = "" if messages[0]["role"] == "system" else "<system> be kind <end> "
        text += "".join(f"<{message['role']}> {message['content']} <end> " for message in messages)
        return text + ("<assistant>" if add_generation_prompt else "")


PLACES = ("kvcompress_guide", "kvcompress_episode")


class NotingEngine:
    """Of `vllm.LLM` what a chat touches."""

    def __init__(self, *, budget=512, dtype="turboquant-4", longest=100_000, **episodic):
        self.tokenizer = WordTokenizer()
        self.requests, self.kept, self.forgets = [], [], False
        settings = {"episodic": {"budget": budget, "block_tokens": BLOCK, **episodic}} if budget else {}
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                additional_config={"kvcompress": settings},
                cache_config=SimpleNamespace(cache_dtype=dtype, user_specified_block_size=False),
                model_config=SimpleNamespace(
                    model="toy", revision=None, max_model_len=longest, get_vocab_size=lambda: 1 << 20
                ),
                load_config=SimpleNamespace(download_dir=None),
                scheduler_config=SimpleNamespace(max_num_batched_tokens=2048),
            )
        )

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompt, params, use_tqdm):
        extra = params.extra_args or {}
        if "kvcompress_keep" in extra:
            self.kept.append((prompt, params))
            report = {"kvcompress": {"kept_tokens": len(prompt["prompt_token_ids"]) // 128 * 128}}
            return [SimpleNamespace(outputs=[None], num_cached_tokens=0, kv_transfer_params=report)]
        self.requests.append((prompt, params))
        said = SimpleNamespace(text="an answer", finish_reason="stop")
        reused = 0 if self.forgets or "kvcompress_episode" not in extra else 128
        return [SimpleNamespace(outputs=[said], num_cached_tokens=reused)]


@pytest.fixture
def make_chat(embedder):
    def make(history=(), settings=None, **engine):
        llm = NotingEngine(**engine)
        chat = EpisodicChat(llm, settings, embedder=embedder)
        chat.append(history)
        return chat, llm

    return make


def words(text):
    return len(text.split())


def long_history(turns=120, seed=0):
    """8 turns about each topic in turn, 12 words a turn with its markers."""
    rng = random.Random(seed)
    topics = list(TOPICS.values())
    return [
        {"role": ("user", "assistant")[turn % 2], "content": " ".join(rng.choices(topics[turn // 8 % 3], k=10))}
        for turn in range(turns)
    ]


def test_a_short_history_is_sent_as_it_is(make_chat):
    chat, llm = make_chat([{"role": "system", "content": "be brief"}])
    chat.append("user", "my cat is called tom")
    chat.append("assistant", ["a fine", {"type": "text", "text": "name"}])
    answer = chat.ask("what is my cat called", max_tokens=7, temperature=0)
    prompt, params = llm.requests[0]
    assert llm.tokenizer.text(prompt["prompt_token_ids"]) == (
        "<system> be brief <end> <user> my cat is called tom <end> <assistant> a fine name <end> "
        "<user> what is my cat called <end> <assistant>"
    )
    assert (params.max_tokens, params.temperature, params.extra_args) == (7, 0, None)
    assert (answer.text, answer.evicted, answer.episode, answer.reused) == ("an answer", False, None, 0)
    assert answer.prompt_tokens == len(prompt["prompt_token_ids"])
    assert [message["content"] for message in chat.messages[-2:]] == ["what is my cat called", "an answer"]


def test_asking_need_not_change_the_history(make_chat):
    chat, llm = make_chat(long_history(4))
    before = chat.messages
    first, second = chat.ask("one", remember=False), chat.ask("one", remember=False)
    assert first == second and chat.messages == before
    assert llm.requests[0][0] == llm.requests[1][0]


@pytest.mark.parametrize("topic", TOPICS)
def test_a_long_history_is_routed(make_chat, topic):
    chat, llm = make_chat([{"role": "system", "content": "you never forget"}, *long_history()], episodes=3)
    answer = chat.ask(" ".join(TOPICS[topic][:5]), max_tokens=8)
    extra = llm.requests[0][1].extra_args
    assert {name: value for name, value in extra.items() if name not in PLACES} == {
        "kvcompress_budget": 512,
        "kvcompress_policy": "epicache-keydiff",
        "kvcompress_protect": words("<system> you never forget <end> <user>"),
    }
    quoted = llm.tokenizer.text(extra["kvcompress_guide"]).split()
    assert set(quoted) & set(TOPICS[topic])
    assert not any(set(quoted) & set(words) for other, words in TOPICS.items() if other != topic)
    assert answer.evicted and answer.episodes == 3 and answer.guide_windows == 4


def test_the_templates_own_system_prompt_is_protected(make_chat):
    chat, llm = make_chat(long_history())
    chat.ask("tomato")
    assert llm.requests[0][1].extra_args["kvcompress_protect"] == words("<system> be kind <end> <user>")


def test_threshold(make_chat):
    # 4 words of the template's own system prompt, 3 a turn of one word.
    history = [{"role": ("user", "assistant")[turn % 2], "content": f"w{turn}"} for turn in range(252)]
    tokens = 4 + 3 * len(history)
    settings = {"budget": 512, "block_tokens": BLOCK}
    at, above = (EpisodicSettings(**settings, threshold_tokens=threshold) for threshold in (tokens, tokens - 1))
    assert not make_chat(history, at)[0].ask("w0").evicted
    assert make_chat(history, above)[0].ask("w0").evicted
    assert not make_chat(history)[0].ask("w0").evicted  # 760 of 512 + 256
    assert make_chat([*history, *long_history(2)])[0].ask("w0").evicted


def test_policies_without_a_guide(make_chat):
    chat, llm = make_chat(long_history(), policy="snapkv")
    answer = chat.ask("tomato")
    assert "kvcompress_guide" not in llm.requests[0][1].extra_args
    assert answer.evicted and answer.episode is None and answer.guide_windows == 0


def test_settings_of_a_conversation(make_chat):
    settings = EpisodicSettings(budget=640, block_tokens=BLOCK, policy="keydiff")
    chat, llm = make_chat(long_history(), settings)
    chat.ask("tomato", extra_args={"other": 1})
    extra = llm.requests[0][1].extra_args
    assert (extra["kvcompress_budget"], extra["kvcompress_policy"], extra["other"]) == (640, "keydiff", 1)


def test_a_guide_that_is_too_long_loses_whole_windows(make_chat):
    history = long_history()
    for message in history:
        message["content"] = " ".join([message["content"]] * 2)
    chat, llm = make_chat(history)
    answer = chat.ask("tomato")
    guide = llm.requests[0][1].extra_args["kvcompress_guide"]
    # Windows of 4 turns, each a speaker and 20 words.
    assert answer.guide_windows == 2
    assert len(guide) == words(GUIDE_INSTRUCTION) + 2 * 4 * 21 <= BLOCK < len(guide) + 4 * 21


def test_a_guide_of_one_window_is_cut(make_chat):
    giant = " ".join("x" for _ in range(5000))
    chat, llm = make_chat([{"role": "user", "content": giant}])
    answer = chat.ask("x")
    assert answer.evicted and answer.guide_windows == 1
    assert len(llm.requests[0][1].extra_args["kvcompress_guide"]) == BLOCK


def test_ten_thousand_tiny_turns(make_chat):
    topics = list(TOPICS.values())
    history = [
        {"role": ("user", "assistant")[turn % 2], "content": topics[turn // 100 % 3][turn % 4]}
        for turn in range(10_000)
    ]
    chat, llm = make_chat(history, episodes=3)
    # Every window of a topic holds the same four words: k-means has three points to find, whatever its start.
    assert chat.ask(" ".join(TOPICS["garden"][:4])).evicted
    guide = llm.tokenizer.text(llm.requests[0][1].extra_args["kvcompress_guide"]).split()
    assert set(guide) & set(TOPICS["garden"])
    assert not set(guide) & set(TOPICS["music"])


def test_unicode_and_empty_turns(make_chat):
    history = long_history()
    history[3]["content"] = "naïve 日本語。 🙂 \ud83d e\u0301 \x00"
    history[4]["content"] = None
    history[5]["content"] = ""
    chat, _ = make_chat(history)
    assert chat.ask("日本語 \udcff tomato").evicted


def test_a_tenants_salt_reaches_the_engine(embedder):
    keys = []
    for salt in (None, "a"):
        llm = NotingEngine()
        chat = EpisodicChat(llm, salt=salt, embedder=embedder)
        chat.append(long_history())
        chat.ask("tomato")
        keys.append(llm.requests[0][0].get("cache_salt"))
    assert keys == [None, "a"]


def test_remembered_answers_are_history(make_chat):
    chat, llm = make_chat(long_history())
    chat.ask("tomato")
    chat.ask("violin")
    text = llm.tokenizer.text(llm.requests[1][0]["prompt_token_ids"])
    assert text.endswith("<user> tomato <end> <assistant> an answer <end> <user> violin <end> <assistant>")


def test_a_history_is_kept_once_for_an_episode_and_again_when_it_has_grown_by_a_block(make_chat):
    chat, llm = make_chat(long_history(), episodes=3)
    cooking, again, sailing = (
        " ".join(words[:5]) for words in (*list(TOPICS.values())[:1] * 2, list(TOPICS.values())[1])
    )
    first = chat.ask(cooking, remember=False)
    assert len(llm.kept) == 1 and first.reused == 128
    (built, params), (asked, question) = llm.kept[0], llm.requests[0]
    tokens = built["prompt_token_ids"]
    assert tokens == asked["prompt_token_ids"][: len(tokens)] and llm.tokenizer.text(tokens).endswith("<end>")
    assert (params.max_tokens, params.ignore_eos) == (2, True)
    name = question.extra_args["kvcompress_episode"]
    assert params.extra_args == {**question.extra_args, "kvcompress_keep": name}
    chat.ask(again, remember=False)
    assert len(llm.kept) == 1 and llm.requests[1][1].extra_args["kvcompress_episode"] == name
    chat.ask(sailing, remember=False)
    assert len(llm.kept) == 2 and llm.kept[1][1].extra_args["kvcompress_keep"] != name
    chat.append("user", " ".join(next(iter(TOPICS.values()))[:5] * (BLOCK // 5 + 30)))
    chat.ask(cooking, remember=False)
    assert len(llm.kept) == 3 and len(llm.kept[2][0]["prompt_token_ids"]) > len(tokens) + BLOCK


def test_what_the_engine_has_let_go_is_kept_again(make_chat):
    chat, llm = make_chat(long_history())
    for forgets, kept in ((False, 1), (True, 1), (False, 2), (False, 2)):
        llm.forgets = forgets
        chat.ask("one", remember=False)
        assert len(llm.kept) == kept


def test_without_keeping_nothing_is_named(make_chat):
    chat, llm = make_chat(long_history())
    assert chat.ask("one", keep=False).reused == 0
    assert not llm.kept and "kvcompress_episode" not in llm.requests[0][1].extra_args


def refused(match, function, *args, **kwargs):
    with pytest.raises(KVCompressError, match=match):
        function(*args, **kwargs)


def test_refusals(make_chat, embedder):
    chat, llm = make_chat()
    refused("history is empty", chat.ask, "anything")
    refused("message 0 has the role 'human'", chat.append, "human", "hello")
    refused("message 1 has the role None", chat.append, [{"role": "user", "content": "a"}, {"content": "b"}])
    refused("message 0 has the role 'hello'", chat.append, ["hello"])
    refused("text only", chat.append, "user", [{"type": "image_url", "image_url": {}}])
    assert chat.messages == ()  # all or none
    chat.append("user", "hello")
    refused("kvcompress_budget is not for extra_args", chat.ask, "a", extra_args={"kvcompress_budget": 512})
    refused("does not take this conversation .* 'user'.: no such turn", chat.ask, "refuse me")
    assert len(chat.messages) == 1 and not llm.requests

    refused("needs an engine that evicts", EpisodicChat, NotingEngine(budget=None), embedder=embedder)
    refused("policy='lru'", EpisodicChat, NotingEngine(policy="lru"), embedder=embedder)
    refused("weights of toy are not on this machine", EpisodicChat, NotingEngine())


def test_a_history_must_fit_the_model(make_chat):
    chat, llm = make_chat(long_history(), longest=1000)
    refused("have 1448 tokens, .* max_model_len=1000. Evicted tokens count", chat.ask, "tomato")
    chat, llm = make_chat(long_history(), longest=1500)
    refused("leaves no positions for the guide", chat.ask, "tomato", max_tokens=52)
    assert not llm.requests
    chat.ask("tomato", max_tokens=4)
    assert len(llm.requests[0][1].extra_args["kvcompress_guide"]) == 1500 - 1448 - 4


def test_instruction_tokens():
    template = ChatTemplate(WordTokenizer())
    system = {"role": "system", "content": "a b c"}
    assert template.instruction_tokens([system]) == 5
    assert template.instruction_tokens([system, system, {"role": "user", "content": "hi"}]) == 11
    assert [common_tokens(*pair) for pair in (([], [1]), ([1, 2], [1]), ([1, 2], [1, 3]))] == [0, 1, 1]
    assert json.dumps(template.tokens([system], answer=True))
