"""``pyfmha verify``: every function and variant of a library on this GPU, and engines, each against float64."""
