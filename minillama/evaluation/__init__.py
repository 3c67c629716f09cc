"""Measuring models of the toy world: tales, for those that write; assistant, for those that answer."""
