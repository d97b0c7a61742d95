"""Is the adapter that a run writes the one that it trained? Asked through plain PEFT, as anybody who is given the folder would load it."""

import copy
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from peft import PeftModel
from torch import Tensor

from qlora_lightning.modeling import adapters
from qlora_lightning.verify.outcome import BITS, Findings, Measurement, relative
from qlora_lightning.verify.subject import Subject


def reload(subject: Subject, folder: Path) -> Findings:
    """Logits of some rows by the live model, and by the same base with the adapter from a folder just written.

    Their difference is counted in parts of what the adapter does: live against base alone.

    Args:
        subject: with an adapter whose B is not zero.
        folder: to write to.
    """
    module = subject.module
    adapters.save_adapter(module.model, folder, module.metadata() | subject.data.metadata(), "")
    batch: Any = move_data_to_device(subject.batches(subject.steps[0], subject.divisors[-1])[0], subject.outside.device)
    live = _logits(subject, module.model, batch)
    with module.model.disable_adapter():
        base = _logits(subject, module.model, batch)
    reloaded = PeftModel.from_pretrained(_bare_base(module.model), str(folder))
    again = _logits(subject, reloaded, batch)
    mine, theirs = (_weights(one) for one in (module.model, reloaded))
    assert mine.keys() == theirs.keys()
    return Findings(
        [
            Measurement("weights in the file = live", max(relative(theirs[name], mine[name]) for name in mine), BITS),
            Measurement("logits = live, of the adapter's effect", relative(again - base, live - base), subject.gradient_bound),
        ]
    )


@torch.no_grad()
def _logits(subject: Subject, model: PeftModel, batch: dict[str, Any]) -> Tensor:
    """At the scored positions, fp32, on the host."""
    training = model.training
    model.eval()
    with subject.module.autocast():
        logits: Tensor = model(input_ids=batch["input_ids"], logits_to_keep=batch["logit_positions"], use_cache=False).logits
    model.train(training)
    return logits.float().cpu()


def _bare_base(model: PeftModel) -> Any:
    """The base without an adapter: its modules anew, its weights shared, so that nothing is loaded or held twice."""
    tensors = [*model.parameters(), *model.buffers()]
    states = [state for one in tensors if (state := getattr(one, "quant_state", None)) is not None]
    copied = copy.deepcopy(model, memo={id(one): one for one in (*tensors, *states)})
    return copied.unload()


def _weights(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.detach().float().cpu() for name, value in model.named_parameters() if ".lora_" in name}
