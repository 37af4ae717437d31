"""The heal stage: one file a way of winning back what the removal of layers cost."""
