"""What every substrate daemon needs around its plane: settings, a strict listener, signals, logs, metrics."""
