"""How many positions a base model has, from its configuration alone: known before its weights are loaded."""

from typing import Any

from transformers import AutoConfig

from qlora_lightning.modeling.sources import hub_errors, quiet_transformers, resolve_base


def positions_of(config: Any) -> int | None:
    """The tokens that a model of this configuration is made for; None where that says nothing (ALiBi, state-space models).

    Args:
        config: Of transformers; of a model that also sees or hears, its text model's part counts.
    """
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def base_positions(source: str, revision: str | None = None) -> int | None:
    """As ``positions_of``, for a base model named as in ``resolve_base``.

    Raises:
        UserError: there is no such model, or no access.
    """
    resolved = resolve_base(source)
    with hub_errors(source), quiet_transformers():
        return positions_of(AutoConfig.from_pretrained(resolved, revision=revision or "main", trust_remote_code=False))
