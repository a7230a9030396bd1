"""Every default, once: the records a run is configured by, their checks, and the YAML groups beside them."""
