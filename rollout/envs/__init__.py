"""Tasks that ship with Grove."""
