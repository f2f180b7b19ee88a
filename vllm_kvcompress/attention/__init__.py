# SPDX-License-Identifier: Apache-2.0
"""vLLM attention backend over 2-bit pages, and the companion cache of 16-bit windows."""
