# SPDX-License-Identifier: Apache-2.0
"""Episodes are a function of the history; keys tell histories, tenants and settings apart and nothing else."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from vllm_kvcompress.episodic.router import EpisodeRouter, clustered_windows
from vllm_kvcompress.episodic.segment import Utterance, chat_utterances
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.errors import KVCompressError

from .conftest import TOPICS, say, talk

SETTINGS = EpisodicSettings(budget=4096)


def facts(episodes):
    """All that a map says but for what it cost."""
    clustering = episodes._clustering
    return (
        episodes.windows,
        episodes.digests,
        episodes.episodes,
        episodes.clustered,
        clustering.vectors.tolist(),
        clustering.sums.tolist(),
    )


def keys(episodes):
    return [episode.key for episode in episodes.episodes]


@pytest.fixture
def router(embedder):
    return EpisodeRouter(SETTINGS, embedder)


def test_series():
    assert [clustered_windows(count, 1.5) for count in range(1, 13)] == [1, 2, 3, 3, 5, 5, 5, 8, 8, 8, 8, 12]
    assert clustered_windows(1000, 1.1) > 900
    assert [clustered_windows(count, 16) for count in (1, 15, 16, 255, 256)] == [1, 1, 16, 16, 256]


def test_topics_become_episodes(rng, router):
    history = talk(rng, 4 * 41)  # 41 is a member of the series: the clustering sees it all
    episodes = router.episodes(history)
    assert (episodes.clustered, len(episodes.episodes)) == (41, 4)
    for index, episode in enumerate(episodes.episodes):
        assert episode.windows == tuple(range(index, 41, 4))
        assert set(episode.medoids) <= set(episode.windows)
        assert all(episodes.windows[medoid].text in episode.guide for medoid in episode.medoids)
    for settings in (SETTINGS, EpisodicSettings(budget=4096, routing="centroid")):
        episodes = router.episodes(history, settings=settings)
        for index, topic in enumerate(TOPICS):
            route = episodes.route(" ".join(rng.sample(TOPICS[topic], 6)))
            assert route.episode == index == int(np.argmax(route.similarity))
            assert len(route.similarity) == 4
            assert all(-1 - 1e-5 <= similarity <= 1 + 1e-5 for similarity in route.similarity)


def test_every_window_is_in_one_episode(rng, router):
    for turns in (1, 3, 4, 5, 17, 94, 200):
        episodes = router.episodes(talk(rng, turns))
        assert sorted(index for episode in episodes.episodes for index in episode.windows) == list(
            range(len(episodes.windows))
        )


@pytest.mark.parametrize("run", range(5))
def test_however_it_grew_it_is_the_same(rng, embedder, run):
    history = talk(rng, 150, per_topic=rng.randrange(1, 12))
    history[rng.randrange(150)] = Utterance("Bob", "")
    history[rng.randrange(150)] = Utterance("Bob", " ".join(say(rng, "music") for _ in range(60)))
    remembering = EpisodeRouter(SETTINGS, embedder)
    length = 0
    while length < len(history):
        length = min(len(history), length + rng.choice([1, 1, 2, 5, 30]))
        grown = remembering.episodes(history[:length])
        assert facts(grown) == facts(EpisodeRouter(SETTINGS, embedder).episodes(history[:length]))
    # Going back, as when an answer is made anew, is no other history either.
    back = rng.randrange(1, 150)
    assert facts(remembering.episodes(history[:back])) == facts(
        EpisodeRouter(SETTINGS, embedder).episodes(history[:back])
    )


def test_growth_embeds_what_is_new_and_keeps_keys(rng, router):
    history = talk(rng, 4 * 62)
    first = router.episodes(history[: 4 * 41])
    assert (first.clustered, first.embedded) == (41, 41)
    for windows in range(42, 62):
        grown = router.episodes(history[: 4 * windows])
        assert (grown.clustered, grown.embedded) == (41, 1)
        assert keys(grown) == keys(first)
        assert [e.guide for e in grown.episodes] == [e.guide for e in first.episodes]
        assert all(set(a.windows) <= set(b.windows) for a, b in zip(first.episodes, grown.episodes, strict=True))
    assert router.episodes(history[: 4 * 61]).embedded == 0
    again = router.episodes(history)
    assert (again.clustered, again.embedded) == (62, 62)
    assert not set(keys(again)) & set(keys(first))


def test_a_started_window_is_not_remembered(rng, router):
    history = talk(rng, 4 * 50)
    router.episodes(history)
    for turns in (1, 2, 3):
        more = [*history, *talk(rng, turns)]
        episodes = router.episodes(more)
        assert (len(episodes.windows), episodes.embedded, episodes.windows[-1].full) == (51, 1, False)


def test_centroids_follow_new_windows(rng, router):
    history = talk(rng, 4 * 41)
    first = router.episodes(history)
    new = [Utterance("Ann", " ".join(TOPICS["garden"])) for _ in range(40)]
    grown = router.episodes([*history, *new])
    assert grown.clustered == 41
    assert set(grown.episodes[0].windows) == {*first.episodes[0].windows, *range(41, 51)}
    vector = first._clustering.embedder.embed([" ".join(TOPICS["garden"])])[0]
    nearness = [c.sums[0] @ vector / np.linalg.norm(c.sums[0]) for c in (first._clustering, grown._clustering)]
    assert nearness[0] < nearness[1]


def test_changes_in_the_middle(rng, router):
    history = talk(rng, 4 * 60)  # 41 windows are clustered
    whole = router.episodes(history)
    # Behind what was clustered: the same episodes, embedded anew from the change on.
    late = list(history)
    late[4 * 55 + 1] = replace(late[4 * 55 + 1], text="Something else.")
    changed = router.episodes(late)
    assert keys(changed) == keys(whole)
    assert changed.digests[: 4 * 55 + 1] == whole.digests[: 4 * 55 + 1]
    assert not set(changed.digests[4 * 55 + 1 :]) & set(whole.digests)
    # Within it: nothing is shared.
    early = list(history)
    early[9] = replace(early[9], text="Something else.")
    changed = router.episodes(early)
    assert changed.embedded == 60
    assert not set(keys(changed)) & set(keys(whole))
    for other in (late, early):
        assert facts(router.episodes(other)) == facts(EpisodeRouter(SETTINGS, router._embedder).episodes(other))
    # The old one is still known.
    assert router.episodes(history).embedded == 0


def test_tenants_share_nothing(rng, router):
    history = talk(rng, 80)
    maps = [router.episodes(history, salt=salt) for salt in (None, "", "a", "b")]
    assert all(episodes.embedded == len(episodes.windows) for episodes in maps)
    for number, one in enumerate(maps):
        for other in maps[:number]:
            assert not {*keys(one), *one.digests} & {*keys(other), *other.digests}


def test_what_is_said_by_a_system_or_a_tool_counts(router):
    chat = [{"role": "user", "content": f"tomato {index}"} for index in range(8)]
    variants = [
        chat,
        [{"role": "system", "content": "Be brief."}, *chat],
        [{"role": "system", "content": "Be kind."}, *chat],
        [{"role": "user", "content": "tomato 0", "name": "Ann"}, *chat[1:]],
    ]
    found = [keys(router.episodes(chat_utterances(messages))) for messages in variants]
    assert len({key for names in found for key in names}) == sum(map(len, found))


def test_settings_of_a_request(rng, router):
    history = talk(rng, 80)
    base = router.episodes(history)
    # Another budget: the same episodes, not clustered again, whose pages are others.
    small = router.episodes(history, settings=EpisodicSettings(budget=1024))
    assert small.embedded == 0
    assert [e.guide for e in small.episodes] == [e.guide for e in base.episodes]
    assert not set(keys(small)) & set(keys(base))
    # Where questions go changes no pages.
    assert keys(router.episodes(history, settings=EpisodicSettings(budget=4096, routing="centroid"))) == keys(base)
    two = router.episodes(history, settings=EpisodicSettings(budget=4096, episodes=2))
    assert (len(two.episodes), two.embedded) == (2, 20)
    with pytest.raises(KVCompressError, match="asks for 'other', the server was started with 'tokens'"):
        router.episodes(history, settings=EpisodicSettings(budget=4096, embedder="other"))


def test_histories_without_text(router):
    for history in ([], [Utterance("A", ""), Utterance("B", " ")]):
        with pytest.raises(KVCompressError, match=f"a history of {len(history)} turns without any text"):
            router.episodes(history)


def test_a_question_about_nothing_goes_to_the_latest_window(rng, router):
    history = talk(rng, 4 * 41)
    for cut in (4 * 46, 4 * 47, 4 * 48 - 2):
        episodes = router.episodes(history[:cut])
        route = episodes.route("")
        assert len(episodes.windows) - 1 in episodes.episodes[route.episode].windows


def test_one_giant_turn_and_ten_thousand_tiny_ones(rng, router):
    giant = router.episodes([Utterance("Ann", " ".join(f"{say(rng, topic)}." for topic in TOPICS for _ in range(100)))])
    assert 1 < len(giant.episodes) <= 4
    assert giant.route(" ".join(TOPICS["garden"])).episode == 0
    tiny = router.episodes([Utterance("Ann", rng.choice(["ok", "yes", "no", "🙂"])) for _ in range(10_000)])
    assert len(tiny.windows) == 2500
    same = router.episodes([Utterance("Ann", "ok")] * 10_000)
    assert [len(episode.windows) for episode in same.episodes] == [2500]


def test_memory_is_bounded(rng, embedder):
    one = 48 * 4 * 20  # vectors of 20 windows
    router = EpisodeRouter(SETTINGS, embedder, memory_bytes=3 * one)
    histories = [talk(rng, 80) for _ in range(4)]
    for history in histories[:3]:
        router.episodes(history)
    assert router.episodes(histories[0]).embedded == 0  # now the last one asked for
    router.episodes(histories[3])
    assert [router.episodes(histories[index]).embedded for index in (0, 2, 3, 1)] == [0, 0, 0, 20]
    assert sum(kept.vectors.nbytes for kept in router._remembered.values()) == 3 * one
    nothing = EpisodeRouter(SETTINGS, embedder, memory_bytes=0)
    assert facts(nothing.episodes(histories[0])) == facts(router.episodes(histories[0]))
    assert not nothing._remembered


def test_threads(rng, router, embedder):
    histories = [talk(rng, rng.randrange(1, 120)) for _ in range(6)]
    order = [rng.randrange(6) for _ in range(60)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda index: facts(router.episodes(histories[index])), order))
    expected = [facts(EpisodeRouter(SETTINGS, embedder).episodes(history)) for history in histories]
    assert found == [expected[index] for index in order]
