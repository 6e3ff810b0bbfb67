"""Block expansion: where new blocks go, the record of it, the rewrite of the files, the proof."""
