"""A block is written once, for the reference and for the Triton kernels."""

import inspect

import pytest

from qlora_lightning.kernels import reference, triton_ops

PUBLIC = {
    name
    for name, value in vars(reference).items()
    if inspect.isfunction(value) and value.__module__ == reference.__name__ and name[0] != "_"
}


def test_the_names_are_the_references() -> None:
    assert set(triton_ops.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_signatures_are_the_references(name: str) -> None:
    assert inspect.signature(getattr(triton_ops, name)) == inspect.signature(getattr(reference, name))
