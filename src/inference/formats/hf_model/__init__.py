"""Files that an exported Hugging Face folder brings along: they run there, without this project."""
