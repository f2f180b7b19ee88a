# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_kvcompress` is the `kvcompress` command."""

import sys

from vllm_kvcompress.cli import main

sys.exit(main())
