"""Training a binary model: the progression, the Trainer, distillation, and the recipe that has all stages."""
