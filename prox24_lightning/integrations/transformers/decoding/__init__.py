"""What :func:`~prox24_lightning.integrations.transformers.generation.accelerate_generation` replays for a token."""
