"""Registration of torch operators, so that `torch.compile` sees one call where kernels are launched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from quant_moelora.core.checks import check_tensor
from quant_moelora.core.errors import ShapeError

NAMESPACE = "quant_moelora"
# Not `torch.library.custom_op`, whose calls take twice as long on the host.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_TYPES: dict[object, str] = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool", str: "str"}

Results = Callable[..., Sequence[tuple[tuple[int, ...], torch.dtype]]]


def fields(of: type[Any], prefix: str = "") -> str:
    """The fields of a NamedTuple of tensors, optional tensors, ints, bools and strings as arguments of a schema."""
    return ", ".join(f"{_TYPES[kind]} {prefix}{name}" for name, kind in get_type_hints(of).items())


def define(
    name: str,
    arguments: str,
    outputs: Sequence[str],
    results: Results,
    write: Callable[..., None],
    compute: Callable[..., Sequence[Tensor]] | None = None,
) -> tuple[Any, Any]:
    """Register the operator ``name``, which makes its results, and its twin ``name_out``, which is given them.

    Neither has a gradient: torch warns when one is asked for. A launch on a device that Triton does not serve fails
    inside.

    Args:
        name: name without the namespace.
        arguments: of both, as a schema writes them; the first one is a tensor on the device of the results.
        outputs: names of the results.
        results: shape and dtype of each result, from the arguments. Sizes may be symbols: it must not compare them.
        write: called with the arguments and the tensors to fill, all contiguous.
        compute: makes and fills the results, where `write` would have to copy them.

    Returns:
        The operator and its twin.
    """

    def allocate(*given: Any) -> list[Tensor]:
        """Results without values."""
        return [given[0].new_empty(shape, dtype=dtype) for shape, dtype in results(*given)]

    def make(*given: Any) -> Tensor | tuple[Tensor, ...]:
        """The operator."""
        if compute is not None:
            return _returned(compute(*given))
        held = allocate(*given)
        write(*given, *held)
        return _returned(held)

    def fill(*given: Any) -> None:
        """Its twin, which fills the caller's tensors."""
        inputs, held = given[: -len(outputs)], given[-len(outputs) :]
        for output, tensor, (shape, dtype) in zip(outputs, held, results(*inputs), strict=True):
            check_tensor(output, tensor, shape, dtype, why=f"the arguments of {name}_out")
            if not tensor.is_contiguous():
                raise ShapeError(
                    output, got=f"strides {tensor.stride()}", rule="a contiguous tensor", remedy="pass one, and copy it"
                )
        write(*given)

    returned = ", ".join("Tensor" for _ in outputs)
    mutated = ", ".join(f"Tensor({chr(ord('a') + i)}!) {output}" for i, output in enumerate(outputs))
    whole = returned if len(outputs) == 1 else f"({returned})"
    return (
        _register(name, f"({arguments}) -> {whole}", make, lambda *given: _returned(allocate(*given))),
        _register(f"{name}_out", f"({arguments}, {mutated}) -> ()", fill, lambda *_: None),
    )


def _returned(results: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return results[0] if len(results) == 1 else tuple(results)


def _register(name: str, schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, _untraced(compute), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _untraced(compute: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch's compiler leaves it alone when a frame that it could not compile calls the operator.

    `torch.compiler.disable` would import that compiler, a second of a process that may never use it.
    """
    untraced: Callable[..., Any] | None = None

    def run(*given: Any) -> Any:
        """The function, untraced once there is a compiler."""
        nonlocal untraced
        if untraced is None:
            if "torch._dynamo" not in sys.modules:
                return compute(*given)
            untraced = torch.compiler.disable(compute)
        return untraced(*given)

    return run
