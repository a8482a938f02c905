"""Pages of cached keys and values: what is written into them, copied between them, and where a token's slot is."""
