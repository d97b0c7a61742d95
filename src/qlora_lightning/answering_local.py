"""Answers from a model on this machine, for ``generate``."""

from collections.abc import Collection, Iterator, Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

from qlora_lightning.answer_file import Answer
from qlora_lightning.data.formats import Conversation
from qlora_lightning.generation import Assistant, GenerationSpec, load_assistant
from qlora_lightning.modeling.adapters import ADAPTER_FILE, adapter_metadata
from qlora_lightning.modeling.fingerprint import base_fingerprint
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.sources import resolve_base, stored_source


class LocalAnswerer:
    """A base model with an adapter, a base or a merged model alone; loaded when it is first asked.

    Args:
        adapter: A PEFT adapter folder; None for the base alone.
        base_model: The base; by default the one that the adapter names.
        template: Prompt template; by default the one that the adapter was trained with.
        storage: How to hold the base; by default as the adapter was trained, without one nf4-dq.
        batch_size: Prompts answered at once.
    """

    def __init__(
        self, adapter: Path | None, base_model: str | None, template: str | None, storage: Storage | None, batch_size: int
    ) -> None:
        self._metadata = adapter_metadata(adapter) if adapter else {}
        self._adapter, self._base_model, self._template = adapter, base_model, template
        self._storage, self._batch_size = storage, batch_size
        self._assistant: Assistant | None = None

    @property
    def system_prompt(self) -> str | None:
        """The one that the adapter was trained with."""
        return self._metadata.get("system_prompt")

    def identity(self) -> dict[str, Any]:
        """The files of the model, and how it is asked and held."""
        base = self._base_model or self._metadata.get("base_model")
        return {
            "base_model": base and _fingerprint(base, self._metadata.get("revision")),
            "adapter": self._adapter and _hash(self._adapter / ADAPTER_FILE),
            "template": self._template or self._metadata.get("template"),
            "storage": self._storage,
        }

    def load(self) -> Assistant:
        """The model, loaded by the first call.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._assistant is None:
            self._assistant, _ = load_assistant(self._adapter, self._base_model, self._template, self._storage)
        return self._assistant

    def answers(
        self, conversations: Mapping[int, Conversation], left: Collection[int], spec: GenerationSpec
    ) -> Iterator[list[tuple[int, Answer]]]:
        """Load the model; then answers to the conversations that are left, batch by batch.

        Raises:
            UserError: the model cannot be loaded, or a message spells a control token that cannot be written as text.
        """
        return self.load().answer_all(conversations, spec, self._batch_size, left)


def _fingerprint(base: str, revision: str | None) -> str:
    """A name on the hub may have no files here yet."""
    name = stored_source(base)
    return f"{name} {base_fingerprint(base, revision)}" if Path(resolve_base(base)).is_dir() else f"{name} {revision or 'main'}"


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()[:16]
