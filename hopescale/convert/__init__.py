"""Folders of Hugging Face transformers: written from checkpoints, read into them, and compared with them."""
