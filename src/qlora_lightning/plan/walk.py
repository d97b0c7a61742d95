"""Memory of a step through transformers' own blocks: their code is run on tensors without values, and what lives at once is counted.

No formula knows every family, what autograd keeps of it and what autocast copies; the code does. Fake tensors have shapes and lifetimes
but no memory. Depth is worked out from two shallow models, as blocks are alike. Not counted: scratch memory inside single operators.
Counted too much: without values transformers makes the causal mask that it leaves out otherwise, and repeats grouped heads for it.
"""

import copy
import weakref
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qlora_lightning.modeling.adapters import LoRASpec
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.skeleton import skeleton
from qlora_lightning.plan.longest import Longest
from qlora_lightning.strategies.policy import GradientCheckpointing

_DEPTHS = 2, 4


class Walked(NamedTuple):
    """Bytes beyond what is there before a step."""

    kept: int
    """Of what forward leaves for backward."""
    peak: int


def walk(config: Any, source: str, lora: LoRASpec, dtype: torch.dtype, longest: Longest, mode: GradientCheckpointing) -> Walked:
    """What a microbatch takes.

    Args:
        config: transformers' of the base.
        source: what a user calls it.
        lora: the adapter.
        dtype: of the products.
        longest: the microbatch.
        mode: of checkpointing.
    """
    depth = config.get_text_config().num_hidden_layers
    shallow, deeper = (_walk(_of_depth(config, layers), source, lora, dtype, longest, mode) for layers in _DEPTHS)
    low, high = _DEPTHS
    kept, peak = (round(one + (other - one) / (high - low) * (depth - low)) for one, other in zip(shallow, deeper, strict=True))
    return Walked(kept, peak)


def _of_depth(config: Any, layers: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def _walk(config: Any, source: str, lora: LoRASpec, dtype: torch.dtype, longest: Longest, mode: GradientCheckpointing) -> Walked:
    model = skeleton(config, source, lora, None, dtype)
    _dequantise_in_passing(model)
    apply_gradient_checkpointing(model, mode)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_fake(model)
        ids = torch.zeros(longest.rows, longest.width, dtype=torch.int64)
        with _Living() as living:
            loss = _forward(model, ids, longest.positions, dtype)
            kept = living.now
            loss.backward()
        return Walked(kept, living.peak)


def _to_fake(model: Any) -> None:
    """Put fake tensors in the place of meta ones: autocast passes meta tensors over."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
                if parameter.requires_grad:
                    module._parameters[name].grad = torch.empty_like(value)  # there before a step, as in the flat adapter
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _forward(model: Any, ids: Tensor, positions: int, dtype: torch.dtype) -> Tensor:
    """As ``QLoRAModule.cross_entropy_sum``."""
    scored = torch.arange(positions)
    targets = ids[:, scored]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=ids, logits_to_keep=scored, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")


def _dequantise_in_passing(model: Any) -> None:
    """Let the frozen layers under an adapter compute as 4-bit ones do: their weight in 16 bits is there for a moment."""
    head = model.get_base_model().get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and module is not head:
            module.forward = partial(_FourBit.apply, module.out_features)  # type: ignore[method-assign]


class _FourBit(torch.autograd.Function):
    """The shapes and the memory of bitsandbytes' product: nothing is kept, the weight is made in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, columns: int, x: Tensor) -> Tensor:
        ctx.features = x.shape[-1]
        return x @ x.new_empty(x.shape[-1], columns)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        return None, gradient @ gradient.new_empty(gradient.shape[-1], ctx.features)


class _Living(TorchDispatchMode):
    """Bytes of the tensors that are alive among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        inputs = {id(tensor.untyped_storage()) for tensor in tree_iter((arguments, options)) if isinstance(tensor, Tensor)}
        result = function(*arguments, **(options or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage(), inputs)
        return result

    def _count(self, storage: Any, inputs: set[int]) -> None:
        if id(storage) in inputs or id(storage) in self._seen:
            return
        size = storage.nbytes()
        self._seen[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage), size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int, _: Any) -> None:
        self.now -= size
        del self._seen[key]
