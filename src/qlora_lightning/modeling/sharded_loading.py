"""Load a base model in 4 bits of which this rank keeps a share: transformers' own loading, with each weight cut as soon as it is packed.

Every rank reads every tensor, packs it whole on its device, as it would alone, and keeps its part of the codes. It cannot read its part
only: double quantisation subtracts the mean over all of a tensor's constants, and a block of 64 values may lie on two ranks. One rank that
reads for all would make the others wait, and the files of ranks on one machine are read from disk once anyhow. At no time is there more
than one whole tensor, on the device or in host memory; the constants, an eighth of a bit a parameter, stay whole on each rank.
"""

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.checksum import checksum_of_packed
from qlora_lightning.modeling.loading import QuantizationSpec, load_quantized, quantization_config
from qlora_lightning.modeling.sharding import Packed, share_of
from qlora_lightning.modeling.skeleton import base_config

_METHOD = "qlora_lightning_sharded_4bit"


class ShardedConfig(BitsAndBytesConfig):
    """transformers' settings of 4-bit storage, and which share is kept."""

    def __init__(self, rank: int = 0, ranks: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method: Any = _METHOD  # transformers' own are of an enumeration
        self.rank, self.ranks = rank, ranks


@register_quantizer(_METHOD)
class ShardingQuantizer(Bnb4BitHfQuantizer):
    """transformers' 4-bit quantiser, whose weights are cut once they are packed."""

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Bytes a value, for which transformers reserves device memory before it loads."""
        config: Any = self.quantization_config
        size = float(super().param_element_size(model, param_name, param))
        return size / config.ranks if self.param_needs_quantization(model, param_name) else size

    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _PackAndCut(self)


class _PackAndCut(Bnb4bitQuantize):
    """Packs a weight as transformers does, notes what it was on the layer, and keeps this rank's share."""

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: nn.Module | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        config = self.hf_quantizer.quantization_config
        packed: dict[str, Any] = super().convert(input_dict, full_layer_name=full_layer_name, model=model, **kwargs)
        for name, weight in packed.items():
            layer, _ = get_module_from_name(model, name)
            layer.packed = Packed(weight.numel(), checksum_of_packed(weight, weight.quant_state))
            weight.data = share_of(weight.data, config.rank, config.ranks).clone()  # a view would keep the whole
        return packed


def load_share(
    source: str, quantization: QuantizationSpec, dtype: torch.dtype, device: torch.device, revision: str | None, rank: int, ranks: int
) -> PreTrainedModel:
    """As ``loading.load_base_model``, but each packed weight is rank ``rank``'s share of it: not yet usable.

    ``sharding.ShardedBase`` makes it usable, once the adapter is attached.

    Raises:
        UserError: as there; or the base's files are quantised already, which are not cut.
    """
    if getattr(base_config(source, revision), "quantization_config", None) is not None:
        raise UserError(
            f"strategy qlora_fsdp2 quantises the base itself, and {source} is stored quantised; give the 16-bit base, "
            "or train with qlora_ddp"
        )
    plain = quantization_config(quantization.storage, dtype)
    assert plain is not None
    settings = {name: value for name, value in plain.to_dict().items() if name.startswith("bnb_4bit_") or name == "load_in_4bit"}
    return load_quantized(source, ShardedConfig(rank, ranks, **settings), quantization.storage, dtype, device, revision)
