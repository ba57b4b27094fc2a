"""What depends on time, derived from the global update number and nothing else."""

from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.config import ModelConfig


def learning_rate(recipe: Recipe, update: int, total: int) -> float:
    """Adam's rate at an update (from 0): linear warm-up, then linear decay to zero.

    Args:
        recipe: peak and warm-up share.
        update: global update number, from 0.
        total: updates of the whole run.
    """
    warmup = max(1, round(recipe.warmup * total))
    if update < warmup:
        return recipe.learning_rate * (update + 1) / warmup
    return recipe.learning_rate * max(0.0, (total - update) / max(1, total - warmup))


def gumbel_temperature(recipe: Recipe, update: int) -> float:
    """Temperature of the Gumbel softmax at an update (fairseq `latent_temp`)."""
    return float(max(recipe.gumbel_end, recipe.gumbel_start * recipe.gumbel_decay**update))


def diversity_weight(config: ModelConfig, recipe: Recipe, update: int, total: int) -> float:
    """Weight of the diversity loss at an update (from 0): linear from its first to its last."""
    gone = update / total if total else 0.0
    return config.diversity_loss_weight * (1 + (recipe.diversity_end - 1) * gone)
