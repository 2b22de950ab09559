"""Learn which features of a diffusion transformer to cache, and replay the learned schedule."""

__version__ = "0.1.0"
