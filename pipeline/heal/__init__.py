"""The heal stage: one file per way of winning back what the removal of layers cost."""
