"""From text files to documents: what the programs in data/ share."""
