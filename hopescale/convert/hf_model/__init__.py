"""The files that are copied into every export. They import torch and transformers, and nothing of hopescale."""
