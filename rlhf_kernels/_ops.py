"""Registers what torch must know of an op besides its kernels. Native and Triton ops of one name share it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._logits import Needs


def needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """torch.library's ops take a tangent for none, so that torch.func.jvp would find a derivative of zero."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op} has no forward-mode derivative (jvp); differentiate in reverse mode")


def differentiable_twice(reference: Callable[..., Tensor], op: Callable[..., Any]) -> Callable[..., Any]:
    """An op of a pair of tensors and more whose gradients are differentiable: where create_graph=True asks for that,
    those of `reference`, which takes the same arguments, take the place of the op's own."""

    def compute(*arguments: Any) -> Any:
        result = op(*arguments)
        losses: Tensor = result[0] if isinstance(result, tuple) else result
        if not torch.compiler.is_compiling() and losses.grad_fn is not None:
            losses.grad_fn.register_hook(functools.partial(_replace_gradients, reference, arguments))
        return result

    return compute


def _replace_gradients(
    reference: Callable[..., Tensor], arguments: Sequence[Any], gradients: Any, upstream: Any
) -> Any:
    if not torch.is_grad_enabled():
        return None
    # Aliases: one tensor may be both of the pair, and each has its own gradient.
    pair = [None if tensor is None else tensor.view_as(tensor) for tensor in arguments[:2]]
    values = reference(*(None if tensor is None else tensor.float() for tensor in pair), *arguments[2:])
    inputs = {i: tensor for i, tensor in enumerate(pair) if tensor is not None and tensor.requires_grad}
    results = torch.autograd.grad(values, list(inputs.values()), upstream[0], create_graph=True)
    return tuple(dict(zip(inputs, results, strict=True)).get(i) for i in range(len(gradients)))


def save(ctx: Any, arguments: Any, *outputs: Tensor) -> None:
    """Keeps an op's arguments, a NamedTuple, and some outputs for backward: tensors where autograd looks after them."""
    tensors = {name: value for name, value in arguments._asdict().items() if isinstance(value, Tensor)}
    ctx.save_for_backward(*outputs, *tensors.values())
    ctx.arguments, ctx.names = arguments._replace(**dict.fromkeys(tensors)), tuple(tensors)


def saved(ctx: Any) -> tuple[Any, Sequence[Tensor]]:
    """The arguments and the outputs that `save` kept."""
    tensors = ctx.saved_tensors  # read once: inside torch's checkpoint a second reading is an error
    count = len(tensors) - len(ctx.names)
    return ctx.arguments._replace(**dict(zip(ctx.names, tensors[count:], strict=True))), tensors[:count]


def flat(arguments: Any) -> tuple:
    """An op's arguments, a NamedTuple whose last two, rows and masked, the Triton op alone takes, as that op or the
    compiled one takes them."""
    *schema, _rows, _masked = arguments
    return (*schema, *visited(arguments))


def visited(arguments: Any) -> tuple:
    """The two arguments more of a Triton op; nothing for a compiled one."""
    return () if arguments.masked is None else (arguments.rows, arguments.masked)


def needs_of(ctx: Any, names: Sequence[str]) -> Needs:
    """The gradients of a head that are needed; `names`: the arguments of the op."""
    needed = dict(zip(names, ctx.needs_input_grad, strict=False))  # a native op has fewer than the Triton op
    return Needs(needed["hidden"], needed["weight"], needed["bias"])


def gradients_of(ctx: Any, names: Sequence[str], **gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Backward's return value: a place for each argument, `names`, with its gradient where that is needed."""
    needed = zip(names, ctx.needs_input_grad, strict=False)
    return tuple(gradients.get(name) if need else None for name, need in needed)


def fake_gradients(tensors: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> tuple[Tensor, ...]:
    """Shapes of a head's gradients: each its tensor's, empty where not needed."""
    return tuple(
        like.new_empty(0, dtype=torch.float32) if tensor is None or not needed else tensor.new_empty(tensor.shape)
        for tensor, needed in zip(tensors, needs, strict=True)
    )


def register_shapes(forward: str, backward: str, fake: Callable[..., Any], fake_backward: Callable[..., Any]) -> None:
    """Registers the shapes of an op whose autograd is in C++."""
    torch.library.register_fake(f"rlhf_kernels::{forward}", fake)
    torch.library.register_fake(f"rlhf_kernels::{backward}", fake_backward)


def register(
    forward: str,
    backward: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    setup_context: Callable[..., None],
    gradient: Callable[..., Any],
) -> None:
    """Shapes (`fake`, `fake_backward`) and autograd of `rlhf_kernels::forward`, whose gradient `rlhf_kernels::backward`
    computes: gradient(the backward op, ctx, *upstream). That op cannot be differentiated again."""
    forward_op, backward_op = f"rlhf_kernels::{forward}", f"rlhf_kernels::{backward}"

    def differentiate(ctx: Any, *upstream: Any) -> Any:
        return gradient(getattr(torch.ops.rlhf_kernels, backward), ctx, *upstream)

    def refuse(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{forward} is differentiable once; use backend='reference' for second derivatives")

    register_shapes(forward, backward, fake, fake_backward)
    torch.library.register_autograd(forward_op, differentiate, setup_context=setup_context)
    torch.library.register_autograd(backward_op, refuse)
