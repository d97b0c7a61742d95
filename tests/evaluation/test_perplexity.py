"""``perplexity``: every token once, as transformers' own recipe has it."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.perplexity import measure_perplexity
from qlora_lightning.evaluation.texts import read_texts
from qlora_lightning.evaluation.windows import strided
from qlora_lightning.modeling.trained import TrainedModel, load_trained

TEXTS = ["The cat sat on the mat, and the mat lay on the floor of a small house by the sea. " * 3, "Grüße aus Köln!", "Hm", "x"]


@pytest.fixture(scope="module")
def tiny(tiny_base: Path) -> TrainedModel:
    """The tiny model in fp32; its tokenizer puts no BOS before a text."""
    trained = load_trained(None, str(tiny_base), "16bit")
    trained.model.float()
    return replace(trained, dtype=torch.float32)


@pytest.fixture
def with_bos(tiny: TrainedModel) -> TrainedModel:
    """The same with a tokenizer that begins what it encodes with BOS."""
    tokenizer = type(tiny.tokenizer).from_pretrained(tiny.tokenizer.name_or_path)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return replace(tiny, tokenizer=tokenizer)


def plain_loop(base: Path, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """The guide "Perplexity of fixed-length models" of transformers, its mean loss weighted by tokens: sum of -log p, number of tokens."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    input_ids, previous_end, nll, tokens = torch.tensor([ids]), 0, 0.0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        fed = input_ids[:, begin:end]
        labels = fed.clone()
        labels[:, : -(end - previous_end)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            nll += float(model(fed, labels=labels).loss) * scored
        tokens += scored
        previous_end = end
        if end == len(ids):
            break
    return nll, tokens


@pytest.mark.parametrize("window, stride", [(64, 32), (64, 63), (50, 7), (2, 1), (512, 256)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_the_plain_loop_of_transformers(tiny: TrainedModel, tiny_base: Path, window: int, stride: int, batch_size: int) -> None:
    """Long texts and such that are shorter than a window; the last one has nothing to score."""
    found = measure_perplexity(tiny, TEXTS, window, stride, batch_size)
    loops = [plain_loop(tiny_base, tiny.tokenizer(text).input_ids, window, stride) for text in TEXTS[:3]]
    nll, tokens = (sum(part) for part in zip(*loops, strict=True))
    assert (found.tokens, found.texts, found.skipped, found.bos) == (tokens, 4, 1, False)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_a_tokenizers_bos_stands_before_each_text(with_bos: TrainedModel, tiny_base: Path) -> None:
    found = measure_perplexity(with_bos, TEXTS, 64, 32, 4)
    loops = [plain_loop(tiny_base, with_bos.tokenizer(text).input_ids, 64, 32) for text in TEXTS]
    nll, tokens = (sum(part) for part in zip(*loops, strict=True))
    assert (found.tokens, found.skipped, found.bos) == (tokens, 0, True)
    assert found.tokens == len("".join(TEXTS).encode())
    assert found.nll == pytest.approx(nll, rel=1e-5)


def test_a_stride_of_the_whole_window_loses_no_token(tiny: TrainedModel, tiny_base: Path) -> None:
    """The guide's recipe would not score the first token of each window."""
    ids = tiny.tokenizer(TEXTS[0]).input_ids
    found = measure_perplexity(tiny, TEXTS[:1], 64, 64, 2)
    assert found.tokens == len(ids) - 1
    pieces = [ids[0:64], ids[63:128], ids[127:192], ids[191:]]
    nll = sum(plain_loop(tiny_base, piece, 512, 512)[0] for piece in pieces)
    assert found.nll == pytest.approx(nll, rel=1e-5)


@given(st.integers(2, 400), st.integers(2, 60), st.data())
def test_every_token_is_scored_once_with_the_context_that_is_promised(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    spans, scored = list(strided(length, window, stride)), []
    for span in spans:
        first = span.end - span.scored
        assert 0 <= span.begin < first < span.end <= length
        assert span.end - 1 - span.begin <= window  # what is fed: the last token is only predicted
        assert first - span.begin >= min(first, max(1, window - stride))
        scored += range(first, span.end)
    assert scored == list(range(1, length))


def test_bytes_and_words_are_those_of_the_scored_text(tiny: TrainedModel, with_bos: TrainedModel) -> None:
    """The byte tokenizer has a token a byte, so that bits per byte follow from the perplexity."""
    text = "two words"
    found = measure_perplexity(with_bos, [text], 64, 32, 1)
    assert (found.tokens, found.bytes, found.words) == (9, 9, 2)
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity))
    assert found.word_perplexity == pytest.approx(found.perplexity ** (9 / 2))
    assert measure_perplexity(tiny, [text], 64, 32, 1).bytes == 8  # "wo words"


def test_a_word_that_is_a_page_has_no_perplexity(tiny: TrainedModel) -> None:
    found = measure_perplexity(tiny, ["x" * 400], 64, 32, 4)
    assert found.word_perplexity is None
    assert json.dumps(found.summary(), allow_nan=False)


def test_a_limit_counts_scored_tokens_over_texts(tiny: TrainedModel) -> None:
    whole = measure_perplexity(tiny, ["abcd", "efgh", "ijkl"], 64, 32, 2)
    part = measure_perplexity(tiny, ["abcd", "efgh", "ijkl"], 64, 32, 2, limit=5)
    assert (whole.tokens, part.tokens, part.texts, part.bytes) == (9, 5, 2, 5)


def test_quantised_and_adapted_models_are_measured(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An adapter brings its base; several storages make one table, and standard output holds one JSON document."""
    adapter = fit("trainer.max_steps=2") / "checkpoints" / "last"
    file = tmp_path / "text.txt"
    file.write_text(TEXTS[0], encoding="utf-8")
    capsys.readouterr()
    command = ["perplexity", str(file), "--adapter", str(adapter), "--storages", "nf4-dq,nf4,fp4,int8,16bit", "--window", "64", "--json"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    results = json.loads(out)["results"]
    assert [result["storage"] for result in results] == ["nf4-dq", "nf4", "fp4", "int8", "16bit"]
    assert results[0]["nll"] != results[2]["nll"] and results[0]["weight_bytes"] < results[1]["weight_bytes"] < results[4]["weight_bytes"]
    assert len({result["tokens"] for result in results}) == 1
    assert "without BOS" in err and "window 64, stride 32" in err and "16bit" in err


# ---- texts ----


def test_any_file_that_is_not_rows_is_one_text(tmp_path: Path) -> None:
    for name, data in {"a.txt": b"one\r\n two\n", "b": b"one\r\n two\n", "c.raw.gz": gzip.compress(b"one\r\n two\n")}.items():
        (tmp_path / name).write_bytes(data)
        assert read_texts(tmp_path / name) == ["one\r\n two\n"]


def test_rows_are_texts_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    rows = [{"text": "a", "body": "b"}, {"text": " \n", "body": "c"}]
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert read_texts(file) == ["a"]
    assert read_texts(file, "body") == ["b", "c"]


# ---- what a user can get wrong ----


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """The one line of ``perplexity`` with these options, which ends with exit code 2."""
    capsys.readouterr()
    assert main(["perplexity", *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1
    return lines[0]


def test_wrong_options_are_one_line_before_anything_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("some text", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"title": "a", "body": "b"}\n', encoding="utf-8")
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("fine\nnot gr\xfcn".encode("latin-1"))
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:30])
    base = ("--base_model", "nowhere/never")
    for options, said in {
        (str(tmp_path / "none.txt"), *base): "no such file",
        (str(tmp_path / "none.jsonl"), *base): "no such file",
        (str(tmp_path / "empty.txt"), *base): "must have words",
        (str(tmp_path / "latin.txt"), *base): "latin.txt:2: text must be UTF-8, found byte 0xfc",
        (str(tmp_path / "torn.txt.gz"), *base): "cannot be read",
        (str(rows), *base): "rows.jsonl:1: the field 'text' must hold a text, found title, body; name another with --field",
        (str(good), "--stride", "0"): "stride must be 1 or more, got 0",
        (str(good), "--window", "1"): "window must be 2 or more, got 1",
        (str(good), "--batch_size", "0"): "batch_size must be 1 or more",
        (str(good), "--limit", "-3"): "limit must be 1 or more",
        (str(good), "--window", "16", "--stride", "17"): "stride must not be longer than the window of 16 tokens, got 17",
        (str(good), "--storage", "nf5"): "nf4-dq",
        (str(good), "--storages", "nf4,nf5"): "got 'nf5'",
        (str(good), "--storages", "nf4", "--storage", "nf4"): "got both",
        (*base,): "got neither",
        (str(good), "--hub_id", "a/b"): "got both",
        ("--hub_id", "a/b", "--hub_file", "c.txt"): "--revision COMMIT",
        (str(good),): "no base model is known",
    }.items():
        assert said in refusal(capsys, *options)


def test_the_hub_that_cannot_be_reached_names_our_options(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--hub_id", "some/texts", "--hub_file", "a.txt", "--revision", "0" * 40)
    assert "a.txt of the hub data set some/texts" in line and "--data" in line and "data.dataset" not in line


def test_what_only_the_model_tells_is_one_line_too(capsys: pytest.CaptureFixture[str], tiny_base: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x", encoding="utf-8")
    model = (str(short), "--base_model", str(tiny_base), "--storage", "16bit")
    assert "must have two tokens" in refusal(capsys, *model)
    capsys.readouterr()
    assert main(["perplexity", *model, "--window", "513"]) == 2
    line = capsys.readouterr().err
    assert "window must be at most the 512 positions" in line and "Loading" not in line
    assert "stride must not be longer than the window of 512 tokens, got 600" in refusal(capsys, *model, "--stride", "600")


def test_the_function_checks_its_stride(tiny: TrainedModel) -> None:
    with pytest.raises(UserError, match="stride must not be longer"):
        measure_perplexity(tiny, TEXTS, 16, 17, 1)
