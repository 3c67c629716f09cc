"""Measuring models of the toy world: `tales` those that write, `assistant` those that answer."""
