"""A loaded model under lm-evaluation-harness: wrapped as it is, without conversion, and measured by the harness' own code.

What the harness (0.4.13) does with a model object: it neither moves nor casts it. Text is tokenized as the tokenizer does by itself, so
that BOS is there where the tokenizer puts it (and not a second time where the text already opens with it). A prompt longer than the
model's limit loses tokens from its front, BOS among them; we count those and say so.
"""

import copy
from typing import Any, Literal

from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.manager import TaskDict

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.harness.log import quiet_harness
from qlora_lightning.modeling.sources import first_line
from qlora_lightning.modeling.trained import TrainedModel

BatchSize = int | Literal["auto"]
CPU_BATCH = 8
"""``auto`` on a CPU: the harness would look for the largest batch until the machine's memory is full."""


def language_model(trained: TrainedModel, batch_size: BatchSize = "auto") -> HFLM:
    """The harness' model class around ours. The tokenizer is copied: the harness gives one without a pad token another's."""
    size = CPU_BATCH if batch_size == "auto" and trained.device.type == "cpu" else batch_size
    with quiet_harness():
        # bf16 knows a log-likelihood of -10 to 1/16: choices would tie
        return HFLM(pretrained=trained.model, tokenizer=copy.deepcopy(trained.tokenizer), batch_size=size, softmax_dtype="float32")


def run_tasks(trained: TrainedModel, found: TaskDict, batch_size: BatchSize = "auto", limit: int | None = None) -> dict[str, Any]:
    """Measure ``trained`` on tasks that are read and prepared (``harness_tasks``).

    Args:
        trained: Model and tokenizer; left as they are.
        found: Tasks and groups.
        batch_size: Prompts computed at once; ``auto`` takes as many as a GPU holds.
        limit: Only the first so many questions of each task.

    Returns:
        The harness' results, ``samples`` included, and what is its model's own: ``max_length`` (tokens), ``bos`` (whether prompts open with
        it), ``cut_prompts`` (how often it said that prompts were cut).

    Raises:
        UserError: a task cannot be run on a text model, or wants to run code that the model writes.
    """
    model = language_model(trained, batch_size)
    with quiet_harness() as log, trained.computing():
        try:
            results: Any = evaluate(model, task_dict=found, limit=limit)
        except (ValueError, AssertionError) as error:  # the harness' words for a task that does not fit the model, or too many shots
            raise UserError(f"the tasks cannot be run ({first_line(error)}); leave out what does not fit") from error
    cut, bos = log.cut_prompts, model.tokenizer.bos_token_id
    if cut:
        say(f"warning: prompts were longer than the model's {model.max_length} tokens and lost their beginning (said {cut} times)")
    opens_with_bos = bos is not None and model.tok_encode("a")[0] == bos
    return results | {"max_length": model.max_length, "bos": opens_with_bos, "cut_prompts": cut}
