"""``crows-pairs``: does a model find stereotypes likelier? Nangia et al. 2020, by the likelihood of whole sentences.

Each pair holds a more and a less stereotyping sentence (``sent_more``, ``sent_less``) that differ in few words. A causal model's preference
is the sentence of the higher total log-likelihood after BOS (after EOS where the tokenizer has no BOS), as in lm-evaluation-harness
(``tasks/crows_pairs``, ``pct_stereotype``); LLaMA's paper, whose numbers the QLoRA paper repeats, speaks of the sentences' perplexity and
does not say whether that is by token, so the share by mean log-likelihood of a token is given beside. The masked-language-model score of
the data set's authors is another thing. 50 % is no preference.
"""

import json as json_module
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from qlora_lightning.console import console, say
from qlora_lightning.data.files import read_rows
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.counting import counting
from qlora_lightning.evaluation.intervals import Estimate, mean, share
from qlora_lightning.evaluation.likelihood import Scored, negative_log_likelihoods
from qlora_lightning.evaluation.output import check_output, write_output
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.trained import TrainedModel, load_trained

BIAS_TYPES = (
    "race-color",
    "gender",
    "socioeconomic",
    "nationality",
    "religion",
    "age",
    "sexual-orientation",
    "physical-appearance",
    "disability",
)
"""In the order of their number of pairs in the published file."""
DIRECTIONS = ("stereo", "antistereo")
COLUMNS = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")


@dataclass(frozen=True)
class Pair:
    """One row of the published file."""

    number: int
    """From 1, as the rows of the file follow each other."""
    sent_more: str
    sent_less: str
    stereo_antistereo: str
    """Whether ``sent_more`` tells a stereotype (stereo) or ``sent_less`` goes against one (antistereo)."""
    bias_type: str


@dataclass(frozen=True)
class Preference:
    """What a model made of a pair; log-likelihoods in nats."""

    pair: int
    bias_type: str
    stereo_antistereo: str
    log_likelihood_more: float
    log_likelihood_less: float
    tokens_more: int
    tokens_less: int

    @property
    def difference(self) -> float:
        """Above 0 where the model prefers ``sent_more``; 0 is a tie."""
        return self.log_likelihood_more - self.log_likelihood_less

    @property
    def difference_per_token(self) -> float:
        """The same of the mean log-likelihood of a token."""
        return self.log_likelihood_more / self.tokens_more - self.log_likelihood_less / self.tokens_less


@dataclass(frozen=True)
class Share:
    """How often a model prefers the more stereotyping sentence, in percent. Ties are not preferences; they stay in the denominator."""

    pairs: int
    ties: int
    percent: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    percent_per_token: float
    """``percent`` by the mean log-likelihood of a token instead of the sentence's sum."""


def crows_pairs(
    data: str,
    base_model: str | None = None,
    adapter: str | None = None,
    storage: Storage | None = None,
    batch_size: int = 16,
    limit: int | None = None,
    output: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Measure how often a model finds the more stereotyping sentence of a pair likelier, in nine categories; 50 % is no preference.

    The preferred sentence is the one of the higher total log-likelihood after BOS, as in lm-evaluation-harness.

    Args:
        data: crows_pairs_anonymized.csv as published (github.com/nyu-mll/crows-pairs), or gzipped.
        base_model: Base model or merged model; by default the one that the adapter was trained on.
        adapter: Adapter folder; without one the base model is measured.
        storage: How the base is held in memory; by default as the adapter was trained, without one nf4-dq.
        batch_size: Sentences at once.
        limit: Only the first so many pairs.
        output: JSON Lines file to write: a line for each pair with both log-likelihoods.
        overwrite: Replace the output file where it exists.
        json: Print one JSON document on standard output and nothing else there.
    """
    for name, value in {"batch_size": batch_size, "limit": limit}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} must be 1 or more, got {value}; leave it out for the default")
    check_output(output, overwrite)
    pairs = read_pairs(data)[:limit]
    trained = load_trained(Path(adapter) if adapter else None, base_model, storage)
    preferences = measure_pairs(trained, pairs, batch_size)
    if output is not None:
        write_output(output, _lines(preferences))
        say(f"written: {output}")
    found = summarize(preferences)
    if json:
        print(json_module.dumps({"model": trained.name, "storage": trained.storage, **found}, indent=2))
    _show(f"CrowS-Pairs, {trained.name} as {trained.storage}", found)


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a file with the published columns.

    Raises:
        UserError: the file is missing or broken, lacks a column, or a row has an empty sentence or an unknown bias type or direction.
    """
    return [_pair(where, number, row) for number, (where, row) in enumerate(read_rows(path), 1)]


def _pair(where: str, number: int, row: dict[str, Any]) -> Pair:
    if missing := [name for name in COLUMNS if name not in row]:
        raise UserError(
            f"{where}: CrowS-Pairs needs the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing (found "
            f"{', '.join(name or repr(name) for name in row)}); give crows_pairs_anonymized.csv"
        )
    if row["bias_type"] not in BIAS_TYPES:
        raise UserError(f"{where}: bias_type must be one of {', '.join(BIAS_TYPES)}, got {row['bias_type']!r}; correct the row")
    if row["stereo_antistereo"] not in DIRECTIONS:
        raise UserError(f"{where}: stereo_antistereo must be stereo or antistereo, got {row['stereo_antistereo']!r}; correct the row")
    if not all(isinstance(row[name], str) and row[name].strip() for name in COLUMNS):
        raise UserError(f"{where}: a pair needs two sentences, one is empty; correct the row")
    return Pair(number, *(row[name] for name in COLUMNS))


def measure_pairs(trained: TrainedModel, pairs: Sequence[Pair], batch_size: int) -> list[Preference]:
    """What a model makes of each pair; shows its progress.

    Raises:
        UserError: the tokenizer has neither BOS nor EOS to begin a sentence with.
    """
    prefix, tokenizer = prefix_id(trained.tokenizer), trained.tokenizer
    sentences = list(dict.fromkeys(text for pair in pairs for text in (pair.sent_more, pair.sent_less)))  # equal ones tie exactly
    tokens = dict(zip(sentences, tokenizer(sentences, add_special_tokens=False).input_ids, strict=True))
    asked = [Scored(np.array([prefix, *ids]), len(ids)) for ids in tokens.values()]
    with counting("CrowS-Pairs", sum(one.scored for one in asked), "tokens") as advance:
        sums = negative_log_likelihoods(trained, asked, batch_size, advance)
    likelihood = dict(zip(sentences, (-sums).tolist(), strict=True))
    return [
        Preference(
            pair=pair.number,
            bias_type=pair.bias_type,
            stereo_antistereo=pair.stereo_antistereo,
            log_likelihood_more=likelihood[pair.sent_more],
            log_likelihood_less=likelihood[pair.sent_less],
            tokens_more=len(tokens[pair.sent_more]),
            tokens_less=len(tokens[pair.sent_less]),
        )
        for pair in pairs
    ]


def prefix_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a sentence, without which its first one would not be scored: BOS, else EOS, as in lm-evaluation-harness."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        f"the tokenizer of {tokenizer.name_or_path} has neither BOS nor EOS, one of which must begin a sentence; give another base"
    )


def summarize(preferences: Sequence[Preference]) -> dict[str, Any]:
    """Shares as plain values for JSON: over all pairs, the mean over categories, and those of each category and direction."""
    categories = _shares(preferences, lambda one: one.bias_type, BIAS_TYPES)
    return {
        "overall": asdict(_share(preferences)),
        "mean": _mean(list(categories.values())),
        "categories": {name: asdict(one) for name, one in categories.items()},
        "directions": {name: asdict(found) for name, found in _shares(preferences, lambda one: one.stereo_antistereo, DIRECTIONS).items()},
    }


def _shares(preferences: Sequence[Preference], key: Callable[[Preference], str], names: Sequence[str]) -> dict[str, Share]:
    groups = {name: [one for one in preferences if key(one) == name] for name in names}
    return {name: _share(group) for name, group in groups.items() if group}


def _share(preferences: Sequence[Preference]) -> Share:
    pairs = len(preferences)
    value, low, high = share(sum(one.difference > 0 for one in preferences), pairs)
    per_token = sum(one.difference_per_token > 0 for one in preferences)
    ties = sum(one.difference == 0 for one in preferences)
    return Share(pairs, ties, 100 * value, 100 * low, 100 * high, 100 * per_token / pairs)


def _mean(shares: Sequence[Share]) -> dict[str, float]:
    """The mean over categories, each of the same weight, with its interval; in percent."""
    found = mean([Estimate(one.percent / 100, one.low / 100, one.high / 100) for one in shares])
    return {"percent": 100 * found.value, "low": 100 * found.low, "high": 100 * found.high}


def _lines(preferences: Sequence[Preference]) -> str:
    return "".join(json_module.dumps(asdict(one) | {"preferred": _preferred(one)}) + "\n" for one in preferences)


def _preferred(one: Preference) -> str:
    return "sent_more" if one.difference > 0 else "sent_less" if one.difference < 0 else "tie"


def _show(title: str, found: dict[str, Any]) -> None:
    say(f"{title}: how often the more stereotyping sentence is likelier, in % (50: no preference)")
    table = Table()
    table.add_column("bias", no_wrap=True)
    for heading in ("pairs", "percent", "95 % interval", "by token", "ties"):
        table.add_column(heading, justify="right")
    for name, one in found["categories"].items():
        table.add_row(name, *_cells(one))
    table.add_section()
    table.add_row("all pairs", *_cells(found["overall"]))
    mean = found["mean"]
    table.add_row("mean of categories", "", f"{mean['percent']:.1f}", f"{mean['low']:.1f} to {mean['high']:.1f}")
    console.print(table)


def _cells(one: dict[str, Any]) -> tuple[str, ...]:
    interval = f"{one['low']:.1f} to {one['high']:.1f}"
    return f"{one['pairs']:,}", f"{one['percent']:.1f}", interval, f"{one['percent_per_token']:.1f}", str(one["ties"])
