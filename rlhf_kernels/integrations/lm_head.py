"""The LM head of a causal language model: reading it, and running a function of the hidden states in its place.

Written for the models of transformers, by their interface alone: `get_output_embeddings()`, `config`, and a forward
that returns an output with `.logits`.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._logits import LMHead
from .lora import check_lora, head_with_lora, is_lora, wrapped_head

__all__ = ["LMHead", "LogitOptions", "lm_head_of", "logit_options_of", "run_in_head"]

Result = TypeVar("Result")
CausalLM = Any  # transformers' PreTrainedModel with an LM head, or a PeftModel of one; neither is imported here

# What configs call the factor on the logits. One name may mean different things: Granite divides by logits_scaling,
# HyperCLOVA X multiplies by it, MiniCPM 3 applies it before the head. So a config only proposes; see `lm_head_of`.
SCALE_NAMES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
SOFTCAP_NAME = "final_logit_softcapping"
SLOT = "_rlhf_kernels_slot"


class LogitOptions(NamedTuple):
    """A model's changes to `hidden @ weight.T + bias`: times logit_scale, soft-capped `cap * tanh(x / cap)`."""

    logit_scale: float = 1.0
    logit_softcap: float | None = None


def lm_head_of(model: CausalLM) -> LMHead:
    """The head of a model whose head is a plain linear layer, with scale and soft cap as `logit_options_of` says.

    Raises ValueError where it is not (a low-rank adapter on it, a quantised or patched head).
    """
    head = _head_module(model)
    if is_lora(head):
        raise ValueError(
            f"the LM head of {type(model).__name__} cannot be read as one matrix: it carries a low-rank adapter. "
            "Merge it first (merge_and_unload), or call the model through run_in_head or patch_causal_lm"
        )
    return LMHead(*_plain_head(head, model), *logit_options_of(model))


def logit_options_of(model: CausalLM) -> LogitOptions:
    """Scale and soft cap, read from the config and confirmed by the model's own forward on four tokens.

    Raises ValueError where the model does something to its logits that `LogitOptions` cannot express: a loss computed
    from it would be silently wrong.
    """
    head = _head_module(model)
    if is_lora(head):
        check_lora(head)
    config = model.config.get_text_config()
    numbers = [float(v) for n in SCALE_NAMES if isinstance(v := getattr(config, n, None), int | float) and v]
    cap = getattr(config, SOFTCAP_NAME, None)
    scales = [1.0, *numbers, *(1.0 / number for number in numbers)]
    caps = [None] if cap is None else [None, float(cap)]
    logits, output = forward_of_known_logits(model)
    returned = output.logits.float()
    for scale, cap in itertools.product(scales, caps):
        expected = logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)
        if returned.shape == expected.shape and torch.allclose(returned, expected, rtol=1e-4, atol=1e-4 * abs(scale)):
            return LogitOptions(scale, cap)
    raise ValueError(
        f"the LM head of {type(model).__name__} cannot be read: its forward turns logits from {logits.min():.3g} to "
        f"{logits.max():.3g} into values from {returned.min():.3g} to {returned.max():.3g}, shape "
        f"{tuple(returned.shape)}, which no scale or soft cap of its config explains (looked for "
        f"{', '.join(SCALE_NAMES)}, {SOFTCAP_NAME})"
    )


def run_in_head(
    model: CausalLM,
    use: Callable[[Tensor, LMHead], Result],
    options: LogitOptions,
    inputs: Mapping[str, Any],
    forward: Callable[..., Any] | None = None,
) -> tuple[Result, Any]:
    """Calls the model and, where its head's matmul would have been, `use(hidden [B, T, D], head)`.

    The model's own forward is called, so hidden states arrive with every hook, mask and scaling it applies, and
    `[tokens, vocab]` logits never exist. `use` runs *inside the head module's call, inside the model's call*: what
    wraps either (DDP, FSDP, ZeRO, anything with hooks) sees the head's weight used where it expects it, gathers it if
    it is sharded, in forward and backward, and synchronises its gradient. So the loss belongs in `use` or behind what
    it returns, never on a weight read elsewhere.

    A low-rank adapter on the head is computed exactly: `hidden` and `weight` then have its rank as further columns.

    Args:
        model: a causal LM of transformers (not wrapped), or one with adapters of peft.
        use: what to compute. Tensors in what it returns may be differentiated.
        options: `logit_options_of(model)`, computed once.
        inputs: what the model is called with.
        forward: what is called instead of the model itself.

    Returns:
        (what `use` returned, the model's output, whose logits are [B, T, 0]).

    Raises ValueError where the head is not a linear layer, or is called more than once or not at all, or with more
    than hidden states.
    """
    head = _head_module(model)
    slot = _slot_of(head)
    results: list[Result] = []
    slot.check_free(model)

    def compute(hidden: Tensor) -> Any:
        # The weight is read now: a wrapper may have put another tensor there since the model was made.
        weight, bias = _plain_head(head.get_base_layer() if is_lora(head) else head, model)
        if is_lora(head):
            hidden, weight = head_with_lora(head, hidden, weight)
        result = use(hidden, LMHead(weight, bias, *options))
        if torch.compiler.is_compiling():  # hooks cannot be added while a graph is traced
            results.append(result)
            return _no_logits(hidden)
        return result

    def divert(_module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Tensor:
        if slot.is_anothers():
            return output
        results.append(output)
        return _no_logits(args[0])

    # Taken by a forward hook registered last, that is, after those of wrappers, which may replace outputs or hook their
    # backward. (Only full backward hooks on the head itself come later still and see the placeholder.)
    handle = None if torch.compiler.is_compiling() else head.register_forward_hook(divert)
    slot.take(compute)
    try:
        output = (forward or model)(**inputs)
    finally:
        slot.compute = None
        if handle is not None:
            handle.remove()
    _check_called_once(len(results), model)
    return results[0], output


def _no_logits(hidden: Tensor) -> Tensor:
    """Zero tokens wide: whatever the model does to its logits costs nothing."""
    return hidden.new_empty((*hidden.shape[:-1], 0))


class _Slot:
    """The function that a head computes instead of its matmul, in one thread; None, and in other threads: its
    matmul."""

    compute: Callable[[Tensor], Any] | None = None
    thread: int = 0

    def take(self, compute: Callable[[Tensor], Any]) -> None:
        self.compute = compute
        if not torch.compiler.is_compiling():  # a traced graph is one thread's
            self.thread = threading.get_ident()

    def is_anothers(self) -> bool:
        return not torch.compiler.is_compiling() and self.thread != threading.get_ident()

    def check_free(self, model: CausalLM) -> None:
        if self.compute is not None:
            raise ValueError(
                f"the LM head of {type(model).__name__} is in use, "
                + ("by another thread: give each thread a copy" if self.is_anothers() else "by a call around this one")
            )


def _forward_or_computed(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    slot = getattr(self, SLOT)
    compute = slot.compute
    if compute is None or slot.is_anothers():
        return type(self).forward(self, hidden, *args, **kwargs)
    if args or kwargs:  # peft's adapter_names, say
        raise ValueError(f"the LM head is called with more than hidden states: {[*args, *kwargs]}")
    return compute(hidden)


# What pickle goes by: a head that was pickled comes back with its class's own forward, as new.
_forward_or_computed.__name__ = "forward"


def _slot_of(head: nn.Module) -> _Slot:
    """The head's slot; the first time, puts it there. A bound method, so that a deep copy of the head has its own."""
    if replaced_forward(head) is not _forward_or_computed:
        setattr(head, SLOT, _Slot())
        # __call__, and with it every hook, stays. (Dynamo traces __get__, but not types.MethodType.)
        head.forward = _forward_or_computed.__get__(head)
    return getattr(head, SLOT)


def replaced_forward(module: nn.Module) -> Any:
    """The function that an instance has as its forward instead of its class's, if any."""
    forward = vars(module).get("forward")
    function = getattr(forward, "__func__", forward)
    return None if function is type(module).forward else function


def _head_module(model: CausalLM) -> Any:
    """The module whose call is the head's matmul: peft's wrapper of trained copies is looked into."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"the LM head of {type(model).__name__} cannot be read: it has no output embeddings")
    head = wrapped_head(head)
    if replaced_forward(head) not in (None, _forward_or_computed):
        raise ValueError(
            f"the LM head of {type(model).__name__} cannot be read: its forward was replaced (a device map, a patch)"
        )
    return head


def _plain_head(head: nn.Module, model: CausalLM) -> tuple[Tensor, Tensor | None]:
    """(weight [V, D], bias [V]) of a head whose output is `hidden @ weight.T + bias`."""
    # A subclass may add anything to the matmul; FSDP's adds nothing to forward.
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    if not linear or hasattr(head, "parametrizations"):
        raise ValueError(
            f"the LM head of {type(model).__name__} cannot be read: expected torch.nn.Linear, got "
            f"{type(head).__module__}.{type(head).__qualname__}"
        )
    weight: Any = head.weight  # mypy: a module's attribute is a Tensor or a Module
    bias: Any = head.bias
    if type(weight) not in (Tensor, nn.Parameter) and not torch.compiler.is_compiling():
        raise ValueError(
            f"the LM head of {type(model).__name__} is a {type(weight).__name__} where it is used, expected a plain "
            "tensor: if it is sharded, call the model through what shards it, or leave the head to the outermost "
            "fully_shard; if it is quantised, load it unquantised"
        )
    return weight, bias


class KnownLogits(NamedTuple):
    """Known logits [1, 4, V] that took the place of a head's output, and what the model's forward made of them."""

    logits: Tensor
    output: Any


@torch.no_grad()
def forward_of_known_logits(model: CausalLM, **labels: Tensor) -> KnownLogits:
    """Runs the model on four tokens, its head's output replaced. `labels`: further arguments of the model."""
    head = _head_module(model)
    weight, _ = _plain_head(head.get_base_layer() if is_lora(head) else head, model)
    vocabulary = weight.shape[0] if weight.dim() == 2 else 0
    device = model.get_input_embeddings().weight.device
    if device.type == "meta" or not vocabulary:
        raise ValueError(
            f"the weights of {type(model).__name__} are not there yet (the meta device, or partitioned), so that its "
            "forward cannot show what it does to logits: give LogitOptions(logit_scale, logit_softcap), which "
            "logit_options_of returns for a small model of the same class"
        )
    ids = torch.arange(4, device=device)[None] % vocabulary
    # Small values tell scales apart, large ones soft caps; positions differ.
    ramp = torch.linspace(-1.0, 1.0, vocabulary, device=device)
    logits = torch.stack([ramp, 100.0 * ramp, -3.0 * ramp, 10.0 * ramp.flip(0)])[None]
    slot, calls = _slot_of(head), 0
    slot.check_free(model)

    def known(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits.to(hidden.device)

    slot.take(known)
    try:
        # Dropout must not take numbers that training would have drawn.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _attention_of_cpus(model, device):
            output = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True, **labels
            )
    finally:
        slot.compute = None
    _check_called_once(calls, model)
    return KnownLogits(logits, output)


@contextlib.contextmanager
def _attention_of_cpus(model: CausalLM, device: torch.device) -> Iterator[None]:
    """Models that are to go to a GPU are made on the CPU, where flash attention does not run: eager, meanwhile."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    chosen = base.config._attn_implementation
    if device.type != "cpu" or chosen in ("eager", "sdpa"):
        yield
        return
    base.set_attn_implementation("eager")
    try:
        yield
    finally:
        base.set_attn_implementation(chosen)


def _check_called_once(calls: int, model: CausalLM) -> None:
    if calls != 1:
        raise ValueError(
            f"the LM head of {type(model).__name__} cannot be read: its forward calls get_output_embeddings() "
            f"{calls} times, expected once"
        )
