"""Corpora: files found, tokenized into shards on disk, opened."""
