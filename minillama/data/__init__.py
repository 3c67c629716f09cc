"""Text to batches: tales writes stories, packing makes rows of token ids and batches of rows."""
