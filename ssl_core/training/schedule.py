"""Learning rate, Gumbel temperature and diversity weight as functions of the global update."""

from ssl_core.training.pretraining_recipe import Recipe
from ssl_core.wav2vec2.config import ModelConfig


def learning_rate(recipe: Recipe, update: int, total: int) -> float:
    """Adam's learning rate: linear warm-up, then linear decay to zero.

    Args:
        recipe: gives the peak rate and the fraction of updates to warm up.
        update: global update number, from 0.
        total: updates in the whole run.
    """
    warmup = max(1, round(recipe.warmup * total))
    if update < warmup:
        return recipe.learning_rate * (update + 1) / warmup
    return recipe.learning_rate * max(0.0, (total - update) / max(1, total - warmup))


def gumbel_temperature(recipe: Recipe, update: int) -> float:
    """Temperature of the Gumbel softmax at an update, from 0 (fairseq `latent_temp`)."""
    return float(max(recipe.gumbel_end, recipe.gumbel_start * recipe.gumbel_decay**update))


def diversity_weight(config: ModelConfig, recipe: Recipe, update: int, total: int) -> float:
    """Weight of the diversity loss, linear from its first value to its last.

    Args:
        config: gives the first weight.
        recipe: gives the factor of the last weight.
        update: global update number, from 0.
        total: updates in the whole run.
    """
    gone = update / total if total else 0.0
    return config.diversity_loss_weight * (1 + (recipe.diversity_end - 1) * gone)
