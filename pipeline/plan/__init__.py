"""What could be made of a model: sizes, what each loses, and its speed and memory on this machine."""
