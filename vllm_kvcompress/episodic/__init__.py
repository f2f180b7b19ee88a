# SPDX-License-Identifier: Apache-2.0
"""Conversations of any length in a fixed budget of KV tokens, after EpiCache (arXiv 2509.17396).

What a history is about, in the order in which it passes the modules: `segment` cuts it into windows, `embed` makes
vectors of them, `cluster` episodes, `router` keeps these as the history grows and routes questions; `identity` tells
histories apart, `settings` is what a user may set. None of these knows of the engine.

A chat with an engine in this process is `chat`, with `template` and `guide` for the tokens of both.

What an engine forgets: `policies` says which tokens a layer keeps, and how many, in plain torch; `request` reads what a
request asks for, `connector` and `worker` carry it out.

Import from the modules: every process of an engine imports this package, and few need scikit-learn.
"""
