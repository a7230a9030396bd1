"""The commands of `grove`, one module each: its help, its options, and what it does."""
