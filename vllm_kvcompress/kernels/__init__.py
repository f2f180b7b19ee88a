# SPDX-License-Identifier: Apache-2.0
"""Attention over 2-bit pages: the torch path that runs anywhere, and the reference that judges it and every kernel."""
