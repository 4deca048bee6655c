"""A teacher beside the pruned model, as a config describes it."""

from __future__ import annotations

from pydantic import Field

from pruningawaretraining.config.strict import Amount, Positive, Strict


class Distillation(Strict):
    """A teacher beside the pruned model, for ``pruner.distill_loss``."""

    weight: Amount = Field(1.0, description="Weight of the teacher's part beside the loss of the task.")
    temperature: Positive = Field(2.0, description="Temperature of the logits, above 0.")
    features: list[str] = Field(
        [], description="Modules whose outputs are compared too, by their names in both models."
    )
    feature_weight: Amount = Field(1.0, description="Weight of the features beside the logits.")
