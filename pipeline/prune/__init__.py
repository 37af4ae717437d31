"""The prune stage: how layers are measured, chosen and cut out."""
