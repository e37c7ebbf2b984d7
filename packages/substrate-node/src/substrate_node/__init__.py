"""The data plane: claims a guest for one invocation, runs it, gives it back."""
