"""Hydra configuration, shipped as the package `retro_data.configs` (searchpath pkg://retro_data.configs)."""
