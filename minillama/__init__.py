"""The executable form of the LLaMA papers."""
