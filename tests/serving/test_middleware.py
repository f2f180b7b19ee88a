# SPDX-License-Identifier: Apache-2.0
"""The middleware before a made-up server: what reaches it, in which order, and what the client gets back."""

import asyncio
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_kvcompress.episodic import request as arguments
from vllm_kvcompress.episodic.embed import TokenEmbedder
from vllm_kvcompress.episodic.router import EpisodeRouter
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.serving import middleware as module
from vllm_kvcompress.serving.middleware import CHAT, EpisodicMiddleware

BUDGET, BLOCK = 512, 256


class Server:
    """A token is a character; rendering is the roles and texts one after another."""

    def __init__(self, build_status=200, kept=None, reused=None):
        self.calls, self.build_status, self.kept, self.reused = [], build_status, kept, reused

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message.get("more_body"):
                break
        self.calls.append((scope["path"], body, dict(scope["headers"])))
        status, content = self.respond(scope["path"], body)
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-own", b"1")]})
        await send({"type": "http.response.body", "body": json.dumps(content).encode()})

    def respond(self, path, body):
        request = json.loads(body) if body.startswith(b"{") else {}
        if path == "/tokenize":
            text = "".join(f"<{m['role']}>{m['content']}" for m in request["messages"])
            text += "<assistant>" if request["add_generation_prompt"] else ""
            return 200, {"tokens": [ord(c) for c in text]}
        if path == "/v1/completions":
            kept = len(request["prompt"]) // 128 * 128 if self.kept is None else self.kept
            report = {"reused_tokens": 0, "kept_tokens": kept}
            return self.build_status, {"kv_transfer_params": {"kvcompress": report}}
        reused = 1024 if self.reused is None else self.reused
        return 200, {"kv_transfer_params": {"kvcompress": {"reused_tokens": reused}}}

    def paths(self):
        return [path for path, _, _ in self.calls]


class Engine:
    """Of two episodes; a question with "beach" belongs to the second."""

    settings = EpisodicSettings(budget=BUDGET, block_tokens=BLOCK)
    block_tokens = BLOCK

    def __init__(self, vllm_config):
        self.salts = []

    def route(self, history, question, salt):
        self.salts.append(salt)
        if question == "?!":
            raise KVCompressError("no text")
        keys = [f"{salt}-{number}-{len(history) // 100}" for number in range(2)]
        return SimpleNamespace(episodes=[SimpleNamespace(key=key) for key in keys]), int("beach" in question)

    def check(self, given):
        if given.get(arguments.BUDGET, BUDGET) < 256:
            raise KVCompressError("too small")

    def arguments(self, episodes, index, protected, given):
        budget = given.get(arguments.BUDGET, BUDGET)
        return {arguments.BUDGET: budget, arguments.POLICY: "snapkv", arguments.PROTECT: protected}


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setattr(module, "_Engine", Engine)


SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [f"turn {i} of a long conversation. " * 4 for i in range(20)]
LONG = [SYSTEM, *({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(TURNS))]
QUESTION = {"role": "user", "content": "What about the beach?"}


def call(middleware, content, path=CHAT, method="POST"):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(vllm_config=None)))
    headers = [(b"authorization", b"Bearer secret"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "app": app, "query_string": b""}
    # In two pieces, as large bodies come.
    pieces = [(body[:10], True), (body[10:], False)]
    sent = []

    async def receive():
        part, more = pieces.pop(0)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message):
        sent.append(message)

    async def run():
        await middleware(scope, receive, send)
        return sent

    return run()


def ask(middleware, content, **kwargs):
    start, *bodies = asyncio.run(call(middleware, content, **kwargs))
    return start["status"], dict(start["headers"]), json.loads(b"".join(message["body"] for message in bodies))


def test_short_histories_and_other_requests_pass_byte_for_byte():
    long = b"x" * 5000
    for body, path in (
        (b'{"messages":  [{"role":"user","content":"hi"}] }', CHAT),
        (long, CHAT),
        (b"[" + b" " * 5000 + b"]", CHAT),
        (json.dumps({"messages": [QUESTION], "padding": "x" * 5000}).encode(), CHAT),
        (json.dumps({"messages": [*LONG, {"role": "assistant", "content": "a"}]}).encode(), CHAT),
        (json.dumps({"messages": [*LONG, QUESTION], "vllm_xargs": {arguments.KEEP: "a"}}).encode(), CHAT),
        (json.dumps({"messages": [*LONG, QUESTION]}).encode(), "/v1/other"),
    ):
        server = Server()
        status, headers, _ = ask(EpisodicMiddleware(server), body, path=path)
        assert status == 200 and module.HEADER not in headers
        assert [(found, sent) for found, sent, _ in server.calls] == [(path, body)]


def test_overrides_mean_nothing_to_a_short_history():
    server = Server()
    xargs = {arguments.BUDGET: 1024, "other": 1}
    request = {"messages": [SYSTEM, QUESTION], "seed": 3}
    _, headers, _ = ask(EpisodicMiddleware(server), {**request, "vllm_xargs": xargs})
    assert json.loads(server.calls[-1][1]) == {**request, "vllm_xargs": {"other": 1}} and module.HEADER not in headers
    for messages in ([SYSTEM, QUESTION], [*LONG, QUESTION]):
        server = Server()
        status, _, content = ask(
            EpisodicMiddleware(server), {"messages": messages, "vllm_xargs": {arguments.BUDGET: 3}}
        )
        assert status == 400 and content["error"]["message"] == "too small" and not server.calls


def test_a_history_just_over_the_threshold_in_bytes_only_is_rendered_and_passes():
    server = Server()
    body = json.dumps({"messages": [SYSTEM, QUESTION], "padding": "x" * 2000}).encode()
    _, headers, _ = ask(EpisodicMiddleware(server), body)
    assert server.paths() == ["/tokenize", CHAT] and server.calls[-1][1] == body and module.HEADER not in headers


def test_a_long_history_is_read_once_and_then_reused():
    server = Server()
    middleware = EpisodicMiddleware(server)
    request = {"model": "m", "messages": [*LONG, QUESTION], "temperature": 0.5}
    status, headers, _ = ask(middleware, request)
    assert status == 200 and headers[module.HEADER] == b"2/2; built" and headers[b"x-own"] == b"1"
    assert server.paths() == ["/tokenize"] * 3 + ["/v1/completions", CHAT]
    assert all(sent[b"authorization"] == b"Bearer secret" for _, _, sent in server.calls)
    build, chat = json.loads(server.calls[3][1]), json.loads(server.calls[4][1])
    history = "".join(f"<{m['role']}>{m['content']}" for m in LONG)
    # The question's role is rendered alike after any history.
    assert "".join(map(chr, build["prompt"])) == history
    name = build["vllm_xargs"][arguments.KEEP]
    assert build["vllm_xargs"] == {
        arguments.BUDGET: BUDGET, arguments.POLICY: "snapkv", arguments.PROTECT: len("<system>Be kind."),
        arguments.KEEP: name, arguments.EPISODE: name,
    }  # fmt: skip
    assert chat.pop("vllm_xargs") == {
        name_: value for name_, value in build["vllm_xargs"].items() if name_ != arguments.KEEP
    }
    assert chat == request

    _, headers, _ = ask(middleware, {**request, "messages": [*LONG, {**QUESTION, "content": "And which beach?"}]})
    assert headers[module.HEADER] == b"2/2; reused" and server.paths()[5:] == ["/tokenize"] * 3 + [CHAT]
    # Grown by less than a block: the tail is read with the question. By more: read again, from what is kept.
    for extra, expected in ((BLOCK // 2, b"reused"), (2 * BLOCK, b"built")):
        grown = [*LONG, {"role": "user", "content": "x" * extra}, QUESTION]
        assert ask(middleware, {**request, "messages": grown})[1][module.HEADER] == b"2/2; " + expected


def test_other_episodes_tenants_and_budgets_have_their_own_pages():
    server = Server()
    middleware = EpisodicMiddleware(server)
    request = {"messages": [*LONG, QUESTION]}
    variants = [
        request,
        {**request, "cache_salt": "tenant"},
        {**request, "vllm_xargs": {arguments.BUDGET: 1024}},
        {"messages": [*LONG, {**QUESTION, "content": "And the mountains?"}]},
    ]
    for variant in variants:
        assert ask(middleware, variant)[1][module.HEADER].endswith(b"built")
    built = [json.loads(body) for path, body, _ in server.calls if path == "/v1/completions"]
    assert len({build["vllm_xargs"][arguments.KEEP] for build in built}) == len(variants)
    assert [build.get("cache_salt") for build in built] == [None, "tenant", None, None]
    assert built[2]["vllm_xargs"][arguments.BUDGET] == 1024


def test_questions_at_once_have_a_history_read_once():
    server = Server()
    middleware = EpisodicMiddleware(server)
    request = {"messages": [*LONG, QUESTION]}

    async def both():
        return await asyncio.gather(*(call(middleware, request) for _ in range(5)))

    answers = asyncio.run(both())
    assert server.paths().count("/v1/completions") == 1 and server.paths().count(CHAT) == 5
    headers = [dict(sent[0]["headers"])[module.HEADER] for sent in answers]
    assert sorted(headers) == [b"2/2; built"] + [b"2/2; reused"] * 4


def test_what_the_engine_has_lost_is_read_again():
    server = Server(reused=0)
    middleware = EpisodicMiddleware(server)
    request = {"messages": [*LONG, QUESTION]}
    for _ in range(2):
        assert ask(middleware, request)[1][module.HEADER].endswith(b"built")


def test_a_history_that_begins_like_another_is_read_though_its_episode_has_the_same_name():
    server = Server()
    middleware = EpisodicMiddleware(server)
    other = [*LONG[:-2], {**LONG[-2], "content": "something else. " * 8}, LONG[-1]]
    found = [ask(middleware, {"messages": [*history, QUESTION]})[1] for history in (LONG, LONG, other, other)]
    assert [headers[module.HEADER] for headers in found] == [b"2/2; built", b"2/2; reused"] * 2
    names = {json.loads(body)["vllm_xargs"][arguments.EPISODE] for path, body, _ in server.calls if path == CHAT}
    assert len(names) == 1


@pytest.mark.parametrize("code", [400, 500, 503])
def test_an_error_of_the_reading_is_the_answer(code):
    server = Server(build_status=code)
    status, headers, content = ask(EpisodicMiddleware(server), {"messages": [*LONG, QUESTION]})
    assert status == code and "kv_transfer_params" in content and CHAT not in server.paths()
    assert module.HEADER not in headers


@pytest.mark.parametrize("path", ["/tokenize", "/v1/completions"])
@pytest.mark.parametrize("nothing", [b"null", b""], ids=["0.32", "0.33"])
def test_a_client_that_goes_away_while_its_history_is_read_is_let_go(path, nothing):
    class Cancelled(Server):
        async def __call__(self, scope, receive, send):
            async def send_nothing(message):
                await send({**message, "body": nothing} if "body" in message else message)

            await super().__call__(scope, receive, send_nothing if scope["path"] == path else send)

    server = Cancelled()
    middleware, request = EpisodicMiddleware(server), {"messages": [*LONG, QUESTION]}
    assert asyncio.run(call(middleware, request)) == [] and server.paths()[-1] == path
    server.__class__ = Server
    assert ask(middleware, request)[1][module.HEADER] == b"2/2; built"  # nothing counts as kept, nothing is locked


def test_histories_without_episodes_are_answered_in_full():
    server = Server()
    body = json.dumps({"messages": [*LONG, {"role": "user", "content": "?!"}]}).encode()
    ask(EpisodicMiddleware(server), body)
    assert server.calls[-1][:2] == (CHAT, body) and "/v1/completions" not in server.paths()


# --- whatever clients send --------------------------------------------------------------------------------------------

RealEngine = module._Engine


class RealRouting(RealEngine):
    """All of the real one but the model's own tokenizer and embeddings: a character is a token."""

    def __init__(self, vllm_config):
        self.settings, self.block_tokens = EpisodicSettings(budget=BUDGET, block_tokens=BLOCK, policy="epicache"), BLOCK
        self._defaults = arguments.Defaults("epicache", BLOCK, 128, 4, 64, 256, 4096)
        self._encode = lambda text: [ord(character) % 256 for character in text]
        table = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        embedder = TokenEmbedder(lambda texts: [self._encode(text) for text in texts], table, "toy")
        self._router = EpisodeRouter(self.settings, embedder)


class StrictServer(Server):
    """As vLLM, it says what is wrong with a request."""

    def respond(self, path, body):
        try:
            return super().respond(path, body)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return 400, {"error": {"message": "as vLLM says it"}}


TEXTS = st.one_of(st.text(max_size=6), st.sampled_from(["user", "system", "\ud800", "../../x", "9" * 300, "\0"]))
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(-2, 3000), st.sampled_from([10**30, 0.5, 1e999]), TEXTS)
ANYTHING = st.recursive(
    ATOMS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=5
)
LONG_MESSAGES = st.integers(0, len(LONG)).map(lambda start: LONG[start:])
ONES = st.one_of(
    ANYTHING,
    st.fixed_dictionaries({"role": st.one_of(st.just("user"), TEXTS), "content": ANYTHING}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(st.fixed_dictionaries({"text": TEXTS}))}),
)
MESSAGES = st.one_of(
    ANYTHING,
    st.tuples(LONG_MESSAGES, st.lists(ONES, max_size=2), st.sampled_from([[], [QUESTION]])).map(
        lambda parts: [*parts[0], *parts[1], *parts[2]]
    ),
)
XARGS = st.dictionaries(
    st.one_of(st.sampled_from([arguments.BUDGET, arguments.POLICY]), st.sampled_from(arguments._ARGUMENTS), TEXTS),
    st.one_of(st.sampled_from([128, 512, 1024, "snapkv", "epicache", "keydiff"]), ANYTHING),
    max_size=3,
)
REQUESTS = st.fixed_dictionaries(
    {"messages": MESSAGES},
    optional={
        "vllm_xargs": st.one_of(XARGS, ANYTHING),
        "cache_salt": st.one_of(TEXTS, ANYTHING), "model": ANYTHING, "tools": ANYTHING,
        "priority": ANYTHING, "stream": st.booleans(), "chat_template": ANYTHING, "padding": st.just("x" * 2000),
    },
)  # fmt: skip


def answered(middleware, server, request):
    """Ask; what came of it is one of the three allowed ones. Returns the answer's header of the episode."""
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    before = len(server.calls)
    status, headers, content = ask(middleware, body)
    chats = [sent for path, sent, _ in server.calls[before:] if path == CHAT]
    if status == 200:
        (sent,) = chats
        if sent != body:
            old, new = json.loads(body), json.loads(sent)
            given, made = old.pop("vllm_xargs", None) or {}, new.pop("vllm_xargs")
            assert repr(new) == repr(old)  # 1e999 is inf, and nothing else was touched
            kept = {name: value for name, value in given.items() if name not in arguments._ARGUMENTS}
            assert made.items() >= kept.items()
            assert module.HEADER in headers or not made.keys() & set(arguments._ARGUMENTS)
    else:
        assert status == 400 and not chats[:-1] and content["error"]["message"]
    return headers.get(module.HEADER)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=REQUESTS, other=st.one_of(st.none(), TEXTS))
@example(request={"messages": [*LONG, QUESTION], "cache_salt": ["a"]}, other="['a']")
@example(request={"messages": [*LONG, QUESTION], "cache_salt": None}, other="None")
def test_any_request_is_passed_on_refused_or_rewritten_and_tenants_share_nothing(monkeypatch, request, other):
    monkeypatch.setattr(module, "_Engine", RealRouting)
    server = StrictServer()
    middleware = EpisodicMiddleware(server)
    answered(middleware, server, request)
    salt = request.get("cache_salt")
    header = answered(middleware, server, {**request, "cache_salt": other})
    assert header is None or salt == other or header.endswith(b"built")
    if isinstance(request.get("cache_salt"), str | None):
        tenants = {}
        for path, body, _ in server.calls:
            if path == "/v1/completions":
                build = json.loads(body)
                assert tenants.setdefault(build["vllm_xargs"][arguments.KEEP], build.get("cache_salt")) == build.get(
                    "cache_salt"
                )


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=st.one_of(st.binary(max_size=64), ANYTHING.map(lambda value: json.dumps(value).encode())), padded=st.booleans()
)
def test_any_bytes_are_passed_on(body, padded):
    body += b" " * 2000 * padded
    server = StrictServer()
    ask(EpisodicMiddleware(server), body)
    assert [(path, sent) for path, sent, _ in server.calls] == [(CHAT, body)]


def test_nesting_of_any_depth_is_answered(monkeypatch):
    """Python's limit of 1000 is met by json.loads, by json.dumps or by repr, whichever is the deepest in the stack."""
    monkeypatch.setattr(module, "_Engine", RealRouting)
    for depth in [*range(850, 1000, 6), 100_000]:
        nest = "[" * depth + "]" * depth
        for wrong in ('"content": %s, "role": "user"', '"content": "a", "role": "user", "more": %s'):
            body = json.dumps({"messages": [*LONG, {"x": 1}, QUESTION]}).replace('"x": 1', wrong % nest).encode()
            server = StrictServer()
            status, _, _ = ask(EpisodicMiddleware(server), body)
            assert status in (200, 400)


def test_bodies_beyond_the_limit_are_not_looked_into(monkeypatch, caplog):
    monkeypatch.setattr(module, "_MAX_BYTES", 4000)
    monkeypatch.setattr(module.json, "loads", None)
    server = Server()
    body = b'{"messages": [], "x": "' + b"x" * 4000 + b'"}'
    server.respond = lambda path, sent: (200, {})
    asyncio.run(call(EpisodicMiddleware(server), body))
    assert server.calls[-1][:2] == (CHAT, body) and f"{len(body)} bytes is larger than 4000" in caplog.text
