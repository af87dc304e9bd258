"""Weights become answers: decoding, sampling, chat, evaluation, export."""
