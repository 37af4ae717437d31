"""The bench stage: measurements of the files that ship, each sample from a process of its own."""
