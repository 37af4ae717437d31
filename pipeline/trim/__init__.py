"""Trimming the vocabulary: which pieces stay, and embedding, head, tokenizer and configs without the others."""
