"""Tiny random models and data: CPU, offline, seconds."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import limbeck  # noqa: F401  sets the environment before torch is imported
