# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the page formats, installed as `vllm_kvcompress.triton_kernels`.

The folder bears the name of another package: `triton_kernels`, which vLLM imports for its MoE layers, or replaces by a
copy of its own where that import fails. Installed, the two cannot meet. But a Python started in the root of this source
tree finds this folder under the other's name first, and there it steps aside.
"""


def _step_aside() -> None:
    """Put the real `triton_kernels` in this module's place.

    Raises:
        ModuleNotFoundError: there is none, exactly as if this folder did not exist.
    """
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    root = Path(__file__).resolve().parent.parent
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    spec = PathFinder.find_spec(__name__, elsewhere)
    if spec is None or spec.loader is None:  # no loader: a folder without __init__.py, not the real package
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    module = importlib.util.module_from_spec(spec)
    sys.modules[__name__] = module
    spec.loader.exec_module(module)


if __name__ == "triton_kernels":
    _step_aside()
