"""Rows of batches: windows of a token stream, or packed examples."""
