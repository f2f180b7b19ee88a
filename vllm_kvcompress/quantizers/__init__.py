# SPDX-License-Identifier: Apache-2.0
"""Quantisers in plain torch: the oracles of every kernel."""
