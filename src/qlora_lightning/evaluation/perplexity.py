"""``perplexity``: how well a model predicts text, by strided windows, each token counted once and with the same weight."""

import gc
import json as json_module
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.table import Table

from qlora_lightning.console import console, say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.counting import counting
from qlora_lightning.evaluation.likelihood import Scored, negative_log_likelihoods
from qlora_lightning.evaluation.texts import hub_file as fetch_file
from qlora_lightning.evaluation.texts import read_texts
from qlora_lightning.evaluation.windows import bos_of, encode, strided
from qlora_lightning.modeling.ledger import ledger
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.positions import base_positions
from qlora_lightning.modeling.trained import TrainedModel, find_base, load_trained

GIB = 2**30
LONGEST_WINDOW = 2048  # of the default, so that models of different contexts are measured alike


@dataclass(frozen=True)
class PerplexityResult:
    """What a model made of texts. Sums are over all scored tokens of all texts."""

    model: str
    storage: Storage
    window: int
    """Tokens that the model saw at most."""
    stride: int
    """Tokens by which a window lies behind the one before it."""
    bos: bool
    """Whether BOS stands before each text; without it nothing predicts a text's first token, which is then not scored."""
    texts: int
    skipped: int
    """Texts among them too short to score a token of."""
    tokens: int
    """Scored tokens."""
    nll: float
    """Sum of their -log p, in nats."""
    bytes: int
    """UTF-8 bytes of what is scored."""
    words: int
    """Words between blanks of what is scored."""
    weight_bytes: int
    """Memory of the model's weights."""
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p of a token: comparable between models of one tokenizer only."""
        return math.exp(self.nll / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between all models."""
        return self.nll / math.log(2) / self.bytes

    @property
    def word_perplexity(self) -> float | None:
        """exp of the mean -log p of a word: comparable between all models. None where that has no value, as without blanks."""
        return math.exp(self.nll / self.words) if self.nll < 700 * self.words else None

    def summary(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        derived = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte, "word_perplexity": self.word_perplexity}
        return {**asdict(self), **derived, "tokens_per_second": self.tokens / self.seconds}


def perplexity(
    data: str | None = None,
    field: str = "text",
    hub_id: str | None = None,
    hub_file: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    adapter: str | None = None,
    storage: Storage | None = None,
    storages: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    json: bool = False,
) -> None:
    """Measure how well a model predicts text: perplexity by token and by word, and bits per byte.

    Windows slide over each text by a stride. The first one scores all its tokens, each later one those that no window scored before,
    so that every token counts once. BOS stands before a text where the tokenizer itself puts it there.

    Args:
        data: A file of rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .zip or a folder of them), each row a text; or any other
            file, which is one text. Both may be gzipped.
        field: The field of a row that holds its text.
        hub_id: In place of data, a data set on the Hugging Face hub. Needs hub_file and revision.
        hub_file: The file in that data set.
        revision: The commit of that data set.
        base_model: Base model or merged model; by default the one that the adapter was trained on.
        adapter: Adapter folder; without one the base model is measured.
        storage: How the base is held in memory; by default as the adapter was trained, without one nf4-dq.
        storages: Several of them with commas between, as in nf4-dq,fp4,16bit: one table over all.
        window: Tokens that the model sees at most; by default the model's own limit, but not over 2048.
        stride: Tokens by which each window lies behind the one before it: smaller is slower, with more context. Default: window / 2.
        batch_size: Windows at once.
        limit: Measure only so many tokens, from the beginning of the data.
        json: Print one JSON document on standard output and nothing else there.
    """
    held = _storages(storage, storages)
    for name, value in {"window": window, "stride": stride, "batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < (2 if name == "window" else 1):
            raise UserError(f"{name} must be {2 if name == 'window' else 1} or more, got {value}; leave it out for the default")
    _check_stride(window, stride)
    texts = _texts(data, field, hub_id, hub_file, revision)
    folder = Path(adapter) if adapter else None
    base, metadata = find_base(folder, base_model)
    size = _window(base_positions(base, metadata.get("revision")), base, window)
    _check_stride(size, stride)
    results = []
    for one in held:
        trained = load_trained(folder, base_model, one)
        results.append(measure_perplexity(trained, texts, size, stride or size // 2, batch_size, limit))
        del trained  # before the next one is loaded: together they might not fit
        gc.collect()
        torch.cuda.empty_cache()
    if json:
        print(json_module.dumps({"results": [result.summary() for result in results]}, indent=2))
    _show(results)


def measure_perplexity(
    trained: TrainedModel, texts: Sequence[str], window: int, stride: int, batch_size: int, limit: int | None = None
) -> PerplexityResult:
    """Perplexity of texts, each on its own; shows its progress.

    Args:
        trained: The model.
        texts: Those that are too short to score a token of are counted.
        window: Tokens that the model sees at most.
        stride: At most the window. The smallest context of a token (but of a text's first ones) is window - stride, at least one token.
        batch_size: Windows at once.
        limit: Measure only so many tokens, from the first text on.

    Raises:
        UserError: the stride is longer than the window, or no text has a token to score.
    """
    _check_stride(window, stride)
    encoded = list(encode(trained.tokenizer, texts, limit))
    scored = [text for text in encoded if len(text.ids) > 1]
    if not scored:
        raise UserError(
            "a text to measure must have two tokens, the first of which predicts the second, found none that has; give more text"
        )
    windows = [Scored(text.ids[span.begin : span.end], span.scored) for text in scored for span in strided(len(text.ids), window, stride)]
    tokens, began = sum(one.scored for one in windows), time.perf_counter()
    with counting(f"perplexity, {trained.storage}", tokens, "tokens") as advance:
        nll = float(negative_log_likelihoods(trained, windows, batch_size, advance).sum())
    return PerplexityResult(
        model=trained.name,
        storage=trained.storage,
        window=window,
        stride=stride,
        bos=bos_of(trained.tokenizer) is not None,
        texts=len(encoded),
        skipped=len(encoded) - len(scored),
        tokens=tokens,
        nll=nll,
        bytes=sum(len(text.scored.encode()) for text in scored),
        words=sum(len(text.scored.split()) for text in scored),
        weight_bytes=sum(row.num_bytes for row in ledger(trained.model)),
        seconds=time.perf_counter() - began,
    )


# ---- what the user gave ----


def _storages(storage: Storage | None, storages: str | None) -> list[Storage | None]:
    if storages is None:
        return [storage]
    if storage is not None:
        raise UserError(f"give --storage or --storages, got both ({storage} and {storages}); leave out one")
    names = [name.strip() for name in storages.strip("[]").split(",")]
    if unknown := [name for name in names if name not in get_args(Storage)]:
        raise UserError(f"storages must be of {', '.join(get_args(Storage))}, got {unknown[0]!r}; correct it")
    return names  # type: ignore[return-value]


def _check_stride(window: int | None, stride: int | None) -> None:
    if window is not None and stride is not None and stride > window:
        raise UserError(f"stride must not be longer than the window of {window} tokens, got {stride}: tokens between would not be scored")


def _texts(data: str | None, field: str, hub_id: str | None, hub_file: str | None, revision: str | None) -> list[str]:
    if (data is None) == (hub_id is None):
        raise UserError(f"text comes from --data FILE or from --hub_id NAME, got {'neither' if data is None else 'both'}; give one of them")
    if data is not None:
        return read_texts(data, field)
    if hub_file is None or revision is None:
        raise UserError(
            f"--hub_id {hub_id} needs --hub_file FILE and --revision COMMIT, so that the same text is read each time; give both"
        )
    assert hub_id is not None
    return read_texts(fetch_file(hub_id, hub_file, revision), field)


def _window(positions: int | None, base: str, window: int | None) -> int:
    if window is None:
        return min(positions or LONGEST_WINDOW, LONGEST_WINDOW)
    if positions is not None and window > positions:
        raise UserError(f"window must be at most the {positions} positions of {base}, got {window}; give a shorter one")
    return window


def _show(results: Sequence[PerplexityResult]) -> None:
    first = results[0]
    table = Table()
    table.add_column("storage", no_wrap=True)
    for heading in ("GiB", "perplexity", "per word", "bits per byte", "tokens/s"):
        table.add_column(heading, justify="right")
    for result in results:
        by_word = "-" if result.word_perplexity is None else f"{result.word_perplexity:.6g}"
        numbers = (f"{result.weight_bytes / GIB:.3f}", f"{result.perplexity:.4f}", by_word, f"{result.bits_per_byte:.4f}")
        table.add_row(result.storage, *numbers, f"{result.tokens / result.seconds:,.0f}")
    console.print(table)
    bos = "after BOS" if first.bos else "without BOS, so that the first of each text is not scored"
    texts = f"{first.texts:,} text{'' if first.texts == 1 else 's'}" + (f" ({first.skipped} too short)" if first.skipped else "")
    say(f"{first.model}: {first.tokens:,} tokens of {texts}, {bos}; window {first.window}, stride {first.stride}")
