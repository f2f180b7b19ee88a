# SPDX-License-Identifier: Apache-2.0
"""Clusters, their medoids and guides."""

import numpy as np
import pytest

from vllm_kvcompress.episodic.cluster import GUIDE_INSTRUCTION, centroid_sums, cluster_windows, guide_prompt, medoids
from vllm_kvcompress.episodic.embed import unit_rows


@pytest.fixture
def generator(rng):
    return np.random.default_rng(rng.getrandbits(32))


def test_separate_groups_are_found(generator):
    truth = generator.permutation(np.repeat(np.arange(4), 12))
    # Unit vectors along axes, with noise of length about 0.2: groups are sqrt(2) apart.
    vectors = unit_rows(np.eye(16)[truth] + 0.05 * generator.standard_normal((48, 16)))
    labels = cluster_windows(vectors, 4)
    for group in range(4):
        assert len(set(labels[truth == group])) == 1
    first = [labels.tolist().index(label) for label in range(4)]
    assert first == sorted(first)


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_fewer_windows_than_episodes(generator, windows):
    vectors = unit_rows(generator.standard_normal((windows, 8)))
    assert cluster_windows(vectors, 4).tolist() == list(range(windows))


def test_equal_windows_are_one_episode(generator):
    vectors = np.repeat(unit_rows(generator.standard_normal((2, 8))), 5, axis=0)
    assert cluster_windows(vectors, 4).tolist() == [0] * 5 + [1] * 5
    assert cluster_windows(np.zeros((7, 8), np.float32), 4).tolist() == [0] * 7


def test_medoids_are_the_nearest_in_time_order(generator):
    vectors = unit_rows(generator.standard_normal((30, 8)) + 1)
    labels = generator.integers(0, 3, 30)
    for episode in range(3):
        members = [index for index in range(30) if labels[index] == episode]
        centre = vectors[members].astype(float).mean(0)
        by_cosine = sorted(members, key=lambda index: -float(vectors[index].astype(float) @ centre))
        for count in (1, 4, 100):
            assert medoids(vectors, labels, episode, count) == sorted(by_cosine[:count])


def test_sums_by_hand():
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    assert centroid_sums(vectors, np.array([1, 0, 1])).tolist() == [[0, 1], [np.float32(1.6), np.float32(0.8)]]


def test_guide():
    guide = guide_prompt(["Ann: hello", "Bob: bye"])
    assert guide.startswith(GUIDE_INSTRUCTION)
    assert guide.endswith("\n\nAnn: hello\nBob: bye")
