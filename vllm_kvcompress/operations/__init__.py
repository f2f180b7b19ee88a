# SPDX-License-Identifier: Apache-2.0
"""For whoever runs a server: the line at start, metrics, and the doctor."""
