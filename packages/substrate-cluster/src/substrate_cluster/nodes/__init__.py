"""The nodes an agent knows: which there are, what they say, how they are spoken to."""
