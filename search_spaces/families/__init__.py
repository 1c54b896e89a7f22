"""A file per family: a table that says how the blocks of timm's modules compute. See `search_spaces.blocks`."""
