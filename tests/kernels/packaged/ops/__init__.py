"""A package of its own, which can be imported."""

NAME = "ops"
