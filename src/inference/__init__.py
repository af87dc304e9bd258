"""What trained weights are used for: text generation, chat, evaluation, and export to other formats."""
