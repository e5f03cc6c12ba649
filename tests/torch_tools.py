"""Imports of the PyTorch world for the tests that compare with it: skipped where it is not installed."""

import importlib

import pytest

_declared = []  # of torch.library.Library: what it declares ends with it


def import_or_skip(name):
    """The module of that name, or the running test (or module of tests) is skipped.

    PyPI has torchvision built against CUDA only, and timm imports it. Beside a CPU build of torch it finds
    none of its compiled operators, and stumbles over two of them; declared by name alone, they do no harm.
    """
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    try:
        return pytest.importorskip(name, reason=f"compares with {name}, which is not installed")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    return importlib.import_module(name)
