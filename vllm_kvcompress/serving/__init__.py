# SPDX-License-Identifier: Apache-2.0
"""What stands between HTTP clients and the engine. Modules: `middleware` long chat histories become episodes,
`loopback` requests of the server to itself."""
