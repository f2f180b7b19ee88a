# SPDX-License-Identifier: Apache-2.0
"""EpiCache (arXiv 2509.17396): conversations of any length in a fixed budget of KV tokens.

Modules: `policies` which tokens a layer keeps, and how many, in plain torch.
"""
