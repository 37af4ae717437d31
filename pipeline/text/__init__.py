"""From a text to windows of token ids, and which windows may judge what. No torch."""
