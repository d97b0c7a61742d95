"""``crows-pairs``: which sentence of a pair a model finds likelier. The pairs here are harmless and of our own."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from statsmodels.stats.proportion import proportion_confint

from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.crows_pairs import BIAS_TYPES, Preference, measure_pairs, prefix_id, read_pairs, summarize
from qlora_lightning.modeling.trained import TrainedModel, load_trained

HEADER = ("", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations", "anon_writer", "anon_annotators")
REAL = os.environ.get("QLORA_LIGHTNING_REAL_DATA")
SENTENCES = [
    ("Tea drinkers, it is said, always come late.", "Coffee drinkers, it is said, always come late.", "stereo", "nationality"),
    ("The left-handed boy lost his keys.", "The right-handed boy lost his keys.", "stereo", "disability"),
    ('He said "no" and she wrote it down.', 'She said "no" and he wrote it down.', "antistereo", "gender"),
    ("Same words.", "Same words.", "stereo", "age"),
    ("Old clocks are slow.", "New clocks are slow.", "stereo", "age"),
    ("Tall people hit their heads, naturally.", "Short people hit their heads, naturally.", "stereo", "physical-appearance"),
]


def write_csv(file: Path, sentences: Sequence[Sequence[str]] = SENTENCES, header: Sequence[str] = HEADER) -> Path:
    """A file in the published schema."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows([number, *row, "[[], []]", "a0", "['a1', 'a2']"][: len(header)] for number, row in enumerate(sentences))
    return file


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> TrainedModel:
    """The tiny model, not quantised, in fp32."""
    trained = load_trained(None, str(tiny_base), "16bit")
    trained.model.float()
    return replace(trained, dtype=torch.float32)


def harness_likelihoods(trained: TrainedModel, sentences: Sequence[str]) -> list[float]:
    """What lm-evaluation-harness finds with the same model: an empty context, the sentence as the answer."""
    instance = pytest.importorskip("lm_eval.api.instance")
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=4, device="cpu")
    requests = [instance.Instance("loglikelihood", {}, ("", sentence), 0) for sentence in sentences]
    return [float(value) for value, _ in model.loglikelihood(requests, disable_tqdm=True)]


def compare_with_harness(trained: TrainedModel, file: Path, count: int) -> None:
    pairs = read_pairs(file)[:count]
    found = measure_pairs(trained, pairs, batch_size=8)
    ours = [value for one in found for value in (one.log_likelihood_more, one.log_likelihood_less)]
    theirs = harness_likelihoods(trained, [text for pair in pairs for text in (pair.sent_more, pair.sent_less)])
    assert ours == pytest.approx(theirs, abs=1e-3)
    wins = [more > less for more, less in zip(theirs[::2], theirs[1::2], strict=True)]  # tasks/crows_pairs/utils.py, process_results
    assert [one.difference > 0 for one in found] == wins


def test_log_likelihoods_are_those_of_lm_evaluation_harness(tiny: TrainedModel, tmp_path: Path) -> None:
    compare_with_harness(tiny, write_csv(tmp_path / "pairs.csv"), len(SENTENCES))


@pytest.mark.skipif(REAL is None, reason="needs QLORA_LIGHTNING_REAL_DATA, the folder of the published data sets")
def test_the_same_on_the_published_file(tiny: TrainedModel) -> None:
    assert REAL is not None
    file = Path(REAL, "crows_pairs", "crows_pairs_anonymized.csv")
    pairs = read_pairs(file)
    assert len(pairs) == 1508 and {pair.bias_type for pair in pairs} == set(BIAS_TYPES)
    compare_with_harness(tiny, file, 60)


def test_a_sentence_begins_after_bos_else_after_eos(tiny: TrainedModel) -> None:
    tokenizer = type(tiny.tokenizer).from_pretrained(tiny.tokenizer.name_or_path)
    assert prefix_id(tokenizer) == tokenizer.bos_token_id == 0
    tokenizer.bos_token = None
    assert prefix_id(tokenizer) == tokenizer.eos_token_id == 1
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        prefix_id(tokenizer)


def preference(difference: float, bias_type: str = "age", direction: str = "stereo", tokens: tuple[int, int] = (10, 10)) -> Preference:
    return Preference(1, bias_type, direction, -20 + difference, -20, *tokens)


def test_shares_count_ties_apart_and_have_wilson_intervals() -> None:
    found = summarize([preference(1.0), preference(0.5), preference(-2.0), preference(0.0), preference(3.0, "gender", "antistereo")])
    age = found["categories"]["age"]
    assert (age["pairs"], age["ties"], age["percent"]) == (4, 1, 50.0)
    assert (age["low"], age["high"]) == pytest.approx([100 * end for end in proportion_confint(2, 4, method="wilson")])
    assert found["overall"]["percent"] == 60.0
    assert found["mean"]["percent"] == 75.0 and found["mean"]["low"] < 75.0 < found["mean"]["high"]
    assert list(found["categories"]) == ["gender", "age"]
    assert {name: share["pairs"] for name, share in found["directions"].items()} == {"stereo": 4, "antistereo": 1}


def test_a_longer_sentence_can_be_likelier_by_token_only() -> None:
    """-22 over 20 tokens against -20 over 10."""
    found = summarize([preference(-2.0, tokens=(20, 10))])["overall"]
    assert (found["percent"], found["percent_per_token"]) == (0.0, 100.0)


def test_the_mean_of_one_category_has_its_interval() -> None:
    found = summarize([preference(1.0), preference(-1.0)])
    assert found["mean"] == pytest.approx({name: found["overall"][name] for name in ("percent", "low", "high")})


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main(["crows-pairs", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_the_command_writes_a_line_for_each_pair(capsys: pytest.CaptureFixture[str], tiny_base: Path, tmp_path: Path) -> None:
    file, output = write_csv(tmp_path / "pairs.csv"), tmp_path / "pairs.jsonl"
    found, err = run(capsys, str(file), "--base_model", str(tiny_base), "--output", str(output), "--batch_size", "3")
    assert found["overall"]["pairs"] == 6 and found["storage"] == "nf4-dq"
    assert found["categories"]["age"]["ties"] == 1, "equal sentences tie, whatever batches they are in"
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["pair"] for row in rows] == [1, 2, 3, 4, 5, 6] and rows[3]["preferred"] == "tie"
    assert sum(row["preferred"] == "sent_more" for row in rows) * 100 / 6 == pytest.approx(found["overall"]["percent"])
    assert "mean of categories" in err and "physical-appearance" in err
    limited, _ = run(capsys, str(file), "--base_model", str(tiny_base), "--limit", "2", "--output", str(output), "--overwrite")
    assert limited["overall"]["pairs"] == 2


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = str(write_csv(tmp_path / "good.csv"))
    columns = write_csv(tmp_path / "columns.csv", header=("id", "sent_more", "sentence", "stereo_antistereo", "kind"))
    kind = write_csv(tmp_path / "kind.csv", [SENTENCES[0], ("a", "b", "stereo", "hair")])
    direction = write_csv(tmp_path / "direction.csv", [("a", "b", "up", "age")])
    empty = write_csv(tmp_path / "empty.csv", [("a", " ", "stereo", "age")])
    none = write_csv(tmp_path / "none.csv", [])
    base = ("--base_model", "nowhere/never")
    for options, said in {
        (str(tmp_path / "missing.csv"), *base): "no such file",
        (
            str(columns),
            *base,
        ): "columns.csv:2: CrowS-Pairs needs the columns sent_more, sent_less, stereo_antistereo, bias_type; sent_less, bias_type missing",
        (str(kind), *base): "kind.csv:3: bias_type must be one of race-color, gender",
        (str(direction), *base): "direction.csv:2: stereo_antistereo must be stereo or antistereo, got 'up'",
        (str(empty), *base): "empty.csv:2: a pair needs two sentences",
        (str(none), *base): "no rows",
        (good, *base, "--batch_size", "0"): "batch_size must be 1 or more",
        (good, *base, "--limit", "0"): "limit must be 1 or more",
        (good, *base, "--output", good): "exists; give another name or --overwrite",
        (good, *base, "--output", str(tmp_path), "--overwrite"): "is a folder; give the name of a file in it",
        (good, *base, "--output", str(tmp_path / "no" / "x.jsonl")): "does not exist; make it first",
        (good, "--storage", "nf5"): "16bit",
        (good,): "no base model is known",
    }.items():
        capsys.readouterr()
        assert main(["crows-pairs", *options]) == 2
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
