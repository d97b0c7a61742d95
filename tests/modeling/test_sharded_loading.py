"""What a rank loads where ranks divide the base, and the checksum that watches over it."""

import json
from pathlib import Path

import pytest
import torch

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.checksum import checksum
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model
from qlora_lightning.modeling.sharded_loading import load_share
from qlora_lightning.modeling.sharding import share_of


def test_a_rank_stores_its_share_of_what_one_device_would(tiny_base: Path) -> None:
    """To the bit, of three ranks, with and without double quantisation."""
    device, ranks = torch.device("cpu"), 3
    for spec in (QuantizationSpec(), QuantizationSpec("fp4", double_quant=False)):
        whole = dict(load_base_model(str(tiny_base), spec, torch.bfloat16, device).named_parameters())
        for rank in range(ranks):
            model = load_share(str(tiny_base), spec, torch.bfloat16, device, None, rank, ranks)
            for name, mine in model.named_parameters():
                theirs, state = whole[name], getattr(mine, "quant_state", None)
                assert mine.equal(share_of(theirs.data, rank, ranks) if state else theirs.data), name
                if state is not None:
                    one, two = (both.quant_state.as_dict(packed=True) for both in (mine, theirs))
                    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one), name


def test_a_base_that_is_stored_quantised_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is stored quantised; give the 16-bit base, or train with qlora_ddp"):
        load_share(str(tmp_path), QuantizationSpec(), torch.float32, torch.device("cpu"), None, 0, 2)


def test_a_checksum_sees_every_bit_and_every_exchange() -> None:
    values = torch.arange(3000, dtype=torch.uint8)
    sums = {checksum(values)}
    for place in range(0, 3000, 37):
        for bit in range(8):
            changed = values.clone()
            changed[place] ^= 1 << bit
            sums.add(checksum(changed))
    assert len(sums) == 1 + 8 * 82
    assert checksum(values.flip(0)) not in sums
    assert checksum(torch.cat([values, torch.zeros(1, dtype=torch.uint8)])) not in sums
