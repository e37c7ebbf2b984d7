"""One request, one guest: the whole substrate in one process."""
