"""How long a test waits for a program before it takes it for hung: no statement about speed, whatever the machine."""

HUNG = 900  # seconds
